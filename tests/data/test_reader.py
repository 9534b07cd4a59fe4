from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from ewc.data.batch import Batch
from ewc.errors import InvalidBatch
from tests.support.reading import read, x


class TestTensors:
    def test_are_moved_to_the_device(self) -> None:
        batch = Batch.read(
            (x(), {"t": torch.tensor(1.0)}),
            batch_dim=0,
            device=torch.device("meta"),
            targets_required=True,
        )
        assert batch.raw[0].is_meta
        assert batch.raw[1]["t"].is_meta

    def test_made_in_inference_mode_work_in_autograd(self) -> None:
        with torch.inference_mode():
            batch = read((x(), x(), torch.tensor(2.0)))
        assert not any(t.is_inference() for t in (*batch.raw, *batch.rest))
        weight = torch.ones(3, requires_grad=True)
        (batch.raw[0] @ weight).sum().backward()

    def test_leave_the_users_graph_but_keep_requiring_gradients(self) -> None:
        data = x().requires_grad_() * 2
        batch = read((data, data))
        for found in (*batch.raw, *batch.rest):
            assert found.requires_grad
            assert found.is_leaf
        assert not read((x(),)).raw[0].requires_grad


class TestInvalid:
    @pytest.mark.parametrize(
        "raw", [SimpleNamespace(x=1), "text", 3, None, (), [], {}, iter([1])], ids=repr
    )
    def test_not_a_batch(self, raw: Any) -> None:
        with pytest.raises(
            InvalidBatch, match=r"a batch must be a list or tuple \(inputs, \*rest\)"
        ) as error:
            read(raw)
        assert "def forward(model, batch):" in str(error.value)

    def test_objects_that_are_not_one_per_sample(self) -> None:
        with pytest.raises(InvalidBatch, match=r'found SimpleNamespace at batch\[0\]\["graph"\]'):
            read(({"graph": SimpleNamespace(), "x": x()}, torch.arange(4)))

    def test_a_bare_tensor_without_the_targets_that_are_required(self) -> None:
        assert read(x(), targets_required=False).raw.shape == (4, 3)
        with pytest.raises(InvalidBatch, match=r"bare tensor, Tensor\[4, 3\] float32"):
            read(x())

    def test_packed_sequences(self) -> None:
        packed = pack_sequence([torch.zeros(3, 2), torch.zeros(2, 2)])
        for raw in ((packed, torch.arange(2)), ([packed], torch.arange(2)), packed):
            with pytest.raises(InvalidBatch, match=r"PackedSequence at batch.* lengths, and pack"):
                read(raw)

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.eye(4).to_sparse(),
            torch.nested.nested_tensor([torch.zeros(2)] * 4, layout=torch.jagged),
        ],
    )
    def test_tensors_that_are_not_dense(self, tensor: Tensor) -> None:
        with pytest.raises(InvalidBatch, match=r"must be dense; found .* at batch\[0\]"):
            read((tensor, torch.arange(4)))

    @pytest.mark.parametrize("raw", [(3, "a"), (torch.tensor(1.0), None), torch.tensor(1.0)])
    def test_no_dimension_of_samples(self, raw: Any) -> None:
        with pytest.raises(InvalidBatch, match="at least one tensor with a dimension of samples"):
            read(raw, targets_required=False)

    def test_different_numbers_of_samples(self) -> None:
        with pytest.raises(InvalidBatch) as error:
            read((x(8), {"mask": torch.zeros(7, 2), "ids": ["a"] * 8}))
        message = str(error.value)
        assert "batch[0]: 8 in Tensor[8, 3] float32 along dimension 0" in message
        assert 'batch[1]["mask"]: 7 in Tensor[7, 2]' in message
        assert 'batch[1]["ids"]: 8 in list of 8 str\n' in message

    def test_a_batch_dim_that_a_tensor_lacks(self) -> None:
        with pytest.raises(
            InvalidBatch, match=r"here 2; found Tensor\[4, 3\] float32 at batch\[0\]"
        ):
            read((x(),), batch_dim=2)

    @pytest.mark.parametrize("batch_dim", [-1, True, "0", 1.0])
    def test_an_invalid_batch_dim(self, batch_dim: Any) -> None:
        with pytest.raises(ValueError, match="an integer >= 0; found"):
            read((x(),), batch_dim=batch_dim)
