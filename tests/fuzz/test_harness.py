"""The fuzzer notices each kind of fault that it looks for."""

import mmap
import os
import time

import pytest

from cosyexp.errors import UserError
from tests.fuzz import harness
from tests.fuzz.harness import Reader, damaged, fuzz

FAULTS = {
    "an exception": (lambda: int("x"), "ValueError in test_harness.py"),
    "two lines": (lambda: (_ for _ in ()).throw(UserError("a\nb")), "AssertionError"),
    "a hang": (lambda: time.sleep(60), "a hang"),
    "memory": (lambda: grow(), "more than 500 MB"),
    "a crash": (lambda: os._exit(7), "ended by 7"),
}


def grow() -> None:
    """Takes 700 MB, and waits."""
    with mmap.mmap(-1, 700 * 2**20) as memory:
        for begin in range(0, len(memory), 4096):
            memory[begin] = 1
        time.sleep(60)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "HANG", 1.0)
    path = tmp_path / "file.txt"
    path.write_text("a: 1\n")
    read, cause = FAULTS[fault]
    bad = damaged(b"a: 1\n", 3, 0)

    def reader() -> None:
        if path.read_bytes() == bad:
            read()

    found = fuzz(Reader("a reader", path, reader), 0.5, 0, tmp_path / "crashes")
    (kept,) = found.crashes.items()
    assert kept[0].startswith(cause) and kept[1][0].read_bytes() == bad
    assert found.inputs > 3 and path.read_text() == "a: 1\n"


def test_a_sentence_and_a_documented_error_are_no_crash(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("a: 1\n")

    def reader() -> None:
        if len(path.read_bytes()) % 2:
            raise UserError("one sentence")
        raise KeyError("documented")

    found = fuzz(Reader("a reader", path, reader, (KeyError,)), 0.3, 0, tmp_path / "crashes")
    assert found.inputs == found.refused > 5 and not found.crashes


def test_damages_depend_on_the_seed_and_the_number_alone():
    content = b"step: 3\nloss: [1, 2]\n" * 5
    made = [damaged(content, number, 0) for number in range(200)]
    assert made == [damaged(content, number, 0) for number in range(200)]
    assert made[0] == content and len(set(made)) > 150
