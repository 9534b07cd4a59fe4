"""What an `EWC` object has learned, and its form in a checkpoint.

A checkpoint outlives the code that wrote it and is read next to models that have changed since, so
the form carries a version, and everything is validated before anything is believed. A fresh
object's state is written with every entry in place: `torch.distributed.checkpoint` reads into the
tensors of such a template, and would read nothing into an empty one.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ewc.errors import NothingProtectedWarning
from ewc.model.names import find, in_order, named_parameters, nearest
from ewc.processes.layout import full_tensor, is_sharded, local
from ewc.processes.ranks import Ranks
from ewc.quadratic.quadratic import Quadratic, curvature_dtype, fits, snapshot

VERSION = 1

_TABLES = ("fisher", "anchor", "constant", "free_rows")


@dataclass(frozen=True)
class State:
    """What consolidations leave behind. Never changed, always replaced, so that all or nothing is.

    Attributes:
        quadratics: By canonical name, in canonical order.
        n_tasks: How many consolidations there were.
        warned: Names that a `ZeroFisherWarning` was given for.
        warned_slow: Whether a `SlowPathWarning` was given.
    """

    quadratics: Mapping[str, Quadratic] = field(default_factory=dict)
    n_tasks: int = 0
    warned: frozenset[str] = frozenset()
    warned_slow: bool = False

    def clone(self) -> "State":
        """A copy that shares no tensor."""
        return replace(
            self, quadratics={name: one.clone() for name, one in self.quadratics.items()}
        )


def dump(
    state: State,
    parameters: Mapping[str, nn.Parameter],
    configuration: Mapping[str, Any],
    *,
    full: bool,
) -> dict[str, Any]:
    """The state as nested dicts of tensors and plain values, sharing memory with nothing.

    Every one of `parameters` has entries of its present shape. What no consolidation has covered
    yet (all of a fresh object's, the new rows of a grown head) is zero in `fisher`, the present
    values in `anchor`, and counted in `free_rows`.

    Args:
        state: What to write.
        parameters: Those that have a quadratic or will be given one, by canonical name.
        configuration: What gives the numbers their meaning.
        full: Whole tensors in place of sharded ones.
    """
    complete = {}
    free_rows = {}
    for name, parameter in parameters.items():
        known = state.quadratics.get(name)
        present = snapshot(parameter)
        if known is None:
            zero = torch.zeros_like(present, dtype=curvature_dtype(parameter))
            complete[name] = Quadratic(zero, present)
            free_rows[name] = _rows(parameter)
        else:
            known = known.beside(parameter)
            complete[name] = known.grown(present.to(known.anchor.dtype)).clone()
            free_rows[name] = _rows(parameter) - _rows(known.fisher)
    laid_out = full_tensor if full else (lambda tensor: tensor)
    return {
        "version": VERSION,
        **configuration,
        "n_tasks": state.n_tasks,
        "parameters": list(complete),
        "fisher": {name: laid_out(one.fisher) for name, one in complete.items()},
        "anchor": {name: laid_out(one.anchor) for name, one in complete.items()},
        "constant": {name: one.constant for name, one in complete.items()},
        "free_rows": free_rows,
    }


def restore(
    raw: object,
    *,
    model: nn.Module,
    protected: Mapping[str, nn.Parameter],
    configuration: Mapping[str, Any],
    ranks: Ranks,
) -> State:
    """Read what `dump` wrote, on the devices of the model's parameters.

    Args:
        raw: The checkpoint's part.
        model: The unwrapped model.
        protected: The parameters that a consolidation would collect now.
        configuration: The object's own.
        ranks: The processes that load together, if parameters are sharded.

    Raises:
        TypeError: `raw` is not a dict.
        ValueError: It does not fit; everything that is wrong is listed.

    Warns:
        UserWarning: Once, where the model has grown since: those parts are free until the next
            consolidation.
        NothingProtectedWarning: Instead, where the state protects nothing at all.
    """
    if not isinstance(raw, Mapping):
        raise TypeError(
            f"A state must be a dict, as state_dict() returns it; found {type(raw).__name__}."
        )
    reader = _Reader(raw, model, configuration)
    found, n_tasks = reader.read()
    if reader.problems:
        raise ValueError(
            "This state does not fit, and nothing was loaded:\n"
            + "\n".join(f"  - {problem}" for problem in reader.problems)
        )
    ranks.barrier("the state's tensors")
    quadratics = {name: one.beside(reader.parameters[name]) for name, one in found.items()}
    unknown = [name for name in protected if name not in reader.names]
    notes = [*reader.grown, *(f"{name!r} is not in the state" for name in unknown)]
    if not quadratics:
        warnings.warn(
            f"This state protects nothing (n_tasks={n_tasks}): it was saved before the first "
            "consolidation, or after all was forgotten. The penalty is 0 until the next one.",
            NothingProtectedWarning,
            stacklevel=3,
        )
    elif notes:
        warnings.warn(
            "The model has parts that this state does not cover; they are free until the next "
            f"consolidation: {'; '.join(notes)}.",
            stacklevel=3,
        )
    ordered = in_order(model, quadratics)
    return State({name: quadratics[name] for name in ordered}, n_tasks)


class _Reader:
    """Reads one state and collects everything that is wrong with it."""

    def __init__(
        self, raw: Mapping[Any, Any], model: nn.Module, configuration: Mapping[str, Any]
    ) -> None:
        self.problems: list[str] = []
        self.grown: list[str] = []
        self.names: list[str] = []
        self.parameters: dict[str, nn.Parameter] = {}
        self._raw = raw
        self._model = model
        self._configuration = configuration

    def read(self) -> tuple[dict[str, Quadratic], int]:
        """The quadratics by name, and the number of tasks; only valid without problems."""
        self._check_header()
        n_tasks = self._get("n_tasks", 0)
        if not _is_int(n_tasks) or n_tasks < 0:
            self.problems.append(f"'n_tasks' must be an integer >= 0; found {n_tasks!r}")
        names = self._get("parameters", [])
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
            self.problems.append(
                f"'parameters' must be a list of names; found {type(names).__name__}"
            )
            return {}, 0
        self.names = list(names)
        tables = {key: self._table(key) for key in _TABLES}
        if "parameters" in self._raw and self._is_of_another_model():
            return {}, 0

        quadratics = {}
        for name in self.names:
            parameter = find(self._model, name)
            if parameter is None:
                known = nearest(name, named_parameters(self._model))
                self.problems.append(
                    f"unexpected {name!r}: the model has no such parameter ({known})"
                )
                continue
            if parameter.is_meta:
                self.problems.append(
                    f"the parameter {name!r} is on the meta device; materialise the model first"
                )
                continue
            entries = {key: table[name] for key, table in tables.items() if name in table}
            quadratic = self._quadratic(name, parameter, entries)
            if quadratic is not None:
                quadratics[name] = quadratic
                self.parameters[name] = parameter
        return quadratics, n_tasks

    def _check_header(self) -> None:
        version = self._get("version", VERSION)
        if not _is_int(version) or not 1 <= version <= VERSION:
            self.problems.append(
                f"'version' is {version!r}; this release reads versions up to {VERSION}. A later "
                "version needs a later release"
            )
        for key, own in self._configuration.items():
            found = self._get(key, own)
            if not _same(found, own):
                self.problems.append(
                    f"{key!r} is {_show(found)} in the state and {_show(own)} in this object; "
                    "build the object as it was when the state was saved"
                )
        known = ["version", *self._configuration, "n_tasks", "parameters", *_TABLES]
        for key, value in self._raw.items():
            if key in known:
                continue
            if isinstance(value, Mapping) and {"version", "kind"} <= value.keys():
                what = f"it holds a state itself: load state[{key!r}]"
            else:
                what = nearest(str(key), known)
            self.problems.append(f"unexpected key {key!r} ({what})")

    def _get(self, key: str, default: Any) -> Any:
        if key not in self._raw:
            self.problems.append(f"missing key {key!r}")
            return default
        return self._raw[key]

    def _table(self, key: str) -> Mapping[str, Any]:
        """One dict of the state, which must have an entry for every name."""
        table = self._get(key, {})
        if not isinstance(table, Mapping):
            self.problems.append(f"{key!r} must be a dict by name; found {type(table).__name__}")
            return {}
        if key not in self._raw or "parameters" not in self._raw:
            return table
        for name in self.names:
            if name not in table:
                self.problems.append(f"missing {key}[{name!r}]")
        for name in table:
            if name not in self.names:
                near = nearest(str(name), self.names)
                self.problems.append(
                    f"unexpected {key}[{name!r}]: not among the state's own 'parameters' ({near})"
                )
        return table

    def _is_of_another_model(self) -> bool:
        if any(find(self._model, name) is not None for name in self.names):
            return False
        self.problems.append(
            f"none of its parameters is in the model: the state has {_listed(self.names)}, the "
            f"model {_listed(list(named_parameters(self._model)))}"
        )
        return True

    def _quadratic(
        self, name: str, parameter: nn.Parameter, entries: Mapping[str, Any]
    ) -> Quadratic | None:
        """The quadratic of one parameter; None if it is free, wrong or incomplete."""
        before = len(self.problems)
        for key in ("fisher", "anchor"):
            if key in entries:
                is_complex = key == "anchor" and parameter.is_complex()
                self._check_tensor(key, name, entries[key], parameter, is_complex=is_complex)
        constant = entries.get("constant", 0.0)
        if not isinstance(constant, float) or not 0 <= constant < math.inf:
            self.problems.append(
                f"constant[{name!r}] must be a finite float >= 0; found {constant!r}"
            )
        if len(self.problems) > before or len(entries) < len(_TABLES):
            return None
        fisher, anchor, free = entries["fisher"], entries["anchor"], entries["free_rows"]
        if fisher.shape != anchor.shape:
            self.problems.append(
                f"fisher[{name!r}] has shape {tuple(fisher.shape)}, its anchor "
                f"{tuple(anchor.shape)}; they must be the same"
            )
            return None
        if not _is_int(free) or not 0 <= free <= _rows(fisher):
            self.problems.append(
                f"free_rows[{name!r}] must be an integer in [0, {_rows(fisher)}]; found {free!r}"
            )
            return None
        if fisher.shape != parameter.shape:
            self.grown.append(
                f"{name!r} has {parameter.shape[0]} rows, the state {fisher.shape[0]} of them"
            )
        covered = _rows(fisher) - free
        if covered == 0 and free > 0:
            return None
        if is_sharded(parameter) and covered < _rows(parameter):
            self.problems.append(
                f"{name!r} is sharded and has grown: {_rows(parameter)} rows, of which the state "
                f"covers {covered}; load into a model that is not sharded, and shard it then"
            )
            return None
        if free:
            fisher, anchor = fisher[:covered], anchor[:covered]
        # Copies even where device and dtype agree: the state dict stays the caller's.
        return Quadratic(
            fisher.detach().clone().contiguous(), anchor.detach().clone().contiguous(), constant
        )

    def _check_tensor(
        self, key: str, name: str, found: object, parameter: nn.Parameter, *, is_complex: bool
    ) -> None:
        label = f"{key}[{name!r}]"
        if not isinstance(found, Tensor):
            self.problems.append(f"{label} must be a tensor; found {type(found).__name__}")
            return
        if found.layout is not torch.strided or found.is_meta:
            kind = "the meta device" if found.is_meta else str(found.layout)
            self.problems.append(f"{label} must be dense and hold values; found one of {kind}")
            return
        if not fits(found.shape, parameter.shape):
            self.problems.append(
                f"{label} has shape {tuple(found.shape)}, the parameter {tuple(parameter.shape)}; "
                "they must be the same, or the parameter have more rows in dimension 0"
            )
        allowed = (
            (torch.complex64, torch.complex128) if is_complex else (torch.float32, torch.float64)
        )
        if found.dtype not in allowed:
            self.problems.append(
                f"{label} must have dtype {' or '.join(map(str, allowed))}; found {found.dtype}"
            )
            return
        part = local(found)
        if not part.isfinite().all():
            self.problems.append(f"{label} must be finite; it has infinite or NaN entries")
        elif key == "fisher" and (part < 0).any():
            self.problems.append(f"{label} must be >= 0; its smallest entry is {part.min():.4g}")


def _rows(tensor: Tensor) -> int:
    """Entries of dimension 0; a scalar counts as one row."""
    return tensor.shape[0] if tensor.dim() else 1


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _same(found: Any, own: Any) -> bool:
    if isinstance(found, Mapping) and isinstance(own, Mapping):
        return found.keys() == own.keys() and all(_same(found[key], own[key]) for key in own)
    if isinstance(found, Tensor) and isinstance(own, Tensor):
        return torch.equal(found.cpu(), own.cpu())
    if isinstance(found, (Mapping, Tensor)) or isinstance(own, (Mapping, Tensor)):
        return False
    return bool(found == own)


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_show(one)}' for key, one in value.items())}}}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value)


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3])) or "none"
    return shown + (", ..." if len(names) > 3 else "")
