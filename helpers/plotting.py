"""The look of every figure, and the figures that more than one notebook draws."""

from collections.abc import Mapping, Sequence
from statistics import fmean

import matplotlib.pyplot as plt

# Okabe and Ito's palette, safe for the common forms of colour blindness, with a darker grey
COLORS = "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #56B4E9 #F0E442 #666666"
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY = COLORS.split()


def set_style() -> None:
    """One look for all figures: large type for phones, a dpi that keeps notebooks small."""
    plt.rc("figure", figsize=(7.0, 3.6), dpi=100)
    plt.rcParams.update({"savefig.bbox": "tight", "font.size": 12, "lines.linewidth": 2.0})
    plt.rcParams.update({"legend.frameon": False, "grid.alpha": 0.25})
    plt.rc("axes", titlesize=13, titleweight="bold", titlelocation="left", grid=True)
    plt.rc("axes", prop_cycle=plt.cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, SKY]))
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("axes.formatter", min_exponent=5)  # log axes say 0.002 and 100


def show_loss(history: Sequence[Mapping], total: int, left: float | None, handle=None):
    """Draw training loss (nats a token, answer tokens only) by step on a log scale in a notebook
    cell, each step and the mean of the last 20, and the validation loss where there is one.

    `history`: the Trainer's log_history; `total`: steps of the run; `left`: the seconds it will
    still take, None at its end. Returns a handle; given back, its figure is drawn anew."""
    from IPython.display import display  # only a notebook has it

    losses = [entry["loss"] for entry in history if "loss" in entry]
    held_out = [(e["step"], e["eval_loss"]) for e in history if "eval_loss" in e]
    steps = range(1, len(losses) + 1)
    mean = [fmean(losses[max(0, i - 20) : i]) for i in steps]
    title = f"Loss from {losses[0]:.1f} to {mean[-1]:.2g}, {len(losses)} of {total} steps"
    title += "" if left is None else f", {left / 60:.0f} min left"
    figure, axes = plt.subplots()
    axes.plot(steps, losses, color=GREY, linewidth=0.7, alpha=0.7, label="one step")
    axes.plot(steps, mean, color=BLUE, label="mean of the last 20")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color=ORANGE, label="validation")
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats a token)", yscale="log")
    axes.set_xlim(0, total)
    axes.legend(loc="upper right")
    if handle:
        handle.update(figure)
    else:
        handle = display(figure, display_id=True)
    plt.close(figure)
    return handle


def draw_intervals(axes, values: Mapping, interval, color=BLUE, shift=0.0, label=None) -> None:
    """A row for each label: every value as a small dot, their mean, and a bar as wide as
    `interval(values)`, (mean, half width), says; rows are moved down by `shift`."""
    rows = [row + shift for row in range(len(values))]
    for row, points in zip(rows, values.values(), strict=True):
        axes.plot(points, [row] * len(points), "o", color=GREY, markersize=4, alpha=0.8, zorder=1)
    means, halves = zip(*map(interval, values.values()), strict=True)
    bars = {"fmt": "o", "color": color, "markersize": 8, "capsize": 4, "zorder": 2}
    axes.errorbar(means, rows, xerr=halves, label=label, **bars)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
