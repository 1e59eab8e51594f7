"""Losses that are not finite on one rank of two: no rank takes over the weights they would give."""

from cosyexp.run.tensors import read_tensors
from cosyexp.training.nonfinite import PATIENCE
from tests.chaos.kills import finish
from tests.chaos.runs import STEPS, Chaos, assert_sentence
from tests.chaos.scenarios import scenario
from tests.resume.checks import newest

ENGINES = ("ddp x2", "fsdp x2")


@scenario("a loss that is not finite on one rank of two: stop", times=2, quick=True)
def stops(chaos: Chaos, turn: int) -> None:
    """The run ends with a sentence; its last checkpoint is sound and it goes on from there."""
    engine = ENGINES[turn % 2]
    chaos.run_of("llm", engine)
    folder = chaos.new_folder()
    nan = ("tests.chaos.nan", 4, 4)
    failed = chaos.start(folder, "llm", engine, instead={1: nan}).result()
    assert failed.returncode
    assert_sentence(failed.stderr, "at step 3 the", "became NaN or infinite")
    assert newest(folder / "run") == 2
    finish(chaos, folder, "llm", engine)


@scenario("losses that are not finite on one rank of two: skip", times=2)
def skips(chaos: Chaos, turn: int) -> None:
    """The updates are skipped on both ranks, and all steps are made."""
    folder, engine = chaos.new_folder(), ENGINES[turn % 2]
    words = ("trainer.on_nonfinite=skip",)
    nan = ("tests.chaos.nan", 3, 4)
    printed = chaos.start(folder, "llm", engine, *words, instead={1: nan}).finish()
    assert printed.count("the update of llm was skipped") >= 2, printed
    assert newest(folder / "run") == STEPS
    tensors = read_tensors(folder / f"run/checkpoints/step_{STEPS:08d}/llm.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@scenario("losses that are not finite on one rank of two: stop after 10", times=2)
def stops_after_ten(chaos: Chaos, turn: int) -> None:
    engine = ENGINES[turn % 2]
    chaos.run_of("llm", engine)
    folder = chaos.new_folder()
    nan = ("tests.chaos.nan", 4, 3 + PATIENCE)
    words = ("trainer.on_nonfinite=skip",)
    failed = chaos.start(folder, "llm", engine, *words, instead={1: nan}).result()
    assert failed.returncode
    assert_sentence(failed.stderr, "at step 3 the", "became NaN or infinite")
    assert failed.stdout.count("was skipped") >= PATIENCE - 1, failed.stdout
    finish(chaos, folder, "llm", engine)
