import logging
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.qwen import save_tokenizer
from tests.tones import prepare_demo, write_lists

torch.set_num_threads(1)


# Files that take a minute or more; they run first, so that no worker is left with one at the end.
SLOW = (
    "apps/test_families.py",
    "unit/test_runtimes.py",
    "invariants/test_engines.py",
    "invariants/test_trajectories.py",
    "slurm/test_slurm.py",
    "resume/test_engines.py",
    "apps/test_launchers.py",
    "golden/test_golden.py",
    "resume/test_kill_flow.py",
    "resume/test_kill_hifigan.py",
    "resume/test_resume.py",
    "apps/test_path.py",
    "apps/test_exports.py",
    "apps/test_prefer.py",
    "apps/test_ljspeech.py",
    "unit/test_ranks.py",
)
# Folders of the quick tier, without the files above and these.
QUICK = ("unit/", "parity/")
NOT_QUICK = tuple(
    f"unit/test_{name}.py" for name in ("devices", "engines", "flow", "hifigan", "run", "values")
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves slow files to the front, and marks the quick tier."""
    order = {file: i for i, file in enumerate(SLOW)}

    def file(item: pytest.Item) -> str:
        return item.path.relative_to(Path(__file__).parent).as_posix()

    for item in items:
        if file(item).startswith(QUICK) and file(item) not in (*SLOW, *NOT_QUICK):
            item.add_marker(pytest.mark.quick)
    items.sort(key=lambda item: order.get(file(item), len(SLOW)))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds an option that replaces the golden losses."""
    parser.addoption("--refresh", action="store_true", help="write the golden losses anew")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints how far the numbers of the parity tests are from those of the original."""
    reports = [
        report
        for kind in terminalreporter.stats.values()
        for report in kind
        if hasattr(report, "user_properties")
    ]
    worst = [
        (report.nodeid, value)
        for report in reports
        for name, value in report.user_properties
        if name == "worst"
    ]
    if worst:
        terminalreporter.section("largest differences from the original")
    for name, value in sorted(set(worst)):
        terminalreporter.line(f"{value:40} {name}")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seeds torch, so that a test draws the same numbers each time."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the record of exports apart from that of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The log of cosyexp; the logger may have stopped to propagate in another test."""
    logger = logging.getLogger("cosyexp")
    propagated, logger.propagate = logger.propagate, True
    with caplog.at_level(logging.DEBUG, "cosyexp"):
        yield caplog
    logger.propagate = propagated


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a minute and a half of prepared demo speech."""
    return prepare_demo(tmp_path_factory.mktemp("data") / "demo")


@pytest.fixture(scope="session")
def lists(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders with train.list and valid.list of tones for every family, by token rate."""
    return write_lists(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer with the ids of Qwen2."""
    return save_tokenizer(tmp_path_factory.mktemp("qwen"))
