"""Trains the reference models: two tiny ones that the package ships and three larger ones for benchmarks.

One H200, the tiny Mamba beside the others or on its own, 5 minutes (`train NAME --tokens FOLDER --out FOLDER --minutes 4.2`;
`tokenizer` makes the token folders first). Several at once share the GPU, which shortens each:

| model | parameters | N | tokens seen | valid perplexity | test perplexity | with a random half of the states silenced |
|---|---|---|---|---|---|---|
| mamba-tiny | 597,632 | 16 | 220M | 18.00 | | |
| mamba2-tiny | 603,360 | 64 | 128M | 18.78 | 18.55 | 20.2 / 19.8 / 19.8 |
| mamba-n16 | 7,358,592 | 16 | 74M | 34.65 | 34.07 | 36.0 / 38.6 / 40.2 |
| mamba-n64 | 8,022,144 | 64 | 37M | 35.09 | 34.16 | 38.1 / 38.1 / 40.1 |
| mamba2-n128 | 7,564,848 | 128 | 32M | 39.37 | 38.20 | 41.6 / 41.4 / 41.8 |

The configs are saved with `rescale_prenorm_residual=False`: with True, stock loading divides the trained out_proj by the
square root of the number of layers, each time.
"""

import argparse
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Mamba2Config,
    MambaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

EOT = "<|endoftext|>"
LENGTH = 512
UNTIMED_STEPS = 5  # Triton tunes its kernels in the first steps, for a minute or more


@dataclass(frozen=True)
class Recipe:
    """One reference model: its architecture and how it is trained."""

    config: type[MambaConfig] | type[Mamba2Config]
    vocab_size: int
    learning_rate: float
    epochs: int  # at most this many passes over the training text
    architecture: dict[str, int]


RECIPES = {
    "mamba-tiny": Recipe(MambaConfig, 1024, 4e-3, 60, {"hidden_size": 128, "num_hidden_layers": 4, "state_size": 16}),
    "mamba2-tiny": Recipe(
        Mamba2Config,
        1024,
        4e-3,
        60,
        {"hidden_size": 128, "num_hidden_layers": 4, "state_size": 64}
        | {"num_heads": 8, "head_dim": 32, "n_groups": 1, "chunk_size": 64},
    ),
    "mamba-n16": Recipe(MambaConfig, 4096, 2e-3, 8, {"hidden_size": 384, "num_hidden_layers": 6, "state_size": 16}),
    "mamba-n64": Recipe(MambaConfig, 4096, 2e-3, 8, {"hidden_size": 384, "num_hidden_layers": 6, "state_size": 64}),
    "mamba2-n128": Recipe(
        Mamba2Config,
        4096,
        2e-3,
        8,
        {"hidden_size": 384, "num_hidden_layers": 6, "state_size": 128}
        | {"num_heads": 24, "head_dim": 32, "n_groups": 1, "chunk_size": 128},
    ),
}


def read_documents(data: Path, split: str) -> list[str]:
    return (data / f"pd_text_{split}.txt").read_text(encoding="utf-8").split(f"\n{EOT}\n")


def train_tokenizer(data: Path, vocab_size: int, folder: Path) -> None:
    """Trains a byte-level BPE tokenizer and saves it, with each split as one stream of token ids, in `folder`."""
    if not (folder / "tokenizer.json").exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(read_documents(data, "train"), trainer)
        PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            bos_token=EOT,
            eos_token=EOT,
            pad_token=EOT,
            padding_side="left",
            model_input_names=["input_ids", "attention_mask"],
            clean_up_tokenization_spaces=False,
        ).save_pretrained(folder)
    bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = bpe.token_to_id(EOT)
    for split in ("train", "valid", "test"):
        encodings = bpe.encode_batch_fast(read_documents(data, split))
        stream = np.concatenate([np.array([*encoding.ids, end], dtype=np.uint16) for encoding in encodings])
        np.save(folder / f"{split}.npy", stream)
        print(f"{folder.name}: {split} has {len(stream):,} tokens", flush=True)


def read_tokens(folder: Path, split: str, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.load(folder / f"{split}.npy").astype(np.int32)).to(device)


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: torch.Tensor, batch_size: int = 32) -> float:
    """Perplexity over adjacent windows of LENGTH tokens, in the precision of the weights."""
    windows = tokens[: (len(tokens) - 1) // LENGTH * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)
    model.eval()
    total = 0.0
    for batch in windows.long().split(batch_size):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        total += F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (len(windows) * LENGTH))


def build_model(recipe: Recipe, end: int) -> PreTrainedModel:
    config = recipe.config(
        vocab_size=recipe.vocab_size,
        **recipe.architecture,
        expand=2,
        initializer_range=0.02,
        rescale_prenorm_residual=True,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def make_optimizer(model: PreTrainedModel, learning_rate: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only: neither norms and biases nor the dynamics (A_log, D, dt_bias)."""
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith("A_log")]
    kept = [p for name, p in model.named_parameters() if p.ndim <= 1 or name.endswith("A_log")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=next(model.parameters()).is_cuda)


def train(args: argparse.Namespace) -> None:
    """Trains until `--steps`, or the recipe's epochs, or `--minutes` is spent: the schedule follows the nearest."""
    deadline = time.monotonic() + 60 * args.minutes
    recipe, device = RECIPES[args.model], torch.device(args.device)
    tokens = read_tokens(args.tokens, "train", device)
    valid = read_tokens(args.tokens, "valid", device)
    tokenizer = AutoTokenizer.from_pretrained(args.tokens)
    torch.manual_seed(args.seed)
    model = build_model(recipe, tokenizer.eos_token_id).to(device)
    optimizer = make_optimizer(model, recipe.learning_rate)
    generator = torch.Generator().manual_seed(args.seed)
    windows_per_epoch = (len(tokens) - 1) // LENGTH - 1
    total = args.steps or recipe.epochs * windows_per_epoch // args.batch_size
    print(f"{args.model}: {model.num_parameters():,} parameters, at most {total:,} steps", flush=True)

    def windows() -> torch.Tensor:
        """One epoch in random order, shifted by a random offset: batches of LENGTH + 1 tokens."""
        offset = int(torch.randint(LENGTH, (1,), generator=generator))
        order = torch.randperm(windows_per_epoch, generator=generator).to(device)
        return tokens[offset:].unfold(0, LENGTH + 1, LENGTH)[: len(order)][order].split(args.batch_size)

    best, best_state, start, step, checks, running = math.inf, None, 0.0, 0, 0, []
    progress, batches = 0.0, iter(())
    while progress < 1.0:
        batch = next(batches, None)
        if batch is None or len(batch) < args.batch_size:
            batches = iter(windows())
            batch = next(batches)
        batch = batch.long()
        rate = min(1.0, (step + 1) / args.warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate
        model.train()
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running.append(loss.detach())
        step += 1
        if step == 1:
            print(f"{args.model}: first step done, loss {loss.item():.3f}, through {loss_path(logits)}", flush=True)
        if step == UNTIMED_STEPS:
            loss.item()
            start = time.monotonic()
        if step % 20 == 0:
            loss.item()  # keeps the queue of launches short, so that the clock tells the truth
        spent = (time.monotonic() - start) / max(deadline - start, 1e-9) if step > UNTIMED_STEPS else 0.0
        progress = min(1.0, max(step / total, spent))
        if progress * args.checks >= checks + 1 or progress >= 1.0:
            checks = int(progress * args.checks)
            mean, running = torch.stack(running).mean().item(), []
            now = perplexity(model, valid)
            seconds = time.monotonic() - start
            print(
                f"{args.model}: {progress:4.0%} step {step:,} {step * args.batch_size * LENGTH / 1e6:.1f}M tokens "
                f"{seconds:.0f} s {step / seconds:.2f} steps/s, train loss {mean:.3f}, valid perplexity {now:.2f}",
                flush=True,
            )
            if now < best:
                best, best_state = now, {name: p.detach().clone() for name, p in model.state_dict().items()}
    model.load_state_dict(best_state)
    save(model, tokenizer, args.out / args.model)
    print(f"{args.model}: saved, {step * args.batch_size * LENGTH:,} tokens seen", flush=True)
    evaluate_folder(args.out / args.model, args.tokens, device)


def loss_path(logits: torch.Tensor) -> str:
    """Names the autograd function that the scan went through: the fused kernels' one, or torch's own."""
    seen, stack = set(), [logits.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [parent for parent, _ in node.next_functions]
    names = {node.name() for node in seen}
    return next((name for name in names if "Mamba" in name), "the reference scan in torch")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves weights as float16; config.json asks for float32, so that `from_pretrained` computes in float32."""
    model.config.rescale_prenorm_residual = False  # stock loading would rescale the trained out_proj again
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    config = folder / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"dtype": "float16"', '"dtype": "float32"'), "utf-8")


@torch.no_grad()
def zero_half_of_states(model: PreTrainedModel, seed: int) -> None:
    """Silences a random half of the states of every layer, in place: their rows of B and C become zero."""
    generator = torch.Generator().manual_seed(seed)
    N = model.config.state_size
    for layer in model.backbone.layers:
        mixer = layer.mixer
        half = torch.randperm(N, generator=generator)[: N // 2]
        if hasattr(mixer, "x_proj"):  # Mamba: rows of x_proj are (dt, B, C)
            rows = torch.cat([mixer.time_step_rank + half, mixer.time_step_rank + N + half])
            mixer.x_proj.weight[rows] = 0
        else:  # Mamba-2: rows of in_proj are (z, x, B, C, dt), channels of the convolution (x, B, C)
            channels = torch.cat([mixer.intermediate_size + half, mixer.intermediate_size + N + half])
            mixer.in_proj.weight[mixer.intermediate_size + channels] = 0
            mixer.conv1d.weight[channels] = 0
            mixer.conv1d.bias[channels] = 0


def evaluate_folder(folder: Path, tokens_folder: Path, device: torch.device) -> None:
    """Prints one row of the table of results for the weights as saved."""
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    valid, test = (read_tokens(tokens_folder, split, device) for split in ("valid", "test"))
    row = [folder.name, f"{model.num_parameters():,}", f"{model.config.state_size}"]
    row += [f"{perplexity(model, valid):.2f}", f"{perplexity(model, test):.2f}"]
    weights, halved = copy.deepcopy(model.state_dict()), []
    for seed in range(3):
        model.load_state_dict(weights)
        zero_half_of_states(model, seed)
        halved.append(f"{perplexity(model, test):.1f}")
    print("RESULT | " + " | ".join([*row, " / ".join(halved)]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and evaluate the reference models.")
    commands = parser.add_subparsers(dest="command", required=True)
    tokenizer = commands.add_parser("tokenizer", help="train a tokenizer and tokenize the three splits")
    tokenizer.add_argument("--data", type=Path, required=True, help="folder of pd_text_{train,valid,test}.txt")
    tokenizer.add_argument("--vocab-size", type=int, required=True)
    tokenizer.add_argument("--tokens", type=Path, required=True, help="folder to write")
    training = commands.add_parser("train", help="train one model and save it")
    training.add_argument("model", choices=RECIPES)
    training.add_argument("--tokens", type=Path, required=True, help="folder that `tokenizer` wrote")
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--minutes", type=float, default=7.0, help="wall-clock budget, the first step included")
    training.add_argument("--steps", type=int, help="end after this many steps")
    training.add_argument("--batch-size", type=int, default=64)
    training.add_argument("--warmup", type=int, default=100, help="steps")
    training.add_argument("--checks", type=int, default=10, help="validations")
    training.add_argument("--seed", type=int, default=0)
    evaluation = commands.add_parser("evaluate", help="perplexity with all states, and with a random half silenced")
    evaluation.add_argument("folder", type=Path, nargs="+")
    evaluation.add_argument("--tokens", type=Path, required=True)
    for command in (training, evaluation):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.command == "tokenizer":
        train_tokenizer(args.data, args.vocab_size, args.tokens)
    elif args.command == "train":
        train(args)
    else:
        for folder in args.folder:
            evaluate_folder(folder, args.tokens, torch.device(args.device))


if __name__ == "__main__":
    main()
