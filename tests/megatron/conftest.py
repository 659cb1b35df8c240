"""What the tests of the recording run share."""

import pytest


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One folder of tokenised corpora for the whole session."""
    return str(tmp_path_factory.mktemp("corpus"))
