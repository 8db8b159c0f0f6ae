"""What a smaller state buys a server: tokens/s of decoding as a CUDA graph, and what its sequences take in memory.

`python tests/gpu/decoding.py` prints a markdown row for a Mamba-2 of the shapes of `state-spaces/mamba2-130m` at its own size, projected
(with the gated norm in one launch, as it is, and with the stock one) and selected. `--tiny` rehearses on a CPU.
"""

import argparse

import torch
from transformers import Mamba2Config

from hf_compressm.cli.speed import Workload, _cache, _decoding, _or_nan, build
from hf_compressm.modeling import modeling_compressm

ROWS = [
    ("N=128", None, "auto", True),
    ("project to 16", 16, "project", True),
    ("project to 16, stock norm", 16, "project", False),
    ("project to 64", 64, "project", True),
    ("project to 64, stock norm", 64, "project", False),
    ("select 64", 64, "select", True),
    ("N=128 again", None, "auto", True),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64, 256])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = {"hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24, "head_dim": 64, "vocab_size": 50288}
    if args.tiny:
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "vocab_size": 100}
    config = Mamba2Config(**shape, n_groups=1, state_size=128, tie_word_embeddings=True)
    work = Workload(repeats=args.repeats)
    one_launch, graph = modeling_compressm.gated_norm, device.type == "cuda"
    batches = [f"batch {batch}" for batch in args.batches]
    print(f"| tokens/s | {' | '.join(batches)} | MB a sequence, GB for 1,000 |")
    print(f"|{'---|' * (2 + len(batches))}", flush=True)
    for name, size, realization, ours in ROWS:
        modeling_compressm.gated_norm = one_launch if ours else lambda norm, x, gate: norm(x, gate)
        model = build(config, device, size, realization).eval().requires_grad_(False).to(torch.bfloat16)

        def ids(batch: int) -> torch.Tensor:
            return torch.randint(shape["vocab_size"], (batch, 1), device=device)

        with torch.no_grad():
            cells = [
                f"{_or_nan(lambda m=model, b=batch: _decoding(m, ids(b), work, graph)):,.0f}" for batch in args.batches
            ]
            (cache,) = _cache(model(ids(8), use_cache=True)).values()
        states = [
            state
            for layer in cache.layers
            for kind in (layer.recurrent_states, layer.conv_states)
            for state in kind.values()
        ]
        total = sum(t.nbytes for t in states)
        each = total / len(states[0])
        print(f"| {name} | {' | '.join(cells)} | {each / 1e6:.2f} |", flush=True)
        del cache, states


if __name__ == "__main__":
    main()
