import logging

import pytest


@pytest.fixture
def said(caplog):
    """What cosyexp logs, also after a test that attached a console of its own."""
    logger = logging.getLogger("cosyexp")
    propagated, logger.propagate = logger.propagate, True
    with caplog.at_level(logging.DEBUG, "cosyexp"):
        yield caplog
    logger.propagate = propagated
