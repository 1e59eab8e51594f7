"""SIGKILL at random times and at chosen points, under all engines, and a start to the end."""

import signal
import time
from pathlib import Path

from tests.chaos.jobs import wait_until
from tests.chaos.runs import ENGINES, Chaos, assert_same_end
from tests.chaos.scenarios import scenario
from tests.support import MODELS

# points of killer.py, and how often each is reached at least in one run
AIMED = {
    "fsync": 40,
    "fsync/config": 1,
    "fsync/overrides": 1,
    "fsync/speakers": 1,
    "fsync/environment": 1,
    "fsync/meta": 4,
    "fsync/safetensors": 8,
    "replace": 10,
    "replace/config": 1,
    "replace/metrics": 1,
    "rename": 4,
    "meta": 4,
    "weights": 8,
    "update": 6,
    "metrics": 6,
    "start": 6,
}
COMBINATIONS = [
    (model, engine)
    for engine in ENGINES
    for model in MODELS
    if (model, engine) != ("hifigan", "fsdp x2")  # fsdp trains one network
]


@scenario("SIGKILL at a random time", times=30)
def killed_at_random(chaos: Chaos, turn: int) -> None:
    """All ranks are killed at once, as by a power cut."""
    model, engine = COMBINATIONS[turn % len(COMBINATIONS)]
    straight = chaos.run_of(model, engine)
    folder = chaos.new_folder()
    job = chaos.start(folder, model, engine)
    wait_until(lambda: (folder / "run/config.yaml").exists() or not job.running(), "the start")
    # the twin's own times tell how long such a run takes after its start
    times = [path.stat().st_mtime for path in straight.glob("checkpoints/*/meta.yaml")]
    time.sleep(chaos.draw.uniform(0, max(times) - min(times)))
    job.kill()
    finish(chaos, folder, model, engine)


@scenario("SIGKILL between write, sync and rename, at start-up, in metrics", times=30)
def killed_at_a_point(chaos: Chaos, turn: int) -> None:
    """A rank kills itself at a chosen point; what starts the ranks kills the others."""
    model, engine = COMBINATIONS[(turn * 4) % len(COMBINATIONS)]
    point = list(AIMED)[turn % len(AIMED)]
    chaos.run_of(model, engine)
    folder = chaos.new_folder()
    times = chaos.draw.randint(1, AIMED[point])
    killer = ("tests.resume.killer", point, times)
    job = chaos.start(folder, model, engine, instead={0: killer})
    job.wait_for_first()
    time.sleep(0.1)
    statuses = job.kill()
    assert statuses[0] == -signal.SIGKILL, f"{point} {times} was not reached: {job.stderr}"
    finish(chaos, folder, model, engine)


def finish(chaos: Chaos, folder: Path, model: str, engine: str) -> None:
    """Starts a run again, and compares its end with that of its uninterrupted twin."""
    chaos.start(folder, model, engine).finish()
    assert_same_end(folder / "run", chaos.run_of(model, engine))
