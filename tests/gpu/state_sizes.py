"""Which state sizes mamba_ssm's Mamba-2 kernels run fast: milliseconds by N, and the bytes of a state.

`python tests/gpu/state_sizes.py [N ...]` on a GPU with mamba_ssm (its Triton kernels are enough) prints for one layer of the
shape of mamba2-130m in bf16: a decoding step of a batch of 256 (float32 state), a scan forward, and one forward and backward
over 8 x 1024 tokens; and the seconds that the first step of a new size takes, which tunes the kernels (and compiles them,
the first time on a machine).
"""

import argparse
import time
from collections.abc import Callable

import torch
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

HEADS, HEAD_DIM, BATCH, TOKENS, LAYERS = 24, 64, 256, (8, 1024), 24
SIZES = (128, 96, 72, 64, 48, 40, 32, 24, 16, 8)


def milliseconds(run: Callable[[], object], times: int = 20) -> float:
    """The median of `times` runs, by the GPU's clock."""
    for _ in range(3):
        run()
    taken = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end))
    return sorted(taken)[times // 2]


def row(N: int) -> str:
    """The figures of one size."""
    options = {"device": "cuda", "dtype": torch.bfloat16}
    A = -torch.rand(HEADS, device="cuda") - 0.5

    state = torch.randn(BATCH, HEADS, HEAD_DIM, N, device="cuda")
    token, step = torch.randn(BATCH, HEADS, HEAD_DIM, **options), torch.randn(BATCH, HEADS, 1, **options)
    token_B, token_C = (torch.randn(BATCH, 1, N, **options) for _ in range(2))
    wide_A, wide_step = A[:, None, None].expand(HEADS, HEAD_DIM, N), step.expand(BATCH, HEADS, HEAD_DIM)
    bias = torch.zeros(HEADS, 1, device="cuda").expand(HEADS, HEAD_DIM)

    def decode() -> None:
        selective_state_update(
            state, token, wide_step, wide_A, token_B, token_C, D=bias, dt_bias=bias, dt_softplus=True
        )

    x, dt = torch.randn(*TOKENS, HEADS, HEAD_DIM, **options), torch.randn(*TOKENS, HEADS, **options)
    B, C = (torch.randn(*TOKENS, 1, N, **options) for _ in range(2))
    inputs = [tensor.requires_grad_() for tensor in (x, dt, A, B, C)]

    def scan() -> torch.Tensor:
        return mamba_chunk_scan_combined(*inputs, chunk_size=256, dt_softplus=True)

    def train() -> None:
        torch.autograd.grad(scan().sum(), inputs)

    begin = time.perf_counter()
    decode()
    train()
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    with torch.no_grad():
        forward = milliseconds(scan)
    kib = LAYERS * HEADS * HEAD_DIM * N * 4 / 1024
    times = f"{milliseconds(decode):.3f} | {forward:.3f} | {milliseconds(train):.3f}"
    return f"| {N} | {kib:,.0f} | {times} | {first:.0f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("N", type=int, nargs="*", default=SIZES)
    sizes = parser.parse_args().N
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| N | KiB a sequence, 24 layers | decoding, ms | scan, ms | forward and backward, ms | first step, s |")
    print("|---|---|---|---|---|---|")
    for N in sizes:
        print(row(N), flush=True)
