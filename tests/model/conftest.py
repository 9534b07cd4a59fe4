import pytest
from torch import nn

from tests.support.tasks import make_model


@pytest.fixture
def model():
    return make_model()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight


@pytest.fixture
def tied():
    return Tied()
