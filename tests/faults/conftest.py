"""Every row holds for both objects."""

import pytest

from ewc import EWC, OnlineEWC


@pytest.fixture(params=[EWC, OnlineEWC])
def kind(request):
    return request.param
