"""Draw data/hero/hero.png, README's first figure: the tiny Falcon before and after, and memory.

`python data/hero/build.py`. The scores are those that notebook 05 printed when it was last
executed; the bars of memory are the planner's prediction. Nothing is typed here. The picture's
description (a PNG text field) is README's alternative text for it; a test holds the two together.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib.pyplot as plt

from helpers import memory, plotting
from helpers.environment import ROOT
from helpers.profiles import FALCON_7B

HERO = Path(__file__).resolve().parent / "hero.png"
NOTEBOOK = ROOT / "notebooks" / "05_finetune_falcon_7b.ipynb"
METHODS = {"full": "16-bit full\nfine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
PARTS = {  # what is drawn as one part of a bar
    "weights": (("weights", "constants", "rest", "casts", "workspace"), plotting.BLUE),
    "gradients, optimizer": (("gradients", "optimizer", "adapter"), plotting.ORANGE),
    "the rest": ((), plotting.GREEN),  # what the two above leave
}


def printed_scores(notebook: Path = NOTEBOOK) -> dict[str, tuple[float, float, float]]:
    """Score: (before, after, after on new wordings) of the table in the stored outputs.

    LookupError if there is none.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    printed = "".join("".join(o.get("text", "")) for cell in cells for o in cell.get("outputs", []))
    share = r" +([01]\.\d{3})"
    rows = re.findall(rf"^(\w+){share}{share}{share}$", printed, re.MULTILINE)
    if not rows:
        raise LookupError(f"{notebook.name} holds no table of scores: run `make refresh ONLY=05`")
    return {name: tuple(map(float, numbers)) for name, *numbers in rows}


def plans() -> dict[str, memory.MemoryPlan]:
    """Falcon-7b trained on a T4, one example of 512 tokens, for each method."""
    config, profile = memory.known_config(FALCON_7B), memory.gpu_profile(FALCON_7B, "T4", 1, 512)
    return {method: memory.plan(config, profile, method) for method in METHODS}


def describe(scores: dict, planned: dict) -> str:
    """The figure in words, for readers who do not see it."""
    before, after, reworded = scores["exact_match"]
    sizes = [f"{planned[key].total / 1e9:.0f} GB with {name}" for key, name in METHODS.items()]
    return (
        f"Left: the tiny Falcon writes {before:.0%} of unseen tickets exactly before fine-tuning, "
        f"{after:.0%} after, {reworded:.0%} when the wording is new (one run). Right, predicted "
        "with 8-bit Adam and one example of 512 tokens: training Falcon-7b takes "
        f"{', '.join(sizes)}; a T4 "
        f"has {memory.capacity('T4') / 1e9:.1f} GB, some of which must stay free."
    ).replace("\n", " ")


def draw_memory(axes, planned: dict) -> None:
    """A stacked bar (GB) for each method, its total beside it, and a line for a T4's memory."""
    for row, plan in enumerate(planned.values()):
        left = 0.0
        for name, (members, color) in PARTS.items():
            width = sum(getattr(plan, member) for member in members) / 1e9
            width = width or plan.total / 1e9 - left
            axes.barh(row, width, left=left, color=color, label=None if row else name)
            left += width
        size = axes.text(left + 0.6, row, f"{plan.total / 1e9:.0f} GB", va="center")
        size.set_bbox({"color": "white", "pad": 1})  # the T4's line ends at it
    card = memory.capacity("T4") / 1e9
    axes.axvline(card, color="black", linewidth=1, linestyle="--", zorder=0)
    axes.text(card + 0.6, len(planned) - 0.4, "T4")
    axes.set_yticks(range(len(planned)), [METHODS[method] for method in planned])
    axes.set(xlim=(0, 1.25 * planned["full"].total / 1e9), ylim=(len(planned) - 0.3, -0.6))
    axes.set_title("QLoRA of Falcon-7b fits\na T4, by prediction")
    axes.set_xlabel("predicted memory (GB), 8-bit Adam,\none example of 512 tokens")
    axes.grid(axis="y", visible=False)


def draw(scores: dict, planned: dict) -> plt.Figure:
    """The figure: scores on the left, memory on the right."""
    plotting.set_style()
    options = {"figsize": (7, 4), "width_ratios": (1, 1.25), "layout": "constrained"}
    figure, (left, right) = plt.subplots(1, 2, **options)
    shares = scores["exact_match"]
    bars = left.bar(["before", "after", "new\nwording"], shares, color=plotting.GREY)
    left.bar_label(bars, fmt="{:.0%}", padding=2)
    left.grid(axis="x", visible=False)
    left.yaxis.set_major_formatter("{x:.0%}")
    title = "Tiny Falcon: {:.0%} exact,\nthen {:.0%}, {:.0%} if reworded".format(*shares)
    left.set(title=title, ylabel="share of messages, one run", ylim=(0, 1.12))
    draw_memory(right, planned)
    figure.legend(ncols=3, loc="outside lower right", columnspacing=1)
    return figure


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    scores, planned = printed_scores(), plans()
    fits = planned["qlora"].total < memory.capacity("T4") < planned["full"].total
    assert fits, "the right title says so"
    figure, words = draw(scores, planned), describe(scores, planned)
    figure.savefig(HERO, dpi=130, metadata={"Description": words, "Software": None})
    print(words)


if __name__ == "__main__":
    main()
