"""Tests that need a GPU; `make test-gpu` runs them, elsewhere they are skipped."""

import pytest
import torch

from tests.apps.conftest import warm

__all__ = ["warm"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this folder, and skips them on a machine without a GPU."""
    skip = pytest.mark.skip(reason="PyTorch finds no GPU on this machine")
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(skip)
