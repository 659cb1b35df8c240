"""The paper's testbed, for tests that need its constants."""

from pathlib import Path

import pytest
import yaml

from hiermoe.topology.cluster import Cluster

CLUSTERS = Path(__file__).parents[2] / "conf" / "cluster"


@pytest.fixture(scope="session")
def a6000() -> Cluster:
    """4 nodes x 8 RTX A6000."""
    return Cluster.model_validate(yaml.safe_load((CLUSTERS / "a6000_4x8.yaml").read_text()))
