"""CompreSSMCallback in a real Trainer."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import BertConfig, BertForMaskedLM, TrainerCallback
from transformers.utils import logging

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress_, hankel_singular_values
from hf_compressm.backends.ddp import DDP
from hf_compressm.backends.fsdp2 import FSDP2
from hf_compressm.layers import find_layers
from hf_compressm.training.checks import check_realization
from hf_compressm.training.settling import rank_correlation
from tests.conftest import tiny_mamba, tiny_mamba2
from tests.training.conftest import dataset, losses, make_trainer, sizes

WINDOW = {"start": 0, "end": 4, "num_reductions": 2}
slow_to_count = pytest.mark.no_cover  # torch.compile looks at each line that coverage does, and takes twice as long


def same_weights(one, other) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("make", [tiny_mamba, tiny_mamba2], ids=["mamba", "mamba2"])
def test_tolerance_0_is_the_run_without_the_callback_bit_for_bit(tmp_path, make):
    plain, watched = make(), make()
    one = make_trainer(tmp_path, plain, max_steps=6)
    two = make_trainer(tmp_path, watched, CompreSSMConfig(tolerance=0, **WINDOW), max_steps=6)
    one.train()
    two.train()
    assert losses(one) == losses(two)
    assert same_weights(plain, watched)
    assert plain.config.to_dict() == watched.config.to_dict()


@pytest.mark.parametrize(
    ("make", "target", "expected"),
    [
        (tiny_mamba, {"state_size": 3}, [[6, 6], [3, 3]]),
        (tiny_mamba, {"state_size": {1: 2}}, [[8, 5], [8, 2]]),
        (tiny_mamba2, {"state_size": 8}, [[16, 16], [8, 8]]),
    ],
)
def test_the_state_shrinks_on_schedule_and_training_goes_on(tmp_path, make, target, expected):
    model = make()
    callback = CompreSSMCallback(CompreSSMConfig(**target, **WINDOW))
    trainer = make_trainer(tmp_path, model, callbacks=[callback], max_steps=6, gradient_accumulation_steps=2)
    trainer.train()
    assert [attempt.step for attempt in callback.history] == [2, 4]
    assert [list(attempt.sizes.values()) for attempt in callback.history] == expected
    assert sizes(model) == expected[-1]
    assert set(losses(trainer)) == set(range(1, 7))
    logged = [entry for entry in trainer.state.log_history if "compressm/state_size_mean" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert logged[-1]["compressm/state_size_mean"] == sum(expected[-1]) / 2
    for key in ("state_size/layer_0", "energy_kept", "cut_seconds", "step_seconds", "rank_correlation"):
        assert f"compressm/{key}" in logged[-1]


@pytest.mark.parametrize("refit", [0, 1])
def test_the_cut_is_that_of_compress_on_the_last_training_batches(tmp_path, refit):
    """The rest of the run is a loop by hand with the optimizer of the same kind."""
    model = tiny_mamba()
    config = CompreSSMConfig(state_size=3, refit=refit, start=0, end=3, num_reductions=1, calibration_batches=2)
    trainer = make_trainer(tmp_path, model, config, max_steps=6, lr_scheduler_type="constant", max_grad_norm=0)
    seen = []
    trainer.compute_loss_ = trainer.compute_loss
    trainer.compute_loss = lambda m, inputs, **kw: (
        seen.append(inputs["input_ids"]) or trainer.compute_loss_(m, inputs, **kw)
    )
    trainer.train()

    mine = tiny_mamba().train()
    optimizer = trainer.optimizer.optimizer.__class__(mine.parameters(), lr=1e-3, weight_decay=0)
    wanted = []
    for step, ids in enumerate(seen, 1):
        loss = mine(input_ids=ids, labels=ids).loss
        wanted.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 3:
            batch = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in seen[1:3]]
            compress_(mine, CompreSSMConfig(state_size=3, refit=refit), batch, optimizer=optimizer)
    assert sizes(model) == sizes(mine) == [3, 3]
    torch.testing.assert_close(list(losses(trainer).values()), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "size", "kinds"),
    [(tiny_mamba, 3, ["read-out", "refit"]), (tiny_mamba2, 8, ["select", "refit"])],
    ids=["mamba", "mamba2"],
)
def test_layers_are_fitted_at_the_cut_if_it_is_asked_for(tmp_path, make, size, kinds):
    class Kinds(TrainerCallback):
        def on_compressm_cut(self, args, state, control, *, plan, **kwargs):
            seen.append({one.kind for one in plan.realizations.values()})

    seen = []
    for options in ({}, {"refit": 1}):
        config = CompreSSMConfig(state_size=size, start=0, end=2, num_reductions=1, **options)
        callbacks = [CompreSSMCallback(config), Kinds()]
        make_trainer(tmp_path, make(), callbacks=callbacks, max_steps=3, per_device_train_batch_size=12).train()
    assert seen[0] == {kinds[0]}
    assert kinds[1] in seen[1]


def test_of_large_batches_the_first_sequences_are_measured(tmp_path, monkeypatch):
    data, model = dataset(), tiny_mamba()
    length = len(data[0]["input_ids"])
    monkeypatch.setattr("hf_compressm.training.callback.MEASURED_TOKENS", 2 * length + 1)
    callback = CompreSSMCallback(CompreSSMConfig(tolerance=0, start=0, end=1, num_reductions=1))
    seen = []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    make_trainer(
        tmp_path, model, callbacks=[callback], max_steps=2, learning_rate=0, per_device_train_batch_size=4
    ).train()
    measured = callback.history[0].hankel_singular_values
    expected = hankel_singular_values(tiny_mamba(), seen[0][:2])
    for layer in expected.layers:
        assert measured[layer.index][0] == pytest.approx(layer.hankel_singular_values[0], rel=1e-4)


def test_small_reductions_are_skipped(tmp_path):
    model = tiny_mamba()
    callback = CompreSSMCallback(CompreSSMConfig(tolerance=0.3, min_reduction=0.99, **WINDOW))
    make_trainer(tmp_path, model, callbacks=[callback], max_steps=5).train()
    assert sizes(model) == [8, 8]
    assert len(callback.history) == 2


@pytest.mark.parametrize("accept", [False, True])
def test_rollback_restores_model_optimizer_and_random_numbers_exactly(tmp_path, accept):
    config = CompreSSMConfig(state_size=1, rollback=1e9 if accept else 0.0, **WINDOW)
    if not accept:  # a metric that any change makes worse
        calls = iter(range(100))
        metric = {"compute_metrics": lambda _: {"badness": next(calls)}, "metric_for_best_model": "badness"}
        metric["greater_is_better"] = False
    else:
        metric = {}
    plain, model = tiny_mamba(), tiny_mamba()
    one = make_trainer(tmp_path, plain, max_steps=6)
    callback = CompreSSMCallback(config)
    two = make_trainer(tmp_path, model, callbacks=[callback], max_steps=6, eval_dataset=dataset(4), **metric)
    torch.manual_seed(0)
    one.train()
    state = torch.get_rng_state()
    torch.manual_seed(0)
    two.train()
    assert callback.history[0].undone is not accept
    if accept:
        assert sizes(model) == [1, 1]
        return
    assert len(callback.history) == 1
    assert callback.stopped
    assert losses(one) == losses(two)
    assert same_weights(plain, model)
    assert plain.config.to_dict() == model.config.to_dict()
    assert torch.equal(state, torch.get_rng_state())
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        for key, entry in one.optimizer.state[p].items():
            assert torch.equal(entry, two.optimizer.state[q][key])


def test_calibration_data_can_be_given(tmp_path, token_ids):
    model = tiny_mamba()
    callback = CompreSSMCallback(CompreSSMConfig(state_size=3, **WINDOW), calibration_data=token_ids)
    make_trainer(tmp_path, model, callbacks=[callback], max_steps=5).train()
    assert sizes(model) == [3, 3]


def test_gradient_checkpointing_and_bf16(tmp_path):
    model = tiny_mamba()
    config = CompreSSMConfig(state_size=3, **WINDOW)
    trainer = make_trainer(tmp_path, model, config, max_steps=5, bf16=True, activation_checkpointing=True)
    trainer.train()
    assert sizes(model) == [3, 3]


@slow_to_count
def test_a_compiled_model_is_traced_again(tmp_path):
    config = CompreSSMConfig(state_size=3, start=0, end=2, num_reductions=1)
    plain, compiled = tiny_mamba(layers=1), tiny_mamba(layers=1)
    one = make_trainer(tmp_path, plain, config, max_steps=4)
    two = make_trainer(tmp_path, compiled, config, max_steps=4, torch_compile=True, torch_compile_backend="eager")
    one.train()
    two.train()
    assert sizes(plain) == sizes(compiled) == [3]
    torch.testing.assert_close(losses(one), losses(two), rtol=1e-5, atol=1e-5)


@slow_to_count
def test_a_loop_with_accelerate():
    """As the help of `compress_` shows it."""
    accelerator = Accelerator(cpu=True)
    model = tiny_mamba()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(dataset(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    recent, seen = [], []
    for step, batch in enumerate(loader, 1):
        recent = [*recent[-3:], {"input_ids": batch["input_ids"]}]
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
        if step == 6:
            config = CompreSSMConfig(state_size=3, refit=0)
            compress_(accelerator.unwrap_model(model), config, recent, optimizer=optimizer)
    assert sizes(accelerator.unwrap_model(model)) == [3, 3]
    assert len(seen) == 12
    for parameter in model.parameters():
        assert optimizer.optimizer.state[parameter]["exp_avg"].shape == parameter.shape


class EightBit(torch.optim.AdamW):
    __module__ = "bitsandbytes.optim.adamw"


class Soap(torch.optim.SGD):
    """Keeps square matrices in a list, from the first step on."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("GG", [torch.eye(n) for n in p.shape])
        return super().step(closure)


def test_optimizers_of_square_matrices_are_refused_after_the_first_step(tmp_path):
    """By what their state is: there is none before."""
    model = tiny_mamba()
    optimizers = (Soap(model.parameters(), lr=1e-3), None)
    trainer = make_trainer(tmp_path, model, CompreSSMConfig(end=4), optimizers=optimizers)
    with pytest.raises(ValueError, match=r"'GG' .* a list that holds tensors.*plain optimizer"):
        trainer.train()
    assert trainer.state.global_step == 1
    trainer = make_trainer(tmp_path, model, CompreSSMConfig(end=4), optimizers=optimizers)  # it has one now
    with pytest.raises(ValueError, match="plain optimizer"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_packed_optimizers_are_refused_before_the_first_step(tmp_path):
    model = tiny_mamba()
    optimizers = (EightBit(model.parameters()), None)
    trainer = make_trainer(tmp_path, model, CompreSSMConfig(end=4), optimizers=optimizers)
    with pytest.raises(ValueError, match="plain optimizer"):
        trainer.train()


def frozen():
    model = tiny_mamba()
    for layer in model.backbone.layers:
        layer.mixer.requires_grad_(False)
    return model


def bert():
    return BertForMaskedLM(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))


def lora():
    return get_peft_model(tiny_mamba(), LoraConfig(target_modules=["in_proj"], task_type="CAUSAL_LM"))


class Mine(torch.nn.Module):
    """A model of one's own around one."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_mamba()

    def forward(self, input_ids, labels=None):
        return self.inner(input_ids=input_ids, labels=labels)


@pytest.mark.parametrize(
    ("make", "config", "arguments", "message"),
    [
        (tiny_mamba, {"state_size": 9}, {}, "can't be cut to 9"),
        (tiny_mamba, {"state_size": {5: 2}}, {}, "names layer 5"),
        (tiny_mamba2, {"state_size": 9}, {}, "multiple of 8"),
        (tiny_mamba, {"end": 50}, {}, "lower end"),
        (tiny_mamba, {"end": 1, "num_reductions": 3}, {}, "num_reductions"),
        (tiny_mamba, {"rollback": 0.1}, {}, "eval_dataset"),
        (
            tiny_mamba,
            {"rollback": 0.1},
            {"eval_dataset": dataset(4), "metric_for_best_model": "accuracy"},
            "'accuracy', which nothing computes",
        ),
        (tiny_mamba2, {}, {}, "would cut nothing: the layers have 16 states, and no smaller size"),
        (frozen, {}, {}, "frozen"),
        (bert, {}, {}, "no Mamba"),
        (lora, {}, {}, "PEFT"),
        (Mine, {}, {}, "can't cut a Mine.*PreTrainedModel"),
    ],
)
def test_what_can_not_work_is_refused_before_the_first_step(tmp_path, make, config, arguments, message):
    steps = []
    trainer = make_trainer(tmp_path, make(), CompreSSMConfig(**({"end": 4} | config)), **arguments)
    trainer.training_step = lambda *args: steps.append(args)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not steps


def test_an_attempt_whose_target_is_reached_already_shows_the_spectra(tmp_path):
    """The sizes that kernels are tuned for go further than a ratio asks for."""
    model = tiny_mamba2(state_size=64)
    config = CompreSSMConfig(ratio=0.5, start=0, end=4, num_reductions=4)
    callback = CompreSSMCallback(config)
    make_trainer(tmp_path, model, callbacks=[callback], max_steps=6).train()
    history = callback.history
    assert [attempt.step for attempt in history] == [1, 2, 3, 4]
    assert sum(sizes(model)) <= 64
    assert any(one.sizes == other.sizes for one, other in pairwise(history))


def test_calibration_texts_without_a_tokenizer_are_refused_before_the_first_step(tmp_path):
    callback = CompreSSMCallback(CompreSSMConfig(state_size=4, **WINDOW), ["a text"])
    trainer = make_trainer(tmp_path, tiny_mamba(), callbacks=[callback])
    with pytest.raises(TypeError, match="need a tokenizer"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_run_that_cut_nothing_says_why(tmp_path, caplog):
    logging.enable_propagation()
    make_trainer(tmp_path, tiny_mamba(), CompreSSMConfig(tolerance=1e-9, **WINDOW)).train()
    logging.disable_propagation()
    (said,) = [record.message for record in caplog.records if "none of 2 attempts" in record.message]
    assert "raise tolerance" in said


def test_a_run_whose_cuts_were_skipped_says_so(tmp_path, caplog):
    callback = CompreSSMCallback(CompreSSMConfig(tolerance=0.3, min_reduction=0.9, **WINDOW))
    logging.enable_propagation()
    make_trainer(tmp_path, tiny_mamba(), callbacks=[callback]).train()
    logging.disable_propagation()
    (said,) = [record.message for record in caplog.records if "none of 2 attempts" in record.message]
    assert said.endswith(
        "2 would have removed a smaller share of the states than min_reduction=0.9: lower min_reduction."
    )
    for attempt in callback.history:
        assert attempt.skipped
        assert attempt.output_error == {0: 0.0, 1: 0.0}
        assert attempt.energy_kept == {0: 1.0, 1: 1.0}


class CutsToo(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 3:
            compress_(model, {"state_size": 5, "refit": 0}, torch.randint(0, 9, (2, 12)), optimizer=optimizer)


def test_a_model_that_something_else_cuts_is_refused(tmp_path):
    model = tiny_mamba()
    callback = CompreSSMCallback(CompreSSMConfig(state_size=4, **WINDOW))
    trainer = make_trainer(tmp_path, model, callbacks=[CutsToo(), callback])
    with pytest.raises(ValueError, match="Layer 0 has 5 states and had 6 when CompreSSMCallback last looked"):
        trainer.train()
    assert sizes(model) == [5, 5]
    assert len(callback.history) == 1


def test_new_parameters_are_refused_where_the_model_is_sharded():
    layers = find_layers(tiny_mamba2())
    with pytest.raises(ValueError, match="new parameters, which FSDP2 can't take"):
        check_realization("project_heads", layers, FSDP2())
    check_realization("select", layers, FSDP2())
    check_realization("project_heads", layers, DDP())


def test_rank_correlation_looks_at_the_states_that_both_have():
    before = {0: [[0, 1, 2, 3, 4]]}, {0: [[5.0, 4.0, 3.0, 2.0, 1.0]]}
    now = {0: [[0, 2, 4]]}, {0: [[0.1, 0.2, 0.3]]}
    assert rank_correlation(*before, *now) == pytest.approx(-1)
    assert rank_correlation(*before, *before) == pytest.approx(1)
    assert rank_correlation(*before, {0: [[0, 2]]}, {0: [[0.1, 0.2]]}) is None


class Averaging(TrainerCallback):
    """A moving average of the weights, which follows the cuts."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        self.cuts = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.averaged.update_parameters(model)

    def on_compressm_cut(self, args, state, control, *, model, plan, backend, **kwargs):
        assert sizes(model) == list(plan.report.sizes.values())
        self.cuts.append((state.global_step, args.max_steps))
        plan.apply_(self.averaged.module, backend=backend)


@pytest.mark.parametrize("make", [tiny_mamba, tiny_mamba2], ids=["mamba", "mamba2"])
def test_a_moving_average_follows_the_cuts(tmp_path, make):
    """The average is constant here, since nothing is learnt: after the cuts, too, it is the model."""
    model, averaging = make(), Averaging()
    config = CompreSSMConfig(state_size=8 if make is tiny_mamba2 else 4, **WINDOW)
    callbacks = [CompreSSMCallback(config), averaging]
    make_trainer(tmp_path, model, callbacks=callbacks, max_steps=5, learning_rate=0).train()
    assert averaging.cuts == ([(4, 5)] if make is tiny_mamba2 else [(2, 5), (4, 5)])
    assert int(averaging.averaged.n_averaged) == 5
    assert sizes(averaging.averaged.module) == sizes(model)
    assert averaging.averaged.module.config.to_dict() == model.config.to_dict()
    assert same_weights(averaging.averaged.module, model)
    loaded = make(3 if make is tiny_mamba else 8).state_dict()
    if make is tiny_mamba:  # the copy's hooks do not touch the model
        with pytest.raises(RuntimeError, match="size mismatch"):
            averaging.averaged.module.load_state_dict(loaded)
        assert sizes(model) == [4, 4]


def test_an_error_in_the_second_evaluation_of_rollback_undoes_the_cut(tmp_path):
    calls = iter([{"score": 1.0}])
    model = tiny_mamba()
    callback = CompreSSMCallback(CompreSSMConfig(state_size=4, rollback=0.1, **WINDOW))
    metric = {"compute_metrics": lambda _: next(calls), "metric_for_best_model": "score", "eval_dataset": dataset(4)}
    trainer = make_trainer(tmp_path, model, callbacks=[callback], **metric)
    with pytest.raises(StopIteration):
        trainer.train()
    assert sizes(model) == [8, 8]
    assert model.config.state_size == 8
    assert callback.history == []
    for parameter in model.parameters():
        assert trainer.optimizer.state[parameter]["exp_avg"].shape == parameter.shape
