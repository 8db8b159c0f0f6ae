"""A family of one's own, registered in sixty lines, goes through everything; and so does a realization of one's own."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress_, get_report, hankel_singular_values, measure
from hf_compressm.hankel.mamba import MambaStatistics
from hf_compressm.hankel.realization import Selection
from hf_compressm.hankel.selective import MambaSystem
from hf_compressm.layers import MixerLayer, ParameterCut, find_layers, register, register_realization, registry
from hf_compressm.layers.selection import Select
from tests.conftest import VOCABULARY, tiny_mamba
from tests.training.conftest import losses, make_trainer


class ToyConfig(PreTrainedConfig):
    model_type = "toy_ssm"

    def __init__(self, state_size: int = 8, **kwargs) -> None:
        self.state_size, self.hidden_size, self.num_hidden_layers, self.vocab_size = state_size, 12, 2, VOCABULARY
        super().__init__(**kwargs)


class ToyMixer(nn.Module):
    """h_t = exp(-rates) h_{t-1} + u_t (into u_t), y_t = (out_of u_t) . h_t"""

    def __init__(self, config: ToyConfig, number: int) -> None:
        super().__init__()
        self.number = number
        self.rates = nn.Parameter(torch.rand(config.hidden_size, config.state_size))
        self.into = nn.Linear(config.hidden_size, config.state_size, bias=False)
        self.out_of = nn.Linear(config.hidden_size, config.state_size, bias=False)

    def forward(self, hidden_states, attention_mask=None):
        state, outputs = 0.0, []
        for u in hidden_states.unbind(1):
            state = torch.exp(-self.rates) * state + u[..., None] * self.into(u)[:, None]
            outputs.append((state * self.out_of(u)[:, None]).sum(-1))
        return torch.stack(outputs, 1)


class ToyModel(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mixers = nn.ModuleList(ToyMixer(config, number) for number in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        x = self.embedding(input_ids)
        for mixer in self.mixers:
            x = x + mixer(x, attention_mask=attention_mask)
        return BaseModelOutput(x)


class ToyForCausalLM(ToyModel):
    base_model_prefix = "self_"

    def forward(self, input_ids, attention_mask=None, labels=None, use_cache=None, **kwargs):
        logits = F.linear(super().forward(input_ids)[0], self.embedding.weight)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class ToyLayer(MixerLayer):
    """All that the library has to be told."""

    family = "toy"

    def __init__(self, name: str, mixer: ToyMixer) -> None:
        self.name, self.mixer, self.index = name, mixer, mixer.number

    @classmethod
    def misfit(cls, module: nn.Module) -> list[str]:
        return [] if isinstance(module, ToyMixer) else ["is no ToyMixer"]

    @property
    def state_size(self) -> int:
        return self.mixer.rates.shape[1]

    @property
    def channels(self) -> int:
        return self.mixer.rates.shape[0]

    def statistics(self, *, mean_lti: bool) -> MambaStatistics:
        return MambaStatistics(self.channels, self.state_size, self.mixer.rates.device, mean_lti=mean_lti)

    def read(self, hidden_states, attention_mask, gradient=None) -> MambaSystem:
        u, mixer = hidden_states.float(), self.mixer
        ones = torch.ones_like(u)
        return MambaSystem(u, ones, -mixer.rates.float(), mixer.into(u), mixer.out_of(u), ones, ones[..., 0])

    def magnitude(self) -> torch.Tensor:
        return (self.mixer.into.weight.norm(dim=1) * self.mixer.out_of.weight.norm(dim=1))[None]

    def shapes(self, size: int) -> dict[str, torch.Size]:
        maps = torch.Size([size, self.channels])
        return {"rates": torch.Size([self.channels, size]), "into.weight": maps, "out_of.weight": maps}

    def resize(self, size: int) -> None:
        self.mixer.into.out_features = self.mixer.out_of.out_features = size

    def select(self, kept, readout=None) -> dict[str, ParameterCut]:
        C = self.mixer.out_of.weight.detach().double()
        return {
            "rates": ParameterCut(dim=1, index=kept[0]),
            "into.weight": ParameterCut(index=kept[0]),
            "out_of.weight": ParameterCut(index=kept[0], values=None if readout is None else readout[0] @ C),
        }


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", list(registry._FAMILIES))
    register(ToyLayer)


def toy() -> ToyForCausalLM:
    torch.manual_seed(0)
    model = ToyForCausalLM(ToyConfig()).eval()
    model.embedding.weight.data *= 0.5
    return model


def sizes(model) -> list[int]:
    return [layer.state_size for layer in find_layers(model)]


@torch.no_grad()
def test_it_is_cut_saved_and_loaded(tmp_path, token_ids):
    model, random = toy(), toy()
    full = model(token_ids).logits
    report = compress_(model, CompreSSMConfig(state_size=4), token_ids)
    compress_(random, CompreSSMConfig(state_size=4, selection="random"), token_ids)
    assert sizes(model) == [4, 4]
    lost = [float((slim(token_ids).logits - full).square().mean()) for slim in (model, random)]
    assert lost[0] < 0.5 * lost[1]
    assert "8 -> 4" in str(report)
    model.save_pretrained(tmp_path)
    assert "8 of 16 SSM states" in (tmp_path / "README.md").read_text()
    again = ToyForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(token_ids).logits, model(token_ids).logits)
    assert get_report(tmp_path) == get_report(again) == report


def test_states_that_do_nothing_go_and_nothing_changes(token_ids):
    model = toy()
    for mixer in model.mixers:
        mixer.out_of.weight.data[::2] = 0
    full = model(token_ids).logits
    compress_(model, CompreSSMConfig(state_size=4), token_ids)
    torch.testing.assert_close(model(token_ids).logits, full, rtol=1e-3, atol=1e-3)


def test_spectra(token_ids):
    for layer in hankel_singular_values(toy(), token_ids).layers:
        (spectrum,) = layer.hankel_singular_values
        assert len(spectrum) == 8
        assert spectrum == sorted(spectrum, reverse=True)


def test_sizes_of_their_own_are_refused_before_anything_is_measured():
    for values in ({}, {"tolerance": 0.2}, {"state_size": {1: 4}}):
        with pytest.raises(ValueError, match="one state size for all layers"):
            compress_(toy(), values, object())


def test_it_shrinks_while_it_trains_and_resumes(tmp_path):
    config = CompreSSMConfig(state_size=4, start=0, end=4, num_reductions=2)
    saved = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    model = toy()
    whole = make_trainer(tmp_path, model, callbacks=[CompreSSMCallback(config)], **saved)
    whole.train()
    assert sizes(model) == [4, 4]
    resumed = make_trainer(tmp_path, toy(), callbacks=[CompreSSMCallback(config)], **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert sizes(resumed.model) == [4, 4]
    torch.testing.assert_close(losses(resumed)[6], losses(whole)[6], rtol=1e-6, atol=1e-6)


class Last(Select):
    """Keep the last states: a realization of one's own."""

    name: ClassVar[str] = "last"

    @classmethod
    def paths(cls, layers, statistics, config):
        return [
            {
                n: cls((Selection(torch.arange(layer.state_size - n, layer.state_size), None, 0.5),))
                for n in range(1, 9)
            }
            for layer in layers
        ]


def test_a_realization_of_ones_own(monkeypatch, token_ids):
    from hf_compressm import config
    from hf_compressm.layers.mamba import MambaLayer

    monkeypatch.setattr(config, "REALIZATIONS", list(config.REALIZATIONS))
    monkeypatch.setattr(registry, "REALIZATIONS", config.REALIZATIONS)
    monkeypatch.setattr(MambaLayer, "realizations", MambaLayer.realizations)
    with pytest.raises(ValueError, match="realization must be one of"):
        CompreSSMConfig(realization="last")
    register_realization(MambaLayer, Last)
    model = tiny_mamba()
    A = [layer.mixer.A_log.detach().clone() for layer in find_layers(model)]
    plan = measure(model, token_ids).plan(CompreSSMConfig(state_size=3, realization="last", refit=0))
    assert plan.kept == {0: [[5, 6, 7]], 1: [[5, 6, 7]]}
    assert plan.apply_(model).realization == "last"
    assert all(torch.equal(layer.mixer.A_log, old[:, 5:]) for layer, old in zip(find_layers(model), A, strict=True))
    with pytest.raises(ValueError, match="is not for these layers"):
        compress_(toy(), CompreSSMConfig(state_size=3, realization="last"), token_ids)
