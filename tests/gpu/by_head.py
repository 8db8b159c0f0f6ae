"""Mamba-2 projected to one size, to sizes by layer, and to sizes by head: what they lose, and what they take.

`python tests/gpu/by_head.py FOLDER ...` prints, for each model of `train_reference_models.py`, the change of perplexity and
recall and the divergence at equal means of states a head, on the code and prose that the package ships. `--time` prints, for
the shapes of --hidden, --layers and --head-dim with random weights, tokens/s in bfloat16 of a training step, a prefill and
of decoding (on a GPU as a CUDA graph), for the full model, and for each of --mean a projection to so many states and one by
head of that mean, whose sizes are spread as those of well-trained models are; and the bytes of state per sequence, as counted
in the cache. `--check` compares the mixer on a GPU with that on the CPU, a static cache with a dynamic one, and the compiled
model with the plain one.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Mamba2Config, Mamba2ForCausalLM

from hf_compressm import CompreSSMConfig, measure
from hf_compressm.cli.speed import (
    Workload,
    _cache,
    _decoding,
    _largest_batch,
    _or_nan,
    _seconds,
    _state_bytes,
    _training,
)
from hf_compressm.cutting.divergence import Divergence
from hf_compressm.cutting.first_states import cut_to_first_states_
from hf_compressm.data.evaluation import evaluate
from hf_compressm.data.texts import CALIBRATION, EVALUATION, LENGTH, windows
from hf_compressm.modeling.modeling_compressm import project_heads_

SPREAD = [0.1, 0.2, 0.2, 0.2, 0.2, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.9, 1.0, 1.2, 3.0, 6.0]
"""Sizes of heads as shares of their mean, about those of a layer of mamba2-n128 at `ratio=0.125`."""


def quality(folder: Path, device: str, sequences: int, means: Sequence[int], budgets: Sequence[float]) -> None:
    """The table of one model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [path.read_text(encoding="utf-8") for path in (CALIBRATION, EVALUATION)]
    known, unseen = (windows(text, tokenizer, sequences, LENGTH) for text in texts)
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    base, N = evaluate(full, unseen), full.config.state_size
    distance = Divergence(full, [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in unseen.split(16)])
    measurement = measure(full, known, CompreSSMConfig(max_divergence=0.01))
    print(
        f"\n{folder.name}: N={N}, {full.num_parameters():,} parameters, perplexity {base.perplexity:.3f}, recall {base.recall:.3f}"
    )
    print(
        "| model | cut | mean | perplexity | recall | divergence | parameters | s |\n|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    rows: list[tuple[str, dict]] = []
    for mean in (mean for mean in means if mean < N):
        rows.append((f"one size, {mean}", {"state_size": mean, "realization": "project", "weights": "fisher"}))
        rows.append((f"by layer, {mean}", {"ratio": mean / N, "realization": "project"}))
        rows.append((f"by head, {mean}", {"ratio": mean / N, "realization": "project_heads"}))
    for budget in budgets:
        rows.append((f"by layer, budget {budget}", {"max_divergence": budget, "realization": "project"}))
        rows.append((f"by head, budget {budget}", {"max_divergence": budget, "realization": "project_heads"}))
    for name, options in rows:
        begin, model = time.perf_counter(), copy.deepcopy(full)
        report = measurement.plan(CompreSSMConfig(**options)).apply_(model)
        seconds = time.perf_counter() - begin
        found, distance.model = evaluate(model, unseen), model
        sizes = list(report.sizes.values())
        print(
            f"| {folder.name} | {name} | {sum(sizes) / len(sizes):.1f} | {100 * (found.perplexity / base.perplexity - 1):+.2f}% | "
            f"{100 * (found.recall / base.recall - 1):+.2f}% | {distance():.4f} | "
            f"{report.parameters_after - report.parameters_before:+,} | {seconds:.1f} | {' '.join(map(str, sizes))}",
            flush=True,
        )


def sizes_of_heads(heads: int, mean: int, most: int) -> list[int]:
    """Sizes spread as `SPREAD` is, with that mean, in an order that mixes them."""
    sizes = [min(most, max(1, round(mean * SPREAD[head * 7 % len(SPREAD)]))) for head in range(heads)]
    while sum(sizes) != heads * mean:
        step = 1 if sum(sizes) < heads * mean else -1
        sizes[sizes.index(min(sizes) if step > 0 else max(sizes))] += step
    return sizes


def by_head_(model: Mamba2ForCausalLM, mean: int) -> None:
    """Project the heads to sizes spread as those of well-trained models, by random maps. In place."""
    N, heads = model.config.state_size, model.config.num_heads
    for layer in model.backbone.layers:
        sizes = sizes_of_heads(heads, mean, N)
        project_heads_(layer.mixer, sizes, torch.randn(2, N, sum(sizes), device=model.device) / N**0.5)


def timing(
    config: Mamba2Config, means: Sequence[int], device: torch.device, work: Workload, largest: bool = True
) -> None:
    """The table of one shape, each number as soon as it is known: first what needs no tuning of kernels."""
    with device:
        full = Mamba2ForCausalLM(config)
    models = {f"N={config.state_size}": full}
    for mean in means:
        models[f"project to {mean}"], models[f"by head, mean {mean}"] = copy.deepcopy(full), copy.deepcopy(full)
        cut_to_first_states_(models[f"project to {mean}"], mean, "project")
        by_head_(models[f"by head, mean {mean}"], mean)
    print(
        f"\nhidden {config.hidden_size}, {config.num_hidden_layers} layers, {config.num_heads} heads of {config.head_dim}, "
        f"N={config.state_size}; training and prefill {work.train_batch} x {work.length}; tokens/s",
        flush=True,
    )
    table: dict[str, dict[str, float]] = {name: {} for name in models}

    def put(name: str, column: str, value: float) -> None:
        table[name][column] = value
        print(f"{name}: {column} {value:,.0f}", flush=True)

    def ids(batch: int, length: int) -> torch.Tensor:
        return torch.randint(config.vocab_size, (batch, length), device=device)

    slim = {name: copy.deepcopy(model).eval().requires_grad_(False).to(work.dtype) for name, model in models.items()}
    graph = device.type == "cuda"
    with torch.no_grad():
        _decoding(slim[f"N={config.state_size}"], ids(1, 1), work, graph)  # a process's first graph is quicker
        for name, model in slim.items():
            (cache,) = _cache(model(ids(1, 1), use_cache=True)).values()
            put(name, "bytes", _state_bytes(model, cache))
            for batch in work.decode_batches:
                put(name, f"decode {batch}", _or_nan(lambda m=model, b=batch: _decoding(m, ids(b, 1), work, graph)))
        prompt = ids(work.prefill_batch, work.length)
        for name, model in slim.items():
            seconds = _seconds(lambda m=model: m(prompt, use_cache=True), device, work.repeats)
            put(name, "prefill", prompt.numel() / seconds)
        for name, model in slim.items():
            if graph and largest:
                batch, speed = _largest_batch(model, ids)
                put(name, "largest batch", batch)
                put(name, "decode it", speed)
    del slim
    for name, model in models.items():
        put(name, "training", _or_nan(lambda m=model: _training(m, ids(work.train_batch, work.length), work)))
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    print(f"\n| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in table.items():
        print(f"| {name} | {' | '.join(f'{row[column]:,.0f}' for column in columns)} |")


@torch.no_grad()
def check(device: torch.device) -> None:
    """What a GPU's kernels and torch.compile give, against plain torch."""
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=512, hidden_size=256, num_hidden_layers=2, state_size=64, num_heads=16, head_dim=32, n_groups=2
    )
    plain = Mamba2ForCausalLM(config).eval()
    for layer in plain.backbone.layers:
        layer.mixer.in_proj.weight.normal_(std=0.1)
    by_head_(plain, 16)
    model = copy.deepcopy(plain).to(device)
    ids = torch.randint(1, 512, (3, 300))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0

    def differ(a: torch.Tensor, b: torch.Tensor) -> str:
        return f"{float((a.cpu() - b.cpu()).norm() / b.cpu().norm()):.1e}"

    def decoded(run: Callable, model: Mamba2ForCausalLM) -> torch.Tensor:
        cache = _cache(model(ids[:, :280].to(model.device), use_cache=True))
        steps = [
            run(ids[:, i : i + 1].to(model.device), use_cache=True, **cache).logits.clone() for i in range(280, 300)
        ]
        return torch.cat(steps, dim=1).cpu()

    whole = plain(ids).logits
    print("whole:", differ(model(ids.to(device)).logits, whole))
    print("token by token:", differ(decoded(model, model), whole[:, 280:]))
    arguments = {"attention_mask": mask.to(device), "max_new_tokens": 40, "do_sample": False}
    dynamic = model.generate(ids.to(device), **arguments)
    begin = time.perf_counter()
    static = model.generate(ids.to(device), **arguments, cache_implementation="static")
    print(f"static cache generates the same: {torch.equal(static, dynamic)}, {time.perf_counter() - begin:.0f} s")
    for mode in ("default", "reduce-overhead"):
        begin = time.perf_counter()
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        print(
            f"compiled, {mode}: {differ(decoded(compiled, model), whole[:, 280:])}, {time.perf_counter() - begin:.0f} s"
        )
    begin = time.perf_counter()
    compiled = torch.compile(model, fullgraph=True)
    print(f"compiled, whole: {differ(compiled(ids.to(device)).logits, whole)}, {time.perf_counter() - begin:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="*")
    parser.add_argument("--sequences", type=int, default=64, help="of 512 tokens, to calibrate and to evaluate on")
    parser.add_argument("--means", type=int, nargs="*", default=[64, 32, 16, 8])
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.01, 0.03])
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--mean", type=int, nargs="+", default=[32, 16])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=16, help="of training and prefill")
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--no-largest", action="store_true", help="leave out the largest batch that fits")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.check:
        check(torch.device(args.device))
    for folder in args.folder:
        quality(folder, args.device, args.sequences, args.means, args.budgets)
    if args.time:
        config = Mamba2Config(
            vocab_size=4096,
            hidden_size=args.hidden,
            num_hidden_layers=args.layers,
            num_heads=2 * args.hidden // args.head_dim,
            head_dim=args.head_dim,
            n_groups=1,
        )
        work = Workload(args.length, args.batch, args.batch, tuple(args.decode), repeats=5)
        timing(config, args.mean, torch.device(args.device), work, not args.no_largest)


if __name__ == "__main__":
    main()
