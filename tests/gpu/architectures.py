"""Every supported architecture, trained for a few hundred steps on real text and then cut without fine-tuning.

`python tests/gpu/architectures.py FOLDER --vocab-size V`, with token ids below V (uint16) in its
`train.npy` and `valid.npy`, prints rows of a markdown table for each model type: perplexity of the full model, and
after a cut to each share of the states by our default, by head where there is a projection, by greedy selection and by a
random one (mean of three). The last column is how far the loss of our cut in training mode is from that in evaluation mode:
fused kernels read weights and buffers of their own. `--whole` needs no folder and trains nothing: it prints, of a model of
each type in bfloat16 with random weights, the bytes that its cache holds of a sequence, the speed of decoding, and how far
decoding is from reading all at once, before and after the cut; and whether a cut at tolerance 0 leaves every logit and
generated token as it was. All Mamba-2 models scan the same shapes, so that kernels are tuned once in a process: with `--only`,
run the Mamba-1 and the Mamba-2 types side by side. `--tiny` rehearses on a CPU.
"""

import argparse
import copy
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.utils import logging

from hf_compressm import CompreSSMConfig, Measurement, compress_, measure
from hf_compressm.cli.speed import Workload, _cache, _decoding
from hf_compressm.layers import find_layers

SELECTIONS: dict[str, dict[str, Any]] = {
    "ours": {},
    "by head": {"realization": "project_heads"},
    "greedy": {"selection": "greedy", "realization": "select"},
    "random": {"selection": "random", "realization": "select"},
}
MAMBA_1 = ["mamba", "falcon_mamba", "jamba", "zamba"]


def configs(hidden: int, heads: int, N1: int, N2: int, chunk: int, vocabulary: int) -> dict[str, Any]:
    """A config of each type: 4 layers with a state (or 3, and one of attention), 2 groups in the Mamba-2 family."""
    inner = 2 * hidden
    attention = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": inner}
    mamba = {"mamba_d_state": N1, **attention}
    bamba = {
        "mamba_d_state": N2,
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_n_groups": 2,
        "mamba_chunk_size": chunk,
        **attention,
    }
    three = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
    one_shared = ["linear_attention", "hybrid", "linear_attention", "linear_attention"]
    fields: dict[str, dict[str, Any]] = {
        "mamba": {"state_size": N1},
        "falcon_mamba": {"state_size": N1, "initializer_range": 0.02},
        "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2, "num_experts": 1, **mamba},
        "zamba": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], **mamba},
        "mamba2": {
            "state_size": N2,
            "num_heads": heads,
            "head_dim": inner // heads,
            "n_groups": 2,
            "chunk_size": chunk,
        },
        "zamba2": {
            "mamba_d_state": N2,
            "mamba_ngroups": 2,
            "n_mamba_heads": heads,
            "chunk_size": chunk,
            "layers_block_type": one_shared,
            **attention,
        },
        "bamba": {"attn_layer_indices": [2], **bamba},
        "granitemoehybrid": {
            "layer_types": three,
            "num_local_experts": 0,
            "shared_intermediate_size": inner,
            **bamba,
        },
        "falcon_h1": {"mamba_d_ssm": inner, "ssm_multipliers": [1.0, 1.0, 0.7, 1.4, 1.0], **bamba},
        "nemotron_h": {
            "layers_block_type": [*three, "mlp"],
            "num_hidden_layers": 5,
            "ssm_state_size": N2,
            "mamba_num_heads": heads,
            "mamba_head_dim": inner // heads,
            "n_groups": 2,
            "head_dim": hidden // 4,
            "chunk_size": chunk,
            **attention,
        },
    }
    common = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": 4,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return {name: AutoConfig.for_model(name, **common | own) for name, own in fields.items()}


def train(model: PreTrainedModel, stream: torch.Tensor, args: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        starts = torch.randint(0, len(stream) - args.length, (args.batch,), generator=generator)
        ids = torch.stack([stream[i : i + args.length] for i in starts.tolist()]).long().to(model.device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == args.steps - 1:
            print(f"  {model.config.model_type} step {step} loss {loss.item():.3f}", flush=True)
    model.eval()


@torch.no_grad()
def mean_loss(model: PreTrainedModel, windows: torch.Tensor) -> float:
    losses = [float(model(input_ids=ids, labels=ids, use_cache=False).loss) * len(ids) for ids in windows.split(8)]
    return sum(losses) / len(windows)


def row(model: PreTrainedModel, measurement: Measurement, share: int, windows: torch.Tensor) -> str:
    """Measured once, cut in each way from the same statistics."""
    N = measurement.layers[0].state_size
    cells = [model.config.model_type, f"{N} to {N // share}", f"{math.exp(mean_loss(model, windows)):.3f}"]
    for name, options in SELECTIONS.items():
        if name == "by head" and model.config.model_type in MAMBA_1:
            cells.append("")
            continue
        losses = []
        for seed in range(3 if name == "random" else 1):
            slim = copy.deepcopy(model)
            config = CompreSSMConfig(state_size=N // share, seed=seed, **options)
            report = measurement.plan(config).apply_(slim)
            losses.append(math.exp(mean_loss(slim, windows)))
            if name == "ours":
                kind = report.realization
                fused = mean_loss(slim.train(), windows[:8]) - mean_loss(slim.eval(), windows[:8])
        cells.append(f"{sum(losses) / len(losses):.3f}" + (f" ({kind})" if name == "ours" else ""))
    return f"| {' | '.join([*cells, f'{fused:+.1e}'])} |"


def cache_bytes(cache: Cache) -> dict[str, int]:
    """Of all layers: recurrent states, those of the convolutions, and keys and values of attention."""
    kinds = {"recurrent_states": "recurrent", "conv_states": "convolution", "keys": "attention", "values": "attention"}
    found = dict.fromkeys(kinds.values(), 0)
    for layer in cache.layers:
        for name, kind in kinds.items():
            value = getattr(layer, name, None)
            tensors = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            found[kind] += sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
    return found


def decoded(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, Cache]:
    """The logits of tokens that come one by one after the first half, and the cache after them."""
    half = ids.shape[1] // 2
    output = model(input_ids=ids[:, :half], use_cache=True)
    steps = []
    for position in range(half, ids.shape[1]):
        step = torch.tensor([[position]], device=ids.device).expand(len(ids), 1)
        output = model(input_ids=ids[:, position : position + 1], position_ids=step, use_cache=True, **_cache(output))
        steps.append(output.logits)
    (cache,) = _cache(output).values()
    return torch.cat(steps, dim=1).float(), cache


@torch.no_grad()
def whole(config: Any, args: argparse.Namespace, batches: tuple[int, ...]) -> str:
    """A row: a model with all its layers, before and after a cut of its states to a half."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(args.device, torch.bfloat16).eval()
    ids = torch.randint(1, config.vocab_size, (2, args.length), device=args.device)
    prompt = {"input_ids": ids[:, :16], "attention_mask": torch.ones_like(ids[:, :16])}
    greedy = {"max_new_tokens": 16, "do_sample": False}
    before = model(ids, use_cache=False).logits, model.generate(**prompt, **greedy)
    compress_(model, CompreSSMConfig(tolerance=0), ids)
    after = model(ids, use_cache=False).logits, model.generate(**prompt, **greedy)
    cells = [config.model_type, "yes" if all(map(torch.equal, before, after)) else "NO"]
    columns = []
    for cut in (False, True):
        if cut:
            size = find_layers(model)[0].state_size // 2
            compress_(model, CompreSSMConfig(state_size=size, realization="select", refit=0, weights="gate"), ids)
            model.generate(**prompt, **greedy)
        logits, cache = decoded(model, ids)
        read = model(ids, use_cache=False).logits[:, -logits.shape[1] :].float()
        work = Workload(decode_batches=batches, repeats=5)
        some = [ids[:1, :1].expand(batch, 1).contiguous() for batch in batches]
        speeds = [f"{_decoding(model, one, work):,.0f}" for one in some]
        kinds = [f"{size / len(ids) / 1024:,.0f}" for size in cache_bytes(cache).values()]
        columns.append([*kinds, *speeds, f"{float((logits - read).norm() / read.norm()):.1e}"])
    cells += [" -> ".join(dict.fromkeys(pair)) for pair in zip(*columns, strict=True)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--only", default="", help="model types, apart by commas")
    parser.add_argument("--shares", type=int, nargs="+", default=[2, 8], help="one of so many states is kept")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--tiny", action="store_true", help="small models and few steps, for a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.set_verbosity_error()
    shape = {"hidden": args.hidden, "heads": 8, "N1": 16, "N2": 64}
    windows, calibration = 64, 8
    if args.tiny:
        shape = {"hidden": 32, "heads": 8, "N1": 16, "N2": 16}
        args.steps, args.batch, args.length = min(args.steps, 5), 4, 32
        windows, calibration = 4, 4
    every = configs(**shape, chunk=min(256, args.length), vocabulary=args.vocab_size)
    types = args.only.split(",") if args.only else list(every)
    if args.whole:
        batches = (2, 3) if args.tiny else (1, 64)
        heads = [f"decoding {batch}, tokens/s" for batch in batches]
        kinds = ["state, KiB a sequence", "convolution", f"attention at {args.length} tokens"]
        print(f"| {' | '.join(['model type', 'tolerance 0 exact', *kinds, *heads, 'decoded - read'])} |")
        print(f"|{'---|' * (6 + len(heads))}", flush=True)
        for model_type in types:
            print(whole(every[model_type], args, batches), flush=True)
        return
    train_stream, valid_stream = (
        torch.from_numpy(np.load(args.folder / f"{split}.npy").astype(np.int32)) for split in ("train", "valid")
    )
    length = 2 * args.length
    valid = valid_stream[: windows * length].view(-1, length).long().to(args.device)
    known = train_stream[: calibration * length].view(-1, length).long().to(args.device)
    rows = []
    for model_type in types:
        begin = time.perf_counter()
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(every[model_type], dtype=torch.float32).to(args.device)
        train(model, train_stream, args)
        trained = time.perf_counter() - begin
        measurement = measure(model, known)
        for share in args.shares:
            rows.append(row(model, measurement, share, valid))
            print(rows[-1], f"training {trained:.0f} s, all {time.perf_counter() - begin:.0f} s", flush=True)
    print("\n| model type | states | full | ours | by head | greedy | random | training - evaluation |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
