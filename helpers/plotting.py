"""The look of every figure, and the figures that more than one notebook draws. Imports nothing of the series."""

import math
import sys
import time
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt

# Okabe and Ito's palette, safe for the common forms of colour blindness, with a grey that nobody takes for the green (tests/test_pictures.py)
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
    "#666666",
)


def set_style() -> None:
    """One look for all figures: large type for phones, no top and right frame, a dpi that keeps a notebook small."""
    plt.rcParams.update(
        {
            "figure.figsize": (7.0, 3.6),
            "figure.dpi": 100,
            "savefig.bbox": "tight",
            "font.size": 12,
            "axes.titlesize": 13,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "axes.formatter.min_exponent": 5,  # log axes say 0.002 and 100; see powers_of_ten for those that reach farther
            "lines.linewidth": 2.0,
            "legend.frameon": False,
            "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, SKY]),
        }
    )


def powers_of_ten(axis) -> None:
    """Label a log axis that spans many decades with powers of ten, all of them."""
    axis.set_major_formatter(lambda value, _: f"$10^{{{round(math.log10(value))}}}$")
    axis.set_minor_formatter("")


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel, where a figure can be updated in place."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def draw_loss(axes, losses: Sequence[float], title: str) -> None:
    """Training loss (nats a token, answer tokens only) by step on a log scale: each step, and the mean of the last 20."""
    steps = range(1, len(losses) + 1)
    mean = [sum(losses[max(0, i - 20) : i]) / min(i, 20) for i in steps]
    axes.plot(steps, losses, color=GREY, linewidth=0.7, alpha=0.7, label="one step")
    axes.plot(steps, mean, color=BLUE, label="mean of 20 steps")
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats a token)", yscale="log")
    axes.legend(loc="upper right")


class LiveLoss:
    """A loss curve that redraws itself in a notebook cell while training runs, at most every `seconds`; its last state stays as output."""

    def __init__(self, total_steps: int, seconds: float = 2.0):
        self.total, self.seconds, self.last, self.handle = total_steps, seconds, 0.0, None

    def update(self, losses: Sequence[float], force: bool = False) -> None:
        from IPython.display import display  # only a notebook has it

        if not losses or (not force and time.monotonic() - self.last < self.seconds):
            return
        figure, axes = plt.subplots()
        recent = losses[-20:]
        draw_loss(
            axes, losses, f"Loss from {losses[0]:.1f} to {sum(recent) / len(recent):.2g} in {len(losses)} of {self.total} steps"
        )
        axes.set_xlim(0, self.total)
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)
        plt.close(figure)
        self.last = time.monotonic()


def _share(value: float) -> str:
    """Two digits, cut rather than rounded, so that 1 means all."""
    return f"{math.floor(100 * value) / 100:.2f}".lstrip("0") if 0 < value < 1 else f"{value:.0f}"


def draw_grouped_bars(axes, labels: Sequence[str], groups: Mapping[str, Sequence[float]]) -> None:
    """For each label one bar a group: shares in [0, 1], written on the bars. The first group is grey, the ground to compare with."""
    width = 0.8 / len(groups)
    for k, ((name, values), color) in enumerate(zip(groups.items(), (GREY, BLUE, ORANGE, GREEN), strict=False)):
        bars = axes.bar(
            [i + (k - (len(groups) - 1) / 2) * width for i in range(len(labels))], values, width * 0.95, color=color, label=name
        )
        axes.bar_label(bars, [_share(value) for value in values], fontsize=9, padding=2)
    axes.set_ylim(0, 1.12)
    axes.set_xticks(range(len(labels)), labels)
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(groups))


MEMORY_PARTS = {  # what a bar of draw_memory shows together, in this order
    "weights": (("weights", "constants", "rest", "casts", "workspace"), BLUE),
    "gradients": (("gradients",), ORANGE),
    "optimizer": (("optimizer",), RED),
    "adapter": (("adapter",), YELLOW),
    "activations, logits": (("activations", "logits"), GREEN),
    "CUDA context": (("context",), GREY),
}


def draw_memory(axes, plans: Mapping[str, Mapping[str, int]], cards: Mapping[str, int], limit: float) -> None:
    """One stacked bar (GB) for each label: its plan as a mapping of part to bytes; a line for each card; bars over `limit` end in an arrow."""
    for row, parts in enumerate(plans.values()):
        left = 0.0
        for name, (members, color) in MEMORY_PARTS.items():
            width = sum(parts[member] for member in members) / 1e9
            shown = min(width, max(0.0, limit - left))
            axes.barh(row, shown, left=left, color=color, label=name if row == 0 else None)
            left += width
        inside = left > 0.93 * limit
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        place = {"ha": "right", "weight": "bold", "color": "white"} if inside else {"ha": "left", "bbox": clear}
        text = f"{left:.0f} GB" + (" →" if left > limit else "")
        axes.text(0.99 * limit if inside else left + 0.01 * limit, row, text, va="center", fontsize=10, **place)
    for card, size in cards.items():
        axes.axvline(size / 1e9, color="black", linewidth=1, linestyle="--", zorder=0)
        axes.text(
            size / 1e9,
            -0.8,
            card,
            ha="center",
            va="center",
            fontsize=10,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    axes.set_yticks(range(len(plans)), list(plans))
    axes.set(xlim=(0, limit), ylim=(len(plans) - 0.5, -1.1))
    axes.grid(axis="y", visible=False)
    axes.legend(ncols=3, fontsize=10, loc="upper center", bbox_to_anchor=(0.45, -0.14))


def draw_intervals(
    axes, values: Mapping[str, Sequence[float]], interval, color: str = BLUE, shift: float = 0.0, label=None
) -> None:
    """A row for each label: every value as a small dot, their mean, and a bar as wide as `interval(values)`, (mean, half width), says."""
    for row, points in enumerate(values.values()):
        mean, half = interval(points)
        axes.plot(points, [row + shift] * len(points), "o", color=GREY, markersize=4, alpha=0.8, zorder=1)
        axes.errorbar(
            mean, row + shift, xerr=half, fmt="o", color=color, markersize=8, capsize=4, zorder=2, label=None if row else label
        )
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
