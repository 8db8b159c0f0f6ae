"""The Triton kernels on a GPU: are they right, how near to the card's limits are they, and what does a cut cost?

    python tests/gpu/gramian_scans.py [--sections correct factor time measure cut]

Each section prints a table of its own; an error in one doesn't stop the others.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_compressm import CompreSSMConfig, kernels, measure
from hf_compressm.hankel import mamba
from hf_compressm.hankel import moments as second_moments
from hf_compressm.hankel.mamba import MambaStatistics
from hf_compressm.hankel.mamba2 import Mamba2Statistics
from hf_compressm.hankel.realization import select_each_with_readout
from hf_compressm.hankel.selective import Mamba2System, MambaSystem
from hf_compressm.hankel.spectra import hankel_spectra
from hf_compressm.kernels.contribution import contribution
from hf_compressm.kernels.mamba import chunk_starts, gramians, output_gram
from hf_compressm.kernels.mamba2 import contribution as contribution2
from hf_compressm.kernels.mamba2 import controllability
from hf_compressm.kernels.reference import mamba2_states, mamba_states, observability_gramian, observability_reach
from hf_compressm.layers import find_layers, realize

BEGIN = time.perf_counter()


def say(*values: object) -> None:
    print(f"[{time.perf_counter() - BEGIN:6.1f} s]", *values, flush=True)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def mamba_system(batch: int, length: int, channels: int, N: int, dtype=torch.float32, pad: int = 0) -> SimpleNamespace:
    """A random system whose decays are those of a Mamba at initialisation: A = -1 ... -N, steps 0.001 to 0.1."""
    valid = torch.ones(batch, length, device="cuda")
    valid[-1, :pad] = 0
    u, gate = (torch.randn(2, batch, length, channels, device="cuda") * valid[..., None]).to(dtype)
    delta = torch.exp(torch.empty_like(u, dtype=torch.float32).uniform_(-6.9, -2.3)).to(dtype)
    A = -torch.arange(1, N + 1, device="cuda").float().expand(channels, N) * torch.rand(channels, N, device="cuda")
    B, C = torch.randn(2, batch, length, N, device="cuda").to(dtype)
    return SimpleNamespace(u=u, delta=delta, A=A.contiguous(), B=B, C=C, gate=gate, valid=valid)


def mamba2_system(
    batch: int, length: int, heads: int, head_dim: int, groups: int, N: int, dtype=torch.float32, pad: int = 0
) -> SimpleNamespace:
    valid = torch.ones(batch, length, device="cuda")
    valid[-1, :pad] = 0
    x, gate = (torch.randn(2, batch, length, heads, head_dim, device="cuda") * valid[..., None, None]).to(dtype)
    delta = torch.exp(torch.empty(batch, length, heads, device="cuda").uniform_(-6.9, -2.3)).to(dtype)
    A = -16 * torch.rand(heads, device="cuda")
    B, C = (torch.randn(2, batch, length, groups, N, device="cuda") * valid[..., None, None]).to(dtype)
    return SimpleNamespace(x=x, delta=delta, A=A, B=B, C=C, gate=gate, valid=valid)


def double(system: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(**{name: value.double() for name, value in vars(system).items()})


def section_correct() -> None:
    """Relative errors ||kernel - float64 reference|| / ||float64 reference||."""
    print(f"{'Mamba-1':>8} {'dtype':>8} {'N':>4} " + " ".join(f"{x:>8}" for x in ["P", "Q", "K", "y", "Khy", "M"]))
    for N in (8, 12, 16, 32, 64, 128, 256):
        for dtype in (torch.float32, torch.bfloat16):
            batch, length, channels, pad = (1, 33, 72, 0) if N == 12 else (2, 135, 72 if N < 256 else 40, 5)
            s = mamba_system(batch, length, channels, N, dtype, pad)
            r = double(s)
            P, Q = gramians(s.u, s.delta, s.A, s.B, s.C, s.valid)
            starts, y = chunk_starts(s.u, s.delta, s.A, s.B, s.C, s.gate)
            M = contribution(s.u, s.delta, s.A, s.B, s.C, s.gate)
            keep = torch.arange(min(N, 64), device="cuda")
            K, moved = output_gram(s.u, s.delta, s.A[:, keep], s.B[..., keep], s.gate, starts[:, :, keep], y)
            h = torch.cat([part.clone() for _, part in mamba_states(r.u, r.delta, r.A, r.B)], 1)
            gated = r.gate[..., None] * h
            features = (gated * r.C[:, :, None]).flatten(0, 2)
            output = (gated * r.C[:, :, None]).sum(-1)
            some = gated[..., keep]
            errors = [
                relative(P, torch.einsum("bldi,bldj,bl->dij", h, h, r.valid)),
                relative(Q, observability_gramian(r.delta, r.A, r.C, r.valid)),
                relative(K, some.mT @ some),
                relative(y, output),
                relative(moved, (some * output[..., None]).sum(2)),
                relative(M, features.mT @ features),
            ]
            print(f"{'':8} {str(dtype)[6:]:>8} {N:4} " + " ".join(f"{e:8.1e}" for e in errors), flush=True)
            del h, gated, features, some
    print(f"{'Mamba-2':>8} {'dtype':>8} {'N':>4} " + " ".join(f"{x:>8}" for x in ["P", "G", "M"]))
    for N in (8, 16, 32, 64, 128, 256):
        for dtype in (torch.float32, torch.bfloat16):
            s = mamba2_system(2, 135, 4, 64, 2 if N < 128 else 1, N, dtype, 5)
            r = double(s)
            P, G = controllability(s.x, s.delta, s.A, s.B, s.gate, s.valid)
            M = contribution2(s.x, s.delta, s.A, s.B, s.C, s.gate)
            P_ref, M_ref = torch.zeros_like(P), torch.zeros_like(M)
            for t, h in mamba2_states(r.x, r.delta, r.A, r.B):
                gated = r.gate[:, t, ..., None] * h
                part = gated.mT @ gated
                C = r.C[:, t].repeat_interleave(h.shape[2] // r.C.shape[2], dim=2)
                P_ref += part.sum((0, 1))
                of_heads = (part * C[..., None] * C[:, :, :, None]).sum((0, 1))
                M_ref += of_heads.unflatten(0, (len(M_ref), -1)).sum(1)
            errors = [
                relative(P, P_ref),
                relative(G, observability_reach(r.delta, r.A, r.valid)),
                relative(M, M_ref),
            ]
            print(f"{'':8} {str(dtype)[6:]:>8} {N:4} " + " ".join(f"{e:8.1e}" for e in errors), flush=True)
    say("statistics, fused against plain torch in float64 (relative errors)")
    for N in (16, 64, 128):
        s = mamba_system(2, 100, 64, N, pad=3)
        pair = [MambaStatistics(64, N, torch.device("cuda")) for _ in range(2)]
        pair[0].update(MambaSystem(**vars(s)))
        reference, pair[1].P, pair[1].Q = double(s), pair[1].P.double(), pair[1].Q.double()
        plain = MambaSystem(**vars(reference))
        pair[1].tokens += plain.valid.sum()
        pair[1].weight += plain.gate.square().sum((0, 1))
        pair[1]._update_by_chunks(plain)
        (fused,), (loop,) = pair[0].groups, pair[1].groups
        same = fused.candidates.tolist() == loop.candidates.tolist()
        rows = loop.candidates
        print(
            f"  Mamba-1 N={N}: same candidates {same}, normal {relative(fused.normal_pairs, loop.normal_pairs):.1e}, "
            f"contribution {relative(fused.contribution, loop.contribution):.1e}, cross "
            f"{relative(fused.cross[rows], loop.cross[rows]):.1e}, output {relative(fused.output, loop.output):.1e}, "
            f"spectrum {relative(hankel_spectra([pair[0]])[0], hankel_spectra([pair[1]])[0]):.1e}",
            flush=True,
        )
    s = mamba2_system(2, 100, 4, 64, 1, 128, pad=3)
    pair2 = [Mamba2Statistics(4, 1, 128, torch.device("cuda")) for _ in range(2)]
    pair2[0].update(Mamba2System(**vars(s)))
    plain2 = Mamba2System(**vars(double(s)))
    fused, kernels.fused = kernels.fused, lambda x: False
    pair2[1].update(plain2)
    kernels.fused = fused
    a, b = pair2[0].groups[0], pair2[1].groups[0]
    print(
        f"  Mamba-2 N=128: P {relative(pair2[0].P, pair2[1].P):.1e}, Q {relative(pair2[0].observable, pair2[1].observable):.1e}, "
        f"contribution {relative(a.contribution, b.contribution):.1e}, output {relative(a.output, b.output):.1e}, "
        f"spectrum {relative(hankel_spectra([pair2[0]])[0], hankel_spectra([pair2[1]])[0]):.1e}",
        flush=True,
    )


def section_factor() -> None:
    """float64 factorisations, which decide what a decision costs."""
    for shape in [(1536, 16), (24 * 1536, 16), (512, 32), (512, 64), (128, 128), (24, 128)]:
        X = torch.randn(shape[0], shape[1], shape[1], dtype=torch.float64, device="cuda")
        S = X @ X.mT
        for name, work in [
            ("eigh", lambda S=S: torch.linalg.eigh(S)),
            ("svdvals", lambda X=X: torch.linalg.svdvals(X)),
            ("cholesky", lambda S=S: torch.linalg.cholesky_ex(S)),
        ]:
            work()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            work()
            torch.cuda.synchronize()
            gpu = 1e3 * (time.perf_counter() - begin)
            line = f"  {name:9} [{shape[0]}, {shape[1]}, {shape[1]}]: {gpu:9.2f} ms on the GPU"
            if shape[0] <= 1536:
                A, B = S.cpu(), X.cpu()
                begin = time.perf_counter()
                (torch.linalg.svdvals if name == "svdvals" else getattr(torch.linalg, name))(
                    B if name == "svdvals" else A
                )
                line += f", {1e3 * (time.perf_counter() - begin):9.2f} ms on the CPU"
            print(line, flush=True)


def milliseconds(work) -> float:
    import triton

    work()
    return triton.testing.do_bench(work, warmup=20, rep=100, return_mode="median")


def ceilings() -> tuple[float, float, float, float]:
    """What the card does: bytes per second of a copy, operations per second of tf32, fp32 and fp64 products."""
    a = torch.empty(2**28, device="cuda")
    b = torch.empty_like(a)
    bandwidth = 8e3 * a.numel() / milliseconds(lambda: b.copy_(a))
    x, y = torch.randn(2, 8192, 8192, device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = True
    tf32 = 2e3 * 8192**3 / milliseconds(lambda: x @ y)
    torch.backends.cuda.matmul.allow_tf32 = False
    fp32 = 2e3 * 8192**3 / milliseconds(lambda: x @ y)
    p, q = x[:4096, :4096].double(), y[:4096, :4096].double()
    return bandwidth, tf32, fp32, 2e3 * 4096**3 / milliseconds(lambda: p @ q)


def section_time() -> None:
    """Each kernel's time against what the card can do: bytes read and written once, or the operations it must do."""
    bandwidth, tf32, fp32, fp64 = ceilings()
    say(
        f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s; matrix products "
        f"tf32 {tf32 / 1e12:.0f}, fp32 {fp32 / 1e12:.0f}, fp64 {fp64 / 1e12:.0f} TFLOP/s"
    )
    print(f"{'kernel':44} {'ms':>8} {'bytes ms':>9} {'tf32 ms':>9} {'fp32 ms':>9} {'% of limit':>10}")

    def row(name: str, work, size: float, matrix: float = 0.0, plain: float = 0.0) -> None:
        """Matrix operations count once, at the tf32 rate; the kernels spend three products on each."""
        try:
            taken = milliseconds(work)
        except Exception:
            print(name)
            traceback.print_exc(limit=-2)
            return
        limits = [1e3 * size / bandwidth, 1e3 * matrix / tf32, 1e3 * plain / fp32]
        print(
            f"{name:44} {taken:8.3f} {limits[0]:9.3f} {limits[1]:9.3f} {limits[2]:9.3f} {100 * max(limits) / taken:9.0f}%",
            flush=True,
        )

    for batch, length, channels, N in [(8, 1024, 1536, 16), (8, 1024, 1536, 64), (50, 784, 512, 128)]:
        s = mamba_system(batch, length, channels, N)
        tokens = batch * length
        inner, maps = 4 * tokens * channels, 4 * tokens * N
        label = f"{batch} x {length}, {channels} channels, N={N}: "
        states, pairs = tokens * channels * N, tokens * channels * N * (N + 1) / 2
        # Per pair: P one multiply-add; Q the decays' product, a multiply-add for G, C C^T and a multiply-add.
        row(
            label + "gramians",
            lambda s=s: gramians(s.u, s.delta, s.A, s.B, s.C, s.valid),
            2 * inner + 2 * maps + 8 * channels * N**2,
            plain=10 * pairs,
        )
        row(
            label + "chunk_starts",
            lambda s=s: chunk_starts(s.u, s.delta, s.A, s.B),
            2 * inner + maps + 4 * states / 64,
            plain=4 * states,
        )
        keep = torch.arange(min(N, 4096 // N), device="cuda")
        c = len(keep)
        starts, y = chunk_starts(s.u, s.delta, s.A, s.B, s.C, s.gate)
        args = s.u, s.delta, s.A[:, keep].contiguous(), s.B[..., keep].contiguous(), s.gate
        part = starts[:, :, keep].contiguous()
        # K is symmetric, but the pairs below the diagonal are no matrix product: all are counted.
        row(
            label + f"output_gram ({c} states)",
            lambda args=args, part=part, y=y, N=N: output_gram(*args, part, y if N > 64 else None),
            3 * inner + 4 * tokens * c * (c + 1) + part.numel() * 4,
            matrix=2 * tokens * channels * c**2,
        )
        row(
            label + "contribution",
            lambda s=s: contribution(s.u, s.delta, s.A, s.B, s.C, s.gate),
            3 * inner + 2 * maps,
            matrix=2 * pairs,
        )
        K = output_gram(*args, part)[0].flatten(0, 1)
        moments = second_moments.ReadoutMoments(N, torch.device("cuda"), readout=True)
        if N > 64:
            moments._take(keep)
        some = slice(0, mamba.WORKING_SET // N**2)
        C, K = s.C.flatten(0, 1)[some], K[some]
        extra = (C[:, :c], moments.output) if N > 64 else ()
        row(
            label + f"moments ({len(K)} tokens, fp64)",
            lambda C=C, K=K, m=moments, extra=extra: m.add(C, K, *extra),
            4 * K.numel(),
        )
        entry = MambaStatistics(channels, N, torch.device("cuda"))
        row(label + "whole update", lambda s=s, e=entry: e.update(MambaSystem(**vars(s))), 3 * inner)
    for batch, length, heads, head_dim, N in [(8, 1024, 24, 64, 128), (8, 1024, 24, 64, 64)]:
        s = mamba2_system(batch, length, heads, head_dim, 1, N)
        tokens, inner = batch * length, heads * head_dim
        label = f"Mamba-2 {batch} x {length}, {heads} heads of {head_dim}, N={N}: "
        row(
            label + "P, G",
            lambda s=s: controllability(s.x, s.delta, s.A, s.B, s.gate, s.valid),
            8 * tokens * inner,
            # Scores, v from inside and before the chunk, states, P; in chunks of 16.
            matrix=2 * tokens * heads * (16 * head_dim + 16 * N + 2 * head_dim * N + N**2),
        )
        row(
            label + "contribution",
            lambda s=s: contribution2(s.x, s.delta, s.A, s.B, s.C, s.gate),
            8 * tokens * inner,
            matrix=tokens * inner * N * (N + 1),
        )
        entry2 = Mamba2Statistics(heads, 1, N, torch.device("cuda"))
        row(label + "whole update", lambda s=s, e=entry2: e.update(Mamba2System(**vars(s))), 8 * tokens * inner)


def model_of(kind: str, size: int, hidden: int = 768, layers: int = 24):
    from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig

    torch.manual_seed(0)
    if kind == "mamba":
        config = MambaConfig(vocab_size=50280, hidden_size=hidden, num_hidden_layers=layers, state_size=size)
    else:
        config = Mamba2Config(
            vocab_size=50280,
            hidden_size=hidden,
            num_hidden_layers=layers,
            state_size=size,
            num_heads=2 * hidden // 64,
            head_dim=64,
            n_groups=1,
        )
    return AutoModelForCausalLM.from_config(config).cuda()


def wall(work, repeats: int = 1) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin) / repeats


def train_step(model, optimizer, ids: Tensor) -> None:
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


WORKLOADS = [
    ("mamba", 16, 768, 24, (8, 1024), 1),
    ("mamba2", 128, 768, 24, (8, 1024), 1),
    ("mamba", 128, 256, 6, (50, 784), 4),
]


def section_measure() -> None:
    """Measuring all layers, against the model's forward pass and training step; all under autocast, as in training."""
    for kind, size, hidden, count, shape, batches in WORKLOADS:
        try:
            model = model_of(kind, size, hidden, count)
            ids = torch.randint(0, 50280, shape, device="cuda")
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
            model.train()
            train_step(model, optimizer, ids)
            train_step(model, optimizer, ids)
            step = wall(lambda m=model, o=optimizer, i=ids: train_step(m, o, i), 3)
            model.eval()
            layers, unfitted = find_layers(model), CompreSSMConfig(refit=0)
            data = [{"input_ids": ids}] * batches
            hidden_states = torch.randn(*shape, hidden, device="cuda")
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                model.base_model(input_ids=ids, use_cache=False)
                forward = wall(lambda m=model, i=ids: m.base_model(input_ids=i, use_cache=False), 2)
                measure(model, data[:1], unfitted)
                whole = wall(lambda m=model, d=data, c=unfitted: measure(m, d, c))
                read = wall(lambda la=layers, x=hidden_states: la[0].read(x, None), 3)
                system = layers[0].read(hidden_states, None)
                entry = layers[0].statistics(mean_lti=False)
                entry.update(system)
                update = wall(lambda e=entry, s=system: e.update(s), 3)
            say(
                f"{kind} N={size}, {count} layers, {batches} x {shape}: training step {step:.1f} ms, forward {forward:.1f}, "
                f"measure {whole:.1f} ms = {whole / step:.2f} steps; per layer and batch: read {read:.2f}, "
                f"update {update:.2f} ms"
            )
            del model, optimizer, entry, system
        except Exception:
            traceback.print_exc()
        torch.cuda.empty_cache()


def one_cut(kind: str, size: int, hidden: int, count: int, shape: tuple[int, int], batches: int) -> str:
    """The milliseconds of a cut to half the states, by phase; the phases in brackets are parts of the plan."""
    model = model_of(kind, size, hidden, count)
    ids = torch.randint(0, 50280, shape, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    model.train()
    train_step(model, optimizer, ids)
    layers = find_layers(model)
    multiple = {"multiple_of": 8} if kind == "mamba2" else {}
    config = CompreSSMConfig(ratio=0.5, realization="select", refit=0, **multiple)
    times: dict[str, float] = {}

    def phase(name: str, work):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        times[name] = 1e3 * (time.perf_counter() - begin)
        return result

    data = [{"input_ids": ids}] * batches
    with torch.no_grad():
        measurement = phase("measure", lambda: measure(model, data, config))
        stats = measurement.statistics
    with torch.no_grad():
        phase("(spectra)", lambda: hankel_spectra(stats))
        phase(
            "(realize one by one)",
            lambda: realize(layers, stats, config, "select"),
        )
        if kind == "mamba":
            phase("(read-outs side by side)", lambda: select_each_with_readout([entry.groups[0] for entry in stats]))
        plan = phase("plan", lambda: replace(measurement, sample=None).plan(config))
        phase("apply", lambda: plan.apply_(model, optimizer))
    whole = sum(times[name] for name in ("measure", "plan", "apply"))
    return f"{whole:.1f} ms: " + ", ".join(f"{name} {value:.1f}" for name, value in times.items())


def section_cut() -> None:
    """A whole cut, as in training (no refit), by phase."""
    for kind, size, *rest in WORKLOADS:
        for attempt in ("first", "second"):  # the first one compiles
            try:
                say(f"{kind} N={size}, {attempt} cut: {one_cut(kind, size, *rest)}")
            except Exception:
                traceback.print_exc()
            torch.cuda.empty_cache()


SECTIONS = {
    "correct": section_correct,
    "factor": section_factor,
    "time": section_time,
    "measure": section_measure,
    "cut": section_cut,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    for name in parser.parse_args().sections:
        say(f"== {name}: {SECTIONS[name].__doc__}")
        try:
            SECTIONS[name]()
        except Exception:
            traceback.print_exc()
        torch.cuda.empty_cache()
    say("end")


if __name__ == "__main__":
    main()
