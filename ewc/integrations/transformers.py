"""The penalty in the Trainer of Hugging Face's transformers, once for each optimizer step.

The Trainer divides a loss by the accumulation steps only if the loss is a mean over one batch. If
the model or the loss function has already divided by the items of the whole accumulated batch, the
Trainer does not, and a penalty added to such a loss would count once for every batch. Only the
Trainer knows which case it is, so the penalty must be added inside the Trainer.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn

from ewc import EWC

FILE = "ewc.pt"
"""The file with the state of `ewc`, beside the model's weights in each checkpoint."""


class EWCMixin:
    """A mixin that adds the EWC penalty to a Trainer.

    Derive a class from `EWCMixin` and `Trainer` (or a subclass of `Trainer`), in this order. The
    mixin adds the penalty to the loss of every training step, but not in evaluation. It writes
    `ewc.pt` wherever the model is saved, also into checkpoints, and reads this file in
    `train(resume_from_checkpoint=...)`. It does not consolidate: after each task, call
    `regularizer.consolidate(trainer.get_train_dataloader())`.

    Args:
        *args: Passed on to the Trainer.
        ewc: The `EWC` or `OnlineEWC` of the Trainer's model.
        **kwargs: Passed on to the Trainer.

    Raises:
        TypeError: `ewc` is not an `EWC`.
        ValueError: `model_init` is passed, which would build another model than `ewc` protects.

    Example:
        >>> class ContinualTrainer(EWCMixin, Trainer): ...
        >>> trainer = ContinualTrainer(model=model, args=args, train_dataset=data, ewc=regularizer)
    """

    # The Trainer's own.
    args: Any
    model_accepts_loss_kwargs: bool
    compute_loss_func: Any
    current_gradient_accumulation_steps: int

    def __init__(self, *args: Any, ewc: EWC, **kwargs: Any) -> None:
        if not isinstance(ewc, EWC):
            raise TypeError(f"ewc must be an EWC or OnlineEWC; found {type(ewc).__name__}.")
        super().__init__(*args, **kwargs)
        if getattr(self, "model_init", None) is not None:
            raise ValueError(
                "The Trainer must train the model that ewc protects; found model_init, which makes "
                "another one. Fix: pass model=..."
            )
        self.ewc = ewc

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss; in training, with the penalty."""
        found = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if not model.training:
            return found
        loss, *outputs = found if return_outputs else (found,)
        penalty = self.ewc().to(loss.device)
        if self._is_scaled(num_items_in_batch):
            penalty = penalty / self.current_gradient_accumulation_steps
        loss = loss + penalty
        return (loss, *outputs) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save the model as the Trainer does, and the state of `ewc` beside it."""
        folder = self.args.output_dir if output_dir is None else output_dir
        state = self.ewc.state_dict(full=True)  # a collective, so on every process
        if self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            torch.save(state, os.path.join(folder, FILE))
        super().save_model(output_dir, *args, **kwargs)  # type: ignore[misc]

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train as the Trainer does; when it resumes, load the state of `ewc` as well."""
        folder = resume_from_checkpoint
        if folder is True:
            from transformers.trainer_utils import get_last_checkpoint

            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            path = os.path.join(str(folder), FILE)
            self.ewc.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the Trainer will not divide the loss by the accumulation steps."""
        # As in `Trainer.training_step`, which computes this inline. Before transformers 5.19 there
        # was no such attribute.
        is_scaled: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if is_scaled is not None:
            return is_scaled
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(by_model or self.compute_loss_func is not None)
