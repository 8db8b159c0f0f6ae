"""CompreSSMCallback: the state of a model shrinks while transformers' Trainer trains it."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.trainer_callback import ExportableState, TrainerCallback
from transformers.utils import CONFIG_NAME, logging

from ..backends import Backend, OneProcess, announce, find_backend
from ..compat.offloading import device_of
from ..compat.trainer import calling_trainer, checkpoint_parent
from ..compat.wrapping import inside
from ..config import CompreSSMConfig, ConfigLike
from ..cutting import Measurement, Plan
from ..cutting.nothing_to_cut import why_nothing
from ..cutting.optimizer import as_list, check_optimizers
from ..cutting.snapshot import undone_on_error
from ..data.batches import batches_of
from ..data.calibration import calibration_batches
from ..interrupts import uninterrupted
from ..layers import Layer, find_layers, is_plain, realization_of
from ..reporting.figures import plot_history
from ..reporting.files import write_files_whole
from ..reporting.history import Attempt
from ..reporting.record import Cut, history_of, record_cut_, record_files
from .checkpoints import ReshapeBeforeLoad, ReshapeOnLoad
from .checks import check_alone, check_evaluation, check_everywhere, check_realization, find_trainable_layers
from .logs import StepTimer, attempt_logs, say_what_was_cut, trainer_log
from .measuring import measure_batches
from .recording import Batch, BatchRecorder, to_device
from .resuming import attempts_until, read_attributes, states_after, states_left, states_shape
from .rollback import Metric
from .run_report import run_report
from .schedule import attempt_config, attempt_steps, check_still_below, check_target, training_config
from .settling import rank_correlation

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.get_logger(__name__)

MEASURED_TOKENS = 2**15
"""Of each recorded batch and process: Gramians gain nothing from more, and cost time in proportion."""
PATIENCE = 600.0
"""Seconds that processes wait for each other when training begins, where other callbacks log in to trackers."""


class CompreSSMCallback(TrainerCallback, ExportableState):
    """Cut the SSM states that carry little Hankel energy while a model trains (CompreSSM, arXiv 2510.02823).

    At `num_reductions` steps between `start` and `end` the callback runs the last training batches once more, without
    gradients, measures the Hankel singular values, and cuts model and optimizer. The same `train()` call goes on with
    the smaller model. Every checkpoint carries its sizes, and `resume_from_checkpoint` goes on as if never interrupted.

    Args:
        config: a `CompreSSMConfig`, or its values as a dictionary. `realization` "auto" means "select" in training,
            and "balance" for time-invariant layers.
        calibration_data: what to measure on instead of the training batches, as for `compress_`; read when training begins. An
            iterator is replaced by what was read of it.
        tokenizer: for calibration texts.

    Attributes:
        history: an `Attempt` for each attempt to cut: its step, the sizes after it, the Hankel singular values, and how far
            the ranking of the states agrees with that of the attempt before.
        initial_sizes: state sizes before the first cut, by layer index.
        kept: the states of those that are left, by layer index, a list for each group. States that were mixed of others have
            numbers of their own, from the first size up.

    Raises:
        ValueError: if the config asks for what is for a trained model; and when training begins, before the first cut at the latest, if anything in the model,
            optimizer, schedule or launcher can't be cut.

    Pass it to the `Trainer`'s constructor; after `trainer.add_callback`, call `attach(trainer)` before `train`.

    Log: `compressm/state_size_mean`, `compressm/state_size/layer_<i>`, `energy_kept`, `cut_seconds`, `step_seconds` (mean
    since the attempt before) and `rank_correlation` (near 1, the ranking of the states has settled) go through
    `trainer.log`, so TensorBoard, W&B and `log_history` have them. `model.compression_report` is about all cuts so far, and
    goes to the model card.

    Checkpoints carry their sizes and load by themselves. `resume_from_checkpoint` before, between or after the cuts gives
    the sizes and losses of the run without the interruption (in one process and under DDP also for mixtures of experts and `nemotron_h`,
    which the `Trainer` of transformers 5.24 alone does not load back); `load_best_model_at_end` may load other sizes, and the report
    is about those. A training loop that begins again on the model that it was cutting (`auto_find_batch_size`, or `train`
    after an error or Ctrl-C) goes on from the cuts that were made.

    Copies of the model, such as a moving average, follow a cut by an event that this callback sends to all callbacks of the
    trainer that have a method for it:

        def on_compressm_cut(self, args, state, control, *, model, plan, backend, **kwargs):
            plan.apply_(self.averaged.module, backend=backend)  # torch.optim.swa_utils.AveragedModel

    `rollback` evaluates right before and right after a cut, on `metric_for_best_model` (default: the loss): two
    evaluations a cut, and no training step is lost.

    Statistics come from the last `calibration_batches` training batches before an attempt, from the first sequences of each
    that make up 32,768 tokens. Under DDP (`torchrun`) they are summed over the processes, process 0 decides, and all stay
    bit-identical; so they are under FSDP1 and 2 and DeepSpeed's ZeRO, where parameters and the optimizer's state stay sharded
    through a cut. All of them need the callback, with the same config: else training ends before its first step, with what
    differs. If one fails or ends in a cut, the others undo theirs and say which it was.

    With `refit`, the layers are fitted at each cut, on what the mixers of all processes read of the first of these batches,
    and the optimizer's moments are those of the kept slices, as without. In Mamba-2 language models cuts pay late in the
    run and fitted: `start=0.7, end=0.85, refit=3`.

    Mamba-2 is cut by selection, since the fused training kernel can't take a projection. `realization="project"` and
    "project_heads" are taken if they are asked for, in one process and under DDP: `in_proj` and the convolution keep
    their rows, and the maps are new parameters, which join the optimizer in the group of the mixer's matrices, without
    a state. At a later cut they are given other values and begin without a state again. A `tolerance` is given up anew
    at each attempt; a `state_size` or `ratio` is reached in equal steps, over sizes that the kernels take. A second
    `train()` with a `state_size` that is reached already is an error: remove the callback first.
    """

    def __init__(
        self,
        config: ConfigLike = None,
        calibration_data: Any = None,
        *,
        tokenizer: Any = None,
    ) -> None:
        self.config = CompreSSMConfig.of(config)
        self._config = training_config(self.config)
        self.calibration_data = calibration_data
        self.tokenizer = tokenizer
        self._leave_run()
        self._reset()

    def _leave_run(self) -> None:
        """What is tied to a run, as it is without one."""
        self._trainer: Any = None
        self._announced = ""
        self._given: list[dict[str, torch.Tensor]] = []  # the calibration data, read
        # Whose state this callback's is, and whether its training loop has not ended.
        self._model: Any = None
        self._training = False
        self._checked = False
        self._backend: Backend = OneProcess()
        self._steps: list[int] = []
        self._recorder = BatchRecorder(self.config.calibration_batches)
        self._earlier: tuple[Cut, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Copied or pickled it keeps its arguments and what it has found, and has no trainer."""
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        copied._leave_run()
        return vars(copied)

    def _reset(self) -> None:
        self.history: list[Attempt] = []
        self.initial_sizes: dict[int, int] = {}
        self.kept: dict[int, list[list[int]]] = {}
        self.attempts = 0
        self.stopped = False
        self._timer = StepTimer()

    # What a checkpoint keeps.
    def state(self) -> dict[str, Any]:
        """Arguments and attributes that go into `trainer_state.json`."""
        return {
            "args": {"config": self.config.to_dict()},
            "attributes": {
                "history": [attempt.to_dict() for attempt in self.history],
                "initial_sizes": self.initial_sizes,
                "kept": self.kept,
                "attempts": self.attempts,
                "stopped": self.stopped,
            },
        }

    # Finding the trainer, which the events do not get.
    def attach(self, trainer: Trainer) -> CompreSSMCallback:
        """Tell the callback its trainer. Needed only if it was added after the trainer's construction."""
        if self._trainer is None or self._trainer() is not trainer:
            self._trainer = weakref.ref(trainer)
            self._take_over(trainer)
            ReshapeOnLoad.install(trainer, self)
            ReshapeBeforeLoad.install(trainer, self)
            self._announced = announce(type(self).__name__)
        return self

    def _take_over(self, trainer: Any) -> None:
        """Be the trainer's callback, with the data of the one before it if the trainer made this one of a checkpoint's config."""
        before, trainer.compressm_callback = getattr(trainer, "compressm_callback", None), self
        restored = trainer.args.restore_callback_states_from_checkpoint
        if before is not None and restored and self.calibration_data is None:
            self.calibration_data, self.tokenizer = before.calibration_data, before.tokenizer

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A trainer was made with this callback."""
        self._find_trainer()

    def _find_trainer(self) -> dict[str, Any]:
        """Attach to the trainer that sends this event; its training loop's local variables."""
        trainer, variables = calling_trainer()
        if trainer is not None:
            self.attach(trainer)
        elif self._trainer is None:
            raise ValueError(
                "CompreSSMCallback works with transformers' Trainer. In a loop of your own, call compress_."
            )
        return variables

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
        """Refuse what can't work, and go on where a checkpoint, or this training loop before it was restarted, left off."""
        loop, model = self._find_trainer(), inside(model)
        self._recorder.stop()  # a run that an error ended did not
        self._backend = find_backend(self.trainer)
        check_everywhere(self, self._announced, self._backend.late)
        begin, checkpoint = "the start of training", loop.get("resume_from_checkpoint")
        self._backend.together(begin, self._backend.refuse, PATIENCE)
        states = self._backend.states_of(optimizer)
        layers = self._backend.together(begin, lambda: self._ready(args, state, model, states, checkpoint), PATIENCE)
        facts = self.config.to_dict() | {
            "the steps of the cuts": self._steps,
            "the state sizes": {layer.index: layer.state_size for layer in layers},
            "the attempts that were made": self.attempts,
            "calibration_data=": self.calibration_data is not None,
        }
        self._backend.agree(begin, facts)
        if self._remaining and self.calibration_data is None:
            self._recorder.start(self.trainer.model_wrapped)
        logger.info(f"hf_compressm: {len(layers)} SSM layers, cuts are attempted after steps {self._remaining}.")

    def _ready(
        self, args: Any, state: Any, model: PreTrainedModel, optimizer: Any, checkpoint: str | None
    ) -> list[Layer]:
        """The layers to cut, once nothing is known that speaks against it."""
        check_alone(self, self.trainer)
        layers = find_trainable_layers(model)
        self._config = replace(self._config, realization=realization_of(self._config, layers, in_training=True))
        check_realization(self._config.realization, layers, self._backend)
        if not self._goes_on(model, layers, state):
            self._begin(model, layers)
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # what a save puts in its place
        self._model, self._training = weakref.ref(model), True
        self._checked = False
        self._steps = attempt_steps(self.config, state.max_steps)
        if self.config.rollback is not None:
            check_evaluation(self.trainer)
        check_optimizers(as_list(optimizer), model)
        if self._remaining and self.calibration_data is not None:
            if isinstance(self.calibration_data, Iterator):  # which can't be read again when training is restarted
                self.calibration_data = batches_of(self.calibration_data, self.tokenizer)
            self._given = calibration_batches(self.calibration_data, model, self.tokenizer)
        elif self._remaining and state.global_step:
            self._recorder.load(checkpoint, args.process_index, args.world_size)
        return layers

    def _goes_on(self, model: PreTrainedModel, layers: list[Layer], state: Any) -> bool:
        """Take up a checkpoint's state, or else keep that of this loop if it is restarted; whether there was any.

        Raises:
            ValueError: if the checkpoint's is damaged, or its layers are smaller than a `state_size`.
        """
        mine = self._model is not None and self._model() is model
        sizes = {layer.index: layer.state_size for layer in layers}
        restarted = (
            mine and self._training and attempts_until(sizes, self.initial_sizes, self.history) == self.attempts
        )
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if saved is not None:
            try:
                attributes = read_attributes(saved, layers)
            except (
                ValueError
            ):  # it is older than the last cut of a loop that was resumed from it, and is restarted now
                if not restarted:
                    raise
            else:
                if not mine:
                    self._earlier = history_of(model)
                self._reset()
                vars(self).update(attributes)
                self._report(model, layers)
                check_still_below(self._config, layers)
                return True
        return restarted

    def _begin(self, model: PreTrainedModel, layers: list[Layer]) -> None:
        """Start from the sizes that the model has.

        Raises:
            ValueError: if the target can't be reached from there.
        """
        self._reset()
        self._earlier = history_of(model)
        self.initial_sizes = {layer.index: layer.state_size for layer in layers}
        shapes = {layer.index: states_shape(layer) for layer in layers}
        self.kept = {index: [list(range(each)) for _ in range(number)] for index, (number, each) in shapes.items()}
        check_target(self._config, layers)

    def on_sizes_loaded(self, model: PreTrainedModel) -> None:
        """Weights of other sizes were loaded, as by `load_best_model_at_end`: report on those."""
        if self._model is not None and self._model() is model:
            layers = find_layers(model)
            self._report(model, layers)

    @property
    def _remaining(self) -> list[int]:
        return [] if self.stopped else self._steps[self.attempts :]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the clock."""
        self._timer.start()

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Attempt a cut, if one is due."""
        model = inside(model)
        self._timer.stop()
        if not self._checked:  # there is a state to look at now
            states = as_list(self._backend.states_of(optimizer))
            self._backend.together("the first step", lambda: check_optimizers(states, model))
            self._checked = True
        if self._remaining and state.global_step >= self._remaining[0]:
            self._attempt(args, state, control, model, self._backend.states_of(optimizer))
            if not self._remaining:
                self._recorder.stop()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the sizes with every checkpoint, and the recorded batches with one between two attempts."""
        folder = os.path.join(checkpoint_parent(self.trainer), f"checkpoint-{state.global_step}")
        if args.should_save and is_plain(self._model()):
            write_files_whole(folder, record_files(self._model()))  # its sizes are the shapes of its weights
        elif args.should_save and os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, CONFIG_NAME)):
            self._model().config.save_pretrained(folder)  # FSDP's SHARDED_STATE_DICT is saved without
        if self._remaining and not args.save_only_model:
            self._recorder.save(folder, args.process_index)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what was not reached."""
        self._recorder.stop()
        self._training = False
        if self.stopped and self._config.tolerance is None:
            logger.warning("hf_compressm: the target was not reached, since rollback undid a cut.")
        if self.history and not self.stopped and self.history[-1].sizes == self.initial_sizes:
            layers = find_layers(self._model())
            reason = why_nothing(self._config, layers, self._config.realization)
            skipped = sum(attempt.skipped for attempt in self.history)
            if skipped:
                least = f"min_reduction={self.config.min_reduction:g}"
                reason = (
                    f"{skipped} would have removed a smaller share of the states than {least}: lower min_reduction."
                )
            if reason is not None:
                logger.warning(f"hf_compressm: none of {self.attempts} attempts cut anything: {reason}")
        if self._remaining:
            logger.warning(
                f"hf_compressm: training ended after step {state.global_step}, before the cuts that were due after steps "
                f"{self._remaining}."
            )
        step_seconds = self._timer.take()
        if step_seconds is not None and self.history:
            trainer_log(self.trainer, control, {"compressm/step_seconds": step_seconds})

    def plot(self) -> Any:
        """The run as a figure: the spectra at each attempt, and the states falling. See `figures.plot_history`.

        Raises:
            ValueError: if there was no attempt yet.
        """
        return plot_history(self.history, self.initial_sizes)

    # An attempt: measure, plan, cut.
    @torch.no_grad()
    def _attempt(self, args: Any, state: Any, control: Any, model: PreTrainedModel, optimizer: Any) -> None:
        begin = time.perf_counter()
        layers = find_layers(model)
        self._check_sizes(layers)
        measurement = self._measure(model)
        config = attempt_config(self._config, self.attempts, self.initial_sizes, layers)
        if config is None:  # a tolerance of 0 shows the spectra, and cuts nothing
            config = replace(self._config, tolerance=0, state_size=None, ratio=None, weights=measurement.weights)
        plan: Plan = self._backend.decide(lambda: self._gate(measurement.plan(config), state.global_step).cpu())
        undone = bool(plan.realizations) and self._cut(model, layers, plan, optimizer)
        with uninterrupted():  # the cut is made: now this callback has to agree
            attempt = self._record(state.global_step, layers, measurement, plan, undone)
            self._report(model, layers)
        if plan.realizations and not undone:
            for callback in self.trainer.callback_handler.callbacks:
                if hasattr(callback, "on_compressm_cut"):
                    callback.on_compressm_cut(args, state, control, model=model, plan=plan, backend=self._backend)
        seconds = time.perf_counter() - begin
        trainer_log(self.trainer, control, attempt_logs(attempt, seconds, self._timer.take()))
        say_what_was_cut(plan, attempt, seconds)

    def _check_sizes(self, layers: list[Layer]) -> None:
        """Refuse a model that something else has cut: what is known of its states is of others."""
        known = self.history[-1].sizes if self.history else self.initial_sizes
        for layer in layers:
            if layer.state_size != known[layer.index]:
                raise ValueError(
                    f"Layer {layer.index} has {layer.state_size} states and had {known[layer.index]} when {type(self).__name__} last "
                    "looked: cut the model by this callback alone, or by compress_ alone."
                )

    def _measure(self, model: PreTrainedModel) -> Measurement:
        """On the recorded or given batches of all processes."""
        if self.calibration_data is None:
            batches = self._recorder.on(device_of(model))
            return measure_batches(model, batches, self._config, self._backend, MEASURED_TOKENS)
        given: list[Batch] = [((), to_device(batch, model.device)) for batch in self._given]
        return measure_batches(model, given, self._config, self._backend)

    def _gate(self, plan: Plan, step: int) -> Plan:
        """Without its cuts, if they remove too little to be worth it."""
        if self._config.tolerance is None or not plan.realizations:
            return plan
        removed = 1 - plan.report.states_after / plan.report.states_before
        if removed >= self.config.min_reduction:
            return plan
        logger.info(
            f"hf_compressm: step {step}: skipped, a cut would remove {removed:.1%} of the states, less than "
            f"min_reduction={self.config.min_reduction:.1%}."
        )
        return replace(plan, realizations={})

    def _cut(self, model: PreTrainedModel, layers: list[Layer], plan: Plan, optimizer: Any) -> bool:
        """Make the cut on all processes; whether it was undone again."""
        metric = None
        if self.config.rollback is not None:
            metric = Metric(self.trainer, self._backend, self.config.rollback)
        before = metric.value() if metric is not None else 0.0
        with undone_on_error(model, layers, as_list(optimizer), self._backend.resize_parameter_) as snapshot:
            snapshot.afterwards = self._backend.after_undo_
            self._backend.together("the cut", lambda: plan.apply_(model, optimizer, backend=self._backend))
            self._backend.after_cut_()
            undone = metric is not None and metric.forbids(before, metric.value())
            if undone:
                snapshot.restore_()
        del snapshot  # the last that holds tensors of the old sizes
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return undone

    def _record(self, step: int, layers: list[Layer], measurement: Measurement, plan: Plan, undone: bool) -> Attempt:
        states = {index: [list(group) for group in groups] for index, groups in self.kept.items()}
        contributions = {
            layer.index: [moments.contribution.diagonal().tolist() for moments in entry.groups]
            for layer, entry in zip(layers, measurement.statistics, strict=True)
        }
        correlation = None
        if self.history:
            last = self.history[-1]
            correlation = rank_correlation(last.states, last.contributions, states, contributions)
        made = {} if undone else plan.realizations
        attempt = Attempt(
            step=step,
            sizes={layer.index: layer.state_size for layer in layers},
            hankel_singular_values={row.index: row.hankel_singular_values for row in plan.report.layers},
            contributions=contributions,
            states=states,
            output_error={row.index: row.output_error if row.index in made else 0.0 for row in plan.report.layers},
            energy_kept={row.index: row.energy_kept if row.index in made else 1.0 for row in plan.report.layers},
            parameters=plan.report.parameters_before,
            rank_correlation=correlation,
            undone=undone,
            skipped=not plan.realizations and plan.report.states_after < plan.report.states_before,
            error_bound={row.index: row.error_bound for row in plan.report.layers if row.error_bound is not None},
        )
        self.history.append(attempt)
        self.attempts += 1
        self.stopped = undone
        of_index = {layer.index: layer for layer in layers}
        self.kept |= {i: states_left(self.kept[i], new, of_index[i]) for i, new in made.items()}
        return attempt

    def _report(self, model: PreTrainedModel, layers: list[Layer]) -> None:
        """Over the cuts that led to the model's sizes, for the model card and the record."""
        sizes = {layer.index: layer.state_size for layer in layers}
        count = attempts_until(sizes, self.initial_sizes, self.history)
        report = None
        if count is not None:
            self.kept = states_after(count, self.kept, self.history)
            history = self.history[:count]
            report = run_report(model, layers, self.initial_sizes, history, self._config.realization)
        record_cut_(model, report, self.config, self._earlier)
