"""Two and four processes, each started once, and stopped after the last of these tests.

A process that waits uses a twentieth of a processor: gloo and its store look for work all the time.
"""

from collections.abc import Iterator

import pytest

from tests.distributed.workers import Workers


@pytest.fixture(scope="package")
def two() -> Iterator[Workers]:
    workers = Workers(2)
    yield workers
    workers.stop()


@pytest.fixture(scope="package")
def four() -> Iterator[Workers]:
    workers = Workers(4)
    yield workers
    workers.stop()


@pytest.fixture(params=[2, 4], ids=["two", "four"])
def workers(request: pytest.FixtureRequest) -> Workers:
    found: Workers = request.getfixturevalue("two" if request.param == 2 else "four")
    return found
