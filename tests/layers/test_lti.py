"""Mixers of one's own that say which time-invariant system they are, in plain modules and in models of transformers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress_, get_report, hankel_singular_values
from hf_compressm.hankel.lti import ModalSystem
from hf_compressm.layers import find_layers, is_plain, resize_like_
from tests.conftest import VOCABULARY
from tests.layers.lti_mixers import LRU, S4D, S5, Net
from tests.training.conftest import losses, make_trainer

SIZE = 6
MIXERS = {"LRU": lambda: LRU(SIZE, 12), "S5": lambda: S5(SIZE, 12), "S4D": lambda: S4D(SIZE, 12)}


def net(make=MIXERS["LRU"]) -> Net:
    torch.manual_seed(0)
    return Net(VOCABULARY, SIZE, make)


def sizes(model) -> list[int]:
    return [layer.state_size for layer in find_layers(model)]


def recurrent(system: ModalSystem, u):
    """Re(C x_k) by the recurrence in float64, for u [length, inputs], of systems side by side one for each input."""
    x, outputs = torch.zeros_like(system.a), []
    for now in u.double():
        now = now[:, None] if system.a.ndim > 1 else now
        x = system.a * x + (system.B @ now[..., None].to(system.B.dtype))[..., 0]
        outputs.append((system.C @ x[..., None])[..., 0].real.flatten())
    return torch.stack(outputs)


@pytest.mark.parametrize("kind", MIXERS)
@torch.no_grad()
def test_a_mixer_becomes_its_truncated_system(kind):
    """With the error and the bound of its report; and so has a selection."""
    model, selected = net(MIXERS[kind]), net(MIXERS[kind])
    (layer, _), before = find_layers(model), hankel_singular_values(model)
    full, u = layer.system(), torch.randn(60, SIZE)
    report = compress_(model, CompreSSMConfig(tolerance=0.1))
    assert all(size < 12 for size in sizes(model))
    torch.testing.assert_close(
        layer.mixer(u[None])[0] - getattr(layer.mixer, "D", 0) * u,
        recurrent(layer.system(), u).float(),
        rtol=1e-3,
        atol=1e-3,
    )
    row, sigma = report.layers[0], torch.tensor(before.layers[0].hankel_singular_values[0])
    kept = sigma[: row.new_size].sum() / sigma.sum()
    assert kept - sigma[row.new_size - 1] / sigma.sum() < 0.9 <= kept
    if kind != "S4D":  # of which the spectrum is a mean
        # Two real states may go unused.
        tail = 2 * float(sigma[row.new_size :].sum())
        assert tail * (1 - 1e-5) <= row.error_bound <= (tail + 2 * sigma[row.new_size - 1]) * (1 + 1e-5)
    error = full.minus(layer.system())
    assert error.energy() == pytest.approx(row.output_error * full.energy(), rel=1e-3)
    assert f"{row.error_bound:.3g}" in str(report)
    chosen = compress_(selected, CompreSSMConfig(state_size=report.sizes, realization="select")).layers[0]
    error = full.minus(find_layers(selected)[0].system())
    assert error.energy() == pytest.approx(chosen.output_error * full.energy(), rel=1e-3)


@torch.no_grad()
def test_states_that_are_not_read_go_and_nothing_changes(token_ids):
    model = net()
    for mixer in model.mixers:
        mixer.C_re[:, ::2] = mixer.C_im[:, ::2] = 0
    before = model(token_ids).logits
    report = compress_(model, CompreSSMConfig(tolerance=1e-5))
    assert sizes(model) == [6, 6]
    assert max(row.output_error for row in report.layers) < 1e-9
    torch.testing.assert_close(model(token_ids).logits, before, rtol=1e-3, atol=1e-3)


def test_a_ratio_and_what_needs_no_data(caplog):
    model = net()
    report = compress_(model, CompreSSMConfig(ratio=0.5), torch.zeros(2, 8, dtype=torch.long))
    assert report.states_after == 12
    assert report.realization == "balance"
    assert get_report(model) == report


def fail(method):
    """A network of which one mixer's method is another."""
    model = net()
    name = method.__name__
    setattr(model.mixers[1], name, method.__get__(model.mixers[1]))
    return model


def test_failures_change_nothing():
    def lti_parameters(self, a, B, C):
        return LRU.lti_parameters(self, a, 2 * B, C)

    twice = fail(lti_parameters)

    def lti_parameters(self, a, B, C):
        return LRU.lti_parameters(self, a, B, C) | {"E": a}

    unknown = fail(lti_parameters)

    def lti_parameters(self, a, B, C):
        return LRU.lti_parameters(self, a, B, C) | {"nu_log": a.abs() * torch.nan}

    not_finite = fail(lti_parameters)

    def lti_parameters(self, a, B, C):
        return LRU.lti_parameters(self, a, B, C) | {"nu_log": torch.where(a.imag == 0, a.abs(), torch.nan)}

    at_the_cut = fail(lti_parameters)
    nan = net()
    nan.mixers[1].B_re.data[0] = torch.nan

    def lti_system(self):
        a, B, C = LRU.lti_system(self)
        return 2 * a, B, C

    unstable = fail(lti_system)

    def lti_system(self):
        return LRU.lti_system(self)[:2]

    no_system = fail(lti_system)
    for model, message in [
        (twice, "undo each other"),
        (unknown, "no parameter"),
        (not_finite, r"mixers\.1\.lti_parameters gives a nu_log that is not finite for a real eigenvalue"),
        (at_the_cut, r"not finite in mixers\.1\.nu_log: look at the model's weights\. Nothing was changed\.$"),
        (
            nan,
            r"mixers\.1\.lti_system\(\) gives no system: B has entries that are not finite\. Nothing was changed\.$",
        ),
        (unstable, r"mixers\.1 can't be measured.*not stable"),
        (no_system, "gives no system"),
        (net(), "state_size"),  # for the default, a max_divergence
    ]:
        before, optimizer = copy.deepcopy(model.state_dict()), torch.optim.AdamW(model.parameters())
        with pytest.raises(ValueError, match=message):
            compress_(model, None if message == "state_size" else {"state_size": 4}, optimizer=optimizer)
        assert all(value.equal(before[name]) or model is nan for name, value in model.state_dict().items())


@pytest.mark.parametrize("seed", range(3))
def test_real_eigenvalues_of_a_truncated_system_are_taken(seed):
    """By the docstring's recipe; two cuts of three make some."""
    torch.manual_seed(seed)
    model = Net(VOCABULARY, SIZE, lambda: LRU(SIZE, 16, r_min=0.6, r_max=0.95, max_phase=3.1))
    compress_(model, CompreSSMConfig(tolerance=0.05))
    assert all(size < 16 for size in sizes(model))
    systems = [layer.system() for layer in find_layers(model)]
    assert any((system.a.imag.abs() < 1e-6).any() for system in systems)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(("kind", "eigenvalue"), [("positive", "0.5"), ("negative", "-0.5")])
def test_a_mixer_that_can_not_take_real_eigenvalues_is_refused_before_the_first_step(kind, eigenvalue, tmp_path):
    class Fragile(LRU):
        def lti_parameters(self, a, B, C):
            angle = a.angle() if kind == "positive" else math.pi - a.angle()
            return super().lti_parameters(a, B, C) | {"theta_log": angle.log()}

    model = net(lambda: Fragile(SIZE, 12))
    message = rf"mixers\.0\.lti_parameters gives a theta_log that is not finite for a real eigenvalue \({eigenvalue}\)"
    with pytest.raises(ValueError, match=message):
        compress_(model, CompreSSMConfig(state_size=6))
    trainer = make_trainer(tmp_path, model, CompreSSMConfig(state_size=6, start=0, end=4, num_reductions=1))
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert len(hankel_singular_values(model).layers) == 2
    assert sizes(model) == [12, 12]
    compress_(model, CompreSSMConfig(state_size=6, realization="select"))


def test_real_eigenvalues_are_selected(token_ids):
    class Leaky(LRU):
        def lti_system(self):
            return tuple(part.real for part in super().lti_system())

    model = net(lambda: Leaky(SIZE, 8))
    with torch.no_grad():
        for mixer in model.mixers:
            mixer.theta_log.fill_(-20)
    report = compress_(model, CompreSSMConfig(state_size=4))
    assert report.realization == "select"
    assert report.state_bytes_after == 4 * sum(sizes(model)) == 32  # a real state is one number
    assert compress_(net(), CompreSSMConfig(state_size=4)).state_bytes_after == 64
    with pytest.raises(ValueError, match="realization='select'"):
        compress_(model, CompreSSMConfig(state_size=2, realization="balance"))


class Packed(LRU):
    """Two numbers for each state in one parameter, and where `real` no complex state."""

    def __init__(self, size: int, states: int, real: bool) -> None:
        super().__init__(size, states)
        self.packed, self.real = torch.nn.Parameter(torch.cat([self.nu_log.data, self.theta_log.data])), real
        del self.nu_log, self.theta_log

    def lti_system(self):
        nu_log, theta_log = self.packed.chunk(2)
        a = torch.exp(torch.complex(-nu_log.exp(), theta_log.exp()))
        system = a, torch.complex(self.B_re, self.B_im), torch.complex(self.C_re, self.C_im)
        return tuple(matrix.abs() for matrix in system) if self.real else system

    def lti_parameters(self, a, B, C):
        made = LRU.lti_parameters(self, a, B, C)
        packed = torch.cat([made.pop("nu_log"), made.pop("theta_log")])
        return made | {"packed": packed, "B_re": B.real, "B_im": B.imag}


@pytest.mark.parametrize(
    ("real", "values", "message"),
    [
        (
            True,
            {},
            r"mixers\.0 can't be cut by any realization: 'balance' wants complex states, 'select' wants one slice",
        ),
        (True, {"realization": "select"}, "'select' wants one slice for each state"),
        (
            False,
            {"selection": "magnitude"},
            "not for these layers, which can balance. Take realization='balance' without",
        ),
        (False, {"realization": "select"}, "not for these layers, which can balance. Take realization='balance'"),
        (False, {"realization": "project"}, "Take realization='balance'"),
    ],
    ids=str,
)
def test_what_the_layers_can_not_have_is_refused_before_anything_changes(real, values, message):
    model = net(lambda: Packed(SIZE, 12, real))
    with pytest.raises(ValueError, match=message):
        compress_(model, CompreSSMConfig(state_size=4, **values))
    assert sizes(model) == [12, 12]
    assert len(hankel_singular_values(model).layers) == 2
    if not real:
        assert compress_(model, CompreSSMConfig(state_size=4)).realization == "balance"
        assert model.mixers[0].packed.shape == (8,)


@pytest.mark.parametrize("realization", ["auto", "select"])
def test_a_parameter_of_one_shape_at_every_size_is_named_beside_the_others(realization, token_ids):
    class Stepped(S5):
        """One step for all states."""

        def __init__(self, size: int, states: int) -> None:
            super().__init__(size, states)
            self.log_step = torch.nn.Parameter(torch.tensor([math.log(0.05)]))

        def lti_parameters(self, a, B, C):
            made = super().lti_parameters(a, B, C)
            return {"log_step": made.pop("log_step")[:1]} | made

    def stepped() -> Net:
        return net(lambda: Stepped(SIZE, 12))

    model, fresh = stepped(), stepped()
    compress_(model, CompreSSMConfig(state_size=4, realization=realization))
    step = 0.03 if realization == "auto" else 0.05
    assert float(model.mixers[0].log_step.detach().exp()) == pytest.approx(step)
    assert resize_like_(fresh, model.state_dict()) == {0: 4, 1: 4}
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(token_ids).logits, model(token_ids).logits)


def test_moments_of_new_states_begin_anew_and_others_stay(token_ids):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step():
        optimizer.zero_grad()
        loss = model(token_ids, labels=token_ids).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    first, _, _ = (step() for _ in range(3))
    mixer = model.mixers[0]
    kept = {name: optimizer.state[getattr(mixer, name)]["exp_avg"].clone() for name in ("D",)}
    compress_(model, CompreSSMConfig(tolerance=0.05), optimizer=optimizer)
    for name in ("nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im"):
        assert not optimizer.state[getattr(mixer, name)]
    assert torch.equal(optimizer.state[mixer.D]["exp_avg"], kept["D"])
    assert [step() for _ in range(10)][-1] < first
    assert optimizer.state[mixer.B_re]["exp_avg"].shape == mixer.B_re.shape
    assert (float(optimizer.state[mixer.B_re]["step"]), float(optimizer.state[mixer.D]["step"])) == (10, 13)


def test_a_slim_plain_model_is_loaded_again(token_ids):
    model = net(MIXERS["S5"])
    compress_(model, CompreSSMConfig(tolerance=0.1))
    fresh = net(MIXERS["S5"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict(model.state_dict())
    assert list(resize_like_(fresh, model.state_dict()).values()) == sizes(fresh) == sizes(model)
    fresh.load_state_dict(model.state_dict())
    assert fresh.mixers[0].state_size == model.mixers[0].state_size < 12
    assert torch.equal(fresh(token_ids).logits, model(token_ids).logits)
    with pytest.raises(ValueError, match="another model"):
        resize_like_(fresh, {"embedding.weight": torch.zeros(1)})


def test_it_shrinks_while_it_trains_and_resumes(tmp_path):
    config = CompreSSMConfig(tolerance=0.1, start=0, end=4, num_reductions=2)
    saved = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    model, callback = net(), CompreSSMCallback(config)
    whole = make_trainer(tmp_path, model, callbacks=[callback], **saved)
    whole.train()
    assert all(size < 11 for size in sizes(model))
    assert callback.history[0].states[0] == [list(range(12))]
    assert callback.history[1].rank_correlation is None  # of states that are others now
    assert model.compression_report.realization == "balance"
    for row in model.compression_report.layers:
        assert row.realization == "balance"
        assert row.error_bound == sum(attempt.error_bound[row.index] for attempt in callback.history) > 0
    report = get_report(tmp_path / "checkpoint-6")
    assert list(report.sizes.values()) == sizes(model)
    resumed = make_trainer(tmp_path, net(), callbacks=[CompreSSMCallback(config)], **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert sizes(resumed.model) == sizes(model)
    bounds, expected = ([row.error_bound for row in m.compression_report.layers] for m in (resumed.model, model))
    assert bounds == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(losses(resumed)[6], losses(whole)[6], rtol=1e-4, atol=1e-4)


class NetConfig(PreTrainedConfig):
    model_type = "lru_net"

    def __init__(self, state_size: int = 12, **kwargs) -> None:
        self.state_size, self.num_hidden_layers, self.vocab_size, self.hidden_size = state_size, 2, VOCABULARY, SIZE
        super().__init__(**kwargs)


class SizelessConfig(NetConfig):
    model_type = "sizeless_net"

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        del self.state_size


class PreTrainedNet(PreTrainedModel):
    config_class = NetConfig
    base_model_prefix = "net"

    def __init__(self, config: NetConfig) -> None:
        super().__init__(config)
        self.net = Net(VOCABULARY, SIZE, lambda: LRU(SIZE, getattr(config, "state_size", 12)))
        self.post_init()

    def get_input_embeddings(self):
        return self.net.embedding

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        return self.net(input_ids, labels)


def test_a_model_of_transformers_keeps_a_budget_and_is_saved(tmp_path, token_ids):
    torch.manual_seed(0)
    model = PreTrainedNet(NetConfig()).eval()
    assert not is_plain(model)
    report = compress_(model, CompreSSMConfig(max_divergence=0.5, uniform=True), token_ids)
    assert 0 < report.divergence.measured <= 0.5
    assert model.config.state_size == sizes(model)[0] < 12
    model.save_pretrained(tmp_path)
    again = PreTrainedNet.from_pretrained(tmp_path)
    assert torch.equal(again(token_ids).logits, model(token_ids).logits)
    assert get_report(tmp_path) == report


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (NetConfig(), {"ratio": 0.5}, "one state size for all layers.*uniform=True"),
        (NetConfig(), {"state_size": {0: 4}}, "uniform=True"),
        (NetConfig(), {"tolerance": 0.1}, "uniform=True"),
        (SizelessConfig(), {"state_size": 6}, "The config of a sizeless_net model has no state size"),
    ],
)
def test_a_config_without_a_place_for_the_sizes_is_refused_before_the_first_step(config, values, message, tmp_path):
    model = PreTrainedNet(config)
    with pytest.raises(ValueError, match=message):
        compress_(model, values, object())
    trainer = make_trainer(tmp_path, model, CompreSSMConfig(**values, start=0, end=4, num_reductions=1))
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert len(hankel_singular_values(model).layers) == 2
