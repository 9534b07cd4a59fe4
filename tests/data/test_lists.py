"""Lists that hold one entry per sample, and lists that do not."""

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ewc import EWC, Classification, Custom
from ewc.data.batch import Batch
from ewc.data.lists import Known
from ewc.errors import InvalidBatch
from tests import oracle
from tests.support.asserts import assert_close
from tests.support.reading import read, x

Pair = namedtuple("Pair", ["first", "second"])
NETWORK = 3


def boxes(*counts: int) -> list[dict[str, Any]]:
    return [{"boxes": torch.randn(n, 4), "labels": torch.arange(n), "id": n} for n in counts]


def ragged(*lengths: int) -> list[Tensor]:
    return [torch.randn(n, NETWORK, dtype=torch.float64) for n in lengths]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


class TestOneEntryPerSample:
    @pytest.mark.parametrize(
        "entries",
        [
            boxes(2, 5, 0),
            boxes(3, 3, 3),  # each with as many objects as there are samples
            [{"c": torch.tensor(1.0)} for _ in range(3)],
            [{"name": "a", "deep": [x(2), {"more": x(5)}]} for _ in range(3)],
            ragged(2, 7, 4),
            ragged(5, 5, 5),
            ragged(3, 3, 3),
            [torch.tensor(float(n)) for n in range(3)],
            [[x(1), x(2)], [x(3), x(4)], [x(5)]],
            [[x(3), x(3)], [x(3), x(3)], [x(3), x(3)]],
            [(x(2), "a"), (x(3), "b"), (x(4), "c")],
            tuple(boxes(2, 5, 0)),
            tuple(boxes(3, 3, 3)),
            tuple(ragged(2, 7, 4)),
            [x(2), None, x(4)],
        ],
        ids=lambda entries: type(entries).__name__,
    )
    @pytest.mark.parametrize("where", ["rest", "mapping", "nested"])
    def test_each_sample_gets_its_own(self, entries: Any, where: str) -> None:
        raw: Any = {
            "rest": (x(3), entries),
            "mapping": {"x": x(3), "labels": entries},
            "nested": ({"x": x(3)}, {"targets": entries, "ids": torch.arange(3)}),
        }[where]
        batch = read(raw)
        assert batch.size == 3
        for n in range(3):
            one = batch.take(n, n + 1).raw
            found = {
                "rest": lambda one=one: one[1],
                "mapping": lambda one=one: one["labels"],
                "nested": lambda one=one: one[1]["targets"],
            }[where]()
            assert same(found, type(entries)([entries[n]]))

    @pytest.mark.parametrize("entries", [ragged(2, 7, 4), tuple(ragged(2, 7, 4)), ragged(1, 1, 1)])
    def test_inputs(self, entries: Any) -> None:
        assert same(read((entries, torch.arange(3))).take(1, 2).raw[0], type(entries)([entries[1]]))

    @pytest.mark.parametrize("n", [2, 3])
    def test_beside_other_inputs(self, n: int) -> None:
        targets = boxes(*range(1, n + 1))
        (inputs, found), _ = read(((x(n), targets), torch.arange(n))).take(1, 2).raw
        assert inputs.shape == (1, 3)
        assert same(found, targets[1:2])

    def test_along_another_dimension(self) -> None:
        raw = (torch.zeros(7, 3, 2), [torch.ones(7, n) for n in (2, 3, 3)])
        assert same(read(raw, batch_dim=1).take(0, 1).raw[1], raw[1][:1])
        raw = (torch.zeros(7, 3, 2), [{"c": torch.ones(n)} for n in (7, 3, 3)])
        assert same(read(raw, batch_dim=1).take(2, 3).raw[1], raw[1][2:])

    def test_without_a_tensor_beside_them(self) -> None:
        """As the collate function of torchvision's references yields them."""
        images = tuple(torch.zeros(3, n, n) for n in (8, 9, 7, 8))
        targets = tuple(boxes(2, 5, 0, 1))
        batch = read((images, targets))
        assert batch.size == 4
        assert same(batch.take(1, 2).raw, (images[1:2], targets[1:2]))

    def test_tensors_are_moved_and_copied(self) -> None:
        targets = boxes(2, 5, 0)
        batch = read((x(3), targets))
        raw = batch.raw
        raw[1][1]["boxes"].zero_()
        raw[1][0].clear()
        raw[1].clear()
        assert same(batch.raw[1], targets)
        with torch.inference_mode():
            made = [{"c": torch.ones(n)} for n in (1, 3)]
        assert not any(each["c"].is_inference() for each in read((x(2), made)).raw[1])

    def test_the_samples_of_several_batches_are_joined(self) -> None:
        one, other = read((x(3), boxes(2, 5, 0))), read((x(2), boxes(1, 2)))
        assert one.joins(other)
        joined = type(one).joined([one, other])
        assert same(joined.raw[1], one.raw[1] + other.raw[1])
        assert same(joined.pick([4, 0]).raw[1], [other.raw[1][1], one.raw[1][0]])


class TestRowsOfAllSamples:
    @pytest.mark.parametrize(
        "raw",
        [
            ((x(2), x(2)), torch.arange(2)),
            ([x(2), x(2)], torch.arange(2)),
            (x(2), (x(2), torch.arange(2))),
            (x(2), Pair(x(2), torch.arange(2))),
            (x(2), [x(2), {"c": x(2)}]),
            (x(2), [x(2), None]),
            (x(2), [torch.arange(2), torch.rand(2)]),
            (x(2), [torch.arange(2), x(2).long()]),
            {"x": x(2), "past": ((x(2), x(2)), (x(2), x(2)))},
            {"x": x(2), "pair": Pair({"a": x(2)}, {"a": x(2)})},
            ([{"c": x(2)}], torch.arange(2)),
            (x(2), [{"c": x(2)}]),
            (x(1), [x(1)]),
        ],
        ids=str,
    )
    def test_are_cut(self, raw: Any) -> None:
        one = read(raw).take(0, 1)
        assert len(one.tensors) == len(read(raw).tensors)
        assert all(tensor.shape[0] == 1 for tensor in one.tensors)
        assert all(
            leaf.shape[0] == 1
            for leaf in torch.utils._pytree.tree_leaves(one.raw)
            if isinstance(leaf, Tensor)
        )


class TestEarlierBatches:
    def test_decide_where_both_may_be_meant(self) -> None:
        for lists, first in ((True, [x(2), x(5), x(3)]), (False, [x(3), x(3)])):
            known = Known()
            self.read((x(3), first), known)
            one = self.read((x(2), [x(2), x(2)]), known).take(0, 1).raw[1]
            assert [len(each) for each in one] == ([2] if lists else [1, 1])

    def test_for_the_inputs_too(self) -> None:
        known = Known()
        self.read((ragged(2, 5, 3), torch.arange(3)), known)
        one = self.read((ragged(2, 2), torch.arange(2)), known).take(0, 1).raw[0]
        assert [len(each) for each in one] == [2]

    @staticmethod
    def read(raw: Any, known: Known) -> Any:
        return Batch.read(
            raw, batch_dim=0, device=torch.device("cpu"), targets_required=True, known=known
        )


class TestErrors:
    def test_a_list_of_another_length_is_named(self) -> None:
        with pytest.raises(InvalidBatch) as error:
            read((x(2), boxes(1, 4, 3)))
        message = str(error.value)
        assert "batch[0]: 2 in Tensor[2, 3]" in message
        assert "batch[1]: 3 in [{'boxes': Tensor[1, 4]" in message
        assert "as many entries" in message

    def test_ragged_tensors_of_another_number(self) -> None:
        with pytest.raises(InvalidBatch, match=r"batch\[1\]\[2\]: 5 in Tensor\[5, 3\]"):
            read((x(2), [x(1), x(4), x(5)]))

    @pytest.mark.parametrize("raising", [True, False])
    def test_a_guess_is_named(self, raising: bool) -> None:
        """Two targets of a batch of two samples, as the default collate function yields them."""

        def nll(outputs: Tensor, targets: Any) -> Tensor:
            if raising:
                return oracle.nll(outputs, targets[0]) + oracle.nll(outputs, targets[1])
            return Classification().nll(outputs, *targets)

        model, y = nn.Linear(3, 3), torch.zeros(2).long()
        with pytest.raises((InvalidBatch, IndexError, ValueError)) as error:
            EWC(model, Custom(nll)).consolidate([[x(2), [y, y]]])
        text = "".join([str(error.value), *getattr(error.value, "__notes__", [])])
        assert "batch[1] was read as one entry per sample" in text
        assert "yield a tuple" in text
        if raising:
            ewc = EWC(model, Custom(nll))
            ewc.consolidate((x, tuple(targets)) for x, targets in [[x(2), [y, y]]])

    def test_inputs_of_different_kinds_are_no_list_of_samples(self) -> None:
        for state in (torch.zeros(1, 2, 8), torch.zeros(1, 3).long()):
            with pytest.raises(InvalidBatch, match=r"batch\[0\]\[1\]: 1 in Tensor\[1, "):
                read(((x(2), state), torch.arange(2)))

    def test_entries_are_dense(self) -> None:
        with pytest.raises(InvalidBatch, match=r"must be dense; found .* at batch\[1\]"):
            read((x(2), [torch.eye(3).to_sparse(), torch.eye(2).to_sparse()]))

    def test_the_ways_out_work(self) -> None:
        ids = torch.arange(3)
        assert read((ragged(1, 4, 5), ragged(2, 3, 4), ids)).size == 3
        with pytest.raises(InvalidBatch):
            read((ragged(1, 4, 5), ragged(2, 3, 4)))


class Detector(nn.Module):
    """An image to the logits of as many slots as there may be objects."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2 * 3, dtype=torch.float64)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images).unflatten(1, (2, 3))


def set_loss(outputs: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
    """The loss of a set of objects: their number may differ."""
    return torch.stack(
        [
            nn.functional.cross_entropy(slots[: len(each["c"])], each["c"], reduction="sum")
            for slots, each in zip(outputs, targets, strict=True)
        ]
    )


@pytest.mark.filterwarnings("ignore::ewc.SlowPathWarning")
class TestFisher:
    @pytest.mark.parametrize("counts", [(2, 2), (1, 2), (2, 1, 1, 2, 2)])
    @pytest.mark.parametrize("container", [list, tuple])
    def test_of_detection_targets(self, counts: tuple[int, ...], container: type) -> None:
        torch.manual_seed(0)
        n = len(counts)
        model, images = Detector(), torch.randn(n, 4, dtype=torch.float64)
        targets = container({"c": torch.randint(3, (count,))} for count in counts)

        def losses(model: nn.Module, i: int) -> Tensor:
            return set_loss(model(images[i : i + 1]), [targets[i]])

        ewc = EWC(model, Custom(set_loss))
        ewc.consolidate([(images, targets)])
        expected = oracle.squares(model, losses, n)
        assert_close(ewc.fisher, {name: each / n for name, each in expected.items()}, 1e-12)

    def test_of_ragged_inputs(self) -> None:
        """The model is called with a list, as in training."""

        class Mean(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(NETWORK, 2, dtype=torch.float64)

            def forward(self, sequences: list[Tensor]) -> Tensor:
                return torch.stack([self.layer(each).tanh().mean(0) for each in sequences])

        torch.manual_seed(0)
        model, y = Mean(), torch.tensor([0, 1, 1, 0])
        batches = [(ragged(2, 5, 1, 3), y), (ragged(2, 2), y[:2]), (ragged(4, 2), y[:2])]

        ewc = EWC(model, Classification())
        summary = ewc.consolidate(iter(batches))
        assert "lists of objects" in summary.reasons["layer.weight"]
        expected = {name: 0 for name, _ in model.named_parameters()}
        for inputs, targets in batches:

            def losses(
                model: nn.Module, n: int, inputs: Any = inputs, targets: Any = targets
            ) -> Tensor:
                return oracle.nll(model([inputs[n]]), targets[n : n + 1])

            for name, each in oracle.squares(model, losses, len(targets)).items():
                expected[name] += each / 8
        assert_close(ewc.fisher, expected, 1e-12)
