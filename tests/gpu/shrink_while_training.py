"""A state that shrinks while the model trains, against the full state and one that is small from the start.

`python tests/gpu/shrink_while_training.py recall --steps 4000` trains the three models for each of 3 seeds, with the
same steps and data order in transformers' `Trainer`, and ends with a table of mean ± std over the seeds. The tasks:

- recall: multi-query associative recall (Zoology, arXiv 2312.04927), where the size of the state is what limits.
  `--scan 1,2,4,8,16` shows that: accuracy from scratch against N, nothing else.
- text: the architecture of mamba-tiny from scratch on `--tokens FOLDER`, with uint16 ids in train.npy and valid.npy.
- digits: scikit-learn's load_digits as sequences of 64 pixels, then the class.

Steps per second are medians: before the first cut without the first 10 steps, and from 5 steps after the last cut on.
The models without cuts are timed in the same two windows.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import MambaConfig, MambaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

import hf_compressm
from hf_compressm import CompreSSMCallback, CompreSSMConfig
from hf_compressm.architectures import find_layers

REFERENCE = Path(hf_compressm.__file__).parent / "reference" / "mamba-tiny"
VOCABULARY = 512  # of recall: the keys are the lower half, the values the upper
SHADES = 17  # of a pixel of the digits: the tokens after them are the classes
DEFAULTS = {"recall": (3e-3, 128, 200_000), "text": (4e-3, 32, 200_000), "digits": (3e-3, 64, 0)}


class Rows(Dataset):
    """Input ids and labels in memory, handed out a batch at a time."""

    def __init__(self, input_ids: Tensor, labels: Tensor) -> None:
        self.input_ids, self.labels = input_ids, labels

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[i].long(), "labels": self.labels[i].long()}

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[rows].long(), "labels": self.labels[rows].long()}


@dataclass
class Task:
    train: Rows
    test: Rows
    config: Callable[[int], MambaConfig]
    perplexity: bool = False


def recall(args: argparse.Namespace, seed: int) -> Task:
    """`pairs` keys with their values, then keys drawn from them; what to predict at each of these is its value."""
    if 2 * args.pairs > args.length - 2:
        raise SystemExit(f"--length {args.length} has no room for queries after {args.pairs} pairs.")

    def rows(count: int, seed: int) -> Rows:
        generator = torch.Generator().manual_seed(seed)
        half, context = VOCABULARY // 2, 2 * args.pairs
        input_ids = torch.empty(count, args.length, dtype=torch.int16)
        labels = torch.full((count, args.length), -100, dtype=torch.int16)
        for ids, targets in zip(input_ids.split(10_000), labels.split(10_000), strict=True):
            keys = torch.rand(len(ids), half, generator=generator).topk(args.pairs).indices
            values = torch.randint(half, VOCABULARY, keys.shape, generator=generator)
            asked = torch.randint(args.pairs, (len(ids), args.length - context), generator=generator)
            ids[:, :context:2], ids[:, 1:context:2] = keys.short(), values.short()
            ids[:, context:] = keys.gather(1, asked).short()
            # The model shifts the labels itself: what to predict at position t is label t + 1.
            targets[:, context + 1 :] = values.gather(1, asked)[:, :-1].short()
        return Rows(input_ids, labels)

    def config(N: int) -> MambaConfig:
        return MambaConfig(vocab_size=VOCABULARY, hidden_size=args.hidden, num_hidden_layers=2, state_size=N)

    return Task(rows(args.train_size, 1000 + seed), rows(2000, 999), config)


def text(args: argparse.Namespace, seed: int) -> Task:
    def rows(name: str, count: int) -> Rows:
        ids = np.load(args.tokens / name, mmap_mode="r")[: count * 256]
        windows = torch.from_numpy(ids[: len(ids) // 256 * 256].astype(np.int32)).view(-1, 256)
        return Rows(windows, windows)

    def config(N: int) -> MambaConfig:
        return MambaConfig.from_pretrained(REFERENCE, state_size=N, dtype="float32")

    if args.tokens is None:
        raise SystemExit("text needs --tokens: a folder with train.npy and valid.npy.")
    return Task(rows("train.npy", args.train_size), rows("valid.npy", 64), config, perplexity=True)


def digits(args: argparse.Namespace, seed: int) -> Task:
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    input_ids = torch.cat([torch.tensor(images).int(), torch.tensor(classes)[:, None].int() + SHADES], 1)
    labels = torch.full_like(input_ids, -100)
    labels[:, -1] = input_ids[:, -1]
    order = torch.randperm(len(input_ids), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 4], order[len(order) // 4 :]

    def config(N: int) -> MambaConfig:
        return MambaConfig(vocab_size=SHADES + 10, hidden_size=args.hidden, num_hidden_layers=2, state_size=N)

    return Task(Rows(input_ids[train], labels[train]), Rows(input_ids[test], labels[test]), config)


@torch.no_grad()
def evaluate(model: MambaForCausalLM, task: Task) -> float:
    """Perplexity, or the share of the labels that the model ranks first, in percent."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for rows in torch.arange(len(task.test)).split(32):
        batch = {name: ids.to(model.device) for name, ids in task.test.__getitems__(rows.tolist()).items()}
        output = model(**batch, use_cache=False)
        labels, guesses = batch["labels"][:, 1:], output.logits[:, :-1].argmax(-1)
        asked = labels != -100
        right += int((guesses[asked] == labels[asked]).sum())
        loss += float(output.loss) * int(asked.sum())
        count += int(asked.sum())
    return math.exp(loss / count) if task.perplexity else 100 * right / count


class Clock(TrainerCallback):
    def on_train_begin(self, *_: object, **__: object) -> None:
        self.times = [time.perf_counter()]

    def on_step_end(self, *_: object, **__: object) -> None:
        self.times.append(time.perf_counter())

    def speed(self, first: int, last: int) -> float:
        """Steps per second between two steps."""
        steps = np.diff(self.times[first : last + 1])
        return 1 / float(np.median(steps)) if len(steps) else math.nan


def run(args: argparse.Namespace, task: Task, name: str, N: int, seed: int) -> dict:
    """Train one model; its states, metric, speeds and seconds."""
    set_seed(seed)
    model = MambaForCausalLM(task.config(N))
    cut_begin, cut_end = (round(share * args.steps) for share in (args.start, args.end))
    clock, callbacks = Clock(), []
    if name == "shrunk":
        config = CompreSSMConfig(state_size=args.small, start=args.start, end=args.end, num_reductions=4)
        callbacks.append(CompreSSMCallback(config))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=int(args.warmup * args.steps),
            optim="adamw_torch",
            seed=seed,
            data_seed=seed,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            dataloader_num_workers=0,
            remove_unused_columns=False,
            logging_steps=10**9,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(
            model,
            arguments,
            data_collator=lambda batch: batch,
            train_dataset=task.train,
            callbacks=[*callbacks, clock],
        )
        trainer.remove_callback(PrinterCallback)
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
    states = sorted({layer.state_size for layer in find_layers(model)})
    row = {
        "states": f"{N} to {states[0]}" if name == "shrunk" else f"{N}",
        "metric": evaluate(model, task),
        "before": clock.speed(10, cut_begin - 1),
        "after": clock.speed(cut_end + 5, args.steps),
        "seconds": seconds,
    }
    cells = [args.task, f"seed {seed}", name, row["states"], f"{row['metric']:.2f}"]
    cells += [f"{row['before']:.1f}", f"{row['after']:.1f}", f"{seconds:.1f}"]
    print(f"| {' | '.join(cells)} |", flush=True)
    return row


def summary(args: argparse.Namespace, metric: str, results: dict[str, list[dict]]) -> None:
    print(f"\n| task | model | states | {metric} | steps/s before the cut | steps/s after | total seconds |")
    print("|---|---|---|---|---|---|---|")
    for name, rows in results.items():
        values = [row["metric"] for row in rows]
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        before, after, seconds = (statistics.mean(row[key] for row in rows) for key in ("before", "after", "seconds"))
        cells = [args.task, name, rows[0]["states"], f"{statistics.mean(values):.2f} ± {std:.2f} ({len(rows)} seeds)"]
        print(f"| {' | '.join(cells)} | {before:.1f} | {after:.1f} | {seconds:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(DEFAULTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no run begins")
    parser.add_argument("--scan", help="recall: only from scratch, at these state sizes (1,2,4), one seed")
    parser.add_argument("--state-size", type=int, default=16)
    parser.add_argument("--small", type=int, default=4)
    parser.add_argument("--start", type=float, default=0.1, help="of the cuts, as a share of the steps")
    parser.add_argument("--end", type=float, default=0.4)
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--train-size", type=int, help="sequences (recall), windows of 256 tokens at most (text)")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--tokens", type=Path)
    args = parser.parse_args()
    learning_rate, batch, train_size = DEFAULTS[args.task]
    args.learning_rate = args.learning_rate or learning_rate
    args.batch, args.train_size = args.batch or batch, args.train_size or train_size
    logging.set_verbosity_error()

    began = time.perf_counter()
    runs = [("full", args.state_size), ("shrunk", args.state_size), ("scratch", args.small)]
    if args.scan:
        args.seeds, runs = 1, [(f"N={N}", int(N)) for N in args.scan.split(",")]
    metric = "perplexity" if args.task == "text" else "accuracy (%)"
    print(f"{args.task}, {args.steps} steps, {'cuda' if torch.cuda.is_available() else 'cpu'}\n")
    print(f"| task | seed | model | states | {metric} | steps/s before the cut | steps/s after | total seconds |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    results: dict[str, list[dict]] = {}
    for seed in range(args.seeds):
        try:
            task = {"recall": recall, "text": text, "digits": digits}[args.task](args, seed)
        except ModuleNotFoundError as error:
            print(f"\nSkipped: {error}.")
            return
        for name, N in runs:
            if time.perf_counter() - began < args.budget:
                results.setdefault(name, []).append(run(args, task, name, N, seed))
    summary(args, metric, results)


if __name__ == "__main__":
    main()
