"""The mixer whose heads scan projections of their own, in sizes that its scan takes apart into several widths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compressm.modeling.modeling_compressm import HeadwiseProjectedMixer, project_heads_, scan_widths
from tests.conftest import cache_of
from tests.modeling.models import build, left_padded, mamba2_config, tokens

N = 40
SIZES = [[40, 0, 17, 3], [3, 33, 16, 8], [1, 1, 1, 1]]
"""Of the heads in three layers: widths of 16 or 32 and 40, of 16 and 40, and of 16."""


def stock(groups: int = 2):
    return build(mamba2_config(state_size=N, n_groups=groups))


def mixers(model):
    return [layer.mixer for layer in model.backbone.layers]


def by_head(groups: int = 2):
    """Random maps, scaled so that the states matter."""
    model, generator = stock(groups), torch.Generator().manual_seed(0)
    for mixer, sizes in zip(mixers(model), SIZES, strict=True):
        project_heads_(mixer, sizes, torch.randn(2, N, sum(sizes), generator=generator) / 4)
    return model


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_a_change_of_basis_in_each_head_changes_nothing(groups, dtype, tolerance):
    """The scan itself is in float32, whatever comes in: it is run on B and C that are equal to float64's rounding."""
    model, generator = stock(groups).to(dtype), torch.Generator().manual_seed(0)
    before = model(tokens()).logits
    for mixer in mixers(model):
        T = torch.eye(N) + 0.1 * torch.randn(mixer.num_heads, N, N, generator=generator) / N**0.5
        maps = [torch.cat(list(part), dim=1) for part in (torch.linalg.inv(T.double()).mT, T.double())]
        project_heads_(mixer, [N] * mixer.num_heads, torch.stack(maps))
    assert all(isinstance(mixer, HeadwiseProjectedMixer) for mixer in mixers(model))
    torch.testing.assert_close(model(tokens()).logits, before, atol=max(tolerance, 1e-5), rtol=tolerance)


@pytest.mark.parametrize("groups", [1, 2])
def test_states_that_are_not_there_are_states_of_zeros(groups):
    """The same maps with columns of zeros up to the full size give the same, in outputs and gradients."""
    model, filled = by_head(groups), by_head(groups)
    for mixer, sizes in zip(mixers(filled), SIZES, strict=True):
        parts = mixer.BC_projection.detach().split(sizes, dim=2)
        maps = torch.cat([torch.nn.functional.pad(part, (0, N - part.shape[2])) for part in parts], dim=2)
        project_heads_(mixer, [N] * len(sizes), maps)
    for each in (model, filled):
        each.train()(tokens(), labels=tokens()).loss.backward()
    torch.testing.assert_close(model(tokens()).logits, filled(tokens()).logits, atol=1e-5, rtol=1e-5)
    for one, other, sizes in zip(mixers(model), mixers(filled), SIZES, strict=True):
        there = torch.cat([torch.arange(N) < size for size in sizes])
        torch.testing.assert_close(one.BC_projection.grad, other.BC_projection.grad[:, :, there], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.in_proj.weight.grad, other.in_proj.weight.grad, atol=1e-5, rtol=1e-4)


@given(length=st.integers(1, 9), padding=st.integers(0, 8), step=st.integers(1, 9), groups=st.sampled_from([1, 2]))
@settings(max_examples=10, deadline=None)
def test_pieces_give_what_the_whole_gives(length, padding, step, groups):
    """A prefill and then pieces of any length, with left padding; the cache holds the states of all heads and no more."""
    model = by_head(groups)
    input_ids = tokens(2, length + 9)
    mask = torch.ones_like(input_ids)
    mask[0, : min(padding, length - 1)] = 0
    whole, pieces, cache = model(input_ids, attention_mask=mask).logits, [], {}
    for start, stop in [(0, length), *((i, min(i + step, length + 9)) for i in range(length, length + 9, step))]:
        output = model(input_ids[:, start:stop], attention_mask=mask[:, start:stop], **cache, use_cache=True)
        pieces.append(output.logits)
        cache = cache_of(output)
        (states,) = cache.values()
        assert [states.get_recurrent_state(i).shape for i in range(3)] == [(2, sum(sizes), 8) for sizes in SIZES]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-4)


@given(sizes=st.lists(st.integers(0, 128), min_size=1, max_size=30), most=st.sampled_from([128, 200]))
def test_two_widths_hold_all_heads(sizes, most):
    """And no two others of their kind would be filled up less."""
    widths = scan_widths(sizes, most)
    assert all(size <= width <= most for size, width in zip(sizes, widths, strict=True))
    assert len(set(widths)) <= 2
    powers = [16, 32, 64, 128]
    pairs = [(a, b) for a in powers for b in powers if a <= b and b >= max(sizes)]
    assert sum(widths) == min(sum(a if size <= a else b for size in sizes) for a, b in pairs)


def test_compiling_breaks_no_graph():
    """Neither of a sequence, nor of a token on top of a cache, whose state changes in place."""
    model = by_head()
    mixer, hidden_states = mixers(model)[0], torch.randn(2, 11, 16, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(mixer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden_states), mixer(hidden_states))
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden_states), mixer(hidden_states))
    compiled, caches = torch.compile(model, backend="eager", fullgraph=True), []
    for _ in range(2):
        caches.append(cache_of(model(tokens(), use_cache=True)))
    for seed in range(2):
        token = tokens(2, 1, seed)
        steps = [each(token, **cache).logits for each, cache in zip((compiled, model), caches, strict=True)]
        torch.testing.assert_close(*steps)


def test_a_static_cache_generates_the_same():
    model, arguments = by_head(), {"max_new_tokens": 6, "do_sample": False}
    for inputs in ({"input_ids": tokens()}, left_padded(tokens())):
        static = model.generate(**inputs, **arguments, cache_implementation="static")
        assert torch.equal(static, model.generate(**inputs, **arguments))


def test_half_precision():
    model = by_head()
    exact = model(tokens()).logits
    half = by_head().to(torch.bfloat16)
    assert all(mixer.BC_projection.dtype == torch.bfloat16 for mixer in mixers(half))
    assert ((half(tokens()).logits - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize(
    ("sizes", "shape", "message"),
    [
        ([3, 3, 3, 3], (2, N, 11), r"\[2, 40, 12\]"),
        ([3, 3, 3, 3], (4, N, 12), r"\[2, 40, 12\]"),
        ([3, 3, 3], (2, N, 9), "4 heads"),
        ([3, 3, 3, 4], (2, N, 13), "multiple of"),
        ([0, 0, 0, 0], (2, N, 0), "multiple of"),
        ([41, 1, 1, 1], (2, N, 44), "0 to 40"),
    ],
)
def test_maps_that_do_not_fit_are_refused(sizes, shape, message):
    mixer = mixers(stock())[0]
    kind = type(mixer)
    with pytest.raises(ValueError, match=message):
        project_heads_(mixer, sizes, torch.ones(shape))
    assert type(mixer) is kind
