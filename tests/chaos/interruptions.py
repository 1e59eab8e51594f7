"""Signals at chosen points, and two trainings in one directory: the run ends as its twin."""

from tests.chaos.kills import COMBINATIONS, finish
from tests.chaos.runs import STEPS, Chaos, assert_same_end, assert_sentence
from tests.chaos.scenarios import scenario
from tests.resume.stopper import POINTS
from tests.support import MODELS

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR2")
TURNS = [(point, name) for name in SIGNALS for point in POINTS]


@scenario("SIGTERM, SIGINT, SIGUSR2 at start-up, in validation, in a step, in saving", times=27)
def signalled(chaos: Chaos, turn: int) -> None:
    """Before the loop, a signal ends the process; in it, the run saves and ends well."""
    point, name = TURNS[turn]
    model, engine = COMBINATIONS[turn % len(COMBINATIONS)]
    chaos.run_of(model, engine)
    folder = chaos.new_folder()
    stopper = ("tests.resume.stopper", f"{point}/{name}")
    job = chaos.start(folder, model, engine, instead={0: stopper})
    if point.startswith("start"):
        job.wait_for_first()
        assert job.statuses[job.pids[0]], "it was not ended by the signal"
        job.kill()
        assert "Traceback" not in job.stderr, job.stderr
    else:
        assert "stopped at step" in job.finish()
    finish(chaos, folder, model, engine)


@scenario("two trainings in one directory, started at once", times=3, quick=True)
def two_at_once(chaos: Chaos, turn: int) -> None:
    """One of them trains, the other one refuses; or, if it comes late, has nothing to do."""
    model = MODELS[turn % 3]
    straight = chaos.run_of(model)
    folder = chaos.new_folder()
    jobs = [chaos.start(folder, model, output=chaos.new_folder()) for _ in range(2)]
    results = [job.result() for job in jobs]
    assert any(result.returncode == 0 for result in results), results
    for result in results:
        if result.returncode:
            assert_sentence(result.stderr, "another process is training in run")
    assert_same_end(folder / "run", straight)


@scenario("a second training that gets the lock when the first is done", times=1)
def late(chaos: Chaos, turn: int) -> None:
    """It looks at the run again, instead of training over it from scratch."""
    straight = chaos.run_of("llm")
    folder = chaos.new_folder()
    second = chaos.start(folder, output=chaos.new_folder(), instead={0: ("tests.chaos.late",)})
    chaos.start(folder).finish()
    assert f"resuming at step {STEPS}" in second.finish()
    assert_same_end(folder / "run", straight)
