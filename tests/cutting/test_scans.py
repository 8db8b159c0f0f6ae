"""The scans that serve while a model is measured give what the stock ones give, and only then."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from hf_compressm import CompreSSMConfig, compress_, measure
from hf_compressm.cutting.scans import quick_scans
from hf_compressm.layers import find_layers
from tests.layers.models import TYPES, build, tokens


def stock_scan(model: Any) -> tuple[Any, str, Any]:
    """The Python module of the mixers, the name of its scan, and the scan."""
    home = sys.modules[type(find_layers(model)[0].mixer).__module__]
    name = "mamba_selective_scan" if hasattr(home, "mamba_selective_scan") else "mamba2_chunk_scan"
    return home, name, getattr(home, name)


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_the_scan_is_the_stock_one(model_type, monkeypatch):
    model, ids = build(model_type), tokens(3, 40)
    home, name, stock = stock_scan(model)
    calls: list[int] = []
    monkeypatch.setattr(home, name, lambda *a, **k: calls.append(1) or stock(*a, **k))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    assert calls
    calls.clear()
    with quick_scans(find_layers(model)):
        found = model(ids, attention_mask=mask, use_cache=False).logits
    assert not calls
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    model(ids, use_cache=False)
    assert calls


@pytest.mark.parametrize("first", [0, 1])
def test_those_that_overlap_may_leave_in_any_order(first):
    models = build("mamba"), build("mamba")
    home, name, stock = stock_scan(models[0])
    both = [quick_scans(find_layers(model)) for model in models]
    for one in both:
        one.__enter__()
        assert getattr(home, name) is not stock
    for one in (both[first], both[1 - first]):
        one.__exit__(None, None, None)
        assert getattr(home, name) is stock


@pytest.mark.parametrize("realization", ["select", "project", "project_heads"])
def test_mamba2_scans_with_a_gradient_like_the_stock_one(realization):
    model, ids = build("mamba2"), tokens(2, 70)
    compress_(model, CompreSSMConfig(ratio=0.5, realization=realization, refit=0), ids)
    gradients = []
    for context in (nullcontext(), quick_scans(find_layers(model))):
        with context:
            loss = model(ids, labels=ids, use_cache=False).loss
        gradients.append(torch.autograd.grad(loss, [*model.parameters()]))
    for stock, quick in zip(*gradients, strict=True):
        torch.testing.assert_close(quick, stock, rtol=1e-4, atol=1e-6)


def test_caches_are_the_stock_ones_of_mamba2():
    model, ids = build("mamba2"), tokens(2, 12)
    with torch.no_grad():
        expected = model(ids, use_cache=True)
        with quick_scans(find_layers(model)):
            found = model(ids, use_cache=True)
    assert torch.equal(found.logits, expected.logits)


def test_gradients_caches_and_other_precisions_are_the_stock_ones():
    model, ids = build("mamba"), tokens(2, 12)
    expected = model(ids, use_cache=True)
    with quick_scans(find_layers(model)):
        found = model(ids, use_cache=True)
        found.logits.sum().backward()
        with torch.no_grad():
            cached = model(ids, use_cache=True)
            half = model.bfloat16()(ids, use_cache=False).logits
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(cached.logits, expected.logits)
    with torch.no_grad():
        assert torch.equal(half, model(ids, use_cache=False).logits)


def test_an_interrupt_puts_the_stock_scan_and_everything_else_back():
    """Ctrl-C in any forward pass: of a measurement, of its backward pass, of trials with cut mixers."""
    model, ids = build("mamba"), tokens(8, 12)
    home, name, stock = stock_scan(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    mixers = [layer.mixer for layer in find_layers(model)]
    config = CompreSSMConfig(max_divergence=0.05, weights="fisher", refit=1)
    calls, at = [0], [-1]

    def interrupt(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == at[0]:
            raise KeyboardInterrupt

    for mixer in mixers:
        mixer.out_proj.register_forward_pre_hook(interrupt)
    measure(model, ids, config).plan(config)
    every = calls[0]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    for number in sorted({1, 2, 3, 4, 5, every // 3, every // 2, every - 1, every}):
        calls[0], at[0] = 0, number
        with pytest.raises(KeyboardInterrupt):
            measure(model, ids, config).plan(config)
        assert getattr(home, name) is stock
        assert [layer.mixer for layer in find_layers(model)] == mixers
        assert all("forward" not in vars(module) for module in model.modules())
        assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
