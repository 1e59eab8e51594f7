"""A run of hifigan that is killed and started again ends like an uninterrupted one, bit by bit."""


def test_killed_and_started_again(kill_and_restart):
    kill_and_restart("hifigan", "ema")
