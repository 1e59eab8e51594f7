from collections.abc import Iterator

import pytest

from tests.apps.warm import Warm, warm_process


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Runs apps without waiting for their imports."""
    with warm_process() as warm:
        yield warm
