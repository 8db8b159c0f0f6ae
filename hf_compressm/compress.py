"""compress_ and compress_pretrained: measure, plan, and only then change the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .backends import Backend, Loop, find_backend, join, launched, processes
from .compat.offloading import device_of
from .compat.pretrained import has_head
from .config import CompreSSMConfig, ConfigLike
from .cutting import Plan, measure
from .cutting.apply import replaced_parameters
from .cutting.measuring import seconds_for
from .cutting.optimizer import as_list, check_optimizers
from .cutting.sizes import check_targets
from .cutting.snapshot import undone_on_error
from .data.evaluation import Evaluation, describe, evaluation_ids
from .data.evaluation import evaluate as evaluation
from .data.healing import HealingText
from .healing import check_can_heal, cut_and_heal_
from .hub import check_login, default_device_map, load_model, load_tokenizer, publish
from .layers import find_layers, plain_model, realization_of
from .modeling.state_sizes import check_state_sizes
from .reporting.record import set_report_
from .reporting.report import CompressionReport
from .reporting.rows import Perplexity

logger = logging.get_logger(__name__)


def compress_pretrained(
    name_or_model: str | Path | PreTrainedModel,
    config: ConfigLike = None,
    *,
    calibration_data: Any = None,
    tokenizer: Any = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    evaluate: bool | None = None,
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """Make a slim model of a checkpoint or a model.

    Healing takes all processes that torchrun or `accelerate launch` started, each of which calls this with the same arguments, on a
    GPU of its own. They get the same model: save it in one.

    Args:
        name_or_model: a name on the Hub or a local folder, in the layout of transformers or of `state-spaces/*`; or a
            model, which is changed in place.
        config: what to cut, as a config or a dictionary of its values; by default as much as keeps a `max_divergence` of
            0.01 nats per token.
        calibration_data: LongTensor [n, L], list of texts, `datasets.Dataset` or DataLoader. By default a text that the
            package ships, if there is a tokenizer, else samples of the model itself. Healing (`heal`) learns from all of it
            and reads a DataLoader as it goes; of much data, only a part is measured then.
        tokenizer: for texts; by default the checkpoint's.
        push_to_hub: a repository to push the slim model, its tokenizer and its model card to, in one commit, if anything
            was cut. The login is checked before anything else is done.
        private: make that repository a private one, if it is new.
        evaluate: take the perplexity before and after the cut, on a text that the package ships, into the report and the
            model card. By default when pushing, if there is a tokenizer, and the model has a head.
        **from_pretrained_kwargs: for `from_pretrained`, such as `dtype`, `revision` or `device_map`. Without the last the model
            is on the GPU, if there is one, where transformers would leave it on the CPU.

    Returns:
        the slim model, with a `compression_report`.

    Raises:
        ValueError, TypeError: see `compress_`.
        OSError: if there is no such checkpoint, or a part of it is missing or half written; or if the push failed.
    """
    config = CompreSSMConfig.of(config)
    token = from_pretrained_kwargs.get("token")
    if push_to_hub is not None:
        if max(processes(), launched()) > 1:
            raise ValueError(
                "Several processes would push the same model: drop push_to_hub, and push it from one of them."
            )
        check_login(token)
    if not isinstance(name_or_model, str | os.PathLike):
        if from_pretrained_kwargs:
            raise TypeError(f"A model is already loaded: drop {', '.join(from_pretrained_kwargs)}, or give its name.")
        model: PreTrainedModel = plain_model(name_or_model)
    else:
        model = load_model(name_or_model, **{"device_map": default_device_map()} | from_pretrained_kwargs)
        if tokenizer is None:
            try:
                tokenizer = load_tokenizer(name_or_model, **from_pretrained_kwargs)
            except (OSError, ValueError) as error:
                logger.info(f"hf_compressm: no tokenizer for {name_or_model} ({error}).")
    report = compress_and_evaluate_(
        model, config, calibration_data, tokenizer=tokenizer, evaluate=evaluate, by_default=push_to_hub is not None
    )
    if push_to_hub is not None and report.states_after == report.states_before:
        logger.warning(f"hf_compressm: nothing was cut, so nothing was pushed to {push_to_hub}.")
    elif push_to_hub is not None:
        publish(model, push_to_hub, tokenizer=tokenizer, private=private, token=token)
    return model


def compress_and_evaluate_(
    model: PreTrainedModel,
    config: ConfigLike,
    calibration_data: Any,
    *,
    tokenizer: Any,
    evaluate: bool | None,
    by_default: bool,
    evaluation: Callable[[PreTrainedModel, Tensor], Evaluation] = evaluation,
) -> CompressionReport:
    """`compress_`, with the perplexity before and after in the report.

    Args:
        model, config, calibration_data, tokenizer: as for `compress_`.
        evaluate: whether to take the perplexity.
        by_default: whether to if `evaluate` is None, where the model has a head and a tokenizer.
        evaluation: takes it, of the model on token ids.

    Raises:
        ValueError, TypeError: as `compress_`, before the first evaluation if the target is wrong; and if there can be none.
    """
    if evaluate and not (has_head(model) and tokenizer is not None):
        why = "the model has no tokenizer" if has_head(model) else "the model has no head"
        raise ValueError(f"The perplexity is taken of predictions of a text, and {why}: don't ask to evaluate.")
    if evaluate is None:
        evaluate = by_default and has_head(model) and tokenizer is not None
    if not evaluate:
        return compress_(model, config, calibration_data, tokenizer=tokenizer)
    _check_target(CompreSSMConfig.of(config).after_training(), model)
    ids = evaluation_ids(tokenizer)
    before = evaluation(model, ids)
    report = compress_(model, config, calibration_data, tokenizer=tokenizer)
    after = before if report.states_after == report.states_before else evaluation(model, ids)
    report = replace(report, perplexity=Perplexity.of(before, after, describe(ids)))
    set_report_(model, report)
    return report


def compress_(
    model: PreTrainedModel,
    config: ConfigLike = None,
    calibration_data: Any = None,
    *,
    tokenizer: Any = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
) -> CompressionReport:
    """Make the state of a model's SSM layers smaller, in place.

    Everything is measured and planned before anything is changed: an error or interrupt leaves the model as it was, or
    cut with its config and optimizer, and as far healed as it was best. Parameters keep their identity and only change their
    data, except that a projection adds one to each mixer.

    In a loop of several processes, call it on all of them between two steps: the statistics of each process's data are summed,
    process 0 decides, and all cut alike or, after an error on any of them, none. They wait 45 s for each other: let them wait before
    (`accelerator.wait_for_everyone()`) if one has much to do alone. With `heal`, which also joins the processes that torchrun or
    `accelerate launch` started, all measure the data of all of them together and share it out to learn from, each on its device;
    the healed weights are the same on all. Parameters stay the same objects, so schedulers and param groups need nothing. A
    Mamba-2 that shall go on with transformers' fused kernel wants `realization="select"`.

        model, optimizer = accelerator.prepare(model, optimizer)
        ...
        report = compress_(model, CompreSSMConfig(state_size=8), recent_batches, optimizer=optimizer)
        accelerator.save_state("state")
        accelerator.unwrap_model(model).config.save_pretrained("state")  # the sizes: accelerate saves no config

        model = AutoModelForCausalLM.from_pretrained("state")  # elsewhere; then prepare it, and:
        accelerator.load_state("state")

    Args:
        model: with Mamba or Mamba-2 layers, on any device; DistributedDataParallel may be around it, also as Accelerate puts it there.
        config: what to cut; by default as much as keeps a `max_divergence` of 0.01 nats per token.
        calibration_data, tokenizer: as for `compress_pretrained`; of this process.
        optimizer: of a training loop, or a list of all that train the model: their states are cut along with the
            parameters that they belong to. Without it an optimizer that goes on has moments of the old shapes, which not each of
            torch's refuses.

    Returns:
        the report, which is also `model.compression_report`.

    Raises:
        ValueError: if the model has no SSM layer or weights that can't be cut, or is held by FSDP or DeepSpeed, if the target can't be
            reached, if the calibration data does not fit the model, if an optimizer can't follow, or if the processes differ in config or
            weights; and with `heal`, if the model has no head, is in float16, in part offloaded, sharded, or on the GPU of
            another process, or nothing of the text is left to learn from.
        TypeError: if the calibration data is of an unknown kind.
        RuntimeError: if another process failed, ended, or did not call this.
    """
    loop = Loop(model)
    if CompreSSMConfig.of(config).heal:
        join(loop.model)
    backend = find_backend(loop)
    config, model = backend.together("compress_", lambda: _checked(loop.model, config, optimizer, backend))
    if backend.processes > 1:
        backend.agree("compress_", _facts(config, model, optimizer))
    if not config.heal:
        measurement = measure(model, calibration_data, config, tokenizer=tokenizer, backend=backend)
        plan = backend.decide(lambda: measurement.plan(config).cpu())
        return _cut_(model, plan, optimizer, backend)
    text = backend.together(
        "reading the text to heal on", lambda: HealingText(calibration_data, model, tokenizer, config.heal)
    )
    text.pool_(backend.gather)
    bounded = config
    # The package's own text is read for a while only, and `measure` can't know that it is given that.
    if calibration_data is None and config.calibration_seconds is None:
        bounded = replace(config, calibration_seconds=seconds_for(model.num_parameters(), device_of(model)))
    measurement = backend.together("measuring", lambda: measure(model, text.measured, bounded))
    plan = backend.decide(lambda: measurement.plan(replace(config, heal=0)).cpu())
    return cut_and_heal_(
        model, plan, lambda: _cut_(model, plan, optimizer, backend), text, measurement.held_out, config, backend
    )


def _checked(
    model: Any, config: ConfigLike, optimizer: Any, backend: Backend
) -> tuple[CompreSSMConfig, PreTrainedModel]:
    """The config and the plain model, once nothing is known that speaks against a cut."""
    config, model = CompreSSMConfig.of(config).after_training(), plain_model(model)
    backend.refuse()
    _check_target(config, model)
    if optimizer is not None:
        check_optimizers(as_list(optimizer), model)
    if config.heal:
        check_can_heal(model, config)
    return config, model


def _check_target(config: CompreSSMConfig, model: PreTrainedModel) -> None:
    layers = find_layers(model)
    check_state_sizes(model, {layer.index: 1 for layer in layers})
    check_targets(config, layers, realization_of(config, layers))


def _facts(config: CompreSSMConfig, model: PreTrainedModel, optimizer: Any) -> dict[str, Any]:
    """What has to be the same on all processes that cut a model together."""
    whole = [p.detach().contiguous() for p in model.parameters() if type(p.data) is Tensor and not p.is_meta]
    whole = [torch.view_as_real(p) if p.is_complex() else p for p in whole]
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return config.to_dict() | {
        "optimizer=": optimizer is not None,
        "the model's state sizes": {layer.index: layer.state_size for layer in find_layers(model)},
        # of the bits, so that it depends on no order
        "the model's weights (a checksum)": sum(
            int(p.view(integers[p.element_size()]).sum(dtype=torch.int64)) for p in whole
        ),
    }


def _cut_(model: PreTrainedModel, plan: Plan, optimizer: Any, backend: Backend) -> CompressionReport:
    """On all processes, or on none."""
    with ExitStack() as stack:
        if backend.processes > 1:  # else the plan's own transaction is enough
            layers = find_layers(model)
            replaced = replaced_parameters(layers, plan.realizations)
            snapshot = stack.enter_context(
                undone_on_error(model, layers, as_list(optimizer), backend.resize_parameter_, replaced)
            )
            snapshot.afterwards = backend.after_undo_
        report = backend.together("the cut", lambda: plan.apply_(model, optimizer, backend=backend))
        backend.after_cut_()
    return report


def hankel_singular_values(
    model: PreTrainedModel, calibration_data: Any = None, *, tokenizer: Any = None, estimator: str = "ltv"
) -> CompressionReport:
    """Measure the Hankel singular values of every SSM layer; the model is not changed.

    Args:
        model, calibration_data, tokenizer: as for `compress_`.
        estimator: "ltv" (time-varying, by scan) or "mean_lti" (the paper's surrogate).

    Returns:
        a report in which every layer keeps its size.

    Raises:
        ValueError, TypeError: as `compress_`.
    """
    config = CompreSSMConfig(tolerance=0, estimator=estimator)  # type: ignore[arg-type]
    return measure(model, calibration_data, config, tokenizer=tokenizer).report()
