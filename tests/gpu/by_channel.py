"""Looked at and left: states by channel in Mamba, and maps that Mamba-2 heads share.

`python tests/gpu/by_channel.py FOLDER...` prints for each layer of a Mamba model the share of the energy of the states'
contributions to the output that goes with half and with three quarters of the states: if all channels keep the same states, if
each keeps its own, as many as carry most, and if those of a bucket of channels keep the same number of the same states. For each layer of a Mamba-2 model, what its heads lose of their outputs at a mean of
16 states: with a map each; if the heads of a pair share one, at the same states, and at the same parameters, which is twice the
states; and with one map for all. Pairs are those that lose least by it.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_compressm import CompreSSMConfig, measure
from hf_compressm.data.texts import CALIBRATION, windows
from hf_compressm.hankel.by_head import balance_heads
from hf_compressm.kernels.reference import mamba_states

MEAN = 16


def by_channel(system) -> list[float]:
    """Of a Mamba layer: lost at 1/2 by layer, by channel, and by channel in buckets; and at 1/4."""
    energy = torch.zeros_like(system.A, dtype=torch.float64)
    for time, h in mamba_states(system.u, system.delta, system.A, system.B):
        gated = system.gate[:, time, :, None] * h * system.C[:, time, None, :]
        energy += gated.square().sum((0, 1)).double()
    channels, N = energy.shape
    lost = []
    for r in (N // 2, N // 4):
        kept = [energy.sum(0).topk(r).values.sum(), energy.flatten().topk(channels * r).values.sum()]
        lost += [float(1 - one / energy.sum()) for one in (*kept, in_buckets(energy, r))]
    return lost


def in_buckets(energy: Tensor, mean: int) -> Tensor:
    """What is kept if each channel has the first of its states, in an order that all share, as many as a bucket's width.

    So that a stock scan of each bucket reads the first rows of B and C. The widths are chosen by the price of a state.
    """
    N = energy.shape[1]
    ordered = energy[:, energy.sum(0).argsort(descending=True)]
    widths = torch.tensor([0, N // 8, N // 4, N // 2, N])
    kept = F.pad(ordered.cumsum(1), (1, 0))[:, widths]
    low, high = 0.0, float(kept.max())
    for _ in range(60):
        price = (low + high) / 2
        chosen = (kept - price * widths).argmax(1)
        low, high = (price, high) if widths[chosen].double().mean() > mean else (low, price)
    chosen = (kept - high * widths).argmax(1, keepdim=True)
    return kept.gather(1, chosen).sum()


def shared_maps(P: Tensor, output: Tensor) -> list[float]:
    """Of a Mamba-2 layer: lost with a map for each head, for pairs, for pairs of twice the states, and for all heads."""
    heads = len(P)
    total = float(balance_heads(P, output)[0].square().sum())

    def carried(parts: list[list[int]], states: int) -> float:
        """By so many states in all; a direction of a map costs one in each head that shares it."""
        sigma = balance_heads(torch.stack([P[part].sum(0) for part in parts]), output)[0].square()
        cost = torch.tensor([len(part) for part in parts], dtype=torch.float64)[:, None]
        order = (sigma / cost).flatten().argsort(descending=True)
        costs = cost.expand_as(sigma).flatten()[order].cumsum(0)
        return float(sigma.flatten()[order][costs <= states].sum())

    alone = balance_heads(P, output)[0].square()[:, :MEAN].sum(1)
    pairs = [(i, j) for i in range(heads) for j in range(i)]
    together = balance_heads(torch.stack([P[i] + P[j] for i, j in pairs]), output)[0].square()[:, :MEAN].sum(1)
    loss = {pair: float(alone[list(pair)].sum() - both) for pair, both in zip(pairs, together, strict=True)}
    left, chosen = set(range(heads)), []
    for i, j in sorted(loss, key=lambda pair: loss[pair]):
        if {i, j} <= left:
            chosen.append([i, j])
            left -= {i, j}
    chosen += [[head] for head in left]
    each, states = [[head] for head in range(heads)], heads * MEAN
    found = [carried(each, states), carried(chosen, states), carried(chosen, 2 * states)]
    return [1 - one / total for one in (*found, carried([list(range(heads))], states))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+")
    for folder in parser.parse_args().folder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = windows(CALIBRATION.read_text(encoding="utf-8"), tokenizer, 8, 256)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        config = CompreSSMConfig(state_size=8, refit=3, weights="gate")
        measurement = measure(model, ids, config)
        mamba = model.config.model_type == "mamba"
        columns = [f"{share} {kind}" for share in ("1/2", "1/4") for kind in ("by layer", "by channel", "in buckets")]
        columns = columns if mamba else ["a map a head", "a pair", "a pair, same parameters", "all"]
        print(f"{folder.name}: lost\n| layer | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
        for layer, statistics in zip(measurement.layers, measurement.statistics, strict=True):
            with torch.no_grad():
                if mamba:
                    reads = measurement.inputs[layer.index]
                    lost = by_channel(layer.read(torch.cat([read[0] for read in reads]), None))
                else:
                    lost = shared_maps(statistics.P_of_heads, statistics.groups[0].output)
            print(f"| {layer.index} | {' | '.join(f'{share:.2%}' for share in lost)} |", flush=True)


if __name__ == "__main__":
    main()
