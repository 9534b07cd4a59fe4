"""The recipe for stable-baselines3."""

from pathlib import Path

import pytest
import torch

from tests.integrations.recipes import (
    assert_near,
    gradients,
    move,
    named,
    recipe,
    recorded,
    written_out,
)
from tests.support.tasks import same

pytest.importorskip("stable_baselines3")
page = "stable-baselines3"


def test_each_step_has_the_gradient_of_the_penalty() -> None:
    space = recipe(page)
    move(space.policy)
    space.policy.optimizer.zero_grad()
    penalty = gradients(space.policy, written_out(space.regularizer, space.policy))
    assert max(float(each.abs().max()) for each in penalty.values()) > 0
    with recorded() as steps:  # no loss but the penalty
        space.policy.optimizer.step()
    (step,) = steps
    found = named(step, space.policy)
    assert_near(found, {name: penalty[name] for name in found})
    assert set(found) == set(space.regularizer.fisher)


def test_the_value_network_is_free_and_the_rest_goes_by_rule() -> None:
    space = recipe(page)
    assert not [name for name in space.regularizer.fisher if "value" in name]
    data = [(batch.observations, batch.actions.flatten()) for batch in space.rollout.get(16)]
    assert set(space.regularizer.consolidate(data).paths.values()) == {"rule"}


def test_a_checkpoint_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    whole = recipe(page)
    move(whole.policy)
    whole.save(tmp_path)
    fresh = recipe(page, seed=1, loop=False)
    fresh.resume(tmp_path)
    assert fresh.regularizer.n_tasks == 2
    assert same(fresh.regularizer.fisher, whole.regularizer.fisher)
    assert whole.regularizer() > 0
    assert torch.equal(fresh.regularizer(), whole.regularizer())
