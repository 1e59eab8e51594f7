"""A run of llm that is killed and started again ends like an uninterrupted one, bit by bit."""

import pytest

from tests.resume.conftest import VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_started_again(variant, kill_and_restart):
    kill_and_restart("llm", variant)
