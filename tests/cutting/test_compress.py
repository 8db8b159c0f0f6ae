"""compress_ and compress_pretrained on tiny models: exactness, targets, reloading, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, MambaForCausalLM

from hf_compressm import CompreSSMConfig, compress_, compress_pretrained, hankel_singular_values, measure
from hf_compressm.config import Selection
from hf_compressm.hankel.spectra import hankel_spectra
from tests.conftest import VOCABULARY, tiny_mamba, tiny_mamba2

BASELINES = ["greedy", "ghost", "lti_modal", "magnitude", "random"]
MODELS = {"mamba": tiny_mamba, "mamba2": tiny_mamba2, "mamba2-groups": lambda: tiny_mamba2(groups=2)}


def states(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before: dict[str, torch.Tensor], config: dict) -> bool:
    after = model.state_dict()
    return (
        model.config.to_dict() == config
        and after.keys() == before.keys()
        and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    )


@torch.no_grad()
def logits(model, ids, **kwargs) -> torch.Tensor:
    return model.eval()(ids, **kwargs).logits


@torch.no_grad()
def zero_states(model, kept: dict[int, list[list[int]]]) -> None:
    """Silence all states but the kept ones, in the full model: {layer: [kept states of group 0, ...]}."""
    for index, groups in kept.items():
        mixer = model.backbone.layers[index].mixer
        N = mixer.ssm_state_size
        for group, states_ in enumerate(groups):
            dropped = torch.tensor(sorted(set(range(N)) - set(states_)))
            if hasattr(mixer, "x_proj"):
                mixer.x_proj.weight[mixer.time_step_rank + N + dropped] = 0
            else:
                channel = mixer.intermediate_size + mixer.n_groups * N + group * N + dropped
                mixer.conv1d.weight[channel] = 0
                mixer.conv1d.bias[channel] = 0


@pytest.mark.parametrize("selection", BASELINES)
@pytest.mark.parametrize("name", MODELS)
def test_selection_equals_the_full_model_with_silenced_states(token_ids, name, selection):
    model = MODELS[name]()
    full = copy.deepcopy(model)
    size = 4 if name != "mamba2" else 8
    plan = measure(model, token_ids).plan(CompreSSMConfig(state_size=size, selection=selection, realization="select"))
    plan.apply_(model)
    zero_states(full, plan.kept)
    torch.testing.assert_close(logits(model, token_ids), logits(full, token_ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", [{"tolerance": 0.0}, {"ratio": 1.0}])
def test_no_cut_changes_nothing(token_ids, name, target):
    model = MODELS[name]()
    before, config = states(model), model.config.to_dict()
    report = compress_(model, CompreSSMConfig(**target), token_ids)
    assert same(model, before, config)
    assert "compression_history" not in vars(model) or model.compression_history == ()
    measured = hankel_singular_values(MODELS[name](), token_ids)
    for row, expected in zip(report.layers, measured.layers, strict=True):
        spectra = [torch.tensor(layer.hankel_singular_values) for layer in (row, expected)]
        assert (row.old_size, row.new_size, row.energy_kept, row.output_error) == (len(spectra[0][0]),) * 2 + (
            1.0,
            0.0,
        )
        if "tolerance" in target:  # a ratio weighs the states by the loss
            torch.testing.assert_close(*spectra)


@pytest.mark.parametrize("name", MODELS)
def test_ours_loses_less_than_every_baseline(token_ids, name):
    def error(**kwargs) -> float:
        model = MODELS[name]()
        report = compress_(model, CompreSSMConfig(state_size=4 if name != "mamba2" else 8, **kwargs), token_ids)
        return sum(layer.output_error for layer in report.layers)

    ours = error()
    for selection in BASELINES:
        assert ours < error(selection=selection, realization="select"), selection


def test_projection_at_full_rank_is_exact(token_ids):
    from hf_compressm.hankel.realization import project
    from hf_compressm.layers import find_layers
    from hf_compressm.modeling.modeling_compressm import project_

    model = tiny_mamba2()
    expected = logits(model, token_ids)
    layers = find_layers(model)
    for layer, entry in zip(layers, measure(model, token_ids).statistics, strict=True):
        cut = project(entry.groups[0].output[None], entry.P)[0][layer.state_size]
        project_(layer.mixer, torch.stack([cut.B_projection, cut.C_projection]))
    torch.testing.assert_close(logits(model, token_ids), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["uniform", "mixed", "project"])
def test_saved_models_reload_and_generate(tmp_path, token_ids, kind):
    model = tiny_mamba() if kind != "project" else tiny_mamba2()
    target = {
        "uniform": {"state_size": 3, "uniform": True},
        "mixed": {"state_size": {0: 3, 1: 5}},
        "project": {"ratio": 0.5, "multiple_of": 1},
    }
    compress_(model, CompreSSMConfig(**target[kind]), token_ids)
    model.save_pretrained(tmp_path / "slim")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "slim", dtype=torch.float32).eval()
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = again.generate(token_ids, use_cache=True, **settings)
    assert torch.equal(cached, again.generate(token_ids, use_cache=False, **settings))
    if kind == "uniform":
        assert (tmp_path / "slim" / "config.json").read_text().count("compressm") == 0


@pytest.mark.parametrize("name", MODELS)
def test_a_slim_model_can_be_cut_again_and_trained(token_ids, name):
    model = MODELS[name]()
    compress_(model, CompreSSMConfig(ratio=0.75, multiple_of=1), token_ids)
    report = compress_(model, CompreSSMConfig(ratio=0.5, multiple_of=1), token_ids)
    assert sum(layer.new_size for layer in report.layers) <= sum(layer.old_size for layer in report.layers) / 2
    model.train()
    model(token_ids, labels=token_ids).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.shape == parameter.shape


def test_parameters_keep_their_identity(mamba, token_ids):
    parameters = dict(mamba.named_parameters())
    mamba.train()
    mamba(token_ids, labels=token_ids).loss.backward()
    compress_(mamba, CompreSSMConfig(state_size=4), token_ids)
    assert mamba.training
    for name, parameter in mamba.named_parameters():
        assert parameter is parameters[name]
    mamba(token_ids, labels=token_ids).loss.backward()


def test_targets(token_ids):
    report = compress_(tiny_mamba(), CompreSSMConfig(state_size={1: 3}), token_ids)
    assert report.sizes == {0: 8, 1: 3}
    report = compress_(tiny_mamba(), CompreSSMConfig(ratio=0.5), token_ids)
    assert sum(report.sizes.values()) == 8
    report = compress_(tiny_mamba(), CompreSSMConfig(tolerance=0.5, uniform=True), token_ids)
    assert len(set(report.sizes.values())) == 1
    report = compress_(tiny_mamba(), CompreSSMConfig(tolerance=0.5, multiple_of=4), token_ids)
    assert all(size % 4 == 0 for size in report.sizes.values())
    report = compress_(tiny_mamba(), CompreSSMConfig(tolerance=0.9, min_state_size=6), token_ids)
    assert all(size >= 6 for size in report.sizes.values())


@pytest.mark.parametrize("realization", ["select", "project"])
@pytest.mark.parametrize("target", [{"tolerance": 0.3}, {"ratio": 0.5}, {"ratio": 0.7, "min_state_size": 20}])
def test_chosen_mamba2_sizes_are_multiples_of_8_or_tuned_ones(token_ids, realization, target):
    model = tiny_mamba2(state_size=48)
    report = compress_(model, CompreSSMConfig(**target, realization=realization, refit=0), token_ids)
    assert all(size % 8 == 0 for size in report.sizes.values())
    model = tiny_mamba2(state_size=48)
    report = compress_(
        model, CompreSSMConfig(**target, realization=realization, refit=0, multiple_of="tuned"), token_ids
    )
    assert set(report.sizes.values()) <= {16, 32, 48}
    assert min(report.sizes.values()) >= target.get("min_state_size", 1)
    if "ratio" in target:
        assert sum(report.sizes.values()) == (48 if target["ratio"] == 0.5 else 64)
    # What the user names is honoured, whatever it is.
    model = tiny_mamba2(state_size=48)
    assert set(
        compress_(model, CompreSSMConfig(state_size=24, realization=realization, refit=0), token_ids).sizes.values()
    ) == {24}
    model = tiny_mamba2(state_size=48)
    report = compress_(model, CompreSSMConfig(ratio=0.5, realization=realization, refit=0, multiple_of=8), token_ids)
    assert sum(report.sizes.values()) == 48


def test_a_mamba2_too_small_for_its_kernels_says_so(mamba2, token_ids):
    before, config = states(mamba2), mamba2.config.to_dict()
    with pytest.raises(ValueError, match="multiple_of"):
        compress_(mamba2, CompreSSMConfig(ratio=0.5, multiple_of="tuned"), token_ids)
    assert same(mamba2, before, config)


@pytest.mark.parametrize("estimator", ["ltv", "mean_lti"])
@pytest.mark.parametrize("name", MODELS)
def test_spectra_descend_and_measuring_changes_nothing(token_ids, name, estimator):
    model = MODELS[name]()
    before, config = states(model), model.config.to_dict()
    report = hankel_singular_values(model, token_ids, estimator=estimator)
    assert same(model, before, config)
    for layer in report.layers:
        for spectrum in layer.hankel_singular_values:
            assert len(spectrum) == layer.old_size
            assert spectrum == sorted(spectrum, reverse=True)
            assert spectrum[-1] >= 0
            assert spectrum[0] > 0


def test_padding_on_the_left_counts_for_nothing(token_ids):

    ids, padding = token_ids[:1], torch.zeros(1, 7, dtype=torch.long)
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {name: torch.cat([padding, tensor], dim=1) for name, tensor in plain.items()}
    for make in (tiny_mamba, tiny_mamba2):
        model = make()
        spectra = [
            hankel_spectra(measure(model, [batch], CompreSSMConfig(tolerance=0)).statistics)
            for batch in (plain, padded)
        ]
        for one, other in zip(*spectra, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_without_data_the_model_samples_its_own(mamba):
    state = torch.random.get_rng_state()
    compress_(mamba, CompreSSMConfig(ratio=0.5))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_report_prints_plots_and_becomes_json(tmp_path, mamba, token_ids):
    import json

    report = compress_(mamba, CompreSSMConfig(state_size=4), token_ids)
    assert mamba.compression_report is report
    assert "8 -> 4" in str(report)
    report.plot().savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["new_size"] == 4
    assert report.state_bytes_after * 2 == report.state_bytes_before
    assert report.parameters_after == sum(p.numel() for p in mamba.parameters()) < report.parameters_before


def test_compress_pretrained_takes_a_folder(tmp_path, mamba, token_ids):
    mamba.save_pretrained(tmp_path)
    slim = compress_pretrained(
        str(tmp_path), CompreSSMConfig(state_size=4), calibration_data=token_ids, dtype=torch.float32
    )
    assert isinstance(slim, MambaForCausalLM)
    compress_(mamba, CompreSSMConfig(state_size=4), token_ids)
    torch.testing.assert_close(logits(slim, token_ids), logits(mamba, token_ids))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tolerance": 1.0}, "tolerance"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"ratio": 0.0}, "ratio"),
        ({"state_size": 0}, "state_size"),
        ({"state_size": {0: 0}}, "state_size"),
        ({"state_size": 4.5}, "whole number"),
        ({"state_size": 4, "ratio": 0.5}, "one target"),
        ({"realization": "other"}, "realization"),
        ({"selection": "best"}, "selection"),
        ({"uniform": True, "realization": "project"}, "uniform"),
        ({"multiple_of": 0}, "multiple_of"),
    ],
)
def test_config_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CompreSSMConfig(**kwargs)


def test_config_round_trips():
    import json

    for config in (
        CompreSSMConfig(),
        CompreSSMConfig(state_size={0: 3, 11: 5}),
        CompreSSMConfig(ratio=0.3, uniform=True),
    ):
        assert CompreSSMConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert set(BASELINES) | {"auto"} == set(Selection.__args__)


@pytest.mark.parametrize(
    ("target", "data", "message"),
    [
        ({"state_size": 8}, None, "8 states"),
        ({"state_size": {5: 2}}, None, "layer 5"),
        ({"realization": "project"}, None, "Mamba-2"),
        ({"ratio": 0.01}, None, "need at least 2: raise ratio"),
        ({}, torch.zeros(2, 3, dtype=torch.long), "warm up"),
        ({}, torch.full((2, 30), VOCABULARY), "vocabulary"),
        ({}, torch.zeros(0, 30, dtype=torch.long), "empty"),
    ],
)
def test_refusals_change_nothing(mamba, token_ids, target, data, message):
    before, config = states(mamba), mamba.config.to_dict()
    with pytest.raises(ValueError, match=message):
        compress_(mamba, CompreSSMConfig(**target), token_ids if data is None else data)
    assert same(mamba, before, config)


def test_refuses_texts_without_a_tokenizer(mamba):
    with pytest.raises(TypeError, match="tokenizer"):
        compress_(mamba, calibration_data=["some text"])


def test_refuses_a_mamba2_size_that_the_kernels_cannot_take(mamba2, token_ids):
    with pytest.raises(ValueError, match="8"):
        compress_(mamba2, CompreSSMConfig(state_size=5, realization="select"), token_ids)
    assert compress_(mamba2, CompreSSMConfig(state_size=5), token_ids).sizes == {0: 5, 1: 5}


def test_refuses_models_that_cannot_be_cut(token_ids):
    bert = BertForMaskedLM(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(ValueError, match="no Mamba"):
        compress_(bert, calibration_data=token_ids)
    with torch.device("meta"):
        empty = MambaForCausalLM(tiny_mamba().config)
    with pytest.raises(ValueError, match="meta"):
        compress_(empty, calibration_data=token_ids)


def quantise_parameter(mixer):
    mixer.in_proj.weight = torch.nn.Parameter(mixer.in_proj.weight.to(torch.int8), requires_grad=False)


def quantise_to_float8(mixer):
    mixer.in_proj.weight = torch.nn.Parameter(mixer.in_proj.weight.to(torch.float8_e4m3fn), requires_grad=False)


def quantise_as_bitsandbytes_does(mixer):
    mixer.out_proj.weight.quant_state = object()


@pytest.mark.parametrize("quantise", [quantise_parameter, quantise_to_float8, quantise_as_bitsandbytes_does])
@pytest.mark.parametrize("name", MODELS)
def test_refuses_quantised_weights(token_ids, name, quantise):
    model = MODELS[name]()
    quantise(model.backbone.layers[1].mixer)
    before, config = states(model), model.config.to_dict()
    for attempt in (compress_, hankel_singular_values):
        with pytest.raises(ValueError, match=r"quantised.*quantise the slim one"):
            attempt(model, calibration_data=token_ids)
    assert same(model, before, config)


def test_refuses_a_model_with_a_quantization_config(mamba, token_ids):
    mamba.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match="quantization_config"):
        compress_(mamba, calibration_data=token_ids)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "empty"),
        (torch.zeros(2, 30), TypeError, "token ids"),
        (torch.zeros(30, dtype=torch.long), TypeError, "token ids"),
        ([{"input_ids": torch.zeros(30)}], TypeError, "token ids"),
        (torch.full((2, 30), -1), ValueError, "vocabulary"),
        ("a text", TypeError, "list of texts"),
        (7, TypeError, "int"),
    ],
)
def test_refuses_calibration_data_that_is_none(mamba, data, error, message):
    before, config = states(mamba), mamba.config.to_dict()
    with pytest.raises(error, match=message):
        compress_(mamba, calibration_data=data)
    assert same(mamba, before, config)


def test_weights_that_are_not_finite_are_refused_before_any_change(mamba, token_ids):
    with torch.no_grad():
        mamba.backbone.layers[1].mixer.x_proj.weight[-1, 0] = torch.nan
    shapes = {name: tensor.shape for name, tensor in mamba.named_parameters()}
    with pytest.raises(ValueError):
        compress_(mamba, CompreSSMConfig(state_size=4), token_ids)
    assert shapes == {name: tensor.shape for name, tensor in mamba.named_parameters()}
    assert mamba.config.state_size == 8


def test_inference_mode_is_refused(token_ids):
    model = tiny_mamba()
    with torch.inference_mode():
        for attempt in (compress_, hankel_singular_values):
            with pytest.raises(ValueError, match=r"outside of it, or under torch.no_grad"):
                attempt(model, calibration_data=token_ids)
        made = tiny_mamba()
    with pytest.raises(ValueError, match=r"inference_mode"):
        compress_(made, CompreSSMConfig(state_size=4), token_ids)
    assert not any(parameter.is_inference() for parameter in model.parameters())
