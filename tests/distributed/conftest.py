"""The processes that all tests of this folder share."""

import pytest

from distributed_pool import Pool


@pytest.fixture(scope="session")
def pool():
    made = Pool()
    yield made
    made.close()
