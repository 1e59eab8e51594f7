"""Fixtures of the golden tests."""

from tests.apps.conftest import warm

__all__ = ["warm"]
