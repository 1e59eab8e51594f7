import logging
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch

from cosyexp.data.corpora.demo import Demo
from cosyexp.data.preparation import PrepareOptions, prepare

torch.set_num_threads(1)

CORPUS = {"name": "demo", "minutes": 1.5, "held_out": 0.2, "seed": 0}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--refresh", action="store_true", help="write the golden losses anew")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How near the original's numbers the parity tests came."""
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
    """A test draws the same numbers each time."""
    torch.manual_seed(0)


@pytest.fixture
def said(caplog):
    """What cosyexp logs, also after a test that attached a console of its own."""
    logger = logging.getLogger("cosyexp")
    propagated, logger.propagate = logger.propagate, True
    with caplog.at_level(logging.DEBUG, "cosyexp"):
        yield caplog
    logger.propagate = propagated


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A minute and a half of demo speech, prepared."""
    out = tmp_path_factory.mktemp("data") / "demo"
    rates = {"token_rate": 50, "codes": 512, "speaker_dim": 192}
    prepare(
        Demo(**CORPUS),
        out,
        PrepareOptions(**rates, shard_size=16, processes=1),
        {"corpus": CORPUS, **rates},
    )
    return out
