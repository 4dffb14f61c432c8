"""The load of every expert of every layer as one picture.

Colour is lambda (load / mean load of the layer) on a fixed logarithmic scale around 1, so that pictures of different
steps can be compared: white is balance, red twice the mean and more, blue half of it and less, gold an expert that
received nothing. Vertical lines part the expert-parallel ranks.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_ds.checkpoint.manifest import replace_file
from megatron_ds.train.expert_load import layer_figures

if TYPE_CHECKING:  # a dense run needs nothing of it
    from megatron_ds.model.moe.sparse_mlp import ExpertLoad

RANGE = 4.0
"""The scale ends at this multiple of the mean, and at its inverse."""
MOST_NUMBERS = 256
"""Cells up to which each also shows its number."""
MOST_TICKS = 32
"""Most labels of an axis; with more experts or layers, some go without."""


def draw_heatmap(load: "ExpertLoad", title: str, path: Path) -> None:
    """Write the picture as PNG to ``path``, replacing an older one at once."""
    # Here, since matplotlib takes half a second and dense runs do not need it. No pyplot: it would choose a screen.
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    factor_LE = layer_figures(load).load_factor_LE.numpy()
    num_layers, num_experts = factor_LE.shape
    size = (min(max(2.4 + 0.45 * num_experts, 6.4), 16), min(max(1.6 + 0.34 * num_layers, 3), 12))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.add_subplot()
    colors = colormaps["RdBu_r"].with_extremes(bad="gold")
    # LogNorm masks zeros, which makes them "bad".
    image = axes.imshow(factor_LE, cmap=colors, norm=LogNorm(1 / RANGE, RANGE), aspect="auto", interpolation="nearest")
    bar = figure.colorbar(image, extend="both", aspect=30, pad=0.01, ticks=[1 / 4, 1 / 2, 1, 2, 4])
    bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
    bar.minorticks_off()
    bar.set_label("load / mean (gold: none)")
    axes.set(title=title, xlabel="expert", ylabel="layer")
    for labels, ticks in ((load.layers, axes.set_yticks), (range(num_experts), axes.set_xticks)):
        every = -(-len(labels) // MOST_TICKS)
        ticks(range(0, len(labels), every), labels[::every])
    for border in range(num_experts // load.ranks, num_experts, num_experts // load.ranks):
        axes.axvline(border - 0.5, color="black", linewidth=0.8)
    if factor_LE.size <= MOST_NUMBERS:
        for (row, column), factor in np.ndenumerate(factor_LE):
            ink = "black" if 1 / 2 < factor < 2 or factor == 0 else "white"
            axes.text(column, row, f"{factor:.2f}", ha="center", va="center", fontsize=7, color=ink)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    replace_file(path, picture.getvalue())
