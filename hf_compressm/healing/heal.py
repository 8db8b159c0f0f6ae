"""Heal a cut model: a short distillation from the full one, of what the cut changed or of all parameters."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..backends import processes
from ..compat import device_of, recompute_activations_
from ..config import CompreSSMConfig
from ..cutting import Plan
from ..cutting.divergence import Divergence
from ..cutting.scans import quick_scans
from ..data.healing import HealingText
from ..interrupts import restoring, uninterrupted
from ..layers import find_layers
from ..reporting.record import record_healing_
from ..reporting.report import CompressionReport
from ..reporting.rows import Healing
from .callbacks import Bar, KeepBest
from .full import FullModel
from .optimizer import MasterAdamW
from .rate import learning_rate
from .traces import without_trace

logger = logging.get_logger(__name__)

WARMUP = 0.1
"""Share of the steps."""
STEP_TOKENS = 2**13
EVALUATIONS, PATIENCE = 20, 5
"""On held-out text: so many, the first of them of the cut, and after so many rises, one after another, it stops."""
CLASSES = 2**27
"""Of all tokens of a forward pass, times the size of the vocabulary: a step makes several of it where it is more."""
LARGE = 2**28
"""Parameters of a model whose activations are computed again in the backward pass."""


def check_can_heal(model: Any, config: CompreSSMConfig) -> None:
    """Refuse what can't be healed, before the long part.

    Raises:
        ValueError: with what to do instead.
    """
    if getattr(model, "base_model", model) is model:
        why = f"{type(model).__name__} has no head, and healing distils next-token predictions: give one with a head"
    elif any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        why = "gradients vanish in float16: load the model with dtype=torch.bfloat16 or torch.float32"
    elif any(parameter.device.type == "meta" for parameter in model.parameters()):
        why = "some weights are offloaded: load the whole model on GPUs or on the CPU"
    elif (several := max(processes(), int(os.environ.get("WORLD_SIZE", "1")))) > 1:
        why = f"this is one of {several} processes: heal in one, and load the healed model in all"
    else:
        return
    raise ValueError(f"This model can't be healed here: {why}, or drop heal={config.heal}. Nothing was changed.")


def cut_and_heal_(
    model: PreTrainedModel,
    plan: Plan,
    text: HealingText,
    held_out: Sequence[Mapping[str, Tensor]],
    config: CompreSSMConfig,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
) -> CompressionReport:
    """Make a cut, and train the model to predict as it did before. In place.

    At the end, also after an error or an interrupt of the training, it has the weights of the lowest divergence on held-out
    text: those of the cut if none were better. No other trace of the training is left in the model or the process.

    Args:
        model, plan, optimizer: as for `Plan.apply_`. The optimizer is not used to heal.
        text: to learn from.
        held_out: to judge by.
        config: with `heal` tokens.

    Returns:
        the model's report, which tells what healing did, too.

    Raises:
        ValueError: as `Plan.apply_`; nothing is changed then.
    """
    if not plan.realizations:
        return plan.apply_(model, optimizer)
    layers = [layer for layer in find_layers(model) if layer.index in plan.realizations]
    changed = {
        layer.name: {*layer.system_parameters(), *plan.realizations[layer.index].parameter_cuts(layer)}
        for layer in layers
    }
    every = config.heal_parameters == "all"
    full = FullModel(model, {} if every else changed)
    with quick_scans(layers):  # where no gradient is wanted
        divergence = Divergence(model, held_out)
        plan.apply_(model, optimizer)
        names = {f"{mixer}.{name}" for mixer in changed for name in changed[mixer]}
        parameters = [parameter for name, parameter in model.named_parameters() if every or name in names]
        return heal_(model, full, parameters, text, divergence, config)


def heal_(
    model: PreTrainedModel,
    full: FullModel,
    parameters: Sequence[nn.Parameter],
    text: HealingText,
    divergence: Divergence,
    config: CompreSSMConfig,
) -> CompressionReport:
    """Train some parameters of a model that was cut to predict as the full one does. See `cut_and_heal_`."""
    keep, began = KeepBest(parameters, PATIENCE), time.perf_counter()

    def finish() -> None:
        with uninterrupted():
            keep.put_back_()
            if keep.curve:
                record_healing_(model, _row(keep, time.perf_counter() - began, divergence, config), config)

    with restoring(finish), without_trace(model):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        _train_(model, full, text, divergence, config, keep)
    report = cast(CompressionReport, model.compression_report)
    healing = cast(Healing, report.healing)
    if healing.after < healing.before:
        logger.info(
            f"hf_compressm: healed on {healing.tokens} tokens in {healing.seconds:.0f} s: the divergence went from "
            f"{healing.before:.4g} to {healing.after:.4g}."
        )
    else:
        logger.warning(
            f"hf_compressm: healing on {healing.tokens} tokens gained nothing: on held-out text nothing diverged less than the "
            f"cut, {healing.before:.4g}. Its weights are as the cut made them; give more text, like that of the model's use."
        )
    return report


def _train_(
    model: PreTrainedModel,
    full: FullModel,
    text: HealingText,
    divergence: Divergence,
    config: CompreSSMConfig,
    keep: KeepBest,
) -> None:
    from .trainer import HealingArguments, HealingTrainer  # a Trainer takes seconds to import

    device = device_of(model)
    rows = text.without(divergence.parts)
    vocabulary = len(cast(nn.Embedding, model.get_input_embeddings()).weight)
    sequences = max(1, round(STEP_TOKENS / text.tokens_per_sequence))
    if isinstance(rows, Sequence):
        sequences = min(sequences, len(rows))
    parts = math.ceil(sequences / max(1, CLASSES // (vocabulary * text.longest)))
    together = math.ceil(sequences / parts)
    steps = max(1, round(config.heal / (parts * together * text.tokens_per_sequence)))
    rate = learning_rate(keep.parameters, divergence, config.seed)
    logger.info(
        f"hf_compressm: healing in {steps} steps of {parts} x {together} sequences, at a learning rate of {rate:.2g}."
    )
    bar = Bar(steps)
    if sum(p.numel() for p in model.parameters()) >= LARGE and model.supports_gradient_checkpointing:
        recompute_activations_(model)
    with tempfile.TemporaryDirectory() as folder, restoring(bar.close):
        arguments = HealingArguments(
            folder,
            on=str(device),
            use_cpu=device.type == "cpu",
            max_steps=steps,
            per_device_train_batch_size=together,
            gradient_accumulation_steps=parts,
            dataloader_drop_last=True,
            remove_unused_columns=False,
            lr_scheduler_type="cosine",
            warmup_steps=round(WARMUP * steps),
            eval_strategy="steps",
            eval_steps=math.ceil(steps / EVALUATIONS),
            eval_on_start=True,
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            seed=config.seed,
        )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        trainer = HealingTrainer(
            model,
            full,
            divergence,
            args=arguments,
            train_dataset=rows,
            callbacks=[keep, bar],
            optimizers=(MasterAdamW(keep.parameters, lr=rate, weight_decay=0.0), None),
        )
        trainer.train()
        trainer.accelerator.free_memory()


def _row(keep: KeepBest, seconds: float, divergence: Divergence, config: CompreSSMConfig) -> Healing:
    return Healing(
        parameters=config.heal_parameters,
        tokens=keep.curve[-1][0],
        seconds=seconds,
        before=keep.curve[0][1],
        after=keep.best,
        held_out_tokens=divergence.tokens,
    )
