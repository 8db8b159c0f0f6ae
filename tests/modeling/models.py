"""Tiny models with random weights for the tests of hf_compressm.hub."""

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from hf_compressm import CompreSSMConfig, compress_
from hf_compressm.modeling.state_sizes import set_state_sizes

VOCAB = 32
LAYERS = 3
STATE_SIZE = 8


def mamba_config(**overrides) -> MambaConfig:
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": LAYERS,
        "state_size": STATE_SIZE,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    return MambaConfig(**fields | overrides)


def mamba2_config(**overrides) -> Mamba2Config:
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": LAYERS,
        "state_size": STATE_SIZE,
        "head_dim": 8,
        "num_heads": 4,
        "n_groups": 2,
        "chunk_size": 4,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    return Mamba2Config(**fields | overrides)


def build(config) -> PreTrainedModel:
    """The same model each time, in which every weight matters: none is left at zero or at the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = {"mamba": MambaForCausalLM, "mamba2": Mamba2ForCausalLM}[config.model_type](config)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def slim(
    config,
    sizes: list[int],
    projected_from: dict[int, int] | None = None,
    head_sizes: dict[int, list[int]] | None = None,
) -> PreTrainedModel:
    set_state_sizes(config, dict(enumerate(sizes)), projected_from, head_sizes)
    return build(config)


def refitted(config, size: int) -> PreTrainedModel:
    """Cut to some states, whose rows of B and C are fitted."""
    model = build(config)
    report = compress_(model, CompreSSMConfig(state_size=size, realization="select", refit=1), tokens(16, 32))
    assert "refit" in {row.realization for row in report.layers}
    return model


# Every kind of slimmed model, by name.
UNIFORM = {
    "mamba_uniform": lambda: slim(mamba_config(), [5, 5, 5]),
    "mamba2_uniform": lambda: slim(mamba2_config(), [4, 4, 4]),
    "mamba2_refitted": lambda: refitted(mamba2_config(), 4),
}
NOT_UNIFORM = {
    "mamba_mixed": lambda: slim(mamba_config(), [5, 8, 2]),
    "mamba2_mixed": lambda: slim(mamba2_config(), [4, 8, 2]),
    "mamba2_projected": lambda: slim(mamba2_config(), [3, 5, 2], {0: 8, 1: 8, 2: 8}),
    "mamba2_projected_to_one_size": lambda: slim(mamba2_config(), [3, 3, 3], {0: 8, 1: 8, 2: 8}),
    "mamba2_projected_keeps_size": lambda: slim(mamba2_config(), [8, 8, 8], {0: 8, 1: 8, 2: 8}),
    "mamba2_projected_in_part": lambda: slim(mamba2_config(), [3, 8, 4], {0: 8}),
    "mamba2_projected_by_head": lambda: slim(
        mamba2_config(), [3, 8, 2], {0: 8, 2: 8}, {0: [8, 0, 1, 3], 2: [2, 3, 1, 2]}
    ),
}


def tokens(batch: int = 2, length: int = 11, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The batch with three places of padding before its first sequence."""
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :3] = 0
    return {"input_ids": input_ids.masked_fill(attention_mask == 0, 0), "attention_mask": attention_mask}


def greedy(model, inputs: dict[str, torch.Tensor], use_cache: bool, new_tokens: int = 6) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, use_cache=use_cache)
