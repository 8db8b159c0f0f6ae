"""Seconds and memory of a cut of models of published shapes, with random weights: nothing is downloaded.

`python tests/gpu/scale.py mamba2-2.7b mamba-2.8b` prints for each shape a row for every step: measure, plan (sensitivities
and sizes), refit, cut and save, with its seconds and the most memory that it took beside the model. `--cap-gib 24` lets the process
have no more of the GPU than that. Weights are bfloat16 (`--dtype`), half of the states are kept (`--ratio`; with a `--state-size` no
layer is tried). Without
mamba_ssm, the stock scan of Mamba-1 is a loop over tokens: name a short `--length` for it. On a CPU (`--device cpu`) the
memory is the most that the process ever had. `--spread 5` puts 5 GiB of the model on each GPU and the rest on the CPU, as `device_map="auto"`
would on smaller ones, and tells the most memory of any; `--estimate` prints what `hf-compressm estimate` expects of a cut on the text that the package ships, which is 64 x 512
tokens on a GPU and 16 x 512 on a CPU.
"""

import argparse
import math
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging

from hf_compressm import CompreSSMConfig, measure
from hf_compressm.cli.estimating import estimate
from hf_compressm.cutting.progress import listening

GIB = 2**30
MAMBA2 = {"state_size": 128, "head_dim": 64, "chunk_size": 256, "vocab_size": 50288, "tie_word_embeddings": True}
NEMOTRON = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
KINDS = {"M": "linear_attention", "-": "mlp", "*": "full_attention"}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba-130m": ("mamba", {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280}),
    "mamba-370m": ("mamba", {"hidden_size": 1024, "num_hidden_layers": 48, "vocab_size": 50280}),
    "mamba-1.4b": ("mamba", {"hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 50280}),
    "mamba-2.8b": ("mamba", {"hidden_size": 2560, "num_hidden_layers": 64, "vocab_size": 50280}),
    "mamba2-130m": ("mamba2", {"hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24, "n_groups": 1} | MAMBA2),
    "mamba2-370m": ("mamba2", {"hidden_size": 1024, "num_hidden_layers": 48, "num_heads": 32, "n_groups": 1} | MAMBA2),
    "mamba2-2.7b": ("mamba2", {"hidden_size": 2560, "num_hidden_layers": 64, "num_heads": 80, "n_groups": 1} | MAMBA2),
    "codestral-7b": (
        "mamba2",
        {"hidden_size": 4096, "num_hidden_layers": 64, "num_heads": 128, "n_groups": 8}
        | MAMBA2
        | {"vocab_size": 32768, "tie_word_embeddings": False},
    ),
    "nemotron-h-8b": (
        "nemotron_h",
        {"layers_block_type": [KINDS[kind] for kind in NEMOTRON], "hidden_size": 4096, "intermediate_size": 21504}
        | {"mamba_num_heads": 128, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "vocab_size": 131072},
    ),
    "granite-4-h-tiny": (
        "granitemoehybrid",
        {
            "layer_types": ["full_attention" if i % 10 == 5 else "linear_attention" for i in range(40)],
            "num_hidden_layers": 40,
            "hidden_size": 1536,
            "intermediate_size": 512,
            "shared_intermediate_size": 1024,
            "num_local_experts": 64,
            "num_experts_per_tok": 6,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "mamba_n_heads": 48,
            "mamba_d_head": 64,
            "mamba_d_state": 128,
            "mamba_n_groups": 1,
            "vocab_size": 100352,
            "tie_word_embeddings": True,
        },
    ),
    "granite-4-h-micro": (
        "granitemoehybrid",
        {
            "layer_types": ["full_attention" if i % 10 == 5 else "linear_attention" for i in range(40)],
            "num_hidden_layers": 40,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "shared_intermediate_size": 8192,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "mamba_n_heads": 64,
            "mamba_d_head": 64,
            "mamba_d_state": 128,
            "mamba_n_groups": 1,
            "vocab_size": 100352,
            "tie_word_embeddings": True,
        },
    ),
    "falcon-h1-7b": (
        "falcon_h1",
        {
            "num_hidden_layers": 44,
            "hidden_size": 3072,
            "intermediate_size": 12288,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "mamba_d_ssm": 3072,
            "mamba_n_heads": 24,
            "mamba_d_head": 128,
            "mamba_d_state": 256,
            "mamba_n_groups": 1,
            "vocab_size": 130048,
        },
    ),
}


@torch.no_grad()
def build(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of that shape: normal weights, decays and steps as they are initialised in training."""
    kind, fields = SHAPES[name]
    config = AutoConfig.for_model(kind, **fields)
    with device, no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    model.tie_weights()
    torch.manual_seed(0)
    for key, weight in model.named_parameters():
        if key.endswith("A_log") and weight.dim() == 2:
            weight.copy_(torch.arange(1, weight.shape[1] + 1, device=device).log().expand_as(weight))
        elif key.endswith("A_log"):
            weight.uniform_(0, math.log(16))
        elif key.endswith(("dt_bias", "dt_proj.bias")):
            step = torch.empty(weight.shape, device=device).uniform_(math.log(1e-3), math.log(0.1)).exp()
            weight.copy_(step + torch.log(-torch.expm1(-step)))
        elif key.endswith(".D") or (weight.dim() == 1 and key.endswith("weight")):
            weight.fill_(1)
        elif weight.dim() == 1:
            weight.zero_()
        elif "conv1d" in key:
            weight.uniform_(-0.5, 0.5)
        else:
            weight.normal_(std=0.02)
    return model


def spread(model: PreTrainedModel, gib: float) -> PreTrainedModel:
    """The model with so much of it on each GPU, and the rest on the CPU."""
    memory: dict[Any, int] = {gpu: round(gib * GIB) for gpu in range(torch.cuda.device_count())} | {"cpu": 2**40}
    device_map = infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules)
    print(f"parts on each device: {Counter(map(str, device_map.values()))}", flush=True)
    return dispatch_model(model, device_map)


def gpus(device: torch.device) -> range:
    return range(torch.cuda.device_count() if device.type == "cuda" else 0)


@contextmanager
def timed(row: str, name: str, device: torch.device, before: list[int]) -> Iterator[None]:
    """Print the step's seconds, on a CPU those that all its threads computed, and the most memory beside the model, of the GPU that
    has most."""
    for gpu in gpus(device):
        torch.cuda.synchronize(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
    begin, computed = time.perf_counter(), time.process_time()
    yield
    for gpu in gpus(device):
        torch.cuda.synchronize(gpu)
    seconds = f"{time.perf_counter() - begin:.1f}"
    if device.type == "cuda":
        peak = max(torch.cuda.max_memory_allocated(gpu) - before[gpu] for gpu in gpus(device)) / GIB
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        seconds += f" (CPU {time.process_time() - computed:.1f})"
    print(f"| {name} | {row} | {seconds} | {peak:.2f} |", flush=True)


def run(name: str, device: torch.device, args: argparse.Namespace) -> None:
    begin = time.perf_counter()
    model = build(name, device, getattr(torch, args.dtype))
    own = sum(p.nbytes for p in model.parameters())
    if args.spread:
        model = spread(model.cpu(), args.spread)
        torch.cuda.empty_cache()
    before = [torch.cuda.memory_allocated(gpu) for gpu in gpus(device)]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (args.sequences, args.length), generator=torch.Generator().manual_seed(0))
    print(
        f"{name}: {model.num_parameters() / 1e9:.2f}B parameters, {own / GIB:.2f} GiB, built in "
        f"{time.perf_counter() - begin:.1f} s; {args.sequences} x {args.length} tokens",
        flush=True,
    )
    options = {"realization": args.realization, "weights": args.weights}
    targets = {"state_size": args.state_size, "max_divergence": args.max_divergence}
    options |= {key: value for key, value in targets.items() if value} or {"ratio": args.ratio}
    config = CompreSSMConfig(**options, refit=args.refit)
    if args.estimate:
        expected = estimate(model.config, config.after_training(), device, model.dtype).seconds
        print("| " + " | ".join(f"{step}: {seconds:.1f}" for step, seconds in expected.items()) + " |", flush=True)
    with timed("measure", name, device, before):
        measurement = measure(model, ids, config)
    begun: dict[str, float] = {}
    parts: dict[str, float] = {}

    def watch(text: str, done: int, total: int) -> None:
        if done == 0:
            begun[text] = time.perf_counter()
        parts[text] = parts.get(text, 0.0) + time.perf_counter() - begun[text]
        begun[text] = time.perf_counter()

    with listening(watch), timed("plan", name, device, before):
        plan = measurement.plan(config)
    for text, seconds in parts.items():
        print(f"| {name} | of that {text} | {seconds:.1f} | |", flush=True)
    del measurement
    with timed("cut", name, device, before):
        report = plan.apply_(model)
    del plan
    with torch.no_grad():
        assert torch.isfinite(model(ids[:1].to(device), use_cache=False).logits).all()
    if not args.no_save:
        with tempfile.TemporaryDirectory() as folder, timed("save", name, device, before):
            model.save_pretrained(folder)
    print(f"{name}: {report.states_before} states -> {report.states_after} ({report.realization})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="+", choices=[*SHAPES])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--state-size", type=int)
    parser.add_argument("--max-divergence", type=float)
    parser.add_argument("--realization", default="auto")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--refit", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cap-gib", type=float)
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--spread", type=float, metavar="GIB")
    parser.add_argument("--estimate", action="store_true")
    args = parser.parse_args()
    logging.disable_progress_bar()
    device = torch.device(args.device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        print(f"{torch.cuda.get_device_name()}, {total / GIB:.1f} GiB, cap {args.cap_gib} GiB", flush=True)
        if args.cap_gib:
            torch.cuda.set_per_process_memory_fraction(args.cap_gib * GIB / total)
    print("| shape | step | s | GiB beside the model |\n|---|---|---|---|", flush=True)
    for name in args.shape:
        try:
            run(name, device, args)
        except torch.cuda.OutOfMemoryError as error:
            print(f"{name}: out of memory: {str(error)[:200]}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
