"""Random operations with generators of one's own: each draws what it draws from the global one."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Binomial, Dirichlet, Gamma, Normal, Poisson
from torch.nn.attention.bias import CausalBias, causal_lower_right

from ewc.model.draws import _FILLS, Drawing, Draws, _filled

X = torch.linspace(-1, 1, 12).reshape(3, 4)
PAIR = X.reshape(1, 1, 3, 4)

DRAWING = {
    "rand": lambda: torch.rand(3, 2),
    "randn": lambda: torch.randn(20),
    "randint": lambda: torch.randint(9, (5,)),
    "randint from": lambda: torch.randint(2, 9, (5,)),
    "randperm": lambda: torch.randperm(7),
    "rand_like": lambda: torch.rand_like(X),
    "randn_like": lambda: torch.randn_like(X),
    "randint_like": lambda: torch.randint_like(X, 9),
    "normal": lambda: torch.normal(X, 2.0),
    "bernoulli": lambda: torch.bernoulli(X.sigmoid()),
    "multinomial": lambda: torch.multinomial(X.exp(), 2),
    "in place": lambda: X.clone().exponential_().uniform_().log_normal_(),
    "dropout": lambda: F.dropout(X, 0.5, training=True),
    "alpha dropout": lambda: F.alpha_dropout(X, 0.5, training=True),
    "rrelu": lambda: F.rrelu(X, training=True),
    "gumbel_softmax": lambda: F.gumbel_softmax(X),
    "attention": lambda: F.scaled_dot_product_attention(PAIR, PAIR, PAIR, dropout_p=0.5),
    "pooling": lambda: F.fractional_max_pool2d(PAIR, 2, output_size=(2, 2)),
    "Normal": lambda: Normal(X, 1.0).rsample(),
    "Gamma": lambda: Gamma(X.exp(), 1.0).rsample(),
    "Dirichlet": lambda: Dirichlet(X.exp()).rsample(),
    "Poisson": lambda: Poisson(X.exp()).sample(),
    "Binomial": lambda: Binomial(5, logits=X).sample(),
    "vmap": lambda: torch.func.vmap(lambda x: x + torch.randn(4), randomness="different")(X),
    "torch.default_generator": lambda: torch.rand(3, generator=torch.default_generator),
    "LSTM": lambda: torch.nn.LSTM(4, 4, 2, dropout=0.5)(X)[0],
}


@pytest.fixture
def draws():
    return Draws([torch.Generator().manual_seed(1)], in_place=None)


@pytest.mark.parametrize("name", DRAWING)
def test_the_same_numbers_without_the_global_generator(draws, name):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected, after = DRAWING[name](), torch.get_rng_state()
    before = torch.get_rng_state()
    with Drawing(draws):
        found = DRAWING[name]()
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draws.states()[0], after)
    assert draws.seen


@pytest.mark.parametrize(
    "run",
    [
        lambda: F.scaled_dot_product_attention(PAIR, PAIR, PAIR),
        lambda: F.dropout(X, 0.5, training=False),
        lambda: torch.rand(3, generator=torch.Generator().manual_seed(0)),
        lambda: X @ X.T,
    ],
    ids=["attention", "dropout", "own generator", "product"],
)
def test_nothing_is_drawn(draws, run):
    expected, before = run(), draws.states()[0]
    with Drawing(draws):
        found = run()
    assert torch.equal(found, expected)
    assert not draws.seen
    assert torch.equal(draws.states()[0], before)


@pytest.mark.parametrize(
    ("operation", "bounds"),
    [(torch.rand_like, ()), (torch.randn_like, ()), (torch.randint_like, (5,))],
)
def test_where_an_operation_gets_no_generator(operation, bounds):
    packet = getattr(torch.ops.aten, operation.__name__)
    assert packet in _FILLS
    generator = torch.Generator().manual_seed(1)
    found = _filled(packet.default, (X, *bounds), {"pin_memory": False}, generator)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert torch.equal(found, operation(X, *bounds))


@pytest.mark.parametrize("number", [0.1, 3, True, 1j])
def test_a_number_that_pytorch_hands_on_for_a_tensor(number):
    """As for `x.mul_(0.1)` inside vmap, beside other threads."""
    draws = Draws([], lambda states: None)
    found = draws.__torch_dispatch__(torch.ops.aten.clone.default, (), (number,))
    assert found.shape == ()
    assert found.item() == number


def test_a_tensor_of_a_subclass_is_made(draws):
    with Drawing(draws):
        bias = causal_lower_right(3, 4)
        found = F.scaled_dot_product_attention(PAIR, PAIR, PAIR, causal_lower_right(3, 3))
    assert isinstance(bias, CausalBias)
    assert torch.equal(
        found, F.scaled_dot_product_attention(PAIR, PAIR, PAIR, causal_lower_right(3, 3))
    )
