"""Time-invariant mixers with a diagonal complex state, as users have them (LRU, S5, S4D), and a plain model of some."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from hf_compressm.layers import lti


def scan(a: Tensor, Bu: Tensor) -> Tensor:
    """x_k = a x_{k-1} + (B u)_k for Bu [batch, length, ..., n] and a [..., n], as a convolution with the powers of a."""
    length = Bu.shape[1]
    steps = torch.arange(length, device=a.device).view(-1, *[1] * a.dim())
    powers = torch.exp(a.log() * steps)
    spectrum = torch.fft.fft(Bu, 2 * length, dim=1) * torch.fft.fft(powers, 2 * length, dim=0)
    return torch.fft.ifft(spectrum, dim=1)[:, :length]


def documented() -> Any:
    """The class that `layers.lti` shows as how to take part: an LRU without parameters."""
    lines = (line for line in str(lti.__doc__).splitlines() if not line or line.startswith("    "))
    names = {"torch": torch, "nn": nn, "math": math}
    exec(textwrap.dedent("\n".join(lines)), names)
    return names["LRU"]


class LRU(documented()):
    """Linear recurrent unit (arXiv 2303.06349): one system from all inputs to all outputs. Its methods are the documented ones.

    Args:
        size: inputs and outputs.
        states: complex ones.
        r_min, r_max, max_phase: the ring that the eigenvalues begin in.
    """

    def __init__(
        self, size: int, states: int, r_min: float = 0.9, r_max: float = 0.999, max_phase: float = 6.28
    ) -> None:
        super().__init__()
        radius = torch.rand(states) * (r_max**2 - r_min**2) + r_min**2
        self.nu_log = nn.Parameter((-0.5 * radius.log()).log())
        self.theta_log = nn.Parameter((max_phase * torch.rand(states)).log())
        self.gamma_log = nn.Parameter(0.5 * (1 - radius).log())
        self.B_re, self.B_im = (nn.Parameter(torch.randn(states, size) / math.sqrt(2 * size)) for _ in range(2))
        self.C_re, self.C_im = (nn.Parameter(torch.randn(size, states) / math.sqrt(states)) for _ in range(2))
        self.D = nn.Parameter(torch.randn(size))

    def forward(self, u: Tensor) -> Tensor:
        """[batch, length, size] in and out."""
        a, B, C = self.lti_system()
        x = scan(a, torch.complex(u @ B.real.mT, u @ B.imag.mT))
        return x.real @ C.real.mT - x.imag @ C.imag.mT + self.D * u


class S5(nn.Module):
    """S5 (arXiv 2208.04933): complex parameters, and a step for each state; half of the conjugate pairs is stored."""

    def __init__(self, size: int, states: int) -> None:
        super().__init__()
        self.state_size = states
        self.Lambda = nn.Parameter(torch.complex(-0.1 - 0.4 * torch.rand(states), math.pi * torch.arange(states)))
        self.log_step = nn.Parameter(torch.empty(states).uniform_(math.log(0.01), math.log(0.1)))
        self.B = nn.Parameter(torch.randn(states, size, dtype=torch.complex64) / math.sqrt(size))
        self.C = nn.Parameter(torch.randn(size, states, dtype=torch.complex64) / math.sqrt(states))

    def lti_system(self) -> tuple[Tensor, Tensor, Tensor]:
        """By zero-order hold."""
        a = torch.exp(self.Lambda * self.log_step.exp())
        return a, ((a - 1) / self.Lambda)[:, None] * self.B, 2 * self.C

    def lti_parameters(self, a: Tensor, B: Tensor, C: Tensor) -> dict[str, Tensor]:
        """With one step for all, and the principal logarithm."""
        step = torch.full_like(a.real, math.log(0.03))
        rates = a.log() / step.exp()
        return {"Lambda": rates, "log_step": step, "B": (rates / (a - 1))[:, None] * B, "C": C / 2}

    def forward(self, u: Tensor) -> Tensor:
        """[batch, length, size] in and out."""
        a, B, C = self.lti_system()
        return (scan(a, u.to(a.dtype) @ B.mT) @ C.mT).real


class S4D(nn.Module):
    """S4D (arXiv 2206.11893): a system for each channel, with B = 1 in continuous time; half of the pairs is stored."""

    def __init__(self, size: int, states: int) -> None:
        super().__init__()
        self.log_step = nn.Parameter(torch.empty(size).uniform_(math.log(0.01), math.log(0.1)))
        self.log_A_real = nn.Parameter(torch.full((size, states), 0.5).log())
        self.A_imag = nn.Parameter(math.pi * torch.arange(states).repeat(size, 1).float())
        self.C = nn.Parameter(torch.view_as_real(torch.randn(size, states, dtype=torch.complex64)).clone())

    def lti_system(self) -> tuple[Tensor, Tensor, Tensor]:
        """[size, states], [size, states, 1], [size, 1, states]: C and the step are folded into one another."""
        A = torch.complex(-self.log_A_real.exp(), self.A_imag)
        a = torch.exp(A * self.log_step.exp()[:, None])
        C = 2 * torch.view_as_complex(self.C) * (a - 1) / A
        return a, torch.ones_like(a)[..., None], C[:, None]

    def lti_parameters(self, a: Tensor, B: Tensor, C: Tensor) -> dict[str, Tensor]:
        """B is 1: what the states are written by goes to what they are read by."""
        A = a.log() / self.log_step.double().exp()[:, None]
        read = C[:, 0] * B[..., 0] / 2 * A / (a - 1)
        return {"log_A_real": A.real.neg().log(), "A_imag": A.imag, "C": torch.view_as_real(read)}

    def forward(self, u: Tensor) -> Tensor:
        """[batch, length, size] in and out."""
        a, B, C = self.lti_system()
        x = scan(a, u[..., None] * B[..., 0])
        return (x * C[:, 0]).sum(-1).real


class Net(nn.Module):
    """A plain language model of two such mixers.

    Args:
        vocabulary: tokens.
        size: of the embedding, and each mixer's inputs and outputs.
        make: a mixer.
    """

    def __init__(self, vocabulary: int, size: int, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.mixers = nn.ModuleList(make() for _ in range(2))

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
    ) -> CausalLMOutput:
        x = self.embedding(input_ids)
        for mixer in self.mixers:
            x = x + torch.tanh(mixer(x))
        logits = F.linear(x, self.embedding.weight)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
