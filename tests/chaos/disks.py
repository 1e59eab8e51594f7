"""A disk that is full, a folder that cannot be written, permissions that are lost."""

from tests.chaos.jobs import wait_until
from tests.chaos.kills import finish
from tests.chaos.runs import ENGINES, Chaos, assert_same_end, assert_sentence
from tests.chaos.scenarios import NotHere, scenario
from tests.disks import NO_DISK, leave, small_disk
from tests.resume.checks import newest
from tests.support import MODELS, contents

WITHOUT_ROOT = ("tests.chaos.without_root",)
GOES_ON = "no checkpoint, training goes on"


@scenario("a full disk of 3 MB", times=6)
def full_disk(chaos: Chaos, turn: int) -> None:
    """The disk gets full somewhere; there is a sentence, and with more space the run goes on."""
    model = MODELS[turn % 3]
    straight = chaos.run_of(model)
    size = sum(path.stat().st_size for path in straight.rglob("*") if path.is_file())
    folder = chaos.new_folder()
    with small_disk(folder / "run", 3 + size // 2**20) as mounted:
        if not mounted:
            raise NotHere(NO_DISK)
        leave(folder / "run", chaos.draw.randrange(10_000, size // 2))
        failed = chaos.start(folder, model).result()
        assert failed.returncode, "it did not need the space"
        assert_sentence(failed.stderr, "the disk is full", "free some space")
        (folder / "run/filler").unlink()
        finish(chaos, folder, model, "ddp")


@scenario("a folder that cannot be written", times=2, quick=True)
def read_only(chaos: Chaos, turn: int) -> None:
    chaos.run_of("llm")  # its twin
    folder = chaos.new_folder()
    if turn == 1:
        chaos.start(folder, "llm", "ddp", "trainer.steps=4", instead={0: WITHOUT_ROOT}).finish()
    locked = folder / "run" if turn == 1 else folder
    before = contents(folder)
    locked.chmod(0o555)
    failed = chaos.start(folder, output=chaos.new_folder(), instead={0: WITHOUT_ROOT}).result()
    assert failed.returncode
    assert_sentence(failed.stderr, "ermission denied")
    locked.chmod(0o755)
    assert before.items() <= contents(folder).items()
    chaos.start(folder, instead={0: WITHOUT_ROOT}).finish()
    finish(chaos, folder, "llm", "ddp")


@scenario("permission lost in the middle of a run", times=3)
def permission_lost(chaos: Chaos, turn: int) -> None:
    model = MODELS[turn % 3]
    chaos.run_of(model)
    folder = chaos.new_folder()
    job = chaos.start(folder, model, instead={0: WITHOUT_ROOT})
    wait_until(lambda: newest(folder / "run") >= 0 or not job.running(), "a checkpoint")
    (folder / "run/checkpoints").chmod(0o555)
    failed = job.result()
    (folder / "run/checkpoints").chmod(0o755)
    assert failed.returncode, "the run ended before the permission was lost"
    assert_sentence(failed.stderr, "checkpoints", "ermission denied")
    chaos.start(folder, model, instead={0: WITHOUT_ROOT}).finish()
    finish(chaos, folder, model, "ddp")


@scenario("checkpoints that cannot be written, on_error=continue", times=2, quick=True)
def training_goes_on(chaos: Chaos, turn: int) -> None:
    """All ranks go on without them, and write those that come later."""
    engine = ("ddp", "fsdp x2")[turn]
    words = ["trainer.steps=200", "trainer.valid_every=50", "checkpoint.every=10"]
    words += ["checkpoint.keep_best=0", "checkpoint.on_error=continue"]
    straight, folder = chaos.run_of("llm", engine, *words), chaos.new_folder()
    ranks = dict.fromkeys(range(ENGINES[engine][0]), WITHOUT_ROOT)
    job = chaos.start(folder, "llm", engine, *words, instead=ranks)
    wait_until(lambda: newest(folder / "run") >= 0 or not job.running(), "a checkpoint")
    (folder / "run/checkpoints").chmod(0o555)
    log = folder / "run/logs/rank_0.log"
    wait_until(lambda: GOES_ON in log.read_text() or not job.running(), "a failure")
    (folder / "run/checkpoints").chmod(0o755)
    ended = job.result()
    assert not ended.returncode, ended.stderr
    assert GOES_ON in log.read_text()
    assert_same_end(folder / "run", straight)
