"""What is made of a model for distributed training, refused, and what works in its place.

Each is recognised by its class, or by a mark on its parameters, without an import of its library.
"""

from typing import NamedTuple

from torch import nn

from ewc.model.names import unwrap


class _Refusal(NamedTuple):
    found: str
    fix: str


_FLATTENED = _Refusal(
    "FullyShardedDataParallel, version 1, which flattens them",
    "apply torch.distributed.fsdp.fully_shard in its place (PyTorch 2.12 or later)",
)
_ENGINE = _Refusal(
    "a DeepSpeed engine ({kind})",
    "pass engine.module, which is the model on ZeRO stages 0, 1 and 2; in place of stage 3, "
    "torch.distributed.fsdp.fully_shard (PyTorch 2.12 or later)",
)
_PARTITIONED = _Refusal(
    "parameters that ZeRO stage 3 of DeepSpeed has partitioned",
    "train on stage 1 or 2 and pass engine.module, or with torch.distributed.fsdp.fully_shard "
    "(PyTorch 2.12 or later)",
)
_PIPELINE = _Refusal(
    "a pipeline ({kind}), which divides the model into stages",
    "pass the model from before it was divided, whole on each process, as the module of one stage "
    "has no loss of its own; to shard it, use torch.distributed.fsdp.fully_shard",
)

_REFUSED = (
    (
        {("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")},
        _FLATTENED,
    ),
    (
        {
            ("torch.distributed.pipelining.stage", "_PipelineStageBase"),
            ("torch.distributed.pipelining.schedules", "_PipelineSchedule"),
            ("torch.distributed.pipelining._IR", "Pipe"),
            ("deepspeed.runtime.pipe.engine", "PipelineEngine"),
            ("deepspeed.runtime.pipe.module", "PipelineModule"),
        },
        _PIPELINE,
    ),
    (
        {
            ("deepspeed.runtime.engine", "DeepSpeedEngine"),
            ("deepspeed.inference.engine", "InferenceEngine"),
        },
        _ENGINE,
    ),
)
"""The classes by module and name, an engine of a pipeline before other engines."""


def check_model(model: object) -> None:
    """Refuse what is no model, and what holds its parameters in a form that cannot be read.

    Raises:
        TypeError: It is no module; or it is, or contains, `FullyShardedDataParallel`, a DeepSpeed
            engine or a part of a pipeline; or one of these has divided its parameters.
    """
    refusal = _refusal(model)
    if refusal is not None:
        raise TypeError(
            "model must hold its parameters whole, or sharded by fully_shard or tensor "
            f"parallelism; found {refusal.found}. Fix: {refusal.fix}."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; found {type(model).__name__}.")


def _refusal(model: object) -> _Refusal | None:
    modules = [*unwrap(model).modules()] if isinstance(model, nn.Module) else []
    candidates: list[object] = [model, *modules]
    for each in candidates:
        classes = {(base.__module__, base.__name__) for base in type(each).__mro__}
        for kinds, refusal in _REFUSED:
            if not classes.isdisjoint(kinds):
                return refusal._replace(found=refusal.found.format(kind=type(each).__name__))
    for parameter in (p for module in modules for p in module._parameters.values()):
        if hasattr(parameter, "_fsdp_flattened"):
            return _FLATTENED
        if hasattr(parameter, "ds_id"):
            return _PARTITIONED
    return None
