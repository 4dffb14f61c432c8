"""What the attention mask costs: our tiled kernel against PyTorch's, forward and backward on one core.

Local attention with a window of 128 at two lengths, against causal SDPA (which sees everything) and against SDPA with
the same mask as a bool tensor, whose gradients ours must match. Below, the kernel that full attention uses on a CPU.

    python benchmarks/attention_mask.py --check
"""

import sys

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.model.attention_mask import Packing
from megatron_ds.model.tiled_attention import tiled_attention

HEADS, HEAD_DIM, WINDOW = 4, 64, 128
GOALS = {1024: 1.5, 4096: 4.0}
"""Length -> how many times faster than causal SDPA a local layer has to be."""


def main(argv: list[str]) -> int:
    options = harness.parser(__doc__, rounds=7).parse_args(argv)
    torch.set_num_threads(1)
    report = harness.Report(f"Attention, forward + backward, fp32, B=1 H={HEADS} K={HEAD_DIM}, window {WINDOW}")
    for length, goal in GOALS.items():
        compare(report, length, goal, options.rounds)
    return report.finish(options)


def compare(report: harness.Report, length: int, goal: float, rounds: int) -> None:
    """Time the contestants at one length and compare the gradients of the two that compute the same."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, 1, HEADS, length, HEAD_DIM, generator=generator)
    qkv = [x.requires_grad_() for x in (q, k, v)]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = (distance >= 0) & (distance <= WINDOW)
    packing = Packing(torch.zeros(1, length, dtype=torch.long))

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, qkv, grad)

    contestants = {
        "local, tiled": lambda: gradients(tiled_attention(*qkv, packing, window=WINDOW)[0]),
        "local, SDPA with a mask": lambda: gradients(F.scaled_dot_product_attention(*qkv, attn_mask=visible)),
        "full, tiled": lambda: gradients(tiled_attention(*qkv, packing)[0]),
        "full, SDPA causal": lambda: gradients(F.scaled_dot_product_attention(*qkv, is_causal=True)),
    }
    seconds = harness.paired_seconds(contestants, rounds)
    for name, samples in seconds.items():
        report.add(f"S={length} {name}", "ms", [1e3 * s for s in samples])
    causal, masked = seconds["full, SDPA causal"], seconds["local, SDPA with a mask"]
    local = seconds["local, tiled"]
    report.add_ratio(f"S={length} SDPA causal / local tiled", causal, local, at_least=goal)
    report.add_ratio(f"S={length} SDPA with a mask / local tiled", masked, local)
    report.add_ratio(f"S={length} SDPA causal / full tiled", causal, seconds["full, tiled"])
    pairs = zip(contestants["local, tiled"](), contestants["local, SDPA with a mask"](), strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs)
    report.add(f"S={length} largest gradient difference", "", difference, at_most=1e-5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
