"""The callback's state belongs to the model that it cut: restarted loops, other models, checkpoints of other kinds."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress_
from hf_compressm.layers import find_layers
from hf_compressm.reporting.record import history_of
from hf_compressm.training.resuming import read_attributes
from tests.conftest import tiny_mamba, tiny_mamba2
from tests.training.conftest import dataset, losses, make_trainer, sizes

WINDOW = {"start": 0, "end": 4, "num_reductions": 2}


class Fail(TrainerCallback):
    """Raise once, at the end of a step; it comes after the callback that cuts."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.error is not None:
            error, self.error = self.error, None
            raise error


@pytest.mark.parametrize(
    ("target", "failing_step"),
    [({"ratio": 0.5}, 3), ({"state_size": 4}, 5), ({"tolerance": 0.3, "min_reduction": 0}, 3)],
)
def test_a_restarted_loop_goes_on_from_the_cuts_that_were_made(tmp_path, target, failing_step):
    """After an out-of-memory with `auto_find_batch_size`, between the cuts and after them."""
    model = tiny_mamba()
    callback = CompreSSMCallback(CompreSSMConfig(**target, **WINDOW))
    fail = Fail(failing_step, RuntimeError("CUDA out of memory."))
    trainer = make_trainer(tmp_path, model, callbacks=[callback, fail], max_steps=6, auto_find_batch_size=True)
    trainer.train()
    assert fail.error is None
    assert callback.attempts == len(callback.history) == 2
    assert callback.initial_sizes == {0: 8, 1: 8}
    if "tolerance" not in target:
        assert sum(sizes(model)) == 8
    assert callback.history[-1].sizes == dict(enumerate(sizes(model)))
    assert [len(groups[0]) for groups in callback.kept.values()] == sizes(model)
    report = model.compression_report
    assert [(row.old_size, row.new_size) for row in report.layers] == [(8, size) for size in sizes(model)]
    assert [cut.report for cut in history_of(model)] == [report]


def test_data_that_can_be_read_once_serves_restarts_and_further_runs(tmp_path):
    callback = CompreSSMCallback(
        CompreSSMConfig(tolerance=0.3, min_reduction=0, **WINDOW),
        calibration_data=({"input_ids": row["input_ids"]} for row in dataset(4)),
    )
    fail = Fail(3, RuntimeError("CUDA out of memory."))
    trainer = make_trainer(tmp_path, tiny_mamba(), callbacks=[callback, fail], max_steps=6, auto_find_batch_size=True)
    trainer.train()
    assert fail.error is None
    assert len(pickle.loads(pickle.dumps(callback)).calibration_data) == 1  # all rows in one batch
    trainer.train()
    assert len(callback.history) == 2


def test_data_is_taken_over_by_the_callback_that_a_trainer_makes_of_a_checkpoint(tmp_path, token_ids):
    options = {"config": CompreSSMConfig(state_size=4, **WINDOW), "calibration_data": token_ids, "tokenizer": len}
    first = CompreSSMCallback(**options)
    run = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path, tiny_mamba(), callbacks=[first], **run).train()
    given = CompreSSMCallback(**options)
    settings = run | {"save_strategy": "no", "restore_callback_states_from_checkpoint": True}
    trainer = make_trainer(tmp_path, tiny_mamba(seed=9), callbacks=[given], **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (mine,) = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, CompreSSMCallback)]
    assert mine is not given
    assert mine.calibration_data is token_ids
    assert mine.tokenizer is len
    assert mine.history[-1].hankel_singular_values == first.history[-1].hankel_singular_values


def test_a_run_that_ctrl_c_ended_goes_on_when_train_is_called_again(tmp_path):
    model = tiny_mamba()
    callback = CompreSSMCallback(CompreSSMConfig(state_size=4, **WINDOW))
    trainer = make_trainer(tmp_path, model, callbacks=[callback, Fail(3, KeyboardInterrupt())], max_steps=6)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert sizes(model) == [6, 6]
    trainer.train()
    assert [attempt.step for attempt in callback.history] == [2, 4]
    assert sizes(model) == [4, 4]


def test_a_second_run_begins_anew(tmp_path):
    """On the same model from the sizes that it has, on another one from its own."""
    model = tiny_mamba()
    config = CompreSSMConfig(ratio=0.5, **WINDOW)
    callback = CompreSSMCallback(config)
    make_trainer(tmp_path, model, callbacks=[callback], max_steps=5).train()
    first = model.compression_report
    make_trainer(tmp_path, model, callbacks=[callback], max_steps=5).train()
    assert sum(callback.initial_sizes.values()) == 8
    assert sum(sizes(model)) == 4
    assert [cut.report for cut in history_of(model)] == [first, model.compression_report]
    other = tiny_mamba(6)
    make_trainer(tmp_path, other, callbacks=[callback], max_steps=5).train()
    assert callback.initial_sizes == {0: 6, 1: 6}
    assert sum(sizes(other)) == 6
    assert len(history_of(other)) == 1


def test_a_run_that_began_without_the_callback_is_resumed_with_it(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, tiny_mamba(), max_steps=2, **saving).train()
    model = tiny_mamba(seed=9)
    callback = CompreSSMCallback(CompreSSMConfig(state_size=4, start=2, end=5, num_reductions=2))
    trainer = make_trainer(tmp_path, model, callbacks=[callback], max_steps=6, **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert callback.initial_sizes == {0: 8, 1: 8}
    assert sizes(model) == [4, 4]
    # What it saves can be resumed in turn.
    again = tiny_mamba(seed=8)
    resumed = make_trainer(
        tmp_path, again, CompreSSMConfig(state_size=4, start=2, end=5, num_reductions=2), max_steps=6
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(resumed) == losses(trainer)
    assert sizes(again) == [4, 4]


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("best_step", [1, 3])
def test_the_report_and_the_record_are_about_the_best_model_that_was_loaded(tmp_path, best_step, by_head):
    """Before the first cut, and between two."""
    model, options = (tiny_mamba2(), {"realization": "project_heads"}) if by_head else (tiny_mamba(), {})
    before = [(name, parameter.shape) for name, parameter in model.named_parameters()]
    N, after_one, target = (16, 12, 8) if by_head else (8, 6, 4)
    scores = iter([1.0 if step == best_step else 0.0 for step in range(1, 6)])
    callback = CompreSSMCallback(CompreSSMConfig(state_size={1: target}, **options, **WINDOW))
    trainer = make_trainer(
        tmp_path / "run",
        model,
        callbacks=[callback],
        max_steps=5,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=dataset(2),
        compute_metrics=lambda _: {"score": next(scores)},
        metric_for_best_model="score",
        load_best_model_at_end=True,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "best"))
    assert sizes(model) == [N, N if best_step == 1 else after_one]
    assert [layer.head_state_sizes is None for layer in find_layers(model)] == [True, best_step == 1 or not by_head]
    assert [len(groups[0]) for groups in callback.kept.values()] == [
        max(layer.head_state_sizes or [layer.state_size]) for layer in find_layers(model)
    ]
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / f"checkpoint-{best_step}")
    assert all(torch.equal(best.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert model.config.to_dict().get("per_layer_config") == best.config.to_dict().get("per_layer_config")
    if best_step == 1:
        assert [(name, parameter.shape) for name, parameter in model.named_parameters()] == before
        assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(before)
        assert model.compression_report is None
        assert history_of(model) == ()
        assert not (tmp_path / "best" / "compressm.json").exists()
        return
    report = model.compression_report
    assert report.sizes == {0: N, 1: after_one}
    first = callback.history[0]
    spectrum = first.hankel_singular_values[1][0]
    assert report.layers[1].energy_kept == pytest.approx(sum(spectrum[:after_one]) / sum(spectrum))
    assert report.parameters_before == sum(shape.numel() for _, shape in before)
    assert report.layers[1].output_error == pytest.approx(first.output_error[1])
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    record = json.loads((tmp_path / "best" / "compressm.json").read_text())
    assert [[row["new_size"] for row in cut["report"]["layers"]] for cut in record["cuts"]] == [[N, after_one]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = CompreSSMConfig(state_size=4, **WINDOW)
    make_trainer(folder, tiny_mamba(), config, max_steps=5, save_strategy="steps", save_steps=3).train()
    return folder / "checkpoint-3"


def _set(*path):
    """A value in the callback's attributes, by its path there."""

    def edit(attributes):
        *way, last, value = path
        for key in way:
            attributes = attributes[key]
        attributes[last] = value

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        lambda attributes: attributes.clear(),
        lambda attributes: attributes.pop("kept"),
        _set("initial_sizes", {"0": 8}),
        _set("initial_sizes", {"zero": 8, "one": 8}),
        _set("initial_sizes", "0", "eight"),
        _set("kept", "0", [[0, 1, 2]]),
        _set("kept", "0", [[0, 1, 2, 3, 4, 99]]),
        _set("kept", "0", None),
        _set("attempts", 7),
        _set("attempts", "1"),
        _set("stopped", "no"),
        _set("history", []),
        _set("history", {}),
        _set("history", 0, "sizes", "1", 5),
        _set("history", 0, "unknown", 5),
        _set("history", 0, "output_error", {}),
        _set("history", 0, "hankel_singular_values", "0", [["a", "b"]]),
        _set("history", 0, "states", "0", [[0, 1]]),
    ],
)
def test_damaged_or_edited_state_is_refused(checkpoint, edit):
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["CompreSSMCallback"]
    layers = find_layers(tiny_mamba(6))
    assert read_attributes(saved, layers)["initial_sizes"] == {0: 8, 1: 8}
    edit(saved["attributes"])
    with pytest.raises(ValueError, match=r"trainer_state.json is damaged or of another run .*another checkpoint"):
        read_attributes(saved, layers)


@pytest.mark.parametrize("entry", [{}, [], "damaged"])
def test_damaged_state_is_refused_before_the_first_step(checkpoint, tmp_path, entry):
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(checkpoint, folder)
    state = json.loads((folder / "trainer_state.json").read_text())
    state["stateful_callbacks"]["CompreSSMCallback"] = entry
    (folder / "trainer_state.json").write_text(json.dumps(state))
    _refused(folder, tmp_path, "trainer_state.json is damaged")


@pytest.mark.parametrize("size", [7, {1: 5, 0: 8}])
def test_a_size_that_the_checkpoint_is_below_is_refused(checkpoint, tmp_path, size):
    _refused(
        checkpoint, tmp_path, r"Layer 0 has 6 states in the checkpoint", CompreSSMConfig(state_size=size, **WINDOW)
    )


def test_another_size_that_the_checkpoint_is_not_below_is_reached(checkpoint, tmp_path):
    """Also where its path leads over sizes that a layer is below already."""
    model = tiny_mamba()
    config = CompreSSMConfig(state_size={0: 6, 1: 3}, start=0, end=4, num_reductions=3)
    make_trainer(tmp_path, model, config, max_steps=5).train(resume_from_checkpoint=str(checkpoint))
    assert sizes(model) == [6, 3]


def test_damaged_batches_are_refused_before_the_first_step(checkpoint, tmp_path):
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(checkpoint, folder)
    path = folder / "compressm_batches_0.pt"
    path.write_bytes(path.read_bytes()[:100])
    _refused(folder, tmp_path, "compressm_batches_0.pt is damaged")


def _refused(folder, tmp_path, message, config=None):
    steps = []
    config = config or CompreSSMConfig(state_size=4, **WINDOW)
    trainer = make_trainer(tmp_path, tiny_mamba(), config, max_steps=5)
    trainer.training_step = lambda *args: steps.append(args)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(folder))
    assert not steps


def test_a_projected_model_is_selected_further_while_it_trains(tmp_path, token_ids):
    model = tiny_mamba2()
    compress_(model, CompreSSMConfig(state_size=12), token_ids)
    maps = [layer.mixer.BC_projection for layer in model.backbone.layers]
    trainer = make_trainer(tmp_path, model, CompreSSMConfig(state_size=8, **WINDOW), max_steps=6)
    trainer.train()
    assert sizes(model) == [8, 8]
    for layer, projection in zip(model.backbone.layers, maps, strict=True):
        assert layer.mixer.BC_projection is projection
        assert projection.shape == trainer.optimizer.state[projection]["exp_avg"].shape == (2, 16, 8)
    assert all(torch.isfinite(torch.tensor(list(losses(trainer).values()))))


def test_several_callbacks_are_refused(tmp_path):
    callbacks = [CompreSSMCallback(CompreSSMConfig(end=4)) for _ in range(2)]
    with pytest.raises(ValueError, match="keep one"):
        make_trainer(tmp_path, tiny_mamba(), callbacks=callbacks).train()
