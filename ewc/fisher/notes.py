"""Errors of the user's model, forward and likelihood say where they were raised, and on what.

The model runs on single samples, which it may never have seen, and an error shows their shapes. So
an exception gets a note (PEP 678) that says which batch it was, and cut to how many samples; it
keeps its type and its message. An `InvalidBatch` is raised again on the whole batch, where it shows
the shapes of the loader.
"""

import textwrap
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch

from ewc.data.batch import Batch
from ewc.data.lists import Known
from ewc.errors import InvalidBatch

_SAMPLES = "_ewc_samples"  # the number of samples that the code ran on which raised an exception

_WHOLE = 1024
"""Up to this many samples a batch is run as a whole, to show its shapes."""


@contextmanager
def calling(samples: int) -> Iterator[None]:
    """Mark exceptions of the user's code with the number of samples that it ran on."""
    try:
        yield
    except Exception as error:
        vars(error).setdefault(_SAMPLES, samples)
        raise


def is_users(error: Exception) -> bool:
    """Whether the user's code raised an exception, or what it returned is not valid."""
    return isinstance(error, InvalidBatch) or _SAMPLES in vars(error)


@contextmanager
def explaining(
    which: str,
    batch: Batch,
    run_whole: Callable[[Batch], object] | None,
    known: Known,
    dtypes: Collection[torch.dtype],
) -> Iterator[None]:
    """Explain the exceptions of the user's code that are raised inside the context.

    Args:
        which: The batch or batches, as the loader counts them.
        batch: The batch, as the loader yielded it.
        run_whole: Runs a whole batch; None if that is not possible.
        known: What the batches have shown about the lists in them.
        dtypes: Of the parameters.
    """
    try:
        yield
    except Exception as error:
        samples = vars(error).pop(_SAMPLES, None)
        found = textwrap.shorten(batch.description, 300, placeholder=" ...")
        if type(error) is InvalidBatch:  # a subclass of the user's own stays what it is
            text = None
            hint = ""
            if run_whole is not None and samples is not None and samples < batch.size <= _WHOLE:
                text, hint = _on_whole(run_whole, batch)
            if text is None:
                text = str(error)
                if samples is not None and samples < batch.size:
                    hint = known.hint or hint
                    text += f" This was the batch {found}, cut to {_counted(samples)}.{hint}"
            raise InvalidBatch(f"in {which} (counted from 0): {text}") from error
        if samples is not None:
            add_note(
                error,
                f"in {which} (counted from 0), {found}, cut to {_counted(samples)}: model, forward "
                f"and likelihood must run on one sample alone.{known.hint}"
                f"{_on_dtypes(error, batch, dtypes)}",
            )
        raise


def add_note(error: BaseException, note: str) -> None:
    """`error.add_note(note)`, which Python has from 3.11 on."""
    error.__notes__ = [*getattr(error, "__notes__", ()), note]  # type: ignore[attr-defined]


def _on_whole(run: Callable[[Batch], object], batch: Batch) -> tuple[str | None, str]:
    """The message of the `InvalidBatch` that the whole batch raises; or what to say if it does not.

    Another exception says nothing about this one.
    """
    try:
        run(batch)
    except InvalidBatch as error:
        return str(error), ""
    except Exception:
        return None, ""
    return None, (
        " The whole batch is valid, so something depends on the number of samples: a squeeze() "
        "without a dimension (use squeeze(-1)), a view with a fixed size."
    )


def _on_dtypes(error: Exception, batch: Batch, dtypes: Collection[torch.dtype]) -> str:
    """What to say of an error about types, if the batch has others than the parameters.

    Wrappers that cast inputs, as for bfloat16 parameters, are taken off the model.
    """
    floating = {each.dtype for each in batch.tensors if each.is_floating_point()}
    if "type" not in str(error) or not floating - set(dtypes):
        return ""
    found, expected = (
        ", ".join(sorted(str(each).removeprefix("torch.") for each in kinds))
        for kinds in (floating, dtypes)
    )
    return (
        f" Inputs must have the dtype that the model computes in; found {found} beside parameters "
        f"in {expected}. Fix: cast the inputs, in the loader or in forward."
    )


def _counted(samples: int) -> str:
    return "1 sample" if samples == 1 else f"{samples} samples"
