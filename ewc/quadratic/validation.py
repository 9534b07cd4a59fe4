"""Validation of a saved state: everything that is wrong with it, at once."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ewc.model.names import find, named_parameters, nearest
from ewc.processes.layout import is_sharded, local
from ewc.quadratic.quadratic import Quadratic, fits, n_rows

VERSION = 1
"""The version of the form that this release writes."""

TABLES = ("fisher", "anchor", "constant", "free_rows")
"""The keys of a state whose value is a dict with an entry for every parameter."""


class Reader:
    """Validates a saved state and takes its quadratics out.

    Attributes:
        problems: Everything that is wrong; nothing else may be used unless this is empty.
        names: The names that the state has entries for.
        parameters: The model's parameters that the state has a quadratic for.
        grown: Descriptions of parameters with more rows than the state.
    """

    def __init__(
        self, saved: Mapping[Any, Any], model: nn.Module, configuration: Mapping[str, Any]
    ) -> None:
        self.problems: list[str] = []
        self.names: list[str] = []
        self.parameters: dict[str, nn.Parameter] = {}
        self.grown: list[str] = []
        self._saved = saved
        self._model = model
        self._configuration = configuration

    def read(self) -> tuple[dict[str, Quadratic], int]:
        """The quadratics by name, and the number of tasks."""
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
        tables = {key: self._table(key) for key in TABLES}
        if "parameters" in self._saved and self._is_of_another_model():
            return {}, 0

        quadratics = {}
        for name in self.names:
            parameter = self._parameter(name)
            if parameter is None:
                continue
            entries = {key: table[name] for key, table in tables.items() if name in table}
            quadratic = self._quadratic(name, parameter, entries)
            if quadratic is not None:
                quadratics[name] = quadratic
                self.parameters[name] = parameter
        return quadratics, n_tasks

    def _get(self, key: str, default: Any) -> Any:
        if key not in self._saved:
            self.problems.append(f"missing key {key!r}")
            return default
        return self._saved[key]

    def _check_header(self) -> None:
        version = self._get("version", VERSION)
        if not _is_int(version) or not 1 <= version <= VERSION:
            self.problems.append(
                f"'version' must be an integer in [1, {VERSION}]; found {version!r}. Fix: load a "
                "later version with a later release"
            )
        for key, own in self._configuration.items():
            found = self._get(key, own)
            if not _equal(found, own):
                self.problems.append(
                    f"{key!r} must be {_shown(own)}, as in this object; found {_shown(found)}. "
                    "Fix: build the object as it was when the state was saved"
                )
        expected = ["version", *self._configuration, "n_tasks", "parameters", *TABLES]
        for key, value in self._saved.items():
            if key in expected:
                continue
            if isinstance(value, Mapping) and {"version", "kind"} <= value.keys():
                hint = f"it is a state itself. Fix: load state[{key!r}]"
            else:
                hint = nearest(str(key), expected)
            self.problems.append(f"unexpected key {key!r} ({hint})")

    def _table(self, key: str) -> Mapping[str, Any]:
        """One dict of the state, which must have an entry for every name and no other."""
        table = self._get(key, {})
        if not isinstance(table, Mapping):
            self.problems.append(f"{key!r} must be a dict by name; found {type(table).__name__}")
            return {}
        if key not in self._saved or "parameters" not in self._saved:
            return table
        self.problems += [f"missing {key}[{name!r}]" for name in self.names if name not in table]
        self.problems += [
            f"unexpected {key}[{name!r}]: not among the state's own 'parameters' "
            f"({nearest(str(name), self.names)})"
            for name in table
            if name not in self.names
        ]
        return table

    def _is_of_another_model(self) -> bool:
        if any(find(self._model, name) is not None for name in self.names):
            return False
        self.problems.append(
            "at least one of its parameters must be in the model; found "
            f"{_listed(self.names)} in the state, and {_listed([*named_parameters(self._model)])} "
            "in the model"
        )
        return True

    def _parameter(self, name: str) -> nn.Parameter | None:
        """The model's parameter of this name; None if it cannot be loaded."""
        parameter = find(self._model, name)
        if parameter is None:
            hint = nearest(name, named_parameters(self._model))
            self.problems.append(f"unexpected {name!r}: the model has no such parameter ({hint})")
            return None
        if parameter.is_meta:
            self.problems.append(
                f"the parameter {name!r} must have values; found it on the meta device. Fix: "
                "materialise the model first"
            )
            return None
        return parameter

    def _quadratic(
        self, name: str, parameter: nn.Parameter, entries: Mapping[str, Any]
    ) -> Quadratic | None:
        """The quadratic of one parameter; None if all rows are free, or something is wrong."""
        n_problems = len(self.problems)
        for key in ("fisher", "anchor"):
            if key in entries:
                self._check_tensor(key, name, entries[key], parameter)
        constant = entries.get("constant", 0.0)
        if not isinstance(constant, float) or not 0 <= constant < math.inf:
            self.problems.append(
                f"constant[{name!r}] must be a finite float >= 0; found {constant!r}"
            )
        if len(self.problems) > n_problems or len(entries) < len(TABLES):
            return None
        fisher, anchor, free = entries["fisher"], entries["anchor"], entries["free_rows"]
        if fisher.shape != anchor.shape:
            self.problems.append(
                f"fisher[{name!r}] must have the shape of its anchor, {tuple(anchor.shape)}; found "
                f"{tuple(fisher.shape)}"
            )
            return None
        if not _is_int(free) or not 0 <= free <= n_rows(fisher):
            self.problems.append(
                f"free_rows[{name!r}] must be an integer in [0, {n_rows(fisher)}]; found {free!r}"
            )
            return None
        if fisher.shape != parameter.shape:
            self.grown.append(
                f"{name!r} has {parameter.shape[0]} rows, the state {fisher.shape[0]} of them"
            )
        covered = n_rows(fisher) - free
        if covered == 0 and free > 0:
            return None
        if is_sharded(parameter) and covered < n_rows(parameter):
            self.problems.append(
                f"all rows of {name!r} must be in the state, as it is sharded; found {covered} "
                f"of {n_rows(parameter)}. Fix: load into a model that is not sharded, and shard it "
                "afterwards"
            )
            return None
        if free:
            fisher, anchor = fisher[:covered], anchor[:covered]
        # Copies, even if device and dtype agree: the tensors in the state dict are the caller's.
        return Quadratic(
            fisher.detach().clone().contiguous(), anchor.detach().clone().contiguous(), constant
        )

    def _check_tensor(self, key: str, name: str, found: object, parameter: nn.Parameter) -> None:
        """Check one Fisher or anchor against its parameter."""
        label = f"{key}[{name!r}]"
        if not isinstance(found, Tensor):
            self.problems.append(f"{label} must be a tensor; found {type(found).__name__}")
            return
        if found.layout is not torch.strided or found.is_meta:
            kind = "the meta device" if found.is_meta else str(found.layout)
            self.problems.append(f"{label} must be dense and have values; found {kind}")
            return
        if not fits(found.shape, parameter.shape):
            self.problems.append(
                f"{label} must have the parameter's shape {tuple(parameter.shape)}, or fewer rows "
                f"in dimension 0; found {tuple(found.shape)}"
            )
        is_complex = key == "anchor" and parameter.is_complex()
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
            self.problems.append(f"{label} must be finite; found infinite or NaN entries")
        elif key == "fisher" and (part < 0).any():
            self.problems.append(f"{label} must be >= 0; found an entry of {part.min():.4g}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _equal(found: Any, own: Any) -> bool:
    if isinstance(found, Mapping) and isinstance(own, Mapping):
        return found.keys() == own.keys() and all(_equal(found[key], own[key]) for key in own)
    if isinstance(found, Tensor) and isinstance(own, Tensor):
        return torch.equal(found.cpu(), own.cpu())
    if isinstance(found, (Mapping, Tensor)) or isinstance(own, (Mapping, Tensor)):
        return False
    return bool(found == own)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_shown(one)}' for key, one in value.items())}}}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value)


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3])) or "none"
    return shown + (", ..." if len(names) > 3 else "")
