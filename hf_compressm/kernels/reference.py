"""Plain-torch scans over time: the reference twins of the GPU kernels, and the CPU path.

| here | paper | meaning |
|---|---|---|
| `A`, `delta`, `B`, `C`, `u` | A, Delta_t, B_t, C_t, u_t | the selective state space model, per token |
| `h` | h_t | state, h_t = exp(Delta_t A) h_{t-1} + Delta_t u_t B_t |
| `P`, `Q` | P, Q | controllability and observability Gramians |
| `K` | K_t | sum over channels of w_t h_t h_t^T: how the states move the layer's output at token t |

Everything is vectorised over channels and walks over time in chunks of `chunk` tokens, so that no
[batch, length, channels, N] tensor is ever made: the working set is a few [batch, chunk, channels, N] tensors
and one [batch, channels, N, N] tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def mamba_states(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, *, chunk: int = 16) -> Iterator[tuple[slice, Tensor]]:
    """Yield the states of a Mamba-1 scan, a chunk of time at a time.

    Args:
        u: inputs after convolution and activation, [batch, length, channels].
        delta: step sizes after softplus, [batch, length, channels].
        A: continuous-time diagonal dynamics (negative), [channels, N].
        B: input maps, [batch, length, N].
        chunk: tokens per step of the iteration.

    Yields:
        the slice of time and the states there, [batch, time, channels, N]. The tensor is reused by the next step.
    """
    state = u.new_zeros(u.shape[0], *A.shape)
    for start in range(0, u.shape[1], chunk):
        time = slice(start, min(start + chunk, u.shape[1]))
        decay = torch.exp(delta[:, time, :, None] * A)
        states = (delta[:, time] * u[:, time])[..., None] * B[:, time, None, :]
        for t in range(states.shape[1]):
            state = states[:, t].addcmul_(decay[:, t], state)
        state = state.clone()
        yield time, states


def mamba_output(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """What a Mamba-1 scan gives, C_t h_t, [batch, length, channels].

    Args:
        u, delta, A, B: as for `mamba_states`.
        C: output maps, [batch, length, N].
    """
    y = torch.empty_like(u)
    chunk = min(16, max(1, 2**19 // (len(u) * A.numel())))
    for time, h in mamba_states(u, delta, A, B, chunk=chunk):
        y[:, time] = (h @ C[:, time, :, None])[..., 0]
    return y


def mamba_states_by_input(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, *, chunk: int = 16
) -> Iterator[tuple[slice, Tensor]]:
    """Yield what each input map drives in each state of a Mamba-1 scan, a chunk of time at a time.

    Args:
        u, delta, chunk: as for `mamba_states`.
        A: continuous-time dynamics of r states, [channels, r].
        B: N input maps, [batch, length, N].

    Yields:
        the slice of time and the states there, [batch, time, channels, r, N]. The tensor is reused by the next step.
    """
    state = u.new_zeros(u.shape[0], *A.shape, B.shape[2])
    for start in range(0, u.shape[1], chunk):
        time = slice(start, min(start + chunk, u.shape[1]))
        decay = torch.exp(delta[:, time, :, None] * A)[..., None]
        inputs = (delta[:, time] * u[:, time])[..., None, None] * B[:, time, None, None, :]
        states = inputs.expand(-1, -1, -1, A.shape[1], -1).contiguous()
        for t in range(states.shape[1]):
            state = states[:, t].addcmul_(decay[:, t], state)
        state = state.clone()
        yield time, states


def mamba_sensitivities(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, *, chunk: int = 16
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield the states of a Mamba-1 scan and their derivatives by log(-A), a chunk of time at a time.

    With k = dh / dlog(-A): k_t = exp(Delta_t A) k_{t-1} + Delta_t A exp(Delta_t A) h_{t-1}.

    Args:
        u, delta, A, B, chunk: as for `mamba_states`.

    Yields:
        the slice of time, the states and the derivatives there, [batch, time, channels, N].
    """
    before, k = u.new_zeros(u.shape[0], *A.shape), u.new_zeros(u.shape[0], *A.shape)
    for time, states in mamba_states(u, delta, A, B, chunk=chunk):
        rates = delta[:, time, :, None] * A
        decay = rates.exp()
        derivatives = decay * rates
        derivatives[:, 0] *= before
        derivatives[:, 1:] *= states[:, :-1]
        for t in range(states.shape[1]):
            k = derivatives[:, t].addcmul_(decay[:, t], k)
        before, k = states[:, -1].clone(), k.clone()
        yield time, states, derivatives


def mamba2_states(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, *, chunk: int = 16
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the states of a Mamba-2 scan, a chunk of time at a time.

    Args:
        x: inputs after convolution and activation, [batch, length, heads, head_dim].
        delta: step sizes after softplus and clamping, [batch, length, heads].
        A: continuous-time dynamics, one negative scalar per head, [heads].
        B: input maps, [batch, length, groups, N]; head h belongs to group h // (heads / groups).
        chunk: tokens per step of the iteration.

    Yields:
        the slice of time and the states there, [batch, time, heads, head_dim, N].
    """
    batch, length, heads, head_dim = x.shape
    groups, size = B.shape[2:]
    state = x.new_zeros(batch, heads, head_dim * size)
    for start in range(0, length, chunk):
        time = slice(start, min(start + chunk, length))
        decay = torch.exp(delta[:, time] * A)[..., None]
        inputs = (delta[:, time, :, None] * x[:, time]).unflatten(2, (groups, -1))
        states = (inputs[..., None] * B[:, time, :, None, None, :]).reshape(batch, -1, heads, head_dim * size)
        for t in range(states.shape[1]):
            state = states[:, t].addcmul_(decay[:, t], state)
        state = state.clone()
        yield time, states.view(batch, -1, heads, head_dim, size)


def observability_gramian(delta: Tensor, A: Tensor, C: Tensor, valid: Tensor, *, chunk: int = 16) -> Tensor:
    """Sum the time-varying observability Gramians of a diagonal scan over batch and time.

    With Q_t = C_t C_t^T + Abar_{t+1} Q_{t+1} Abar_{t+1}, the sum over t of Q_t equals the sum over s of
    C_s C_s^T * G_s with G_s = 1 + Abar_s G_{s-1} Abar_s: a forward scan. On a CPU the channels are taken in blocks that
    stay in its cache.

    Args:
        delta: step sizes, [batch, length, channels].
        A: continuous-time diagonal dynamics, [channels, N].
        C: output maps, [batch, length, N].
        valid: 1 for tokens that count and 0 for padding, [batch, length].
        chunk: tokens whose decays are computed at once.

    Returns:
        sum over batch and valid t of Q_t, [channels, N, N].
    """
    batch, length, channels = delta.shape
    size = A.shape[-1]
    outputs = C[..., :, None] * C[..., None, :] * valid[..., None, None]
    block = max(1, 2**17 // (batch * size**2)) if delta.device.type == "cpu" else channels
    Q = []
    for rates, steps in zip(A.split(block), delta.split(block, dim=2), strict=True):
        G = delta.new_zeros(batch, len(rates), size, size)
        total = torch.zeros_like(G)
        for start in range(0, length, chunk):
            decay = torch.exp(steps[:, start : start + chunk, :, None] * rates)
            for step, one in enumerate(decay.unbind(1)):
                t = start + step
                G.mul_(one[..., :, None]).mul_(one[..., None, :]).add_(valid[:, t, None, None, None])
                total.addcmul_(G, outputs[:, t, None])
        Q.append(total.sum(0))
    return torch.cat(Q)


def observability_reach(delta: Tensor, A: Tensor, valid: Tensor) -> Tensor:
    """How often, and with which decay, the outputs of a Mamba-2 scan see earlier states.

    With one decay per head, the sum over t of Q_t is the sum over s of G_s C_s C_s^T, G_s = valid_s + Abar_s^2 G_{s-1}.

    Args:
        delta: step sizes, [batch, length, heads].
        A: continuous-time dynamics, [heads].
        valid: 1 for tokens that count and 0 for padding, [batch, length].

    Returns:
        G, [batch, length, heads].
    """
    decay = torch.exp(2 * delta * A)
    G = torch.zeros_like(decay[:, 0])
    reach = torch.empty_like(decay)
    for t in range(decay.shape[1]):
        G = G * decay[:, t] + valid[:, t, None]
        reach[:, t] = G
    return reach
