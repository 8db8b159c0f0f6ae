"""What fitting the kept rows of B and C does for a stock Mamba-2 cut: quality and seconds, against other ways.

`python tests/gpu/refit_mamba2.py FOLDER ...` for Mamba-2 language models with tokenizers; on the code and prose that the
package ships. Columns: sequences of 512 tokens that it was calibrated on (`--known`: of the package's text, of `--corpus`, which
`healing.py` keeps, or samples of the model), states of a layer on average, change of the perplexity, change of that of tokens
whose bigram occurred earlier in the window, seconds to plan with the fits, and how many layers the fit changed.

`--groups 4` makes a model of so many groups of one with one group: B and C are copied to each, and the model, whose gated norm
is another one then, is trained on `--corpus` for `--steps` steps first, and kept in `--save` for `healing.py`.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_compressm import CompreSSMConfig, compress_, measure
from hf_compressm.cutting import Measurement, Plan
from hf_compressm.data.calibration import sample
from hf_compressm.data.evaluation import Evaluation, evaluate
from hf_compressm.data.texts import CALIBRATION, EVALUATION, LENGTH, windows
from hf_compressm.hankel.refit_mamba2 import OwnLoss, RowsRefit
from hf_compressm.layers import find_layers
from hf_compressm.layers.rows import parted, reading, rows_of
from hf_compressm.layers.selection import Refit

CUTS: dict[str, dict[str, Any]] = {
    "mean 1/4": {"ratio": 0.25},
    "all 1/2": {"state_size": 0.5},
    "all 1/4": {"state_size": 0.25},
    "mean 1/2": {"ratio": 0.5},
    "budget 0.01": {"max_divergence": 0.01},
}
ROWS = ["project", "refit 0", "refit 3", "adam 300", "refit 1", "refit 4", "two steps", "bf16 refit 0", "bf16 refit 3"]


def adam(measurement: Measurement, plan: Plan, steps: int) -> Plan:
    """Fit a plan's selections by Adam to the layers' own error, lr 3e-3 with a cosine."""
    made = {}
    for layer in measurement.layers:
        if layer.index not in plan.realizations:
            continue
        groups = plan.realizations[layer.index].groups
        train, _ = parted(measurement.inputs[layer.index], 2**20, layer.device)
        with torch.no_grad():
            loss = OwnLoss([reading(layer, *read) for read in train])
        rows = rows_of(layer, torch.stack([group.kept for group in groups]))
        x = rows.flat().requires_grad_()
        optimizer = torch.optim.Adam([x], lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            loss.share(rows.filled(x)).backward()
            optimizer.step()
            schedule.step()
        rows = rows.filled(x.detach())
        made[layer.index] = Refit(tuple(RowsRefit(g.kept, rows.of_group(i), 0.0) for i, g in enumerate(groups)))
    return replace(plan, realizations=made)


def cut(
    row: str, full: PreTrainedModel, known: torch.Tensor, options: dict, measured: dict
) -> tuple[Any, Plan, float]:
    """The slim model of a row of the table, its plan, and the seconds that the plan took."""
    kind = row.removeprefix("bf16 ")
    dtype = torch.bfloat16 if kind != row else torch.float32
    if dtype not in measured:
        whole = copy.deepcopy(full).to(dtype)
        measured[dtype] = measure(
            whole, known, CompreSSMConfig(max_divergence=0.01, realization="select", weights="fisher")
        )
    measurement = measured[dtype]
    model = copy.deepcopy(measurement.model)
    realization = "project" if kind == "project" else "select"
    begin = time.perf_counter()
    if kind == "two steps":
        half = {name: (value + 1) / 2 if name == "ratio" else 2 * value for name, value in options.items()}
        compress_(model, CompreSSMConfig(**half, realization=realization, weights="fisher", refit=2), known)
        if "ratio" in options:
            options = {"ratio": options["ratio"] / half["ratio"]}
        again = CompreSSMConfig(**options, realization=realization, weights="fisher", refit=2)
        plan = measure(model, known, again).plan(again)
    else:
        rounds = int(kind.split()[1]) if kind.startswith("refit") else 0
        config = CompreSSMConfig(**options, realization=realization, weights="fisher", refit=rounds)
        plan = measurement.plan(config)
        if kind.startswith("adam"):
            plan = adam(measurement, plan, int(kind.split()[1]))
    plan.apply_(model)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return model, plan, time.perf_counter() - begin


def known_text(kinds: str, args: argparse.Namespace, model: PreTrainedModel, tokenizer: Any) -> torch.Tensor:
    """Token ids [n, length], such as of "shipped:64+samples:192"."""
    parts = []
    for kind, count in ((part.split(":")[0], int(part.split(":")[1])) for part in kinds.split("+")):
        if kind == "shipped":
            parts.append(windows(CALIBRATION.read_text(encoding="utf-8"), tokenizer, count, args.length))
        elif kind == "samples":
            parts.append(sample(model, count, args.length).cpu())
        else:
            corpus = torch.load(args.corpus)[:, : args.length]
            parts.append(corpus[torch.linspace(0, len(corpus) - 1, count).round().long()])
    return torch.cat(parts)


def table(
    name: str,
    full: PreTrainedModel,
    texts: dict[str, torch.Tensor],
    unseen: torch.Tensor,
    wanted: Callable,
    until: float,
):
    base: Evaluation = evaluate(full, unseen)
    N = find_layers(full)[0].state_size
    print(
        f"\n{name}: N={N}, {full.config.n_groups} groups, perplexity {base.perplexity:.3f}, recall {base.recall:.3f}"
    )
    print(
        "| model | calibration | cut | how | states | perplexity | recall | s | fitted |\n|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for of, known in texts.items():
        measured: dict = {}
        for label, options in CUTS.items():
            sizes = {"state_size": int(N * options["state_size"])} if "state_size" in options else options
            for row in ROWS:
                if not wanted(f"{label}: {row}") or (row == "two steps" and "1/4" not in label) or time.time() > until:
                    continue
                model, plan, seconds = cut(row, full, known, sizes, measured)
                found = evaluate(model, unseen)
                fitted = sum(one.kind == "refit" for one in plan.realizations.values())
                kept = [layer.state_size for layer in find_layers(model)]
                print(
                    f"| {name} | {of} | {label} | {row} | {sum(kept) / len(kept):.1f} | "
                    f"{found.perplexity / base.perplexity - 1:+.2%} | {found.recall / base.recall - 1:+.2%} | "
                    f"{seconds:.1f} | {fitted} | {' '.join(map(str, kept))}",
                    flush=True,
                )


def of_groups(model: PreTrainedModel, groups: int) -> PreTrainedModel:
    """The same with B and C of its one group for each of several."""
    config = copy.deepcopy(model.config)
    config.n_groups = groups
    other = type(model)(config).to(model.device)
    inner, N = model.config.num_heads * model.config.head_dim, model.config.state_size
    new = model.state_dict()
    for name, tensor in new.items():
        start = {"in_proj": 2 * inner, "conv1d": inner}.get(name.split(".")[-2])
        if start is not None:
            before, B, C, after = tensor.split([start, N, N, len(tensor) - start - 2 * N])
            new[name] = torch.cat([before, *[B] * groups, *[C] * groups, after])
    other.load_state_dict(new)
    return other


def train(
    model: PreTrainedModel, ids: torch.Tensor, steps: int, until: float, lr: float = 5e-4, batch: int = 8
) -> None:
    """Next-token prediction with AdamW and a learning rate that falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    model.train()
    begin = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        rows = ids[torch.randint(len(ids), (batch,), generator=generator)].to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            logits = model(rows).logits[:, :-1].float()
        loss = F.cross_entropy(logits.mT, rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or time.time() > until:
            print(f"step {step}: loss {loss.item():.3f}, {time.time() - begin:.0f} s", flush=True)
        if time.time() > until:
            break
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+")
    parser.add_argument("--only", default="", help="rows whose name holds one of these, apart by commas")
    parser.add_argument(
        "--known", nargs="+", default=["shipped:64"], help="such as corpus:256, shipped:64+samples:192"
    )
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--sequences", type=int, default=64, help="of 512 tokens, to evaluate on")
    parser.add_argument("--groups", type=int, default=[], nargs="*")
    parser.add_argument("--save", type=Path, help="a folder for the models of several groups")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no row is begun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    begin = time.time()
    only = args.only.split(",")
    for folder in args.folder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        unseen = windows(EVALUATION.read_text(encoding="utf-8"), tokenizer, args.sequences, args.length)
        full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device).eval()
        for number, groups in enumerate(args.groups or [1]):
            model, until = full, begin + args.limit * (number + 1) / max(1, len(args.groups))
            if groups > 1:
                model = of_groups(full, groups)
                ids = torch.load(args.corpus)[:, : args.length]
                train(model, ids, args.steps, begin + args.limit * (number + 0.45) / len(args.groups))
                if args.save is not None:
                    model.save_pretrained(args.save / f"{folder.name}-{groups}-groups")
                    tokenizer.save_pretrained(args.save / f"{folder.name}-{groups}-groups")
            texts = {kinds: known_text(kinds, args, model, tokenizer) for kinds in args.known}
            table(folder.name, model, texts, unseen, lambda name: any(part in name for part in only), until)


if __name__ == "__main__":
    main()
