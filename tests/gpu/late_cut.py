"""A Mamba-2 language model cut late in its training: with and without a fit at the cut, moments carried or reset.

`python tests/gpu/late_cut.py FOLDER --tokens FILE.npy` goes on training a trained model, with a learning rate that falls to 0
over `--steps` steps, and cuts it to a quarter of its states after `--warm` of them. Columns: perplexity on the package's
evaluation text right after the cut and at the end, and the training loss over the last fifth of the steps. `--scratch` begins
with random weights, and adds a model that is that small from the start.
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_compressm import CompreSSMConfig, compress_
from hf_compressm.data.evaluation import perplexity
from hf_compressm.data.texts import EVALUATION, windows
from hf_compressm.layers import find_layers

RUNS = {
    "not cut": None,
    "no fit": (0, False),
    "fit": (3, False),
    "fit, moments of B and C reset": (3, True),
    "no fit, moments reset": (0, True),
}
SCRATCH = ["not cut", "no fit", "fit"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--warm", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--scratch", action="store_true")
    parser.add_argument("--limit", type=float, default=1e9)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.from_numpy(np.load(args.tokens).astype("int64"))[:, : args.length]
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    unseen = windows(EVALUATION.read_text(encoding="utf-8"), tokenizer, 32, args.length)
    begin = time.time()
    print("| seed | run | after the cut | at the end | training loss | sizes |\n|---|---|---|---|---|---|", flush=True)
    for seed in args.seeds:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randint(len(ids), (args.steps, args.batch), generator=generator)
        model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).to(device).train()
        if args.scratch:
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(model.config).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

        def train(model, optimizer, steps: range, order: torch.Tensor) -> float:
            losses = []
            for step in steps:
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * min(1, (step + 1) / 20) * (1 - step / args.steps)
                rows = ids[order[step]].to(device)
                with torch.autocast(device, torch.bfloat16):
                    logits = model(rows).logits[:, :-1].float()
                loss = F.cross_entropy(logits.mT, rows[:, 1:])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            last = losses[-max(1, args.steps // 5) :]
            return sum(last) / len(last)

        if args.scratch:
            config = copy.deepcopy(model.config)
            config.state_size //= 4
            torch.manual_seed(seed)
            small = AutoModelForCausalLM.from_config(config).to(device).train()
            loss = train(small, torch.optim.AdamW(small.parameters(), lr=args.lr), range(args.steps), order)
            print(
                f"| {seed} | small from the start | | {perplexity(small.eval(), unseen):.3f} | {loss:.4f} | "
                f"{config.state_size} | {time.time() - begin:.0f} s",
                flush=True,
            )
        train(model, optimizer, range(args.warm), order)
        for name, run in RUNS.items():
            if args.scratch and name not in SCRATCH:
                continue
            if time.time() - begin > args.limit:
                return
            one = copy.deepcopy(model)
            mine = torch.optim.AdamW(one.parameters(), lr=args.lr)
            mine.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            if run is not None:
                rounds, reset = run
                config = CompreSSMConfig(ratio=0.25, realization="select", refit=rounds)
                compress_(one, config, ids[order[args.warm - 4 : args.warm].flatten()], optimizer=mine)
                for layer in find_layers(one) if reset else []:
                    for part in (layer.mixer.in_proj, layer.mixer.conv1d):
                        for parameter in part.parameters():
                            mine.state[parameter]["exp_avg"].zero_()
                            mine.state[parameter]["exp_avg_sq"].zero_()
            after = perplexity(one.eval(), unseen)
            loss = train(one.train(), mine, range(args.warm, args.steps), order)
            kept = [layer.state_size for layer in find_layers(one)]
            print(
                f"| {seed} | {name} | {after:.3f} | {perplexity(one.eval(), unseen):.3f} | {loss:.4f} | {kept} | "
                f"{time.time() - begin:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
