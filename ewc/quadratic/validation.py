"""Validation of a saved state: everything that is wrong with it, at once."""

import math
from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ewc._checks import listed_names
from ewc.model.names import find, named_parameters, nearest
from ewc.processes.layout import is_sharded, local
from ewc.quadratic.problems import Problems
from ewc.quadratic.quadratic import Quadratic, fits, n_rows
from ewc.quadratic.values import (
    equal,
    is_array,
    is_foreign,
    plain_float,
    plain_int,
    plain_name,
    plain_names,
    plain_tensor,
    shown,
    tensor_of,
)

VERSION = 1
"""The version of the form that this release writes."""

TABLES = ("fisher", "anchor", "constant", "free_rows")
"""The keys of a state whose value is a dict with an entry for every parameter."""


class Reader:
    """Validates a saved state and takes its quadratics out.

    Attributes:
        problems: Everything that is wrong; nothing else may be used unless this is empty.
        names: The names that the state has entries for, in its order.
        parameters: The model's parameters that the state has a quadratic for.
        grown: Descriptions of parameters with more rows than the state.
    """

    def __init__(
        self, saved: Mapping[Any, Any], model: nn.Module, configuration: Mapping[str, Any]
    ) -> None:
        self.problems = Problems()
        self.names: dict[str, None] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self.grown: list[str] = []
        self._saved = saved
        self._model = model
        self._configuration = configuration

    def read(self) -> tuple[dict[str, Quadratic], int]:
        """The quadratics by name, and the number of tasks."""
        self._check_header()
        found = self._get("n_tasks", 0)
        n_tasks = plain_int(found)
        if n_tasks is None or n_tasks < 0:
            self._refuse(f"'n_tasks' must be an integer >= 0; found {shown(found)}")
            n_tasks = 0
        found = self._get("parameters", [])
        names = plain_names(found)
        if names is None:
            self._refuse(f"'parameters' must be a list of names; found {type(found).__name__}")
            return {}, 0
        self.names = dict.fromkeys(names)
        if len(self.names) < len(names):
            self._refuse(
                "'parameters' must name each parameter once; found "
                f"{len(names)} names, of which {len(self.names)} are different"
            )
            return {}, 0
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

    def _refuse(self, text: str) -> None:
        """Record a problem of which there are only a few."""
        self.problems.add(text, text)

    def _get(self, key: str, default: Any) -> Any:
        if key not in self._saved:
            self._refuse(f"missing key {key!r}")
            return default
        return self._saved[key]

    def _check_header(self) -> None:
        found = self._get("version", VERSION)
        version = plain_int(found)
        if version is None or not 1 <= version <= VERSION:
            self._refuse(
                f"'version' must be an integer in [1, {VERSION}]; found {shown(found)}. Fix: load "
                "a later version with a later release"
            )
        for key, own in self._configuration.items():
            found = self._get(key, own)
            if not equal(found, own):
                self._refuse(
                    f"{key!r} must be {shown(own)}, as in this object; found {shown(found)}. "
                    "Fix: build the object as it was when the state was saved"
                )
        expected = ["version", *self._configuration, "n_tasks", "parameters", *TABLES]
        for key, value in self._saved.items():
            if key in expected:
                continue
            if isinstance(value, Mapping) and {"version", "kind"} <= value.keys():
                hint = f"it is a state itself. Fix: load state[{shown(key)}]"
                self._refuse(f"unexpected key {shown(key)} ({hint})")
            else:
                self.problems.add("unexpected keys", partial(_unexpected, "key ", key, expected))

    def _table(self, key: str) -> Mapping[str, Any]:
        """One dict of the state, which must have an entry for every name and no other."""
        table = self._get(key, {})
        if not isinstance(table, Mapping):
            self._refuse(f"{key!r} must be a dict by name; found {type(table).__name__}")
            return {}
        if key not in self._saved or "parameters" not in self._saved:
            return table
        self.problems.extend(
            f"missing entries of {key!r}",
            (f"missing {key}[{name!r}]" for name in self.names if name not in table),
        )
        self.problems.extend(
            f"unexpected entries of {key!r}",
            (
                partial(self._unexpected_entry, key, name)
                for name in table
                if name not in self.names
            ),
        )
        return table

    def _unexpected_entry(self, key: str, name: object) -> str:
        return (
            f"unexpected {key}[{shown(name)}]: not among the state's own 'parameters' "
            f"({_nearest(name, self.names)})"
        )

    def _is_of_another_model(self) -> bool:
        if any(find(self._model, name) is not None for name in self.names):
            return False
        self._refuse(
            "at least one of its parameters must be in the model; found "
            f"{listed_names(self.names) or 'none'} in the state, and "
            f"{listed_names(self._known) or 'none'} in the model"
        )
        return True

    def _parameter(self, name: str) -> nn.Parameter | None:
        """The model's parameter of this name; None if it cannot be loaded."""
        parameter = find(self._model, name)
        if parameter is None:
            self.problems.add("names that the model does not have", partial(self._unknown, name))
            return None
        if parameter.is_meta:
            self.problems.add(
                "parameters without values",
                f"the parameter {name!r} must have values; found it on the meta device. Fix: "
                "materialise the model first",
            )
            return None
        return parameter

    def _unknown(self, name: str) -> str:
        hint = nearest(name, self._known)
        return f"unexpected {name!r}: the model has no such parameter ({hint})"

    @cached_property
    def _known(self) -> list[str]:
        """The names of the model's parameters."""
        return list(named_parameters(self._model))

    def _quadratic(
        self, name: str, parameter: nn.Parameter, entries: Mapping[str, Any]
    ) -> Quadratic | None:
        """The quadratic of one parameter; None if all rows are free, or something is wrong."""
        fisher, anchor = (
            self._tensor(key, name, entries[key], parameter) if key in entries else None
            for key in ("fisher", "anchor")
        )
        constant = plain_float(entries.get("constant", 0.0))
        if constant is None or not 0 <= constant < math.inf:
            self.problems.add(
                "constants",
                f"constant[{name!r}] must be a finite float >= 0; found "
                f"{shown(entries['constant'])}",
            )
            return None
        if fisher is None or anchor is None or len(entries) < len(TABLES):
            return None
        if fisher.shape != anchor.shape:
            self.problems.add(
                "shapes",
                f"fisher[{name!r}] must have the shape of its anchor, {tuple(anchor.shape)}; found "
                f"{tuple(fisher.shape)}",
            )
            return None
        free = plain_int(entries["free_rows"])
        if free is None or not 0 <= free <= n_rows(fisher):
            self.problems.add(
                "numbers of free rows",
                f"free_rows[{name!r}] must be an integer in [0, {n_rows(fisher)}]; found "
                f"{shown(entries['free_rows'])}",
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
            self.problems.add(
                "sharded parameters with rows that are not in the state",
                f"all rows of {name!r} must be in the state, as it is sharded; found {covered} "
                f"of {n_rows(parameter)}. Fix: load into a model that is not sharded, and shard it "
                "afterwards",
            )
            return None
        if free:
            fisher, anchor = fisher[:covered], anchor[:covered]
        # Copies, even if device and dtype agree: the tensors in the state dict are the caller's.
        return Quadratic(_copy(fisher), _copy(anchor), constant)

    def _tensor(self, key: str, name: str, found: object, parameter: nn.Parameter) -> Tensor | None:
        """One Fisher or anchor; None if it does not fit its parameter.

        Values are looked at last: in a file, an expanded tensor of any size takes a few bytes.
        """
        rule, what = self._fault(key, found, parameter) or ("", "")
        tensor = None
        if not rule:
            tensor = plain_tensor(found) if isinstance(found, Tensor) else tensor_of(found)
            part = local(tensor)
            if not part.isfinite().all():
                rule, what = "be finite", "infinite or NaN entries"
            elif key == "fisher" and (part < 0).any():
                rule, what = "be >= 0", f"an entry of {part.min():.4g}"
        if rule:
            self.problems.add(f"entries of {key!r}", f"{key}[{name!r}] must {rule}; found {what}")
            return None
        return tensor

    def _fault(self, key: str, found: Any, parameter: nn.Parameter) -> tuple[str, str] | None:
        """What must be so for a Fisher or an anchor, and is not, before its values are read."""
        if isinstance(found, Tensor):
            if is_foreign(found) and not found.is_nested:
                return "be a plain tensor", f"{type(found).__name__}, which wraps others"
            if found.is_nested or found.layout is not torch.strided or found.is_meta:
                kind = "the meta device" if found.is_meta else str(found.layout)
                return "be dense and have values", "a nested tensor" if found.is_nested else kind
        elif not is_array(found):
            return "be a tensor", type(found).__name__
        is_complex = key == "anchor" and parameter.is_complex()
        allowed = ("complex64", "complex128") if is_complex else ("float32", "float64")
        dtype = str(getattr(found.dtype, "name", found.dtype)).removeprefix("torch.")
        rules, whats = [], []
        if not fits(torch.Size(found.shape), parameter.shape):
            rules.append(
                f"have the parameter's shape {tuple(parameter.shape)}, or fewer rows in dimension 0"
            )
            whats.append(str(tuple(found.shape)))
        if dtype not in allowed:
            rules.append(f"have dtype torch.{' or torch.'.join(allowed)}")
            whats.append(dtype)
        return (" and ".join(rules), " and ".join(whats)) if rules else None


def _unexpected(what: str, name: object, known: Iterable[str]) -> str:
    return f"unexpected {what}{shown(name)} ({_nearest(name, known)})"


def _nearest(name: object, known: Iterable[str]) -> str:
    return nearest(plain_name(name) if isinstance(name, str) else shown(name), known)


def _copy(tensor: Tensor) -> Tensor:
    """A contiguous copy of a tensor."""
    return tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
