"""Expert loads for the tests of this folder."""

import torch

from megatron_ds.model.moe.sparse_mlp import ExpertLoad


def expert_load(chosen, dropped=None, bias=None, *, ranks=1, layers=None):
    """``chosen``, ``dropped`` and ``bias`` are nested lists, a row per layer; layer i sent i + 1 megabytes."""
    chosen_LE = torch.tensor(chosen)
    count_L = torch.arange(1, len(chosen) + 1).double()
    return ExpertLoad(
        layers=tuple(layers or range(len(chosen))),
        chosen_LE=chosen_LE,
        dropped_LE=torch.zeros_like(chosen_LE) if dropped is None else torch.tensor(dropped),
        bias_LE=None if bias is None else torch.tensor(bias, dtype=torch.float32),
        ranks=ranks,
        bytes_sent_L=1e6 * count_L,
        seconds_L=0.1 * count_L,
        exposed_seconds_L=0.01 * count_L,
        auxiliary_loss_L=0.5 * count_L,
    )
