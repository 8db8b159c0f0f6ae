"""CompreSSMCallback: the state of a model shrinks while transformers' Trainer trains it."""

from __future__ import annotations

import os
import random
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_callback import ExportableState, TrainerCallback
from transformers.utils import logging

from .architectures import SSMLayer, find_layers
from .calibration import calibration_batches
from .compress import apply_cut_
from .config import CompreSSMConfig
from .figures import plot_history
from .measuring import evaluating, observing
from .planning import CutPlan, plan_cut
from .training.checkpoints import ReshapeOnLoad
from .training.distributed import (
    decide,
    find_ddp,
    rebuild_reducer_,
    several_processes,
    share_candidates_,
    sum_statistics_,
)
from .training.optimizer import check_optimizer, verify_optimizer
from .training.run_report import run_report
from .training.schedule import attempt_config, attempt_steps, check_target, training_config
from .training.snapshot import Snapshot
from .training.trajectory import rank_correlation

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.get_logger(__name__)

# Beside the checkpoint's other files, one for each process: the batches that the next attempt measures.
BATCHES_NAME = "compressm_batches_{rank}.pt"
MEASURED_TOKENS = 2**15
"""Of each recorded batch and process: Gramians gain nothing from more, and cost time in proportion."""

Batch = tuple[tuple[Any, ...], dict[str, Any]]


class CompreSSMCallback(TrainerCallback, ExportableState):
    """Cut the SSM states that carry little Hankel energy while a model trains (CompreSSM, arXiv 2510.02823).

    At `num_reductions` steps between `start` and `end` the callback runs the last training batches once more, without
    gradients, measures the Hankel singular values, and cuts model and optimizer. The same `train()` call goes on with
    the smaller model. Every checkpoint carries its sizes, and `resume_from_checkpoint` goes on as if never interrupted.

    Args:
        config: a `CompreSSMConfig`, or its values as a dictionary. `realization` "auto" means "select" in training.
        calibration_data: what to measure on instead of the training batches, as for `compress_`.
        tokenizer: for calibration texts.

    Attributes:
        history: for each attempt its step, the sizes after it, the Hankel singular values (of each layer and group,
            descending), how much each state contributes to the layer's output, which of the original states they are,
            and `rank_correlation`: how far the states' ranking agrees with that of the attempt before.

    Raises:
        ValueError: if the config asks for a projection; and when training begins, if anything in the model, optimizer,
            schedule or launcher can't be cut.

    Pass it to the `Trainer`'s constructor; after `trainer.add_callback`, call `attach(trainer)` before `train`.

    Log: `compressm/state_size_mean`, `compressm/state_size/layer_<i>`, `energy_kept`, `cut_seconds`, `step_seconds` (mean
    since the attempt before) and `rank_correlation` (near 1, the ranking of the states has settled) go through
    `trainer.log`, so TensorBoard, W&B and `log_history` have them. `model.compression_report` is about all cuts so far, and
    goes to the model card.

    Checkpoints carry their sizes and load by themselves. `resume_from_checkpoint` before, between or after the cuts gives
    the sizes and losses of the run without the interruption; `load_best_model_at_end` may load other sizes.

    `rollback` evaluates right before and right after a cut, on `metric_for_best_model` (default: the loss): two
    evaluations a cut, and no training step is lost.

    Statistics come from the last `calibration_batches` training batches before an attempt, from the first sequences of each
    that make up 32,768 tokens. Under DDP (`torchrun`) they are summed over the processes, process 0 decides, and all stay
    bit-identical.

    Mamba-2 is cut by selection, since the fused training kernel can't take a projection: call `compress_` with
    `realization="project"` after the training. A `tolerance` is given up anew at each attempt; a `state_size` or `ratio` is
    reached in equal steps, over sizes that the kernels take. A second `train()` with a `state_size` that is reached already
    is an error: remove the callback first.
    """

    def __init__(
        self,
        config: CompreSSMConfig | dict[str, Any] | None = None,
        calibration_data: Any = None,
        *,
        tokenizer: Any = None,
    ) -> None:
        self.config = CompreSSMConfig(**config) if isinstance(config, dict) else config or CompreSSMConfig()
        self._config = training_config(self.config)
        self.calibration_data = calibration_data
        self.tokenizer = tokenizer
        self._trainer: Any = None
        self._hook: Any = None
        self._steps: list[int] = []
        self._batches: deque[Batch] = deque(maxlen=self.config.calibration_batches)
        self._reset()

    def _reset(self) -> None:
        self.history: list[dict[str, Any]] = []
        self.initial_sizes: dict[int, int] = {}
        self.kept: dict[int, list[list[int]]] = {}
        self.attempts = 0
        self.stopped = False
        self._timer = _StepTimer()

    # What a checkpoint keeps.
    def state(self) -> dict[str, Any]:
        """Arguments and attributes that go into `trainer_state.json`."""
        return {
            "args": {"config": self.config.to_dict()},
            "attributes": {
                name: getattr(self, name) for name in ("history", "initial_sizes", "kept", "attempts", "stopped")
            },
        }

    def _restore(self, attributes: dict[str, Any]) -> None:
        # JSON turns the layer numbers into strings.
        self.history = list(attributes["history"])
        self.initial_sizes = {int(i): size for i, size in attributes["initial_sizes"].items()}
        self.kept = {int(i): groups for i, groups in attributes["kept"].items()}
        self.attempts, self.stopped = attributes["attempts"], attributes["stopped"]

    # Finding the trainer, which the events do not get.
    def attach(self, trainer: Trainer) -> CompreSSMCallback:
        """Tell the callback its trainer. Needed only if it was added after the trainer's construction."""
        if self._trainer is None or self._trainer() is not trainer:
            self._trainer = weakref.ref(trainer)
            ReshapeOnLoad.install(trainer)
        return self

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._find_trainer()

    def _find_trainer(self) -> dict[str, Any]:
        """Attach to the trainer that sends this event; its training loop's local variables."""
        from transformers import Trainer

        frame: Any = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, Trainer):
                self.attach(owner)
                return frame.f_locals
            frame = frame.f_back
        if self._trainer is None:
            raise ValueError(
                "CompreSSMCallback works with transformers' Trainer. In a loop of your own, call compress_."
            )
        return {}

    @property
    def trainer(self) -> Any:
        """The trainer that the callback works for."""
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is None:
            raise ValueError("CompreSSMCallback has no trainer: pass it to Trainer(callbacks=[...]).")
        return trainer

    # The run.
    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        loop = self._find_trainer()
        self._reset()
        self._stop_recording()  # a run that an error ended did not
        _check_launcher(self.trainer)
        layers = _find_trainable_layers(model)
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        resumed = state.global_step > 0 and isinstance(saved, dict)
        if saved is not None and resumed:
            self._restore(saved["attributes"])
            self._report(model, layers)
        else:
            self.initial_sizes = {layer.index: layer.state_size for layer in layers}
            self.kept = {layer.index: [list(range(layer.state_size))] * layer.groups for layer in layers}
        if not resumed:
            check_target(self._config, layers)
        self._steps = attempt_steps(self.config, state.max_steps)
        evaluation = self.trainer.eval_dataset
        if self.config.rollback is not None and (evaluation is None or isinstance(evaluation, dict)):
            raise ValueError("rollback needs one evaluation set: pass eval_dataset to the Trainer, or drop rollback.")
        check_optimizer(_unwrap(optimizer), _cut_parameters(layers))
        verify_optimizer(_unwrap(optimizer), model)
        self._batches.clear()
        if self._remaining:
            if resumed:
                self._load_batches(loop.get("resume_from_checkpoint"))
            if self.calibration_data is None:
                self._hook = self.trainer.model_wrapped.register_forward_pre_hook(self._record, with_kwargs=True)
        logger.info(f"hf_compressm: {len(layers)} SSM layers, cuts are attempted after steps {self._remaining}.")

    @property
    def _remaining(self) -> list[int]:
        return [] if self.stopped else self._steps[self.attempts :]

    def _record(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():
            self._batches.append(
                (args, {name: value for name, value in kwargs.items() if name != "num_items_in_batch"})
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._timer.start()

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self._timer.stop()
        if state.global_step == 1:  # the first state that there is to look at
            check_optimizer(_unwrap(optimizer), _cut_parameters(find_layers(model)))
        if self._remaining and state.global_step >= self._remaining[0]:
            self._attempt(state.global_step, model, _unwrap(optimizer), control)
            if not self._remaining:
                self._stop_recording()

    @torch.no_grad()
    def _attempt(self, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer, control: Any) -> None:
        begin = time.perf_counter()
        layers = find_layers(model)
        config = attempt_config(self._config, self.attempts, self.initial_sizes, layers)
        self.attempts += 1
        statistics = self._measure(model, layers)
        # A tolerance of 0 still measures the spectra; nothing is cut.
        measured = config or CompreSSMConfig(tolerance=0, realization="select", estimator=self.config.estimator)
        plan: CutPlan = decide(lambda: self._gate(plan_cut(model, layers, statistics, measured), step).cpu())
        entry = self._history_entry(step, plan, layers, statistics)
        undone = False
        if plan.cuts:
            undone = self._cut(model, layers, plan, optimizer)
        sizes = {layer.index: layer.state_size for layer in layers}
        if plan.cuts and not undone:
            self.kept |= {
                index: [[old[s] for s in new] for old, new in zip(self.kept[index], groups, strict=True)]
                for index, groups in plan.kept.items()
            }
        errors = {layer.index: layer.output_error for layer in plan.report.layers}
        entry |= {"sizes": sizes, "undone": undone, "output_error": errors}
        self.history.append(entry)
        self._report(model, layers)
        seconds = time.perf_counter() - begin
        self._log(step, plan, entry, seconds, control, undone)

    def _report(self, model: PreTrainedModel, layers: list[SSMLayer]) -> None:
        """Over all cuts so far, for the model card."""
        model.compression_report = run_report(model, layers, self.initial_sizes, self.history)  # type: ignore[assignment]

    def plot(self) -> Any:
        """The run as a figure: the spectra at each attempt, and the states falling. See `figures.plot_history`.

        Raises:
            ValueError: if there was no attempt yet.
        """
        return plot_history(self.history, self.initial_sizes)

    def _gate(self, plan: CutPlan, step: int) -> CutPlan:
        """Without its cuts, if they remove too little to be worth it."""
        if self._config.tolerance is None or not plan.cuts:
            return plan
        old = sum(layer.old_size for layer in plan.report.layers)
        removed = 1 - sum(layer.new_size for layer in plan.report.layers) / old
        if removed >= self.config.min_reduction:
            return plan
        logger.info(
            f"hf_compressm: step {step}: skipped, a cut would remove {removed:.1%} of the states, less than "
            f"min_reduction={self.config.min_reduction:.1%}."
        )
        return CutPlan(plan.report, {}, {})

    def _measure(self, model: PreTrainedModel, layers: list[SSMLayer]) -> list[Any]:
        """Statistics of each layer on the recorded or given batches of all processes."""
        if self.calibration_data is not None:
            data = calibration_batches(self.calibration_data, model, self.tokenizer)
            batches: list[Batch] = [((), {k: v.to(model.device) for k, v in batch.items()}) for batch in data]
        else:
            batches = [_to_device(batch, model.device) for batch in self._batches]
        if not batches:
            raise ValueError("No training batch passed through the model before the attempt to cut it.")
        statistics = self._run(model, layers, batches, self._empty(layers))
        if several_processes() and any(m.readout and m.size > len(m.candidates) for e in statistics for m in e.groups):
            shared = self._empty(layers)
            share_candidates_(shared, self._run(model, layers, batches[:1], self._empty(layers)))
            statistics = self._run(model, layers, batches, shared)
        sum_statistics_(statistics)
        for layer, entry in zip(layers, statistics, strict=True):
            if not entry.tokens:
                raise ValueError(f"{layer.name} saw no token of the training batches, so it can't be measured.")
        return statistics

    def _empty(self, layers: list[SSMLayer]) -> list[Any]:
        return [layer.statistics(mean_lti=self.config.estimator == "mean_lti") for layer in layers]

    @torch.no_grad()
    def _run(self, model: Any, layers: list[SSMLayer], batches: list[Batch], statistics: list[Any]) -> list[Any]:
        max_tokens = MEASURED_TOKENS if self.calibration_data is None else None
        with observing(layers, statistics, max_tokens=max_tokens), evaluating(model):
            for args, kwargs in batches:
                model(*args, **kwargs)
        return statistics

    def _cut(
        self, model: PreTrainedModel, layers: list[SSMLayer], plan: CutPlan, optimizer: torch.optim.Optimizer
    ) -> bool:
        """Make the cut on all processes; whether it was undone again."""
        allowed, undone = self.config.rollback, False
        before = self._metric() if allowed is not None else 0.0
        snapshot = Snapshot(model, layers, optimizer)
        apply_cut_(model, layers, plan, optimizer)
        if allowed is not None:
            after = self._metric()
            worse = before - after if self._greater_is_better else after - before
            if not worse <= allowed:  # also if it is not a number
                snapshot.restore_()
                self.stopped = undone = True
                logger.info(
                    f"hf_compressm: the cut is undone: {self._metric_name} went from {before:.4g} to {after:.4g}, more "
                    f"than rollback={allowed} allows. No more cuts."
                )
        del snapshot  # the last that holds tensors of the old sizes
        ddp = find_ddp(self.trainer.model_wrapped)
        if ddp is not None:
            rebuild_reducer_(ddp)
        dynamo: Any = sys.modules.get("torch._dynamo")
        # Only if something was compiled: the reset imports inductor, which takes seconds.
        if dynamo is not None and dynamo.utils.counters["frames"]["total"]:
            dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return undone

    # The metric of rollback.
    @property
    def _metric_name(self) -> str:
        name = self.trainer.args.metric_for_best_model or "loss"
        return name if name.startswith("eval_") else f"eval_{name}"

    @property
    def _greater_is_better(self) -> bool:
        greater = self.trainer.args.greater_is_better
        return not self._metric_name.endswith("loss") if greater is None else greater

    def _metric(self) -> float:
        """The metric of the evaluation set. The random numbers of the run are as they were, no event is sent."""
        trainer = self.trainer
        with _same_random_numbers():
            metrics = trainer.evaluation_loop(
                trainer.get_eval_dataloader(),
                description="CompreSSM",
                prediction_loss_only=True if trainer.compute_metrics is None else None,
            ).metrics
        if self._metric_name not in metrics:
            raise ValueError(
                f"rollback looks at {self._metric_name}, and the evaluation gives {sorted(metrics)}: set "
                "metric_for_best_model to one of them."
            )
        return decide(lambda: float(metrics[self._metric_name]))

    # What is recorded and logged.
    def _history_entry(
        self, step: int, plan: CutPlan, layers: list[SSMLayer], statistics: list[Any]
    ) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "step": step,
            "hankel_singular_values": {row.index: row.hankel_singular_values for row in plan.report.layers},
            "contributions": {
                layer.index: [moments.contribution.diagonal().tolist() for moments in stats.groups]
                for layer, stats in zip(layers, statistics, strict=True)
            },
            "states": {index: [list(group) for group in groups] for index, groups in self.kept.items()},
        }
        entry["rank_correlation"] = rank_correlation(self.history[-1], entry) if self.history else None
        return entry

    def _log(
        self, step: int, plan: CutPlan, entry: dict[str, Any], seconds: float, control: Any, undone: bool
    ) -> None:
        sizes = list(entry["sizes"].values())
        cut = bool(plan.cuts) and not undone
        energies = [layer.energy_kept if layer.index in plan.cuts and cut else 1.0 for layer in plan.report.layers]
        logs = {
            "compressm/state_size_mean": sum(sizes) / len(sizes),
            "compressm/energy_kept": sum(energies) / len(energies),
            "compressm/cut_seconds": round(seconds, 4),
        }
        logs |= {f"compressm/state_size/layer_{index}": size for index, size in entry["sizes"].items()}
        if entry["rank_correlation"] is not None:
            logs["compressm/rank_correlation"] = entry["rank_correlation"]
        step_seconds = self._timer.take()
        if step_seconds is not None:
            logs["compressm/step_seconds"] = step_seconds
        self._trainer_log(logs, control)
        if cut:
            old = [layer.old_size for layer in plan.report.layers]
            logger.info(
                f"hf_compressm: step {step}: state size {sum(old) / len(old):.1f} -> {sum(sizes) / len(sizes):.1f} (mean "
                f"of {len(sizes)} layers, {min(sizes)} to {max(sizes)}), Hankel energy kept "
                f"{sum(energies) / len(energies):.1%}, {seconds:.1f} s."
            )

    def _trainer_log(self, logs: dict[str, Any], control: Any) -> None:
        # Logging clears the flag by which the trainer knows that the step's own loss is to be logged.
        should_log = control.should_log
        self.trainer.log(logs)
        control.should_log = should_log

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_recording()
        if self.stopped and self._config.tolerance is None:
            logger.warning("hf_compressm: the target was not reached, since rollback undid a cut.")
        if self._remaining:
            logger.warning(
                f"hf_compressm: training ended after step {state.global_step}, before the cuts that were due after steps "
                f"{self._remaining}."
            )
        step_seconds = self._timer.take()
        if step_seconds is not None and self.history:
            self._trainer_log({"compressm/step_seconds": step_seconds}, control)

    def _stop_recording(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._batches.clear()

    # The recorded batches of a checkpoint between two attempts.
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = os.path.join(self.trainer._get_output_dir(trial=None), f"checkpoint-{state.global_step}")
        if self._remaining and self._batches and os.path.isdir(folder) and not args.save_only_model:
            path = os.path.join(folder, BATCHES_NAME.format(rank=args.process_index))
            torch.save([_to_device(batch, torch.device("cpu")) for batch in self._batches], path)

    def _load_batches(self, folder: str | None) -> None:
        path = os.path.join(folder or "", BATCHES_NAME.format(rank=self.trainer.args.process_index))
        if folder is not None and os.path.isfile(path):
            self._batches.extend(torch.load(path, map_location="cpu", weights_only=True))
        elif self.calibration_data is None and self._remaining:
            logger.warning(
                f"hf_compressm: {BATCHES_NAME.format(rank=self.trainer.args.process_index)} is not in the checkpoint, so "
                "that the next cut may be measured on fewer batches than without the interruption."
            )


class _StepTimer:
    """Mean duration of a training step since the last question."""

    def __init__(self) -> None:
        self.begin: float | None = None
        self.durations: list[float] = []

    def start(self) -> None:
        self.begin = time.perf_counter()

    def stop(self) -> None:
        if self.begin is not None:
            self.durations.append(time.perf_counter() - self.begin)
            self.begin = None

    def take(self) -> float | None:
        durations, self.durations = self.durations, []
        return round(sum(durations) / len(durations), 6) if durations else None


def _unwrap(optimizer: Any) -> torch.optim.Optimizer:
    from accelerate.optimizer import AcceleratedOptimizer

    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {name: _to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_to_device(value, device) for value in batch)
    return batch


def _check_launcher(trainer: Any) -> None:
    """Refuse ways to distribute a model whose shards can't be cut in place."""
    for flag, name in (
        ("is_deepspeed_enabled", "DeepSpeed"),
        ("is_fsdp_enabled", "FSDP"),
        ("is_distributed_loading_by_transformers", "a model that was sharded when it was loaded"),
    ):
        if getattr(trainer, flag, False):
            raise ValueError(
                f"CompreSSMCallback can't cut under {name} yet: train in one process or with DDP (torchrun), or call "
                "compress_pretrained before or after the training."
            )
    if isinstance(trainer.model_wrapped, torch.nn.DataParallel):
        raise ValueError(
            "CompreSSMCallback does not work with DataParallel: start one process per GPU with torchrun, or show one GPU "
            "to this process (CUDA_VISIBLE_DEVICES)."
        )


def _find_trainable_layers(model: Any) -> list[SSMLayer]:
    """The SSM layers, of which none is frozen or carries an adapter."""
    if hasattr(model, "peft_config"):
        raise ValueError(
            "CompreSSMCallback can't cut a PEFT model: an adapter's checkpoints do not carry the sizes of its base. Call "
            "compress_pretrained on the base model first, then train the adapter on the slim model."
        )
    layers = find_layers(model)
    for layer in layers:
        parameters = _cut_parameters([layer])
        if not any(parameter.requires_grad for parameter in parameters.values()):
            raise ValueError(
                f"{layer.name} is frozen ({', '.join(parameters)}), so training can't make up for a cut: unfreeze it, or "
                "call compress_pretrained before the training."
            )
    return layers


def _cut_parameters(layers: list[SSMLayer]) -> dict[str, Any]:
    return {
        f"{layer.name}.{name}": layer.mixer.get_parameter(name)
        for layer in layers
        for name in layer.changed_by_a_cut()
    }


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)
