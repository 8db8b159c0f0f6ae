"""Trains the reference models on Python source and English prose: the corpus that `reference_corpus.py` writes.

    python train_reference_models.py train MODEL --corpus CORPUS --out FOLDER      one model on one GPU
    python train_reference_models.py evaluate FOLDER... --corpus CORPUS            perplexities of the weights as saved

Two H100 with two models on each, mamba-n16 beside mamba2-small and mamba2-n128 beside mamba-small, for 9 minutes;
batches of 32 x 512 tokens; a corpus of 31M tokens of code and 10M of prose. Perplexities over windows of 512 tokens:

| model | parameters | N | tokens seen | valid code / prose | test code / prose |
|---|---|---|---|---|---|
| mamba-small | 3,676,928 | 16 | 316M | 9.53 / 27.27 | 8.96 / 26.99 |
| mamba2-small | 3,853,856 | 128 | 207M | 8.79 / 28.09 | 7.84 / 27.39 |
| mamba-n16 | 9,287,040 | 16 | 110M | 9.21 / 26.22 | 8.70 / 25.99 |
| mamba2-n128 | 7,564,848 | 128 | 259M | 8.01 / 24.59 | 7.18 / 24.12 |

The weights are stock ones, the forward pass is not: Mamba's scan is a Triton kernel, Mamba-2's a product of matrices,
and the rest goes through `torch.compile`. The configs are saved with `rescale_prenorm_residual=False`: with True,
stock loading divides the trained out_proj by the square root of the number of layers, each time.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Mamba2Config,
    MambaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

LENGTH = 512
VOCABULARY = 4096
CHUNK = 64  # of the scans
UNTIMED_STEPS = 5  # the first steps compile, for a minute or so


@dataclass(frozen=True)
class Recipe:
    """One reference model: its architecture and its peak learning rate."""

    config: type[MambaConfig] | type[Mamba2Config]
    learning_rate: float
    architecture: dict[str, int]


def mamba(learning_rate: float, hidden_size: int, layers: int, states: int) -> Recipe:
    shape = {"hidden_size": hidden_size, "num_hidden_layers": layers, "state_size": states}
    return Recipe(MambaConfig, learning_rate, shape)


def mamba2(learning_rate: float, hidden_size: int, layers: int, states: int) -> Recipe:
    heads = {"num_heads": hidden_size // 16, "head_dim": 32, "n_groups": 1, "chunk_size": 128}
    return Recipe(Mamba2Config, learning_rate, mamba(0, hidden_size, layers, states).architecture | heads)


RECIPES = {
    "mamba-small": mamba(3e-3, 256, 6, 16),
    "mamba2-small": mamba2(3e-3, 256, 6, 128),
    "mamba-n16": mamba(2.5e-3, 384, 8, 16),
    "mamba2-n128": mamba2(2.5e-3, 384, 6, 128),
}

# Forward pass -------------------------------------------------------------------------------------------------------


@triton.jit
def scan_forward(u, dt, A, B, C, y, starts, L, D, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """y[t] = C[t] h[t] with h[t] = exp(dt[t] A) h[t-1] + dt[t] u[t] B[t]; keeps the state before each chunk."""
    batch, n = tl.program_id(1), tl.arange(0, N)[None, :]
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    state = d[:, None] * N + n
    a = tl.load(A + state)
    h = tl.zeros((BLOCK, N), tl.float32)
    for chunk in range(L // CHUNK):
        first = batch * L + chunk * CHUNK
        tl.store(starts + first // CHUNK * D * N + state, h)
        for t in range(first, first + CHUNK):
            step = tl.load(dt + t * D + d)[:, None]
            x = tl.load(u + t * D + d).to(tl.float32)[:, None]
            h = tl.exp(step * a) * h + step * x * tl.load(B + t * N + n).to(tl.float32)
            tl.store(y + t * D + d, tl.sum(h * tl.load(C + t * N + n).to(tl.float32), 1))


@triton.jit
def scan_backward(
    u, dt, A, B, C, dy, starts, states, du, ddt, dA, dB, dC, L, D,
    N: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chunks in reverse: the states before each token are computed again, then the gradients go back."""
    block, batch, n = tl.program_id(0), tl.program_id(1), tl.arange(0, N)[None, :]
    d = block * BLOCK + tl.arange(0, BLOCK)
    state = d[:, None] * N + n
    a = tl.load(A + state)
    sum_dA = tl.zeros((BLOCK, N), tl.float32)
    g = tl.zeros((BLOCK, N), tl.float32)  # gradient of the state after token t
    mine = states + batch * CHUNK * D * N + state
    shared = block * tl.num_programs(1) * L * N + n  # dB and dC: one addend for each block of channels
    for chunk in range(L // CHUNK):
        first = (batch + 1) * L - (chunk + 1) * CHUNK
        h = tl.load(starts + first // CHUNK * D * N + state)
        tl.debug_barrier()
        for i in range(CHUNK):
            t = first + i
            tl.store(mine + i * D * N, h)
            step = tl.load(dt + t * D + d)[:, None]
            x = tl.load(u + t * D + d).to(tl.float32)[:, None]
            h = tl.exp(step * a) * h + step * x * tl.load(B + t * N + n).to(tl.float32)
        tl.debug_barrier()
        for i in range(CHUNK):
            t = first + CHUNK - 1 - i
            before = tl.load(mine + (CHUNK - 1 - i) * D * N)
            step = tl.load(dt + t * D + d)[:, None]
            x = tl.load(u + t * D + d).to(tl.float32)[:, None]
            b = tl.load(B + t * N + n).to(tl.float32)
            grad = tl.load(dy + t * D + d).to(tl.float32)[:, None]
            before *= tl.exp(step * a)
            tl.store(dC + shared + t * N, tl.sum((before + step * x * b) * grad, 0)[None, :])
            g += tl.load(C + t * N + n).to(tl.float32) * grad
            tl.store(dB + shared + t * N, tl.sum(g * step * x, 0)[None, :])
            gb = tl.sum(g * b, 1)
            decayed = g * before
            tl.store(du + t * D + d, gb * tl.sum(step, 1))
            tl.store(ddt + t * D + d, gb * tl.sum(x, 1) + tl.sum(decayed * a, 1))
            sum_dA += decayed * step
            g *= tl.exp(step * a)
    tl.store(dA + batch * D * N + state, sum_dA)


class Scan(torch.autograd.Function):
    """Mamba's selective scan: u and dt [b, L, D], A [D, N], B and C [b, L, N]; L a multiple of CHUNK."""

    BLOCK = 16

    @staticmethod
    def forward(ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        inputs = [tensor.contiguous() for tensor in (u, dt, A, B, C)]
        (b, L, D), N = u.shape, A.shape[1]
        y, starts = torch.empty_like(inputs[0]), A.new_empty(b, L // CHUNK, D, N)
        scan_forward[(D // Scan.BLOCK, b)](*inputs, y, starts, L, D, N, CHUNK, Scan.BLOCK, num_warps=max(1, N // 32))
        ctx.save_for_backward(*inputs, starts)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        *inputs, starts = ctx.saved_tensors
        u, dt, A, B, C = inputs
        (b, L, D), N, blocks = u.shape, A.shape[1], u.shape[2] // Scan.BLOCK
        du, ddt, dA = torch.empty_like(u), torch.empty_like(dt), A.new_empty(b, D, N)
        states = A.new_empty(b, CHUNK, D, N)
        dB, dC = A.new_empty(2, blocks, b, L, N)
        outputs = (starts, states, du, ddt, dA, dB, dC)
        grid = (blocks, b)
        scan_backward[grid](*inputs, dy.contiguous(), *outputs, L, D, N, CHUNK, Scan.BLOCK, num_warps=max(1, N // 32))
        return du, ddt, dA.sum(0), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The causal convolution of each channel, and SiLU: x [b, L, D], weight [D, 1, K]."""
    L, K = x.shape[1], weight.shape[2]
    padded = F.pad(x, (0, 0, K - 1, 0))
    return F.silu(bias + sum(weight[:, 0, k] * padded[:, k : k + L] for k in range(K))).to(x.dtype)


def mamba_inputs(x: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, ...]:
    u, z = F.linear(rms_norm(x, p["norm.weight"]), p["mixer.in_proj.weight"]).chunk(2, -1)
    u = convolve(u, p["mixer.conv1d.weight"], p["mixer.conv1d.bias"])
    N, rank = p["mixer.A_log"].shape[1], p["mixer.dt_proj.weight"].shape[1]
    dt, B, C = F.linear(u, p["mixer.x_proj.weight"]).split([rank, N, N], -1)
    dt = F.softplus(F.linear(dt, p["mixer.dt_proj.weight"]).float() + p["mixer.dt_proj.bias"])
    return u, z, dt, -torch.exp(p["mixer.A_log"]), B.contiguous(), C.contiguous()


def mamba_output(x: Tensor, y: Tensor, u: Tensor, z: Tensor, p: dict[str, Tensor]) -> Tensor:
    return x + F.linear((y + p["mixer.D"] * u) * F.silu(z), p["mixer.out_proj.weight"])


def mamba_block(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    u, z, dt, A, B, C = run(mamba_inputs)(x, p)
    return run(mamba_output)(x, Scan.apply(u, dt, A, B, C), u, z, p)


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Mamba-2's scan, one group: x [b, L, H, P], dt [b, L, H], A [H], B and C [b, L, N] -> [b, L, H, P]."""
    b, L, H, P = x.shape
    chunks = (b, L // CHUNK, CHUNK)
    B, C = B.reshape(*chunks, -1), C.reshape(*chunks, -1)
    x = (x * dt[..., None]).reshape(*chunks, H, P).permute(0, 1, 3, 2, 4)  # [b, c, H, l, P]
    decay = (dt * A).reshape(*chunks, H).transpose(2, 3).cumsum(-1)  # log, since the chunk's start [b, c, H, l]
    between = decay[..., :, None] - decay[..., None, :]
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).tril()
    scores = (C @ B.mT)[:, :, None] * torch.exp(between.masked_fill(~causal, -math.inf))
    within = scores @ x
    added = (x * torch.exp(decay[..., -1:] - decay)[..., None]).transpose(-1, -2).flatten(2, 3) @ B  # [b, c, H P, N]
    kept = torch.exp(decay[..., -1]).repeat_interleave(P, -1)[..., None]  # [b, c, H P, 1]
    states = [torch.zeros_like(added[:, 0], dtype=torch.float32)]
    for i in range(chunks[1] - 1):
        states.append(kept[:, i] * states[-1] + added[:, i])
    across = (C @ torch.stack(states, 1).mT).unflatten(-1, (H, P)).transpose(2, 3) * torch.exp(decay)[..., None]
    return (within + across).transpose(2, 3).reshape(b, L, H, P)


def mamba2_block(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    H, D = len(p["mixer.A_log"]), len(p["mixer.norm.weight"])
    N = (len(p["mixer.conv1d.bias"]) - D) // 2
    z, u, dt = F.linear(rms_norm(x, p["norm.weight"]), p["mixer.in_proj.weight"]).split([D, D + 2 * N, H], -1)
    u, B, C = convolve(u, p["mixer.conv1d.weight"], p["mixer.conv1d.bias"]).split([D, N, N], -1)
    u = u.unflatten(-1, (H, -1))
    dt = F.softplus(dt.float() + p["mixer.dt_bias"])
    y = (ssd(u, dt, -torch.exp(p["mixer.A_log"]), B, C) + p["mixer.D"][:, None] * u).flatten(-2)
    return x + F.linear(rms_norm(y * F.silu(z.float()), p["mixer.norm.weight"]), p["mixer.out_proj.weight"])


def head_loss(x: Tensor, norm: Tensor, embeddings: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(rms_norm(x, norm), embeddings)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@functools.cache
def run(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled where there is a GPU."""
    return torch.compile(function, dynamic=False) if torch.cuda.is_available() else function


def mean_loss(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Mean loss of the next token over windows [b, LENGTH + 1]: the stock model's, to rounding."""
    backbone, batch = model.backbone, batch.long()
    block = mamba_block if isinstance(model.config, MambaConfig) else run(mamba2_block)
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
        x = F.embedding(batch[:, :-1], backbone.embeddings.weight)
        for layer in backbone.layers:
            x = block(x, dict(layer.named_parameters()))
        return run(head_loss)(x, backbone.norm_f.weight, backbone.embeddings.weight, batch[:, 1:].contiguous())


# Training -----------------------------------------------------------------------------------------------------------


def read_tokens(corpus: Path, name: str, device: str) -> Tensor:
    return torch.from_numpy(np.load(corpus / f"{name}.npy").astype(np.int32)).to(device)


def perplexity(model: PreTrainedModel, tokens: Tensor, batch_size: int, most: int | None = None) -> float:
    """Perplexity over adjacent windows, in whole batches, at most so many of them, spread over the text."""
    batches = tokens.unfold(0, LENGTH + 1, LENGTH).split(batch_size)[:-1]
    batches = batches[:: max(1, len(batches) // (most or len(batches)))]
    # With gradients, as in training: without, everything would be compiled once more.
    return math.exp(torch.stack([mean_loss(model, batch).detach() for batch in batches]).mean().item())


def held_out(model: PreTrainedModel, corpus: Path, split: str, batch_size: int, most: int | None = None) -> str:
    device = str(model.device)
    return ", ".join(
        f"{kind} {perplexity(model, read_tokens(corpus, f'{split}_{kind}', device), batch_size, most):.2f}"
        for kind in ("code", "prose")
    )


def build_model(recipe: Recipe, end: int) -> PreTrainedModel:
    config = recipe.config(
        vocab_size=VOCABULARY,
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
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def train(args: argparse.Namespace) -> None:
    """Trains until `--minutes` are spent, or `--steps` done: the schedule follows the nearer."""
    deadline = time.monotonic() + 60 * args.minutes
    recipe = RECIPES[args.model]
    tokens = read_tokens(args.corpus, "train", args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.corpus)
    torch.manual_seed(args.seed)
    model = build_model(recipe, tokenizer.eos_token_id).to(args.device)
    optimizer = make_optimizer(model, recipe.learning_rate)
    generator = torch.Generator().manual_seed(args.seed)
    windows = (len(tokens) - 1) // LENGTH - 1
    print(f"{args.model}: {model.num_parameters():,} parameters", flush=True)

    start, step, checks, progress, running, batches = 0.0, 0, 0, 0.0, [], iter(())
    while progress < 1.0:
        batch = next(batches, None)
        if batch is None or len(batch) < args.batch_size:  # another pass, from a random offset, in random order
            offset = int(torch.randint(LENGTH, (1,), generator=generator))
            order = torch.randperm(windows, generator=generator).to(args.device)
            batches = iter(tokens[offset:].unfold(0, LENGTH + 1, LENGTH)[order].split(args.batch_size))
            batch = next(batches)
        rate = min(1.0, (step + 1) / args.warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate
        loss = mean_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running.append(loss.detach())
        step += 1
        if step == UNTIMED_STEPS:
            print(f"{args.model}: loss {loss.item():.3f} after {UNTIMED_STEPS} steps", flush=True)
            start = time.monotonic()
        if step % 20 == 0:
            loss.item()  # keeps the queue of launches short, so that the clock tells the truth
        spent = (time.monotonic() - start) / max(deadline - start, 1e-9) if step > UNTIMED_STEPS else 0.0
        progress = min(1.0, max(step / args.steps if args.steps else 0.0, spent))
        if progress * args.checks >= checks + 1 or progress >= 1.0:
            checks = int(progress * args.checks)
            mean, running = torch.stack(running).mean().item(), []
            seconds = time.monotonic() - start
            print(
                f"{args.model}: {progress:4.0%} step {step:,} {step * args.batch_size * LENGTH / 1e6:.1f}M tokens "
                f"{seconds:.0f} s {step / seconds:.2f} steps/s, train loss {mean:.3f}, "
                f"valid perplexity {held_out(model, args.corpus, 'valid', args.batch_size, 6)}",
                flush=True,
            )
    save(model, tokenizer, args.out / args.model)
    print(f"{args.model}: saved, {step * args.batch_size * LENGTH:,} tokens seen", flush=True)
    evaluate_folder(args.out / args.model, args)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves weights as float16; config.json asks for float32, so that `from_pretrained` computes in float32."""
    model.config.rescale_prenorm_residual = False  # stock loading would rescale the trained out_proj again
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    config = folder / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"dtype": "float16"', '"dtype": "float32"'), "utf-8")


def evaluate_folder(folder: Path, args: argparse.Namespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).to(args.device)
    figures = [f"{split}: {held_out(model, args.corpus, split, args.batch_size)}" for split in ("valid", "test")]
    print(f"RESULT {folder.name}: {model.num_parameters():,} parameters; perplexity {'; '.join(figures)}", flush=True)


def evaluate(args: argparse.Namespace) -> None:
    for folder in args.folder:
        evaluate_folder(folder, args)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and evaluate the reference models.")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train one model and save it")
    training.add_argument("model", choices=RECIPES)
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--minutes", type=float, default=8.0, help="wall-clock budget, compiling included")
    training.add_argument("--steps", type=int, help="end after this many steps")
    training.add_argument("--warmup", type=int, default=100, help="steps")
    training.add_argument("--checks", type=int, default=8, help="validations")
    training.add_argument("--seed", type=int, default=0)
    training.set_defaults(run=train)
    evaluation = commands.add_parser("evaluate", help="held-out perplexity, code and prose apart")
    evaluation.add_argument("folder", type=Path, nargs="+")
    evaluation.set_defaults(run=evaluate)
    for command in (training, evaluation):
        command.add_argument("--corpus", type=Path, required=True, help="folder that reference_corpus.py wrote")
        command.add_argument("--batch-size", type=int, default=32)
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
