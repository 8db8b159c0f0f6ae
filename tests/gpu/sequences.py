"""A state that shrinks while the model trains, against the full state, a small one, and the rivals of the published results.

`python tests/gpu/sequences.py images --model lru --images FILE.npz --methods full,cut:0.05,small:0.05 --seeds 0,1,2` trains each
of these for each seed, with the same data order in transformers' `Trainer`, and ends with a table of mean ± deviation.

Tasks: images (Fashion-MNIST or the like as sequences of 784 pixels, then the class: an .npz with x_train, y_train, x_test
and y_test), digits (scikit-learn's, 64 pixels), recall (multi-query associative recall, Zoology, arXiv 2312.04927, where the
size of the state is what limits), text (the bytes of a file, `--text FILE[.xz]`: perplexity).

Models: lru (images and digits), mamba, mamba2. Where mamba_ssm is missing, Mamba is scanned on a GPU by the Triton kernel of
`train_reference_models.py`.

Methods, with the sizes that they end with: a whole number of states, or the tolerance of the cut whose sizes they take,
which is made first or found in `--results`:

- full; cut:0.05 (a tolerance at each of `--reductions` attempts); cut:12 (a state size);
- at0.2:12, one cut at that share of the steps; after:12 (lru), the full model cut once it is trained, and not trained on;
- small:12, as many states from the start; long1.4:12, the same for 1.4 times the steps;
- distilled:12, small and taught by the full model: half labels, half Kullback-Leibler divergence (arXiv 1503.02531);
- shared:12, the same where teacher and student have half of the steps each, so that the teacher's training is counted;
- nuclear3e-5:12 (lru), the full model with 3e-5 times the sum of all Hankel singular values in the loss, at each
  `--every`th step, cut once it is trained. `--hankel` says how their gradient is computed.

`--settling` tells for the full model how far the ranking of the states at 2, 5, 10, 20 and 40% of the steps is that of the end.

To share seeds and methods out among several processes, give each `--seeds`, `--methods` and `--results FILE.jsonl`;
`table FILE.jsonl ...` makes one table of them, and `figure FILE.jsonl ... --output FILE.png` shows when the ranking settles. Seconds
tell nothing then: `--timing` trains only so many steps, alone; `hankel` times the nuclear norm in each way, and a cut.

Results are in tests/gpu/README.md, and those of each seed in sequences.jsonl. Beside them: four cuts in the first 10% of 574 steps, tolerance
0.05, leave an LRU 137 states and 82.15%.

Mamba on images, N=128, bf16, 700 steps, `--calibration 1`, with mamba_ssm's kernels: full 85.42 ± 0.12 in 104 s; cut:12 at 1 to 5% of
the steps 85.16 ± 0.33 in 29 to 31 s; cut:0.05 (8 to 13 states) 85.09 ± 0.39 in 26 to 29 s; cut:0.1 (2 to 4) 84.78 ± 0.25 in 22 to 24 s; small:32, 12,
3, 1: 85.03 ± 0.88, 84.92 ± 0.94, 84.21 ± 1.19, 85.04 ± 0.15. The same seed twice differs by up to 0.4 points.

Recall, one layer of 128 channels, 1000 steps, seeds 3 to 5, from scratch with N=1, 2, 4, 8, 16: vocabulary 64: 41.9, 68.0, 90.4, 95.5, 98.0;
vocabulary 256: 14.7 ± 0.3, 42.8 ± 7.4, -, -, 87.5 ± 3.8, where cut:1 and cut:2 have 24.8 ± 0.8 and 49.1 ± 3.7 (100 and 111 s on a CPU; small 41
and 53 s; distilled with its teacher 326 and 346 s: 15.3 ± 0.8, 39.7 ± 3.8). With half the learning rate the one seed tried gains nothing.
Digits, 500 steps, N=16, cut:4, small:4: 73.7 ± 4.9, 74.3 ± 6.0, 76.2 ± 2.9.
"""

import argparse
import copy
import functools
import json
import lzma
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress_
from hf_compressm.backends import OneProcess
from hf_compressm.hankel.systems import double, lti_gramian
from hf_compressm.layers import find_layers
from hf_compressm.training.measuring import measure_batches

SHADES = 17  # of a pixel of the digits: the tokens after them are the classes
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 1)
# Learning rate, batch, training sequences, hidden size, layers, states.
DEFAULTS = {
    "recall": (1e-2, 64, 200_000, 64, 1, 16),  # with two layers, chance decides whether a run learns
    "text": (4e-3, 32, 200_000, 128, 4, 16),
    "digits": (3e-3, 64, 0, 64, 2, 16),
    "images": (2e-3, 128, 60_000, 128, 4, 128),
}

# Tasks --------------------------------------------------------------------------------------------------------------


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
    vocabulary: int
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

    return Task(rows(args.train_size, 1000 + seed), rows(2000, 999), args.vocabulary)


def text(args: argparse.Namespace, seed: int) -> Task:
    if args.text is None:
        raise SystemExit("text needs --text: a file, which may be compressed by xz.")
    data = (lzma.open if args.text.suffix == ".xz" else open)(args.text, "rb").read(256 * (args.train_size + 512))
    windows = torch.frombuffer(bytearray(data), dtype=torch.uint8)[: len(data) // 256 * 256].view(-1, 256).short()
    test, train = windows[:512], windows[512:]
    return Task(Rows(train, train), Rows(test, test), 256, perplexity=True)


def classified(sequences: Tensor, classes: Tensor, first: int) -> Rows:
    """Sequences [n, length] with their class as one more token, from `first` on, which alone is to be predicted."""
    input_ids = torch.cat([sequences.short(), classes.short()[:, None] + first], 1)
    labels = torch.full_like(input_ids, -100)
    labels[:, -1] = input_ids[:, -1]
    return Rows(input_ids, labels)


def digits(args: argparse.Namespace, seed: int) -> Task:
    from sklearn.datasets import load_digits

    pixels, classes = (torch.tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 4], order[len(order) // 4 :]
    return Task(*(classified(pixels[rows], classes[rows], SHADES) for rows in (train, test)), SHADES + 10)


def images(args: argparse.Namespace, seed: int) -> Task:
    if args.images is None:
        raise SystemExit("images needs --images: an .npz file with x_train, y_train, x_test and y_test.")
    data = np.load(args.images)

    def rows(split: str, count: int) -> Rows:
        pixels, classes = (torch.from_numpy(data[f"{part}_{split}"][:count]) for part in "xy")
        return classified(pixels.flatten(1), classes.flatten(), 256)

    return Task(rows("train", args.train_size), rows("test", args.test_size), 272)


TASKS: dict[str, Callable[[argparse.Namespace, int], Task]] = {
    "recall": recall,
    "text": text,
    "digits": digits,
    "images": images,
}

# Models -------------------------------------------------------------------------------------------------------------


def build(args: argparse.Namespace, task: Task, sizes: Sequence[int]) -> nn.Module:
    """A fresh model with so many states in each layer."""
    if len(set(sizes)) == 1:
        return build_uniform(args, task, sizes[0])
    model = build_uniform(args, task, args.state_size)
    for number, size in enumerate(sizes):
        mixer = find_layers(build_uniform(args, task, size))[number].mixer
        owner, _, name = find_layers(model)[number].name.rpartition(".")
        setattr(model.get_submodule(owner), name, mixer)
    return model


def build_uniform(args: argparse.Namespace, task: Task, size: int) -> nn.Module:
    shape = {"vocab_size": task.vocabulary, "hidden_size": args.hidden, "num_hidden_layers": args.layers}
    if args.model == "mamba":
        return MambaForCausalLM(MambaConfig(**shape, state_size=size))
    if args.model == "mamba2":
        heads = {"head_dim": 32, "num_heads": args.hidden // 16, "n_groups": 1, "chunk_size": 64}
        return Mamba2ForCausalLM(Mamba2Config(**shape, **heads, state_size=size))
    if args.task in ("recall", "text"):
        raise SystemExit(f"lru predicts one class of a sequence, and {args.task} asks for more: take mamba or mamba2.")
    from lru_model import LRUClassifier

    return LRUClassifier(task.vocabulary, args.hidden, args.layers, size)


def scan_mamba_by_triton() -> None:
    """Where there is a GPU and no mamba_ssm, whose place a loop over the tokens takes."""
    from transformers.models.mamba import modeling_mamba

    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # noqa: F401
    except ImportError:
        from train_reference_models import CHUNK, Scan
    else:
        return

    def selective_scan(
        u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
        delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False, **_: Any,
    ) -> Tensor:  # fmt: skip
        if return_last_state:
            raise NotImplementedError("Training needs no last state.")
        length, N = u.shape[-1], A.shape[1]
        delta = dt.float() if delta_bias is None else dt.float() + delta_bias.float()[:, None]
        delta = F.softplus(delta) if delta_softplus else delta
        # The kernel takes whole chunks and powers of two: steps of 0, and states that are neither written nor read.
        to_chunks, to_power = (0, -length % CHUNK), (0, 2 ** math.ceil(math.log2(N)) - N)
        inputs = [F.pad(x.float(), to_chunks).mT for x in (u, delta, B, C)]
        B, C = (F.pad(x, to_power) for x in inputs[2:])
        Scan.BLOCK = 16 if A.shape[1] <= 32 else 8
        y = Scan.apply(inputs[0], inputs[1], F.pad(A.float(), to_power), B, C).mT[..., :length].to(u.dtype)
        y = y if D is None else y + u * D.to(u.dtype)[:, None]
        return y if z is None else y * F.silu(z)

    modeling_mamba.mamba_selective_scan = selective_scan


def tune_little() -> None:
    """Two configurations of each of mamba_ssm's Triton kernels for Mamba-2 are tried: all would take minutes for each N."""
    try:
        import mamba_ssm.ops.triton.ssd_combined  # noqa: F401
        from triton.runtime import Autotuner
    except ImportError:
        return
    for name in [name for name in sys.modules if name.startswith("mamba_ssm.ops.triton")]:
        for kernel in vars(sys.modules[name]).values():
            if isinstance(kernel, Autotuner):
                kernel.configs = kernel.configs[1:3] or kernel.configs


def asked_logits(output: Any, labels: Tensor) -> Tensor:
    """Of the positions that a label follows, [asked, classes]."""
    return output.logits if output.logits.dim() == 2 else output.logits[:, :-1][labels[:, 1:] != -100]


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, device: torch.device) -> float:
    """Perplexity, or the share of the labels that the model ranks first, in percent."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for rows in torch.arange(len(task.test)).split(200):
        batch = {name: ids.to(device) for name, ids in task.test.__getitems__(rows.tolist()).items()}
        output = model(**batch)
        labels = batch["labels"][:, 1:]
        labels = labels[labels != -100]
        right += int((asked_logits(output, batch["labels"]).argmax(-1) == labels).sum())
        loss += float(output.loss) * len(labels)
        count += len(labels)
    return math.exp(loss / count) if task.perplexity else 100 * right / count


# Training -----------------------------------------------------------------------------------------------------------


class Clock(TrainerCallback):
    def on_train_begin(self, *_: object, **__: object) -> None:
        self.times = [time.perf_counter()]

    def on_step_end(self, *_: object, **__: object) -> None:
        self.times.append(time.perf_counter())

    def milliseconds(self, first: int, last: int) -> float:
        """Median of a step, between two steps."""
        steps = np.diff(self.times[first : last + 1])
        return 1000 * float(np.median(steps)) if len(steps) else math.nan


class Settling(TrainerCallback):
    """What each state contributes to its layer's output, at some shares of the steps."""

    def __init__(self, task: Task, steps: int) -> None:
        self.batch = task.train.__getitems__(list(range(min(32, len(task.train)))))
        self.steps = {round(share * steps): share for share in SHARES}
        self.contributions: dict[float, list[Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: object) -> None:
        if state.global_step in self.steps:
            batch = {name: ids.to(args.device) for name, ids in self.batch.items()}
            config = CompreSSMConfig(tolerance=0)
            measurement = measure_batches(model, [((), batch)], config, OneProcess())
            found = [group.contribution.diagonal().cpu() for entry in measurement.statistics for group in entry.groups]
            self.contributions[self.steps[state.global_step]] = found

    def correlations(self) -> dict[str, float]:
        """Spearman's, of the ranking at each share with that at the end, mean of the layers."""
        from scipy.stats import spearmanr

        end = self.contributions[1]
        return {
            str(share): float(np.mean([spearmanr(a, b).statistic for a, b in zip(found, end, strict=True)]))
            for share, found in self.contributions.items()
            if share < 1
        }


class DistillingTrainer(Trainer):
    """Half of the loss is that of the labels, half is T^2 KL(teacher || student) at temperature T."""

    def __init__(self, *args: object, teacher: nn.Module, temperature: float, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.temperature = teacher.eval(), temperature

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **_: object) -> Tensor:
        output = model(**inputs)
        with torch.no_grad():
            target = self.teacher(**inputs)
        student, teacher = (
            F.log_softmax(asked_logits(found, inputs["labels"]).float() / self.temperature, -1)
            for found in (output, target)
        )
        distance = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return (output.loss + self.temperature**2 * distance) / 2


class NuclearTrainer(Trainer):
    """The loss, and `weight` times the sum of all Hankel singular values; only at each `every`th step, as much more."""

    def __init__(self, *args: object, weight: float, every: int, squares: Callable, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.weight, self.every, self.squares = weight, every, squares

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **_: object) -> Tensor:
        loss = model(**inputs).loss
        if self.state.global_step % self.every == 0:
            norms = [hankel_nuclear_norm(*layer.mixer.lti_system(), self.squares) for layer in find_layers(model)]
            loss = loss + self.every * self.weight * torch.stack(norms).sum().float()
        return loss


def hankel_nuclear_norm(a: Tensor, B: Tensor, C: Tensor, squares: Callable[..., Tensor]) -> Tensor:
    """The sum of the Hankel singular values, whose squares are the eigenvalues of the Gramians' product P Q."""
    found = squares(*(double(x) for x in (a, B, C)))
    return found.clamp_min(1e-14 * float(found.detach().max())).sqrt().sum()


def squares_by_cholesky(a: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Of the Hermitian L^H Q L with P = L L^H; the Gramians of a diagonal system in closed form."""
    P, Q = lti_gramian(a, B @ B.mH), lti_gramian(a.conj(), C.mH @ C)
    ridge = 1e-10 * P.diagonal().real.mean().detach() * torch.eye(len(a), device=a.device)
    L = torch.linalg.cholesky(P + ridge)
    return torch.linalg.eigvalsh(L.mH @ Q @ L)


def squares_by_product(a: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Of P Q itself, which is not symmetric: as github.com/forgi86/lru-reduction and Algopaul/hankelreg have it."""
    return torch.linalg.eigvals(lti_gramian(a, B @ B.mH) @ lti_gramian(a.conj(), C.mH @ C)).real


def squares_by_lyapunov(a: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Of P Q, where P = A P A^H + B B^H is solved as for any A: by doubling, P <- P + A P A^H and A <- A A."""
    A, P, Q = a.diag(), B @ B.mH, C.mH @ C
    for _ in range(20):  # a million steps
        P, Q, A = P + A @ P @ A.mH, Q + A.mH @ Q @ A, A @ A
    return torch.linalg.eigvals(P @ Q).real


HANKEL: dict[str, Callable[..., Tensor]] = {
    "cholesky": squares_by_cholesky,
    "product": squares_by_product,
    "lyapunov": squares_by_lyapunov,
}


def time_hankel(args: argparse.Namespace) -> None:
    """Milliseconds of the sum over all layers with its gradient, in each way, and of balancing all layers for one cut."""
    from lru_model import LRU

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mixers = nn.ModuleList(LRU(args.hidden, args.state_size) for _ in range(args.layers)).to(device)

    def gradient(squares: Callable[..., Tensor]) -> float:
        loss = torch.stack([hankel_nuclear_norm(*mixer.lti_system(), squares) for mixer in mixers]).sum()
        loss.backward()
        return loss.item()

    def cut() -> float:
        slim = copy.deepcopy(mixers)
        compress_(slim, CompreSSMConfig(tolerance=0.15))
        return sum(layer.state_size for layer in find_layers(slim))

    ways = {name: functools.partial(gradient, squares) for name, squares in HANKEL.items()} | {"a cut": cut}
    print(f"| {args.layers} layers of {args.state_size} states | sum, or states left | ms |\n|---|---|---|")
    for name, way in ways.items():
        times = []
        while len(times) < 4 and (not times or sum(times) < 15):
            begin = time.perf_counter()
            value = way()
            times.append(time.perf_counter() - begin)
        print(f"| {name} | {value:.2f} | {1000 * min(times):.1f} |", flush=True)


@dataclass(frozen=True)
class Method:
    """`kind`, with a number of its own or without, and `:sizes` or without: a number of states or a cut's tolerance."""

    kind: str
    number: float | None
    sizes: float | None

    @classmethod
    def of(cls, written: str) -> "Method":
        name, _, sizes = written.partition(":")
        kind = re.match("[a-z]*?(?=[0-9.]|$)", name)[0]
        number = name.removeprefix(kind)
        return cls(kind, float(number) if number else None, float(sizes) if sizes else None)

    def __str__(self) -> str:
        name = self.kind if self.number is None else f"{self.kind}{self.number:g}"
        return name if self.sizes is None else f"{name}:{self.sizes:g}"


@dataclass
class Trained:
    model: nn.Module
    trainer: Trainer
    clock: Clock
    steps: int
    seconds: float
    settling: Settling | None = None


class Bench:
    """Trains by one method after the other; cut sizes and teachers are those of the same seed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rows: list[dict] = []
        self.kept: dict[tuple, Trained] = {}  # of the present seed

    def known(self) -> list[dict]:
        """The rows of this process, and those of others."""
        if self.args.results is None or not self.args.results.exists():
            return self.rows
        return self.rows + [json.loads(line) for line in self.args.results.read_text().splitlines()]

    def sizes(self, seed: int, wanted: float | None) -> list[int]:
        """Of a cut's tolerance, or one for all layers."""
        if wanted is None or wanted >= 1:
            return [int(wanted or self.args.state_size)] * self.args.layers
        mine = {"task": self.args.task, "architecture": self.args.model, "seed": seed, "method": f"cut:{wanted:g}"}
        for row in self.known():
            if all(row[key] == value for key, value in mine.items()):
                return row["sizes"]
        raise SystemExit(f"No {mine['method']} of seed {seed} is known: make it first, or name its --results.")

    def large(self, task: Task, seed: int, share: float = 1.0, nuclear: float | None = None) -> Trained:
        """The full model, trained for a share of the steps; once for each seed."""
        key = (seed, share, nuclear)
        if key not in self.kept:
            self.kept = {known: one for known, one in self.kept.items() if known[0] == seed}
            args, trainer_class = self.args, Trainer
            if nuclear is not None:
                options = {"weight": nuclear, "every": args.every, "squares": HANKEL[args.hankel]}
                trainer_class = functools.partial(NuclearTrainer, **options)
            settle = args.settling and share == 1 and nuclear is None
            self.kept[key] = self.train(task, seed, args.state_size, trainer_class, share=share, settle=settle)
        return self.kept[key]

    def train(
        self,
        task: Task,
        seed: int,
        sizes: int | list[int],
        trainer_class: Callable[..., Trainer] = Trainer,
        callbacks: Sequence[TrainerCallback] = (),
        share: float = 1.0,
        settle: bool = False,
    ) -> Trained:
        args, steps = self.args, round(self.args.steps * share)
        set_seed(seed)
        model = build(args, task, [sizes] * args.layers if isinstance(sizes, int) else sizes)
        clock, settling = Clock(), Settling(task, steps) if settle else None
        begin = time.perf_counter()
        watchers = [*callbacks, clock, *([settling] if settling else [])]
        trainer = train(args, task, model, trainer_class, watchers, steps, seed)
        return Trained(model, trainer, clock, steps, time.perf_counter() - begin, settling)

    def made(self, task: Task, method: Method, seed: int, window: tuple[float, float, int]) -> tuple[Trained, float]:
        """A model of a method, and the seconds that its teacher took."""
        args, kind = self.args, method.kind
        if kind == "full":
            return self.large(task, seed), 0.0
        if kind in ("after", "nuclear"):
            large = self.large(task, seed, nuclear=method.number if kind == "nuclear" else None)
            model = copy.deepcopy(large.model)
            compress_(model, CompreSSMConfig(state_size=dict(enumerate(self.sizes(seed, method.sizes)))))
            return replace(large, model=model), 0.0
        if kind in ("cut", "at"):
            assert method.sizes is not None
            target = {"tolerance": method.sizes} if method.sizes < 1 else {"state_size": int(method.sizes)}
            start, end, number = window
            schedule = {"start": start, "end": end, "num_reductions": number, "calibration_batches": args.calibration}
            return self.train(
                task, seed, args.state_size, callbacks=[CompreSSMCallback(CompreSSMConfig(**target, **schedule))]
            ), 0.0
        sizes = self.sizes(seed, method.sizes)
        if kind in ("distilled", "shared"):
            share = 1.0 if kind == "distilled" else 0.5
            teacher = self.large(task, seed, share)
            options = {"teacher": teacher.model, "temperature": args.temperature}
            student = self.train(task, seed, sizes, functools.partial(DistillingTrainer, **options), share=share)
            return student, teacher.seconds
        if kind in ("small", "long"):
            return self.train(task, seed, sizes, share=method.number or 1.0), 0.0
        raise SystemExit(f"No method is called {kind}.")

    def run(self, task: Task, method: Method, seed: int) -> dict:
        """Train one model; its states, metric, the length of a step, and seconds: of the whole training, and of the cuts in it."""
        args, kind = self.args, method.kind
        window = (0, method.number, 1) if kind == "at" else (args.start, args.end, args.reductions)
        made, teaching = self.made(task, method, seed, window)
        logs = made.trainer.state.log_history
        cuts = [log["compressm/cut_seconds"] for log in logs if "compressm/cut_seconds" in log]
        cut_until = round(window[1] * made.steps) + 3 if kind in ("cut", "at") else 3
        row = {
            "task": args.task,
            "architecture": args.model,
            "seed": seed,
            "method": str(method),
            "sizes": [layer.state_size for layer in find_layers(made.model)],
            "metric": evaluate(made.model, task, made.trainer.args.device) if not args.timing else math.nan,
            "steps": made.steps,
            "step": made.clock.milliseconds(cut_until, made.steps),
            "seconds": made.seconds,
            "teaching": teaching,
            "cutting": sum(cuts),
        }
        if kind == "full" and made.settling is not None:
            row["settling"] = made.settling.correlations()
        self.rows.append(row)
        if args.results is not None:
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
        cells = [args.task, args.model, f"seed {seed}", row["method"], str(row["sizes"]), f"{row['metric']:.2f}"]
        cells += [f"{row['step']:.1f}", f"{made.seconds:.1f}", f"{sum(cuts):.1f}", str(row.get("settling", ""))]
        print(f"| {' | '.join(cells)} |", flush=True)
        return row


def train(
    args: argparse.Namespace,
    task: Task,
    model: nn.Module,
    trainer_class: Callable[..., Trainer],
    callbacks: Sequence[TrainerCallback],
    steps: int,
    seed: int,
) -> Trainer:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            weight_decay=args.weight_decay,
            per_device_train_batch_size=args.batch,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=int(args.warmup * steps),
            optim="adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
            seed=seed,
            data_seed=seed,
            bf16=args.bf16,
            tf32=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            dataloader_num_workers=0,
            remove_unused_columns=False,
            logging_steps=10**9,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = trainer_class(
            model, arguments, data_collator=lambda batch: batch, train_dataset=task.train, callbacks=list(callbacks)
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def summary(rows: Sequence[dict]) -> None:
    """One line for each task, model and method: means over the seeds."""
    header = ["task", "model", "method", "states", "accuracy (%), text: perplexity", "ms a step", "seconds", "cutting"]
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["architecture"], row["method"]), []).append(row)
    for key, group in groups.items():
        means = [statistics.mean(row["sizes"]) for row in group]
        states = f"{min(means):.3g}" if max(means) == min(means) else f"{min(means):.3g} to {max(means):.3g}"
        cells = [*key, states, spread([row["metric"] for row in group])]
        cells += [f"{statistics.mean(row[name] for row in group):.1f}" for name in ("step", "seconds", "cutting")]
        print(f"| {' | '.join(cells)} |", flush=True)
    settled = [(row["architecture"], row["settling"]) for row in rows if "settling" in row]
    for model in dict.fromkeys(model for model, _ in settled):
        found = [correlations for name, correlations in settled if name == model]
        line = [f"{share}: {spread([one[share] for one in found])}" for share in found[0]]
        print(f"\nRank correlation with the end, {model}: {', '.join(line)}")


def figure(rows: Sequence[dict], file: Path) -> None:
    """By family: when the ranking of the states is that of the end, and what one cut at that time costs in the end."""
    from matplotlib import pyplot

    _, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for number, model in enumerate(dict.fromkeys(row["architecture"] for row in rows if "settling" in row)):
        mine = [row for row in rows if row["architecture"] == model and not math.isnan(row["metric"])]
        color, task = f"C{number}", next(row["task"] for row in mine if "settling" in row)
        settled = [row["settling"] for row in mine if "settling" in row]
        shares = [share for share in SHARES if share < 1]
        draw(left, shares, [[one[str(share)] for one in settled] for share in shares], model, color)
        full = {row["seed"]: row["metric"] for row in mine if row["method"] == "full" and row["task"] == task}
        costs: dict[float, list[float]] = {}
        for row in mine:
            method = Method.of(row["method"])
            if method.kind == "at" and row["task"] == task and row["seed"] in full:
                before = full[row["seed"]]
                lost = 100 * (row["metric"] / before - 1) if task == "text" else before - row["metric"]
                costs.setdefault(method.number, []).append(lost)
        states = next(row["sizes"][0] for row in mine if "settling" in row)
        small = next(Method.of(row["method"]).sizes for row in mine if row["method"].startswith("at"))
        what = "perplexity, %" if task == "text" else "accuracy, points"
        draw(
            right,
            sorted(costs),
            [costs[share] for share in sorted(costs)],
            f"{model}, {states} to {small:g} ({what})",
            color,
        )
    left.set(title="Ranking of the states", ylabel="rank correlation with the end", ylim=(-0.1, 1.05))
    right.set(title="One cut at that time", ylabel="lost at the end, against the full model")
    right.set_ylim(min(0, right.get_ylim()[0]), 1.4 * right.get_ylim()[1])  # room for the legend
    for axes in (left, right):
        axes.set(xscale="log", xlabel="share of the run")
        axes.set_xticks([share for share in SHARES if share < 1], [f"{share:.0%}" for share in SHARES if share < 1])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    pyplot.savefig(file, dpi=120)


def draw(axes: Any, x: Sequence[float], values: Sequence[Sequence[float]], label: str, color: str) -> None:
    """Means, with deviations where there are several seeds."""
    deviations = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
    axes.errorbar(
        x, [statistics.mean(each) for each in values], deviations, label=label, color=color, marker="o", capsize=3
    )


def spread(values: Sequence[float]) -> str:
    if any(map(math.isnan, values)):
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f} ({len(values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*TASKS, "hankel", "table", "figure"])
    parser.add_argument("files", type=Path, nargs="*", help="table, figure: what --results wrote")
    parser.add_argument("--output", type=Path, default=Path("settling.png"), help="of figure")
    parser.add_argument("--model", choices=["lru", "mamba", "mamba2"], default="mamba")
    parser.add_argument("--methods", default="full,cut:4,small:4")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--results", type=Path, help="append a line of JSON for each run to this file")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--timing", action="store_true", help="no evaluation")
    parser.add_argument("--settling", action="store_true")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no run begins")
    parser.add_argument("--state-size", type=int)
    parser.add_argument("--temperature", type=float, default=1.0, help="of distillation")
    parser.add_argument("--hankel", choices=list(HANKEL), default="cholesky", help="how nuclear computes")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--calibration", type=int, default=4, help="batches")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--start", type=float, default=0.1, help="of the cuts, as a share of the steps")
    parser.add_argument("--end", type=float, default=0.4)
    parser.add_argument("--reductions", type=int, default=4)
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--train-size", type=int, help="sequences (recall), windows of 256 bytes at most (text)")
    parser.add_argument("--test-size", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=256, help="recall: half of it keys, half of it values")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--images", type=Path)
    args = parser.parse_args()
    if args.task in ("table", "figure"):
        rows = [json.loads(line) for file in args.files for line in file.read_text().splitlines()]
        summary(rows) if args.task == "table" else figure(rows, args.output)
        return
    if args.task == "hankel":
        args.hidden, args.layers, args.state_size = args.hidden or 128, args.layers or 4, args.state_size or 256
        time_hankel(args)
        return
    names = ("learning_rate", "batch", "train_size", "hidden", "layers", "state_size")
    for name, default in zip(names, DEFAULTS[args.task], strict=True):
        setattr(args, name, getattr(args, name) or default)
    logging.set_verbosity_error()
    if torch.cuda.is_available() and args.model == "mamba":
        scan_mamba_by_triton()
    if args.model == "mamba2":
        tune_little()

    began = time.perf_counter()
    print(f"{args.task}, {args.steps} steps, {'cuda' if torch.cuda.is_available() else 'cpu'}\n")
    header = ["task", "model", "seed", "method", "states", "metric", "ms a step", "seconds", "cutting", "settling"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    bench = Bench(args)
    for seed in map(int, args.seeds.split(",")):
        task = TASKS[args.task](args, seed)
        for method in map(Method.of, args.methods.split(",")):
            if time.perf_counter() - began < args.budget:
                bench.run(task, method, seed)
    summary(bench.rows)


if __name__ == "__main__":
    main()
