"""A classifier of sequences with LRU layers, for `sequences.py`; on a GPU its scan is a Triton kernel."""

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
        in_re, in_im, a_re, a_im, out_re, out_im, h_re, h_im, da_re, da_im, L, N,
        BACK: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """out_t = a out_{t-1} + in_t over [b, L, N]; or BACK from the end, with conj(a), and the sum of out_t conj(h_{t-1})."""
        n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        batch, keep = tl.program_id(1).to(tl.int64), n < N
        ar, ai = tl.load(a_re + n, keep, 0.0), tl.load(a_im + n, keep, 0.0)
        if BACK:
            ai = -ai
        xr, xi = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        sr, si = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for i in range(L):
            t = L - 1 - i if BACK else i
            at = (batch * L + t) * N + n
            ur, ui = tl.load(in_re + at, keep, 0.0), tl.load(in_im + at, keep, 0.0)
            real = ar * xr - ai * xi + ur
            xi = ar * xi + ai * xr + ui
            xr = real
            tl.store(out_re + at, xr, keep)
            tl.store(out_im + at, xi, keep)
            if BACK:
                before = keep & (t * N + n >= N)  # there is a state before it
                hr, hi = tl.load(h_re + at - N, before, 0.0), tl.load(h_im + at - N, before, 0.0)
                sr += xr * hr + xi * hi
                si += xi * hr - xr * hi
        if BACK:
            tl.store(da_re + batch * N + n, sr, keep)
            tl.store(da_im + batch * N + n, si, keep)


class Scan(torch.autograd.Function):
    """x_t = a x_{t-1} + (B u)_t, in real and imaginary parts [b, L, N] and [N]."""

    @staticmethod
    def forward(ctx: Any, in_re: Tensor, in_im: Tensor, a_re: Tensor, a_im: Tensor) -> tuple[Tensor, Tensor]:
        in_re, in_im = in_re.contiguous(), in_im.contiguous()
        out = torch.empty_like(in_re), torch.empty_like(in_im)
        b, L, N = in_re.shape
        grid = (triton.cdiv(N, BLOCK), b)
        lru_scan[grid](in_re, in_im, a_re, a_im, *out, *out, *out, L, N, False, BLOCK, num_warps=1)
        ctx.save_for_backward(a_re, a_im, *out)
        return out

    @staticmethod
    def backward(ctx: Any, d_re: Tensor, d_im: Tensor) -> tuple[Tensor, ...]:
        a_re, a_im, h_re, h_im = ctx.saved_tensors
        d_re, d_im = d_re.contiguous(), d_im.contiguous()
        out, sums = (torch.empty_like(d_re), torch.empty_like(d_im)), a_re.new_empty(2, len(d_re), len(a_re))
        b, L, N = d_re.shape
        grid = (triton.cdiv(N, BLOCK), b)
        lru_scan[grid](d_re, d_im, a_re, a_im, *out, h_re, h_im, *sums, L, N, True, BLOCK, num_warps=1)
        return (*out, *sums.sum(1))


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
