"""Two and four processes, each started once."""

from collections.abc import Iterator

import pytest

from tests.distributed.workers import Workers


@pytest.fixture(scope="session")
def two() -> Iterator[Workers]:
    workers = Workers(2)
    yield workers
    workers.stop()


@pytest.fixture(scope="session")
def four() -> Iterator[Workers]:
    workers = Workers(4)
    yield workers
    workers.stop()


@pytest.fixture(params=[2, 4], ids=["two", "four"])
def workers(request: pytest.FixtureRequest) -> Workers:
    found: Workers = request.getfixturevalue("two" if request.param == 2 else "four")
    return found
