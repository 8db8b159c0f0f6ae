"""A state that shrinks while the model trains, against the full state and one that is small from the start.

`python tests/gpu/shrink_while_training.py recall --steps 1000 --small 1` trains the three models for each of 3 seeds,
with the same steps and data order in transformers' `Trainer`, and ends with a table of mean ± std over the seeds. The tasks:

- recall: multi-query associative recall (Zoology, arXiv 2312.04927), where the size of the state is what limits.
  `--scan 1,2,4,8,16` shows that: accuracy from scratch against N, nothing else.
- text: 0.6 M parameters (vocabulary 1024) from scratch on `--tokens FOLDER`, with uint16 ids in train.npy and valid.npy.
- digits: scikit-learn's load_digits as sequences of 64 pixels, then the class.
- images: Fashion-MNIST as sequences of 784 pixels, then the class; `--images FILE.npz` holds x_train, y_train, x_test and
  y_test.

`--models full,distilled` distils the full model, once it is trained, into ones of the small sizes.

`--small 12,32` shrinks to each of these sizes. To share the seeds and models out among several GPUs, start a process for
each, with `--seeds`, `--models` and `--results FILE.jsonl`; `table FILE.jsonl ...` makes one table of their results.

Steps per second are medians: before the first cut without the first 10 steps, and from 5 steps after the last cut on.
The models without cuts are timed in the same two windows.
"""

import argparse
import json
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
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import MambaConfig, MambaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from hf_compressm import CompreSSMCallback, CompreSSMConfig
from hf_compressm.layers import find_layers

SHADES = 17  # of a pixel of the digits: the tokens after them are the classes
# Learning rate, batch, training sequences, hidden size, layers.
DEFAULTS = {
    "recall": (1e-2, 64, 200_000, 64, 1),  # with two layers, chance decides whether a run learns
    "text": (4e-3, 32, 200_000, 128, 4),
    "digits": (3e-3, 64, 0, 64, 2),
    "images": (2e-3, 128, 60_000, 128, 4),
}


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
        half, context = args.vocabulary // 2, 2 * args.pairs
        input_ids = torch.empty(count, args.length, dtype=torch.int16)
        labels = torch.full((count, args.length), -100, dtype=torch.int16)
        for ids, targets in zip(input_ids.split(10_000), labels.split(10_000), strict=True):
            keys = torch.rand(len(ids), half, generator=generator).topk(args.pairs).indices
            values = torch.randint(half, args.vocabulary, keys.shape, generator=generator)
            asked = torch.randint(args.pairs, (len(ids), args.length - context), generator=generator)
            ids[:, :context:2], ids[:, 1:context:2] = keys.short(), values.short()
            ids[:, context:] = keys.gather(1, asked).short()
            # The model shifts the labels itself: what to predict at position t is label t + 1.
            targets[:, context + 1 :] = values.gather(1, asked)[:, :-1].short()
        return Rows(input_ids, labels)

    def config(N: int) -> MambaConfig:
        return MambaConfig(
            vocab_size=args.vocabulary, hidden_size=args.hidden, num_hidden_layers=args.layers, state_size=N
        )

    return Task(rows(args.train_size, 1000 + seed), rows(2000, 999), config)


def text(args: argparse.Namespace, seed: int) -> Task:
    def rows(name: str, count: int) -> Rows:
        ids = np.load(args.tokens / name, mmap_mode="r")[: count * 256]
        windows = torch.from_numpy(ids[: len(ids) // 256 * 256].astype(np.int32)).view(-1, 256)
        return Rows(windows, windows)

    def config(N: int) -> MambaConfig:
        return MambaConfig(vocab_size=1024, hidden_size=args.hidden, num_hidden_layers=args.layers, state_size=N)

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
        return MambaConfig(
            vocab_size=SHADES + 10, hidden_size=args.hidden, num_hidden_layers=args.layers, state_size=N
        )

    return Task(Rows(input_ids[train], labels[train]), Rows(input_ids[test], labels[test]), config)


def images(args: argparse.Namespace, seed: int) -> Task:
    if args.images is None:
        raise SystemExit("images needs --images: an .npz file with x_train, y_train, x_test and y_test.")
    data = np.load(args.images)

    def rows(split: str, count: int) -> Rows:
        pixels = torch.from_numpy(data[f"x_{split}"][:count]).flatten(1).short()
        classes = torch.from_numpy(data[f"y_{split}"][:count]).short()[:, None] + 256
        input_ids = torch.cat([pixels, classes], 1)
        labels = torch.full_like(input_ids, -100)
        labels[:, -1] = input_ids[:, -1]
        return Rows(input_ids, labels)

    def config(N: int) -> MambaConfig:
        return MambaConfig(vocab_size=272, hidden_size=args.hidden, num_hidden_layers=args.layers, state_size=N)

    return Task(rows("train", args.train_size), rows("test", 10_000), config)


@torch.no_grad()
def evaluate(model: MambaForCausalLM, task: Task) -> float:
    """Perplexity, or the share of the labels that the model ranks first, in percent."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for rows in torch.arange(len(task.test)).split(200):
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


class DistillingTrainer(Trainer):
    """Half of the loss is that of the labels, half is T^2 KL(teacher || student) at temperature T (arXiv 1503.02531)."""

    def __init__(self, *args: object, teacher: MambaForCausalLM, temperature: float, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.temperature = teacher.eval(), temperature

    def compute_loss(self, model: MambaForCausalLM, inputs: dict, return_outputs: bool = False, **_: object) -> Tensor:
        asked = inputs["labels"][:, 1:] != -100
        output = model(**inputs)
        with torch.no_grad():
            target = self.teacher(inputs["input_ids"]).logits
        student, teacher = (
            F.log_softmax(logits[:, :-1][asked].float() / self.temperature, -1) for logits in (output.logits, target)
        )
        distance = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return (output.loss + self.temperature**2 * distance) / 2


def run(
    args: argparse.Namespace,
    task: Task,
    name: str,
    N: int,
    small: int,
    seed: int,
    teacher: MambaForCausalLM | None = None,
) -> tuple[dict, MambaForCausalLM]:
    """Train one model; its states, metric, speeds, and seconds: of the whole training, and of the cuts in it."""
    set_seed(seed)
    model = MambaForCausalLM(task.config(N))
    cut_begin, cut_end = (round(share * args.steps) for share in (args.start, args.end))
    clock, callbacks = Clock(), []
    if name == "shrunk":
        target = {"tolerance": args.tolerance} if args.tolerance else {"state_size": small}
        config = CompreSSMConfig(
            **target, start=args.start, end=args.end, num_reductions=4, calibration_batches=args.calibration_batches
        )
        callbacks.append(CompreSSMCallback(config))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=args.steps,
            weight_decay=args.weight_decay,
            per_device_train_batch_size=args.batch,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=int(args.warmup * args.steps),
            optim="adamw_torch",
            seed=seed,
            data_seed=seed,
            bf16=args.bf16,
            use_cpu=not torch.cuda.is_available(),
            dataloader_num_workers=0,
            remove_unused_columns=False,
            logging_steps=10**9,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer_class, options = Trainer, {}
        if name == "distilled":
            trainer_class, options = DistillingTrainer, {"teacher": teacher, "temperature": args.temperature}
        trainer = trainer_class(
            model,
            arguments,
            data_collator=lambda batch: batch,
            train_dataset=task.train,
            callbacks=[*callbacks, clock],
            **options,
        )
        trainer.remove_callback(PrinterCallback)
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
    states = [layer.state_size for layer in find_layers(model)]
    after = f"{states[0]}" if len(set(states)) == 1 else f"{sum(states) / len(states):.1f} (mean)"
    cuts = [entry["compressm/cut_seconds"] for entry in trainer.state.log_history if "compressm/cut_seconds" in entry]
    row = {
        "task": args.task,
        "seed": seed,
        "model": name,
        "states": f"{N} to {after}" if name == "shrunk" else f"{N}",
        "metric": evaluate(model, task),
        "before": clock.speed(10, cut_begin - 1),
        "after": clock.speed(cut_end + 5, args.steps),
        "seconds": seconds,
        "cut_seconds": sum(cuts),
    }
    if args.results is not None:
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
    cells = [args.task, f"seed {seed}", name, row["states"], f"{row['metric']:.2f}"]
    cells += [f"{row['before']:.1f}", f"{row['after']:.1f}", f"{seconds:.1f}", f"{sum(cuts):.1f}"]
    print(f"| {' | '.join(cells)} |", flush=True)
    return row, model


def summary(rows: list[dict]) -> None:
    """One line for each task, model and size: means over the seeds."""
    print(
        "\n| task | model | states | accuracy (%), text: perplexity | steps/s | of them after the cuts | seconds | cutting |"
    )
    print("|---|---|---|---|---|---|---|---|")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["model"], row["states"]), []).append(row)
    for key, group in groups.items():
        values = [row["metric"] for row in group]
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        means = {
            name: statistics.mean(row[name] for row in group) for name in ("before", "after", "seconds", "cut_seconds")
        }
        cells = [*key, f"{statistics.mean(values):.2f} ± {std:.2f} ({len(values)} seeds)"]
        cells += [f"{mean:.1f}" for mean in means.values()]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*DEFAULTS, "table"])
    parser.add_argument("files", type=Path, nargs="*", help="table: what --results wrote")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--models", default="full,shrunk,scratch")
    parser.add_argument("--results", type=Path, help="append a line of JSON for each run to this file")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no run begins")
    parser.add_argument("--scan", help="recall: only from scratch, at these state sizes (1,2,4)")
    parser.add_argument("--state-size", type=int, default=16)
    parser.add_argument("--small", default="4", help="sizes to shrink to, and to train from scratch")
    parser.add_argument("--temperature", type=float, default=1.0, help="of distillation")
    parser.add_argument("--tolerance", type=float, help="shrink by this tolerance at each attempt, not to a size")
    parser.add_argument("--calibration-batches", type=int, default=4)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--start", type=float, default=0.1, help="of the cuts, as a share of the steps")
    parser.add_argument("--end", type=float, default=0.4)
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--train-size", type=int, help="sequences (recall), windows of 256 tokens at most (text)")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=256, help="recall: half of it keys, half of it values")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--images", type=Path)
    args = parser.parse_args()
    if args.task == "table":
        summary([json.loads(line) for file in args.files for line in file.read_text().splitlines()])
        return
    names = ("learning_rate", "batch", "train_size", "hidden", "layers")
    for name, default in zip(names, DEFAULTS[args.task], strict=True):
        setattr(args, name, getattr(args, name) or default)
    logging.set_verbosity_error()

    began = time.perf_counter()
    seeds, models, small = args.seeds.split(","), args.models.split(","), [int(n) for n in args.small.split(",")]
    runs = [("full", args.state_size, 0)]
    runs += [("shrunk", args.state_size, n) for n in small]
    runs += [(name, n, 0) for name in ("scratch", "distilled") for n in small]
    runs = [run for run in runs if run[0] in models]
    if "distilled" in models and "full" not in models:
        raise SystemExit("distilled needs its teacher: add full to --models.")
    if args.scan:
        runs = [("scratch", int(N), 0) for N in args.scan.split(",")]
    print(f"{args.task}, {args.steps} steps, {'cuda' if torch.cuda.is_available() else 'cpu'}\n")
    print("| task | seed | model | states | metric | steps/s | of them after the cuts | seconds | cutting |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for seed in map(int, seeds):
        try:
            task = {"recall": recall, "text": text, "digits": digits, "images": images}[args.task](args, seed)
        except ModuleNotFoundError as error:
            print(f"\nSkipped: {error}.")
            return
        teacher = None
        for name, N, n in runs:
            if time.perf_counter() - began < args.budget:
                row, model = run(args, task, name, N, n, seed, teacher)
                rows.append(row)
                if name == "full":
                    teacher = model
    summary(rows)


if __name__ == "__main__":
    main()
