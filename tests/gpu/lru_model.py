"""A classifier of sequences with LRU layers, for `sequences.py`; on a GPU its scan is a Triton kernel."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from tests.layers import lti_mixers

try:
    import triton
    import triton.language as tl
except ImportError:  # there is the convolution
    triton = None

BLOCK = 32

if triton is not None:

    @triton.jit
    def lru_scan(
        in_re, in_im, a_re, a_im, x_re, x_im, out_re, out_im, h_re, h_im, da_re, da_im, L, N, CHUNKS,
        BACK: tl.constexpr, ENDS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """out_t = a out_{t-1} + in_t in each chunk [L, N], from a state x before it; with ENDS only the last, from 0.

        BACK goes from the end, with conj(a), and sums out_t conj(h_{t-1}) up. A sequence is CHUNKS of them.
        """
        n, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
        keep, first = n < N, (row % CHUNKS) * L
        ar, ai = tl.load(a_re + n, keep, 0.0), tl.load(a_im + n, keep, 0.0)
        if BACK:
            ai = -ai
        xr, xi = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        if not ENDS:
            xr, xi = tl.load(x_re + row * N + n, keep, 0.0), tl.load(x_im + row * N + n, keep, 0.0)
        sr, si = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for i in range(L):
            t = L - 1 - i if BACK else i
            at = (row * L + t) * N + n
            ur, ui = tl.load(in_re + at, keep, 0.0), tl.load(in_im + at, keep, 0.0)
            real = ar * xr - ai * xi + ur
            xi = ar * xi + ai * xr + ui
            xr = real
            if not ENDS:
                tl.store(out_re + at, xr, keep)
                tl.store(out_im + at, xi, keep)
                if BACK:
                    before = keep & ((first + t) * N + n >= N)  # there is a state before it
                    hr, hi = tl.load(h_re + at - N, before, 0.0), tl.load(h_im + at - N, before, 0.0)
                    sr += xr * hr + xi * hi
                    si += xi * hr - xr * hi
        if ENDS:
            tl.store(out_re + row * N + n, xr, keep)
            tl.store(out_im + row * N + n, xi, keep)
        elif BACK:
            tl.store(da_re + row * N + n, sr, keep)
            tl.store(da_im + row * N + n, si, keep)


Parts = Sequence[Tensor]
"""Real and imaginary parts."""


def scan(u: Parts, a: Tensor, h: Parts | None = None) -> tuple[Tensor, ...]:
    """The states [b, L, N], in two parts; with `h`, their gradients, and that of a.

    In chunks: how each ends on its own, then what comes before each, then all of it.
    """
    back, (b, L, N) = h is not None, u[0].shape
    chunk = next(d for d in range(math.isqrt(L), L + 1) if L % d == 0)
    chunks = L // chunk

    def run(u: Parts, a: Tensor, x: Parts, out: Parts, h: Parts, shape: tuple[int, int, int], ends: bool) -> Tensor:
        (rows, length, each), sums = shape, u[0].new_empty(2, shape[0], N)
        parts, grid = (a.real.contiguous(), a.imag.contiguous()), (triton.cdiv(N, BLOCK), rows)
        lru_scan[grid](*u, *parts, *x, *out, *h, *sums, length, N, each, back, ends, BLOCK, num_warps=1)
        return sums.sum(1)

    ends, carried, before = u[0].new_zeros(3, 2, b, chunks, N)
    run(u, a, ends, ends, ends, (b * chunks, chunk, chunks), True)
    run(ends, a**chunk, before, carried, ends, (b, chunks, 1), False)
    if back:
        before[:, :, :-1] = carried[:, :, 1:]
    else:
        before[:, :, 1:] = carried[:, :, :-1]
    out = u[0].new_empty(2, b, L, N)
    sums = run(u, a, before, out, out if h is None else h, (b * chunks, chunk, chunks), False)
    return (*out, *sums) if back else tuple(out)


class Scan(torch.autograd.Function):
    """x_t = a x_{t-1} + (B u)_t, in real and imaginary parts [b, L, N] and [N]."""

    @staticmethod
    def forward(ctx: Any, in_re: Tensor, in_im: Tensor, a_re: Tensor, a_im: Tensor) -> tuple[Tensor, ...]:
        out = scan((in_re.contiguous(), in_im.contiguous()), torch.complex(a_re, a_im))
        ctx.save_for_backward(a_re, a_im, *out)
        return out

    @staticmethod
    def backward(ctx: Any, d_re: Tensor, d_im: Tensor) -> tuple[Tensor, ...]:
        a_re, a_im, *h = ctx.saved_tensors
        return scan((d_re.contiguous(), d_im.contiguous()), torch.complex(a_re, a_im), tuple(h))


class LRU(lti_mixers.LRU):
    def forward(self, u: Tensor) -> Tensor:
        if triton is None or not u.is_cuda:
            return super().forward(u)
        a, B, C = self.lti_system()
        re, im = Scan.apply(u @ B.real.mT, u @ B.imag.mT, a.real.contiguous(), a.imag.contiguous())
        return re @ C.real.mT - im @ C.imag.mT + self.D * u


class Block(nn.Module):
    def __init__(self, hidden: int, states: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(hidden), LRU(hidden, states)
        self.gate, self.dropout = nn.Linear(hidden, 2 * hidden), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(F.gelu(self.mixer(self.norm(x))))
        return x + self.dropout(F.glu(self.gate(y), dim=-1))


class LRUClassifier(nn.Module):
    """Blocks as in CompreSSM's LRU experiments, but for LayerNorm; a prediction is made from the mean over the tokens so far.

    Logits are those of the positions that a label follows, of all sequences together.
    """

    def __init__(self, vocabulary: int, hidden: int, layers: int, states: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.ModuleList(Block(hidden, states, dropout) for _ in range(layers))
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutput:
        asked = labels[:, 1:] != -100
        x = self.embedding(input_ids[:, :-1])
        for block in self.blocks:
            x = block(x)
        counts = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        logits = self.head((x.cumsum(1) / counts)[asked])
        return CausalLMOutput(loss=F.cross_entropy(logits, labels[:, 1:][asked]), logits=logits)
