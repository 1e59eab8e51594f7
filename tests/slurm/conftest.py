from collections.abc import Iterator

import pytest

from tests.slurm.cluster import cluster, missing
from tests.support import environment


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a cluster of one node."""
    if why := missing():
        pytest.skip(f"no SLURM can be started here: {why}")
    folder = tmp_path_factory.mktemp("slurm")
    with cluster(folder) as env:
        yield {**env, **environment(), "SLURM_CONF": env["SLURM_CONF"], "PATH": env["PATH"]}
