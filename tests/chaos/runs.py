"""What the scenarios share: small runs, their uninterrupted twins, and what must be equal."""

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from tests.chaos.jobs import Job, fork, import_heavy
from tests.resume.checks import hashes, newest
from tests.support import checkpoints, metrics, train_words
from tests.tones import prepare_demo

STEPS = 8
EVERY = [
    f"trainer.steps={STEPS}",
    "trainer.valid_every=4",
    "trainer.ema=0.9",
    "checkpoint.every=2",
]
ENGINES: dict[str, tuple[int, list[str]]] = {  # number of ranks, and overrides
    "ddp": (1, ["engine=ddp"]),
    "ddp x2": (2, ["engine=ddp"]),
    "deepspeed": (1, ["engine=deepspeed", "engine.stage=2"]),
    "fsdp x2": (2, ["engine=fsdp"]),
}
CHANGING = ("logs", "tensorboard", ".lock")  # names that depend on the clock, or on what happened


@dataclass
class Chaos:
    """What a scenario needs.

    Attributes:
        folder: for all files.
        data: folder of prepared demo speech, see `prepared`.
        seed: of all random numbers.
        fuzz_seconds: how long each reader is fuzzed.
        only: parts of the names of what is tried.
        draw: random numbers.
    """

    folder: Path
    data: Path
    seed: int = 0
    fuzz_seconds: float = 5.0
    only: Sequence[str] = ("",)
    _numbers: Iterator[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    def new_folder(self) -> Path:
        """Returns a new empty folder."""
        folder = self.folder / f"{next(self._numbers):03d}"
        folder.mkdir()
        return folder

    def words(self, model: str, *words: str) -> list[str]:
        """Returns the overrides of a short training in the folder `run`."""
        return [*train_words(model, self.data, *EVERY), "run_dir=run", *words]

    def run_of(self, model: str, engine: str = "ddp", *words: str) -> Path:
        """Returns an uninterrupted run, and trains it the first time; scenarios only read it."""
        folder = self.folder / "-".join(("straight", model, engine, *words)).replace("/", "_")
        if not folder.exists():
            folder.mkdir()
            self.start(folder, model, engine, *words).finish()
        return folder / "run"

    def start(
        self,
        folder: Path,
        model: str = "llm",
        engine: str = "ddp",
        *words: str,
        **options: object,
    ) -> Job:
        """Starts a training in a folder."""
        ranks, own = ENGINES[engine]
        return Job(self.words(model, *own, *words), folder, ranks=ranks, **options)  # type: ignore[arg-type]


def prepared(folder: Path) -> Path:
    """Prepares demo speech in a fork, after this process has imported what every job needs."""
    import_heavy()
    job = fork(lambda: prepare_demo(folder))
    _, status = os.waitpid(job, 0)
    assert status == 0, "the demo data could not be prepared"
    return folder


def files(run: Path) -> set[str]:
    """Returns the paths of a run whose names do not depend on the clock."""
    paths = (path.relative_to(run) for path in run.rglob("*"))
    return {str(path) for path in paths if path.parts[0] not in CHANGING}


def assert_same_end(run: Path, straight: Path) -> None:
    """Asserts that a run ended as its uninterrupted twin: the same bytes, and nothing left over."""
    assert newest(straight) == newest(run) > 0
    assert hashes(straight, newest(straight)) == hashes(run, newest(run)), "the weights differ"
    assert metrics(run) == metrics(straight), "metrics.jsonl differs"
    assert checkpoints(run) == checkpoints(straight)
    left = files(run) - files(straight)
    assert not left, f"left behind: {sorted(left)}"
    assert files(run) == files(straight), f"missing: {sorted(files(straight) - files(run))}"


def assert_sentence(text: str, *parts: str) -> str:
    """Asserts that a command's stderr ends in one sentence with all parts, and returns it."""
    lines: Sequence[str] = text.strip().splitlines()
    assert lines and lines[-1].startswith("cosyexp: ") and "Traceback" not in text, text
    assert all(part in lines[-1] for part in parts), lines[-1]
    return lines[-1]
