"""Mamba-2 projected to one size, to sizes by layer, and to sizes by head: what they lose, and what they take.

`python tests/gpu/by_head.py FOLDER ...` prints, for each model of `train_benchmark_models.py`, the change of perplexity and
recall and the divergence at equal means of states a head, on the code and prose that the package ships. `--time` prints, for
the shapes of --hidden, --layers and --head-dim with random weights, tokens/s in bfloat16 of a training step, a prefill and
of decoding, for the full model, a projection to --mean states and one by head of that mean, whose sizes are spread as those
of well-trained models are; and the bytes of state per sequence, as counted in the cache.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Mamba2Config, Mamba2ForCausalLM

from hf_compressm import CompreSSMConfig, measure
from hf_compressm.cli.speed import Workload, _cache, _decoding, _or_nan, _seconds, _state_bytes, _training
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


def timing(config: Mamba2Config, mean: int, device: torch.device, work: Workload) -> None:
    """The table of one shape."""
    with device:
        full = Mamba2ForCausalLM(config)
    print(
        f"\nhidden {config.hidden_size}, {config.num_hidden_layers} layers, {config.num_heads} heads of {config.head_dim}, N={config.state_size}; tokens/s\n"
        f"| | training | prefill | {' | '.join(f'decode {b}{g}' for g in ('', ', graph') for b in work.decode_batches)} | bytes |",
        flush=True,
    )
    for name in ("full", "project", "project_heads"):
        model = copy.deepcopy(full)
        if name == "project":
            cut_to_first_states_(model, mean, name)
        elif name == "project_heads":
            for layer in model.backbone.layers:
                sizes = sizes_of_heads(config.num_heads, mean, config.state_size)
                maps = torch.randn(2, config.state_size, sum(sizes), device=device) / config.state_size**0.5
                project_heads_(layer.mixer, sizes, maps)
            print([list(layer.mixer.buckets) for layer in model.backbone.layers[:1]], flush=True)

        def ids(batch: int, length: int) -> torch.Tensor:
            return torch.randint(config.vocab_size, (batch, length), device=device)

        cells = [_or_nan(lambda m=model, i=ids: _training(m, i(work.train_batch, work.length), work))]
        model = model.eval().requires_grad_(False).to(work.dtype)
        prompt = ids(work.prefill_batch, work.length)
        with torch.no_grad():
            cells.append(
                prompt.numel() / _seconds(lambda m=model, p=prompt: m(p, use_cache=True), device, work.repeats)
            )
            for graph in (False, True):
                for batch in work.decode_batches:
                    if graph and device.type != "cuda":
                        continue
                    cells.append(_or_nan(lambda m=model, b=batch, i=ids, g=graph: _decoding(m, i(b, 1), work, g)))
            (cache,) = _cache(model(ids(1, 1), use_cache=True)).values()
        print(
            f"| {name} | {' | '.join(f'{cell:,.0f}' for cell in cells)} | {_state_bytes(model, cache):,.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="*")
    parser.add_argument("--sequences", type=int, default=64, help="of 512 tokens, to calibrate and to evaluate on")
    parser.add_argument("--means", type=int, nargs="*", default=[64, 32, 16, 8])
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.01, 0.03])
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--mean", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8, help="of training and prefill")
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
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
        timing(config, args.mean, torch.device(args.device), work)


if __name__ == "__main__":
    main()
