"""Wrappers for distributed training that are refused; their libraries need not be installed."""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ewc import EWC, Classification, OnlineEWC, diagonal_fisher
from tests.support import groups
from tests.support.asserts import raises
from tests.support.tasks import make_model, make_task


@pytest.fixture
def world(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    groups.destroy()


def made_up(home: str, name: str, *bases: type) -> type:
    return type(name, bases or (nn.Module,), {"__module__": home})


def around(kind: type, model: nn.Module) -> nn.Module:
    engine: nn.Module = kind()
    engine.module = model
    return engine


FSDP = "torch.distributed.fsdp.fully_sharded_data_parallel"
ENGINE = made_up("deepspeed.runtime.engine", "DeepSpeedEngine")
CASES = {
    "FSDP 1": (made_up(FSDP, "FullyShardedDataParallel"), "version 1", "fully_shard in its place"),
    "engine": (ENGINE, "a DeepSpeed engine (DeepSpeedEngine)", "engine.module"),
    "subclass": (
        made_up("mine", "MyEngine", ENGINE),
        "a DeepSpeed engine (MyEngine)",
        "engine.module",
    ),
    "inference": (
        made_up("deepspeed.inference.engine", "InferenceEngine"),
        "a DeepSpeed engine (InferenceEngine)",
        "engine.module",
    ),
    "pipeline": (
        made_up("deepspeed.runtime.pipe.engine", "PipelineEngine", ENGINE),
        "a pipeline (PipelineEngine)",
        "before it was divided",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_by_class(case: str) -> None:
    kind, found, fix = CASES[case]
    wrapped = around(kind, make_model())
    for model in (wrapped, nn.Sequential(wrapped), nn.DataParallel(wrapped)):
        for make in (EWC, OnlineEWC):
            with raises(TypeError, found, fix):
                make(model, Classification())
    with raises(TypeError, fix):
        diagonal_fisher(wrapped, make_task(0), Classification())


def test_the_model_inside_an_engine_works() -> None:
    model = make_model()
    assert EWC(around(ENGINE, model).module, Classification()).consolidate(make_task(0)).samples


def test_partitioned_parameters() -> None:
    model = make_model()
    next(model.parameters()).ds_id = 0  # what stage 3 marks them with
    with raises(TypeError, "ZeRO stage 3", "stage 1 or 2"):
        EWC(model, Classification())


@pytest.mark.filterwarnings("ignore:FSDP is switching", "ignore::FutureWarning")
@pytest.mark.parametrize("original", [False, True])
def test_fsdp_1(world: None, original: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(
        make_model(), use_orig_params=original, device_id=torch.device("cpu")
    )
    for each in (model, model.module, nn.Sequential(model)):
        with raises(TypeError, "FullyShardedDataParallel, version 1", "fully_shard in its place"):
            EWC(each, Classification())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_pipelines(world: None) -> None:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, pipeline

    stage = PipelineStage(nn.Linear(3, 4), 0, 1, torch.device("cpu"))
    model = nn.Sequential(OrderedDict(layer=nn.Linear(3, 4)))  # 2.6 fails at a child "0"
    pipe = pipeline(model, mb_args=(torch.randn(2, 3),))
    parts: list[Any] = [stage, ScheduleGPipe(stage, 1), pipe]
    for part in parts:
        with raises(TypeError, f"pipeline ({type(part).__name__})", "before it was divided"):
            EWC(part, Classification())
