"""What healing gains: perplexity and recall on held-out text after a cut, and after a distillation from the full model.

`python tests/gpu/healing.py FOLDER... --prose FILE`, on models of `train_reference_models.py`. Healed on Python source of the
packages of the Python that runs this, but for those of the evaluation, and on the prose of a file, evaluated on the code and
prose that the package ships. A row of a markdown table for each cut and each number of tokens: states of a layer, on average;
change of the perplexity; change of that of the tokens whose bigram occurred earlier in the window; divergence from the full
model's predictions on that text, in nats per token; seconds to heal. `--steps` prints for each of its cuts what it comes to at
once and by way of twice the states, healed on the same tokens in all. Mamba's scan is the Triton kernel of
`train_reference_models.py` where its own kernels are not installed.
"""

import argparse
import copy
import functools
import itertools
import os
import sysconfig
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from reference_corpus import HELD_OUT, SKIPPED, digest, is_written_by_hand
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.mamba import modeling_mamba
from transformers.utils import logging

from hf_compressm import CompreSSMConfig, Measurement, compress_, compress_pretrained, measure
from hf_compressm.backends import OneProcess
from hf_compressm.cutting.divergence import Divergence
from hf_compressm.cutting.trials import mixers_for_a_while
from hf_compressm.data.evaluation import evaluate, evaluating
from hf_compressm.data.healing import HealingText
from hf_compressm.data.texts import EVALUATION, LENGTH, windows
from hf_compressm.healing import cut_and_heal_, heal, rate
from hf_compressm.healing.callbacks import KeepBest
from hf_compressm.healing.full import FullModel
from hf_compressm.healing.trainer import HealingTrainer

CUTS: dict[str, dict[str, dict[str, Any]]] = {
    "mamba": {
        "budget 0.01": {"max_divergence": 0.01},
        "all 8": {"state_size": 8},
        "all 4": {"state_size": 4},
    },
    "mamba2": {
        "budget 0.01": {"max_divergence": 0.01},
        **{f"one size 1/{n}": {"state_size": 1 / n, "realization": "project"} for n in (2, 4, 8, 16)},
        **{f"by layer 1/{n}": {"ratio": 1 / n, "realization": "project"} for n in (2, 4, 8)},
        **{f"by head 1/{n}": {"ratio": 1 / n, "realization": "project_heads"} for n in (2, 4, 8, 16)},
        **{f"select 1/{n}": {"ratio": 1 / n, "realization": "select"} for n in (2, 4)},
        **{f"select one size 1/{n}": {"state_size": 1 / n, "realization": "select"} for n in (2, 4)},
    },
}
"""By `model_type`, the names of cuts, and what they are; a `state_size` below 1 is a share of the model's."""


STEPS: dict[str, tuple[str, float]] = {
    "project 1/8": ("project", 1 / 8),
    "project_heads 1/16": ("project_heads", 1 / 16),
    "select 1/4": ("select", 1 / 4),
}
"""The names of cuts, how they are made, and the share of the states that is left."""


def source_code(characters: int) -> list[str]:
    """Python files, none of the held-out modules, in an order that depends on their names alone."""
    found, seen = [], set()
    for root in (Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).parts
            package = parts[0].removesuffix(".py")
            skipped = {package} & SKIPPED or package in HELD_OUT or {"site-packages", "_vendor"} & set(parts)
            if not skipped and not any(f"test_{name}" in path.name for name in HELD_OUT):
                found.append((digest("/".join(parts)), path))
    texts: list[str] = []
    for _, path in sorted(found):
        if characters <= 0:
            break
        text = path.read_text(encoding="utf-8", errors="replace")
        if digest(text) not in seen and is_written_by_hand(text):
            seen.add(digest(text))
            texts.append(text[:30_000])
            characters -= len(texts[-1])
    return texts


def tokens_of(texts: list[str], tokenizer: Any) -> Tensor:
    """Windows [n, 512] of texts, one after another."""
    end = tokenizer.eos_token_id
    ids = [i for encoding in tokenizer(texts, verbose=False)["input_ids"] for i in (*encoding, end)]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def read_corpus(args: argparse.Namespace, most: int, tokenizer: Any) -> Tensor:
    """So many tokens of code and prose to heal on, from the file that they were kept in if there is one."""
    if args.corpus is not None and args.corpus.exists():
        return torch.load(args.corpus)
    corpus = tokens_of(source_code(4 * most if args.prose is None else int(2.4 * most)), tokenizer)
    if args.prose is not None:
        prose = tokens_of([args.prose.read_text(encoding="utf-8")], tokenizer)[: int(0.4 * most) // LENGTH]
        corpus = torch.cat([corpus, prose])
    if args.corpus is not None:
        torch.save(corpus, args.corpus)
    return corpus


def print_curve() -> None:
    """The learning rate, and each evaluation as it comes."""
    measured = rate.learning_rate

    def learning_rate(*args: Any) -> float:
        found = measured(*args)
        print(f"rate {found:.2g}:", end=" ")
        return found

    heal.learning_rate = learning_rate
    stock = KeepBest.on_evaluate

    def on_evaluate(self: Any, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        stock(self, args, state, control, metrics)
        print(f"{metrics['eval_divergence']:.4f}", end=" ", flush=True)

    KeepBest.on_evaluate = on_evaluate


def compare_hidden_states(weight: float) -> None:
    """Add to the loss so many times the share of the hidden states' energy that differs, the mean over the layers."""
    stock = HealingTrainer.compute_loss

    def predictions(self: FullModel, batch: Any) -> Tensor:
        with torch.no_grad(), mixers_for_a_while(self.model, self.mixers), evaluating(self.model):
            output = self.model(**(batch | {"output_hidden_states": True}), use_cache=False)
        self.hidden = output.hidden_states
        return output.logits.float().log_softmax(-1)

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss, output = stock(self, model, inputs | {"output_hidden_states": True}, return_outputs=True)
        pairs = zip(output.hidden_states, self.full.hidden, strict=True)
        shares = [(one - other).square().sum() / other.square().sum() for one, other in pairs]
        return loss + weight * torch.stack(shares[1:]).mean()

    FullModel.__call__, HealingTrainer.compute_loss = predictions, compute_loss


def patch_scan() -> None:
    """Mamba's scan by Triton, forward and backward, where it would be a loop over tokens."""
    from train_reference_models import CHUNK, Scan

    stock = modeling_mamba.mamba_selective_scan

    def scan(u, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, **kwargs):
        if return_last_state or u.shape[2] % CHUNK:
            return stock(u, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, **kwargs)
        step = F.softplus(dt.float() + delta_bias[:, None]).mT
        more = (1 << (A.shape[1] - 1).bit_length()) - A.shape[1]
        A, B, C = F.pad(A, (0, more), value=-1.0), F.pad(B.mT, (0, more)), F.pad(C.mT, (0, more))
        y = Scan.apply(u.mT, step, A, B, C).mT + u * D[:, None]
        return y * F.silu(z)

    modeling_mamba.mamba_selective_scan = scan
    modeling_mamba.mamba_inner_fn = lambda *args, **kwargs: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+")
    parser.add_argument(
        "--prose", type=Path, help="a file of prose to heal on, beside the code; two fifths of the tokens"
    )
    parser.add_argument("--corpus", type=Path, help="a file to keep the tokens to heal on in")
    parser.add_argument("--tokens", type=float, nargs="+", default=[1e6, 4e6])
    parser.add_argument("--only", nargs="+", default=[""], help="cuts whose name begins with one of these")
    parser.add_argument("--refit", type=int, help="rounds of the fit, if not those of the default")
    parser.add_argument("--parameters", nargs="+", default=["cut"], help="cut, all")
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument(
        "--noise", type=float, nargs="+", default=[rate.NOISE], help="that the learning rate is chosen by"
    )
    parser.add_argument("--step", type=int, nargs="+", default=[heal.STEP_TOKENS], help="tokens of a step")
    parser.add_argument("--text", nargs="+", default=["corpus"], help="corpus, shipped, samples")
    parser.add_argument("--hidden", type=float, default=0.0, help="weight of the hidden states' error in the loss")
    parser.add_argument("--without-masters", action="store_true", help="let AdamW move bfloat16 weights themselves")
    parser.add_argument("--sequences", type=int, default=64, help="of 512 tokens, to evaluate on")
    parser.add_argument("--curve", action="store_true", help="print each evaluation of the healing")
    parser.add_argument(
        "--together", action="store_true", help="a quarter by layer, in all processes that torchrun started"
    )
    parser.add_argument("--steps", nargs="*", choices=list(STEPS), help="compare these cuts in one step and in two")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")
    if args.without_masters:
        heal.MasterAdamW = torch.optim.AdamW
    if args.hidden:
        compare_hidden_states(args.hidden)
    if args.curve:
        print_curve()
    if args.device == "cuda":
        patch_scan()
    begin = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(args.folder[0])
    corpus = read_corpus(args, int(max(args.tokens)), tokenizer)
    print(f"corpus of {corpus.numel():,} tokens after {time.perf_counter() - begin:.0f} s", flush=True)
    for folder in args.folder:
        if args.together:
            heal_together(folder, args, tokenizer, corpus)
        elif args.steps:
            cut_in_steps(folder, args, tokenizer, corpus)
        else:
            heal_every_cut(folder, args, tokenizer, corpus)


def cut_in_steps(folder: Path, args: argparse.Namespace, tokenizer: Any, corpus: Tensor) -> None:
    """Print what cuts come to at once and in two steps."""
    unseen = windows(EVALUATION.read_text(encoding="utf-8"), tokenizer, args.sequences, LENGTH)
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device).eval()
    base = evaluate(full, unseen)
    print("| cut | healed on | steps | states | perplexity | recall | s |\n|---|---|---|---|---|---|---|", flush=True)
    for name, tokens in itertools.product(args.steps, args.tokens):
        realization, share = STEPS[name]
        for shares in ([share], [2 * share, share]):
            model, begin, before = copy.deepcopy(full), time.perf_counter(), 1.0
            for after in shares:
                config = CompreSSMConfig(
                    ratio=after / before, realization=realization, heal=int(tokens / len(shares)), seed=len(shares)
                )
                report, before = compress_(model, config, corpus), after
            seconds, found = time.perf_counter() - begin, evaluate(model, unseen)
            states = sum(report.sizes.values()) / len(report.sizes)
            print(
                f"| {name} | {tokens / 1e6:g}M | {len(shares)} | {states:.1f} | {found.perplexity / base.perplexity - 1:+.2%} | "
                f"{found.recall / base.recall - 1:+.2%} | {seconds:.0f} |",
                flush=True,
            )


def heal_together(folder: Path, args: argparse.Namespace, tokenizer: Any, corpus: Tensor) -> None:
    """Print a row for each number of tokens: what all processes of torchrun come to, each with a GPU of its own."""
    rank, local = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    where = f"cuda:{local}" if args.device == "cuda" else args.device
    unseen = windows(EVALUATION.read_text(encoding="utf-8"), tokenizer, args.sequences, LENGTH)
    base = evaluate(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(where), unseen)
    for tokens in args.tokens:
        config = CompreSSMConfig(ratio=0.25, heal=int(tokens), calibration_seconds=1e9)
        begin = time.perf_counter()
        model = compress_pretrained(folder, config, calibration_data=corpus, device_map={"": where})
        row, found = model.compression_report.healing, evaluate(model, unseen)
        weights = sha256(b"".join(parameter.detach().cpu().numpy().tobytes() for parameter in model.parameters()))
        print(
            f"| process {rank} of {os.environ.get('WORLD_SIZE', '1')} on {where} | {row.tokens / 1e6:.2f}M | "
            f"{row.before:.4f} -> {row.after:.4f} | {found.perplexity / base.perplexity - 1:+.2%} | "
            f"{found.recall / base.recall - 1:+.2%} | {row.seconds:.1f} of {time.perf_counter() - begin:.1f} s | "
            f"{weights.hexdigest()[:8]} |",
            flush=True,
        )


def heal_every_cut(folder: Path, args: argparse.Namespace, tokenizer: Any, corpus: Tensor) -> None:
    """Print the table of one model."""
    unseen = windows(EVALUATION.read_text(encoding="utf-8"), tokenizer, args.sequences, LENGTH)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in unseen.split(16)]
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device).eval()
    base = evaluate(full, unseen)
    measured: dict[tuple[str, str], Measurement] = {}
    print(f"\n{folder.name}: N={full.config.state_size}, perplexity {base.perplexity:.3f}, recall {base.recall:.3f}")
    print("| model | cut | healed | states | perplexity | recall | divergence | held out | s |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    known = HealingText(corpus, full, tokenizer, 1).measured
    ways = [*itertools.product(args.tokens, args.parameters, args.noise, args.step, args.text)]
    for name, options in CUTS[full.config.model_type].items():
        if not any(name.startswith(part) for part in args.only):
            continue
        options = options | ({} if args.refit is None else {"refit": args.refit})
        weights = "fisher" if {"ratio", "max_divergence"} & options.keys() else "gate"
        if options.get("state_size", 1) < 1:
            options = options | {"state_size": int(options["state_size"] * full.config.state_size)}
        begin = time.perf_counter()
        key = weights, "select" if options.get("realization") == "select" else "auto"
        if key not in measured:
            measured[key] = measure(
                full, known, CompreSSMConfig(max_divergence=0.01, weights=key[0], realization=key[1])
            )
        plan = measured[key].plan(CompreSSMConfig(**options))
        seconds = time.perf_counter() - begin
        states = sum(plan.report.sizes.values()) / len(plan.report.sizes)
        for dtype in args.dtype:
            for way in [None, *ways]:
                model = copy.deepcopy(full).to(getattr(torch, dtype))
                reference, distance = evaluate(model, unseen), Divergence(model, batches)
                healed, held_out = f"no ({dtype})", ""
                if way is None:
                    plan.apply_(model)
                else:
                    tokens, what, rate.NOISE, heal.STEP_TOKENS, kind = way
                    config = CompreSSMConfig(**options, heal=int(tokens), heal_parameters=what)
                    data = corpus if kind == "corpus" else None
                    text = HealingText(data, model, None if kind == "samples" else tokenizer, config.heal)
                    cut = functools.partial(plan.apply_, model)
                    row = cut_and_heal_(model, plan, cut, text, measured[key].held_out, config, OneProcess()).healing
                    assert row is not None
                    seconds, held_out = row.seconds, f"{row.before:.4f} -> {row.after:.4f}"
                    healed = f"{row.tokens / 1e6:.1f}M, {what}, noise {rate.NOISE}, step {heal.STEP_TOKENS}, {kind}, {dtype}"
                found = evaluate(model, unseen)
                print(
                    f"| {folder.name} | {name} | {healed} | {states:.1f} | {found.perplexity / reference.perplexity - 1:+.2%} | "
                    f"{found.recall / reference.recall - 1:+.2%} | {distance():.4f} | {held_out} | {seconds:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
