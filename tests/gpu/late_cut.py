"""When to cut a Mamba-2 language model that trains: early, late, with and without a fit at the cut, or small from the start.

`python tests/gpu/late_cut.py --corpus FILE.pt` trains `mamba2-small` of `train_reference_models.py` from random weights, on the
token ids [n, 512] that `healing.py --corpus` keeps, and prints a row for each seed and run: perplexity and recall on the
package's evaluation text right after the cut and at the end, the training loss over the last tenth of the steps, and the sizes.
All runs of a seed begin with the same weights and see the same batches; those that are cut go on from one model that is not.
"""

import argparse
import copy
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
import train_reference_models
from train_reference_models import RECIPES, build_model, make_optimizer, mean_loss
from transformers import AutoTokenizer, PreTrainedModel

from hf_compressm import CompreSSMConfig, compress_
from hf_compressm.data.evaluation import Evaluation, evaluate
from hf_compressm.data.texts import EVALUATION, windows
from hf_compressm.layers import find_layers

RUNS = {
    "cut late, fit": (0.75, 3, False),
    "cut early, no fit": (0.1, 0, False),
    "cut late, no fit": (0.75, 0, False),
    "cut early, fit": (0.1, 3, False),
    "cut late, fit, moments of B and C reset": (0.75, 3, True),
}
"""The share of the steps before the cut, rounds of the fit, and whether the optimizer forgets."""
SMALL, WHOLE = "small from the start", "not cut"
KNOWN = 64
"""Sequences of the last batches that a cut is measured on."""


class Training:
    """Of one seed: the batches and the schedule."""

    def __init__(self, args: argparse.Namespace, seed: int, ids: torch.Tensor) -> None:
        self.steps, self.lr = args.steps, args.lr
        generator = torch.Generator().manual_seed(seed)
        self.order = torch.randint(len(ids), (args.steps, args.batch), generator=generator)
        self.ids, self.device = ids, args.device

    def batch(self, step: int) -> torch.Tensor:
        """Windows [batch, length + 1]."""
        return self.ids[self.order[step]].to(self.device)

    def run(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, steps: range) -> float:
        """Train, and return the mean loss of the last tenth."""
        losses = []
        model.train()
        for step in steps:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * min(1, (step + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * step / self.steps))
            loss = mean_loss(model, self.batch(step))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
            if step % 20 == 0:
                loss.item()
        return float(torch.stack(losses[-max(1, self.steps // 10) :]).mean()) if losses else math.nan


def copied(model: PreTrainedModel, optimizer: torch.optim.Optimizer, lr: float) -> tuple[Any, Any]:
    """Both, once more."""
    one = copy.deepcopy(model)
    mine = make_optimizer(one, lr)
    mine.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return one, mine


def cut_(model: Any, optimizer: Any, training: Training, step: int, ratio: float, rounds: int, reset: bool) -> None:
    """As the callback does, on the last batches."""
    count = max(1, KNOWN // training.order.shape[1])
    known = torch.cat([training.batch(i)[:, :-1] for i in range(max(0, step - count), step)])
    config = CompreSSMConfig(ratio=ratio, realization="select", refit=rounds)
    compress_(model, config, known, optimizer=optimizer)
    for layer in find_layers(model) if reset else []:
        for part in (layer.mixer.in_proj, layer.mixer.conv1d):
            for parameter in part.parameters():
                optimizer.state[parameter]["exp_avg"].zero_()
                optimizer.state[parameter]["exp_avg_sq"].zero_()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", default="mamba2-small")
    parser.add_argument(
        "--folder", type=Path, default=Path("hf_compressm/reference/mamba2-small"), help="for its tokenizer"
    )
    parser.add_argument("--ratio", type=float, default=1 / 8)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", choices=[SMALL, WHOLE, *RUNS], default=[SMALL, WHOLE, *list(RUNS)[:4]])
    parser.add_argument(
        "--compile", action="store_true", help="pays where nothing is cut: it compiles anew for each size"
    )
    parser.add_argument("--windows", type=int, default=64, help="of 512 tokens, to evaluate on")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no run is begun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    if not args.compile:
        train_reference_models.run = lambda function: function
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    stream = torch.load(args.corpus).flatten()
    ids = stream[: (len(stream) - 1) // 512 * 512 + 1].unfold(0, 513, 512)
    unseen = windows(EVALUATION.read_text(encoding="utf-8"), tokenizer, args.windows)
    recipe = RECIPES[args.model]
    small = dataclasses.replace(
        recipe,
        architecture=recipe.architecture | {"state_size": round(args.ratio * recipe.architecture["state_size"])},
    )
    begin = time.time()
    print(
        "| seed | run | after the cut | at the end | training loss | sizes | s |\n|---|---|---|---|---|---|---|",
        flush=True,
    )

    def said(found: Evaluation) -> str:
        return f"{found.perplexity:.3f}, {found.recall:.3f}"

    def report(seed: int, name: str, after: str, model: PreTrainedModel, loss: float) -> None:
        sizes = " ".join(str(layer.state_size) for layer in find_layers(model))
        end = said(evaluate(model, unseen))
        print(f"| {seed} | {name} | {after} | {end} | {loss:.4f} | {sizes} | {time.time() - begin:.0f} |", flush=True)

    for seed in args.seeds:
        training = Training(args, seed, ids)
        if SMALL in args.runs:
            torch.manual_seed(seed)
            model = build_model(small, tokenizer.eos_token_id).to(args.device)
            loss = training.run(model, make_optimizer(model, args.lr), range(args.steps))
            report(seed, SMALL, "", model, loss)
        cuts = [name for name in args.runs if name in RUNS]
        if args.runs == [SMALL]:
            continue
        torch.manual_seed(seed)
        model = build_model(recipe, tokenizer.eos_token_id).to(args.device)
        optimizer, done, starts = make_optimizer(model, args.lr), 0, {}
        for share in sorted({RUNS[name][0] for name in cuts}):
            step = round(share * args.steps)
            training.run(model, optimizer, range(done, step))
            done, starts[share] = step, copied(model, optimizer, args.lr)
        if WHOLE in args.runs:
            loss = training.run(model, optimizer, range(done, args.steps))
            report(seed, WHOLE, "", model, loss)
        for name in cuts:
            if time.time() - begin > args.limit:
                return
            share, rounds, reset = RUNS[name]
            step = round(share * args.steps)
            one, mine = copied(*starts[share], args.lr)
            cut_(one, mine, training, step, args.ratio, rounds, reset)
            after = said(evaluate(one, unseen))
            loss = training.run(one, mine, range(step, args.steps))
            report(seed, name, after, one, loss)


if __name__ == "__main__":
    main()
