"""One tiny model of every supported architecture, with random weights and states that matter."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 64
N = 16
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
HYBRID = {"intermediate_size": 48, "max_position_embeddings": 128} | ATTENTION
MAMBA = {"mamba_d_state": N, "mamba_dt_rank": 3}
BAMBA = {
    "mamba_d_state": N,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
} | HYBRID
LAYERS = ["linear_attention", "full_attention", "linear_attention"]
SHARED = {"layers_block_type": ["linear_attention", "hybrid", "linear_attention"], "num_mem_blocks": 1}

# model_type: what its config says beyond the sizes that all have.
CONFIGS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": N, "num_hidden_layers": 2},
    "falcon_mamba": {"state_size": N, "num_hidden_layers": 2},
    "jamba": {
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    }
    | MAMBA
    | HYBRID,
    "zamba": {
        "n_mamba_heads": 2,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],  # one alone has nothing to share with
    }
    | MAMBA
    | HYBRID,
    "mamba2": {
        "state_size": N,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
    },
    "zamba2": {"mamba_d_state": N, "mamba_ngroups": 2, "n_mamba_heads": 8, "chunk_size": 8} | SHARED | HYBRID,
    "bamba": {"attn_layer_indices": [1]} | BAMBA,
    "granitemoehybrid": {
        "layer_types": LAYERS,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 32,
    }
    | BAMBA,
    "falcon_h1": {"mamba_d_ssm": 64, "ssm_multipliers": [0.5, 2.0, 1.5, 0.7, 1.2], "ssm_in_multiplier": 0.9} | BAMBA,
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "linear_attention", "moe", "mlp"],
        "ssm_state_size": N,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "head_dim": 8,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "num_hidden_layers": 5,
    }
    | HYBRID,
}
TYPES = list(CONFIGS)
STATE_SIZE_FIELD = {
    model_type: next(name for name in ("state_size", "mamba_d_state", "ssm_state_size") if name in config)
    for model_type, config in CONFIGS.items()
}
MAMBA_1 = ("mamba", "falcon_mamba", "jamba", "zamba")


def make_config(model_type: str, **overrides: Any) -> Any:
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return AutoConfig.for_model(model_type, **common | CONFIGS[model_type] | overrides)


@torch.no_grad()
def build(model_type: str, **overrides: Any) -> PreTrainedModel:
    """The same model each time. Fresh weights hardly use the state: its part of the output is made larger."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(make_config(model_type, **overrides)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(("x_proj.weight", "x_proj_weight", "in_proj.weight", "out_proj.weight")):
                parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
            elif name.endswith("dt_proj_weight"):
                parameter.normal_(std=0.3)
            elif name.endswith(
                ("c_layernorm.weight", "b_layernorm.weight", "dt_layernorm.weight", "mamba.norm.weight")
            ):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens(batch: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
