"""Pictures for TensorBoard."""

from __future__ import annotations

from matplotlib.figure import Figure
from torch import Tensor

MANY = 30  # classes from which single names and numbers can no longer be read


def confusion_figure(confusion_CC: Tensor, names: list[str]) -> Figure:
    """Draw a confusion matrix, each row as shares of its class.

    Args:
        confusion_CC: counts, (C, C); row: the true class, column: the predicted one.
        names: the C class names.
    """
    counts = confusion_CC.double()
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    few = len(names) <= MANY
    side = 1.6 + 0.38 * len(names) if few else 8.0
    figure = Figure(figsize=(max(4.0, side + 0.6), max(3.6, side)), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if few:
        ticks = range(len(names))
        short = [n if len(n) <= 14 else n[:13] + "…" for n in names]
        axes.set_xticks(ticks, short, rotation=90 if max(map(len, short)) > 2 else 0)
        axes.set_yticks(ticks, short)
        for i in ticks:
            for j in ticks:
                if counts[i, j]:
                    colour = "white" if shares[i, j] > 0.5 else "black"
                    axes.text(j, i, f"{int(counts[i, j])}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(picture, ax=axes, label="share of the true class", shrink=0.8)
    return figure
