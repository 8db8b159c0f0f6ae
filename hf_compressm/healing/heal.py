"""Heal a cut model: a short distillation from the full one, of what the cut changed or of all parameters."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..backends import Backend, launched, processes
from ..compat.offloading import device_of
from ..compat.pretrained import has_head, recompute_activations_
from ..compat.sharding import is_sharded
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
    if not has_head(model):
        why = f"{type(model).__name__} has no head, and healing distils next-token predictions: give one with a head"
    elif any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        why = "gradients vanish in float16: load the model with dtype=torch.bfloat16 or torch.float32"
    elif any(parameter.device.type == "meta" for parameter in model.parameters()):
        why = "some weights are offloaded: load the whole model on GPUs or on the CPU"
    elif any(is_sharded(parameter) for parameter in model.parameters()):
        why = "it is sharded: heal it before (compress_pretrained on as many processes), then shard the slim one"
    else:
        why = _what_keeps_apart(device_of(model))
    if why:
        raise ValueError(f"This model can't be healed here: {why}, or drop heal={config.heal}. Nothing was changed.")


def _what_keeps_apart(device: torch.device) -> str:
    """Why this process can't heal a model on a device together with the others that there are; nothing if it can."""
    if processes() == 1:
        why = (
            f"this is one of {launched()} processes (WORLD_SIZE), and does not know the others: start them with torchrun or "
            "accelerate launch, or unset it"
        )
        return why if launched() > 1 else ""
    here = int(os.environ.get("LOCAL_RANK", device.index or 0))
    if device.type == "cuda" and device.index != here:
        return f"it is on {device}, and this is process {here} of its machine: load it with device_map={{'': {here}}}"
    if device.type == "cpu" and dist.get_backend() == "nccl":
        return f"it is on the CPU, and the processes talk by NCCL: load it with device_map={{'': {here}}}"
    return ""


def cut_and_heal_(
    model: PreTrainedModel,
    plan: Plan,
    cut: Callable[[], CompressionReport],
    text: HealingText,
    held_out: Sequence[Mapping[str, Tensor]],
    config: CompreSSMConfig,
    backend: Backend,
) -> CompressionReport:
    """Make a cut, and train the model to predict as it did before. In place.

    At the end, also after an error or an interrupt of the training, it has the weights of the lowest divergence on held-out
    text: those of the cut if none were better. No other trace of the training is left in the model or the process.

    Args:
        model, plan: what is cut, and how.
        cut: makes the cut.
        text: to learn from.
        held_out: to judge by.
        config: with `heal` tokens.
        backend: of the loop that calls. Its processes have the same plan, text that is shared, and held-out text.

    Returns:
        the model's report, which tells what healing did, too.

    Raises:
        ValueError: as `cut`; nothing is changed then.
    """
    if not plan.realizations:
        return cut()
    text.hold_out_(held_out)
    layers = [layer for layer in find_layers(model) if layer.index in plan.realizations]
    changed = {
        layer.name: {
            *layer.system_parameters(),
            *plan.realizations[layer.index].to(layer.device).parameter_cuts(layer),
        }
        for layer in layers
    }
    every = config.heal_parameters == "all"
    full = FullModel(model, {} if every else changed)
    with quick_scans(layers):  # where no gradient is wanted
        divergence = Divergence(model, held_out)
        cut()
        names = {f"{mixer}.{name}" for mixer in changed for name in changed[mixer]}
        parameters = [parameter for name, parameter in model.named_parameters() if every or name in names]
        report = heal_(model, full, parameters, text, divergence, config, backend)
        backend.after_cut_()  # a reducer counts each backward pass
        return report


def heal_(
    model: PreTrainedModel,
    full: FullModel,
    parameters: Sequence[nn.Parameter],
    text: HealingText,
    divergence: Divergence,
    config: CompreSSMConfig,
    backend: Backend,
) -> CompressionReport:
    """Train some parameters of a model that was cut to predict as the full one does. See `cut_and_heal_`."""
    keep, began = KeepBest(parameters, PATIENCE), time.perf_counter()

    def finish() -> None:
        with uninterrupted():
            keep.put_back_()
            if keep.curve:
                record_healing_(model, _row(keep, time.perf_counter() - began, divergence, config), config)

    with restoring(finish), without_trace(model), torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        _train_(model, full, text, divergence, config, keep, backend)
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
    backend: Backend,
) -> None:
    from .trainer import HealingArguments, HealingTrainer  # a Trainer takes seconds to import

    device = device_of(model)
    rows = text.rows
    vocabulary = len(cast(nn.Embedding, model.get_input_embeddings()).weight)
    sequences = max(1, round(STEP_TOKENS / text.tokens_per_sequence))
    if isinstance(rows, list):
        rows = rows * math.ceil(backend.processes / len(rows))  # one for each at least
        sequences = min(sequences, len(rows))
    each = max(1, sequences // backend.processes)
    parts = math.ceil(each / max(1, CLASSES // (vocabulary * text.longest)))
    together = math.ceil(each / parts)
    of_all = backend.processes * parts * together
    steps = max(1, round(config.heal / (of_all * text.tokens_per_sequence)))
    rate = learning_rate(keep.parameters, lambda: backend.decide(divergence), config.seed)
    logger.info(f"hf_compressm: healing in {steps} steps of {of_all} sequences, at a learning rate of {rate:.2g}.")
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
            accelerator_config={"dispatch_batches": False},  # which would join batches of several lengths
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
            backend,
            shared=text.shared,
            args=arguments,
            train_dataset=rows,
            callbacks=[keep, bar],
            optimizers=(MasterAdamW(keep.parameters, lr=rate, weight_decay=0.0), None),
        )
        trainer.train()
        trainer.model_wrapped = model  # no reducer is left to hear of later backward passes
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
