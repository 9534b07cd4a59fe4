"""What to do about a model that falls back to the loop, by the reason."""

_DEFAULT = (
    "make the forward run under torch.func.vmap, or add a rule for the operation (ewc.fisher.rule)"
)

_FIXES = {
    "differentiates by autograd": "differentiate with torch.func.grad or vjp inside the forward",
    "differ between samples": (
        "weight with a mask of a fixed size (torch.where) instead of selecting by values, or use "
        "batches whose samples agree"
    ),
    "lists of objects": "let the loader yield tensors in place of the objects",
    "draws random numbers": "draw none in eval mode, or pass what is drawn as an input",
    "generator of its own": "draw before the consolidation, and pass what is drawn as an input",
    "scripted module": "use the module as it is, without torch.jit.script",
    "no tensor to verify": "return tensors from the forward",
    "changes the shape": "use the method without the underscore, such as unsqueeze for unsqueeze_",
    "as another dtype": "write before the view, or write its real and imaginary parts",
    "into the memory of a detached": "write into the tensor itself",
    "into a view": "write before the view, or assign its value to a new tensor",
    "samples into a parameter": "write into a clone of the parameter",
    "memory that all samples share": "return the new value instead of writing it in place",
    "register a hook": "register the hook on the module, or change the value in the forward",
    "numpy()": "compute with PyTorch instead of NumPy",
}
"""What to do, by a part of the reason."""


def fix(reason: str) -> str:
    """What to do, so that a model no longer falls back to the loop for a reason."""
    return next((each for part, each in _FIXES.items() if part in reason), _DEFAULT)
