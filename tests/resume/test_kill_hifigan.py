"""A run of hifigan that is killed and started again ends like an uninterrupted one, bit by bit."""

import pytest


@pytest.mark.parametrize("variant", ["plain", "ema"])
def test_killed_and_started_again(variant, kill_and_restart):
    kill_and_restart("hifigan", variant)
