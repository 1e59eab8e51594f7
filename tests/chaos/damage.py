"""Damaged, truncated and missing files of a run: it goes on from what is intact."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cosyexp.run.checkpoint import META
from tests.chaos.kills import finish
from tests.chaos.runs import STEPS, Chaos, assert_same_end
from tests.chaos.scenarios import scenario
from tests.support import MODELS, metrics

NEWEST = f"run/checkpoints/step_{STEPS:08d}"


def copied(chaos: Chaos, model: str, engine: str = "ddp") -> Path:
    """Returns a new folder with a copy of a finished run."""
    folder = chaos.new_folder()
    shutil.copytree(chaos.run_of(model, engine), folder / "run", dirs_exist_ok=True)
    return folder


def goes_on_from_the_one_before(chaos: Chaos, folder: Path, model: str, engine: str) -> None:
    """Asserts that a start skips the newest checkpoint with a warning, and ends as before."""
    printed = chaos.start(folder, model, engine).finish()
    assert f"step_{STEPS:08d} is skipped" in printed, printed
    assert f"resuming at step {STEPS - 2}" in printed, printed
    assert_same_end(folder / "run", chaos.run_of(model, engine))


def a_file(chaos: Chaos, folder: Path) -> Path:
    """Returns one of the files of the newest checkpoint whose checksums it holds."""
    files = [path for path in (folder / NEWEST).rglob("*") if path.is_file() and path.name != META]
    return chaos.draw.choice(sorted(files))


@scenario("one bit flipped in the newest checkpoint", times=6)
def flipped_bit(chaos: Chaos, turn: int) -> None:
    model = MODELS[turn % 3]
    folder = copied(chaos, model)
    path = a_file(chaos, folder)
    content = bytearray(path.read_bytes())
    content[chaos.draw.randrange(len(content))] ^= 1 << chaos.draw.randrange(8)
    path.write_bytes(content)
    goes_on_from_the_one_before(chaos, folder, model, "ddp")


@scenario("a file of the newest checkpoint truncated", times=6)
def truncated(chaos: Chaos, turn: int) -> None:
    """Meta.yaml is one of the files."""
    model = MODELS[turn % 3]
    folder = copied(chaos, model)
    path = folder / NEWEST / META if turn % 3 == 2 else a_file(chaos, folder)
    os.truncate(path, chaos.draw.randrange(path.stat().st_size // 2))
    goes_on_from_the_one_before(chaos, folder, model, "ddp")


@scenario("the file of a rank missing in the newest checkpoint", times=2, quick=True)
def missing_rank(chaos: Chaos, turn: int) -> None:
    folder = copied(chaos, "flow", "fsdp x2")
    paths = sorted((folder / NEWEST / "trainer").rglob("*"))
    own = [path for path in paths if path.is_file() and "rank_0" not in path.name]
    chaos.draw.choice(own).unlink()
    goes_on_from_the_one_before(chaos, folder, "flow", "fsdp x2")


def cut_last_line(path: Path) -> None:
    """Leaves half of the last line."""
    os.truncate(path, path.stat().st_size - len(path.read_bytes().splitlines()[-1]) // 2)


def damage_a_line(path: Path) -> None:
    """Damages a line in the middle."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines[len(lines) // 2] = b'{"step": 3, "tra\n'
    path.write_bytes(b"".join(lines))


METRICS: dict[str, Callable[[Path], object]] = {
    "lost": Path.unlink,
    "empty": lambda path: os.truncate(path, 0),
    "last line cut": cut_last_line,
    "a line damaged": damage_a_line,
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 9),
}


@scenario("metrics.jsonl lost or damaged", times=len(METRICS))
def damaged_metrics(chaos: Chaos, turn: int) -> None:
    """The run goes on, and the lines that are intact stay, but for those of later steps."""
    straight = chaos.run_of("llm")
    folder = copied(chaos, "llm")
    shutil.rmtree(folder / NEWEST)
    path = folder / "run/metrics.jsonl"
    list(METRICS.values())[turn](path)
    intact = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError):
            intact.append({k: v for k, v in json.loads(line).items() if not k.startswith("time/")})
    chaos.start(folder).finish()
    again = (STEPS - 1, STEPS)
    wanted = [line for line in metrics(straight) if line in intact or line["step"] in again]
    assert metrics(folder / "run") == wanted


@scenario("the clock set back", times=3)
def clock_set_back(chaos: Chaos, turn: int) -> None:
    """The newest files are the oldest by their times; then, time itself runs backwards."""
    model = MODELS[turn % 3]
    straight = chaos.run_of(model)
    folder = chaos.new_folder()
    chaos.start(folder, model, "ddp", "trainer.steps=4").finish()
    for age, path in enumerate(sorted((folder / "run").rglob("*"))):
        os.utime(path, (1e9 - age, 1e9 - age))
    backwards = ("tests.chaos.backwards",)
    printed = chaos.start(folder, model, instead={0: backwards}).finish()
    assert "resuming at step 4" in printed
    assert_same_end(folder / "run", straight)
    finish(chaos, folder, model, "ddp")
