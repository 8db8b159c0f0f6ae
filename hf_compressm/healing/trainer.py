"""A `Trainer` that brings a cut model's predictions back to the full one's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from ..backends import Backend
from ..compat.offloading import device_of
from ..cutting.divergence import Divergence
from ..cutting.passes import called_with
from ..data.healing import collate
from .full import FullModel


@dataclass
class HealingArguments(TrainingArguments):
    """A Trainer's, on the device that the model is on."""

    on: str = "cpu"

    @property
    def device(self) -> torch.device:
        """That of the model."""
        assert super().device  # which sets up the process
        return torch.device(self.on)

    @property
    def n_gpu(self) -> int:
        """One at most, so that the model is not wrapped in DataParallel."""
        return min(1, int(super().n_gpu))

    @property
    def place_model_on_device(self) -> bool:
        """It is where it is."""
        return False


class HealingTrainer(Trainer):
    """Train a model to predict as the full one does.

    Args:
        model: that was cut.
        full: that it was.
        divergence: on held-out text, that the best weights are chosen by.
        backend: of the processes.
        shared: whether they share in the data, or all of it is this process's.
        kwargs: as for `Trainer`.

    Attributes:
        tokens: that this process learnt from.
    """

    def __init__(
        self, model: Any, full: FullModel, divergence: Divergence, backend: Backend, *, shared: bool, **kwargs: Any
    ) -> None:
        self.full, self.divergence, self.backend, self.shared = full, divergence, backend, shared
        self.tokens = torch.zeros((), dtype=torch.int64, device=device_of(model))
        super().__init__(model, data_collator=collate, eval_dataset=divergence.parts, **kwargs)
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Of this process's share."""
        if self.shared:
            return super().get_train_dataloader()
        mine = cast("IterableDataset[Any]", self.train_dataset)
        return DataLoader(mine, batch_size=self.args.per_device_train_batch_size, collate_fn=self.data_collator)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean Kullback-Leibler divergence of the next-token distribution from the full model's, in nats."""
        full, mask = self.full(inputs), inputs["attention_mask"]
        output = model(**called_with(inputs), use_cache=False)
        now = output.logits.float().log_softmax(-1)
        each = F.kl_div(now, full, reduction="none", log_target=True).sum(-1)
        tokens = mask.sum()
        self.tokens += tokens
        loss = (each * mask).sum() / tokens
        return (loss, output) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The divergence on held-out text."""
        tokens = self.accelerator.reduce(self.tokens)
        metrics = {"eval_divergence": self.backend.decide(self.divergence), "eval_tokens": int(tokens)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
