"""Draw data/hero.png, README's first figure: the tiny Falcon before and after, and Falcon-7b's memory. `python data/build_hero.py`

The scores are those that notebook 05 printed when it was last executed; the bars of memory are the planner's prediction. Nothing is
typed here. The picture's description (a PNG text field) is README's alternative text for it, and a test holds the two together.
"""

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("agg")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib.pyplot as plt

from helpers import memory, plotting
from helpers.gpus import capacity
from helpers.profiles import FALCON_7B, ROOT

HERO = ROOT / "data" / "hero.png"
NOTEBOOK = ROOT / "notebooks" / "05_finetune_falcon_7b.ipynb"
METHODS = {"full": "full\nfine-tuning", "lora": "LoRA", "qlora": "QLoRA"}


def printed_scores(notebook: Path = NOTEBOOK) -> dict[str, tuple[float, float, float]]:
    """Score: (before, after, after on reworded messages), from the table in the stored outputs. Raises LookupError if there is none."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    printed = "".join("".join(o.get("text", "")) for cell in cells for o in cell.get("outputs", []))
    rows = re.findall(r"^(\w+) +([01]\.\d{3}) +([01]\.\d{3}) +([01]\.\d{3})$", printed, re.MULTILINE)
    if not rows:
        raise LookupError(f"{notebook.name} holds no table of scores: run `make refresh ONLY=05`")
    return {name: tuple(map(float, numbers)) for name, *numbers in rows}


def plans() -> dict[str, memory.MemoryPlan]:
    """Falcon-7b trained on a T4, one example of 512 tokens, for each method."""
    config, profile = memory.known_config(FALCON_7B), memory.gpu_profile(FALCON_7B, "T4", 1, 512)
    return {method: memory.plan(config, profile, method) for method in METHODS}


def describe(scores: dict, planned: dict) -> str:
    """The figure in one sentence, for readers who do not see it."""
    before, after, reworded = scores["exact_match"]
    gigabytes = ", ".join(f"{planned[m].total / 1e9:.0f} GB with {METHODS[m]}".replace("\n", " ") for m in METHODS)
    return (
        f"Left: the tiny Falcon writes {before:.0%} of unseen tickets exactly before fine-tuning, {after:.0%} after, "
        f"{reworded:.0%} when the wording is new. Right, predicted: training Falcon-7b takes {gigabytes}; a T4 has "
        f"{capacity('T4') / 1e9:.0f} GB."
    )


def draw(scores: dict, planned: dict) -> plt.Figure:
    plotting.set_style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 4.0), width_ratios=(1, 1.1), layout="constrained")
    shown = {"valid\nJSON": "valid_json", "exact\nticket": "exact_match", "urgency": "urgency"}
    columns = zip(*(scores[name] for name in shown.values()), strict=True)
    plotting.draw_grouped_bars(left, list(shown), dict(zip(("before", "after", "new wording"), columns, strict=True)))
    before, after, _ = scores["exact_match"]
    left.set(title=f"Exact tickets: {before:.0%} before, {after:.0%} after", ylabel="share of unseen messages")
    parts = {METHODS[method]: asdict(plan) for method, plan in planned.items()}
    plotting.draw_memory(right, parts, {"T4": capacity("T4")}, limit=1.25 * planned["full"].total / 1e9)
    right.set(title="In 4 bits, Falcon-7b trains on a T4", xlabel="predicted memory (GB)")
    right.get_legend().set_bbox_to_anchor((0.4, -0.19))
    return figure


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    scores, planned = printed_scores(), plans()
    assert planned["qlora"].total < capacity("T4") < planned["full"].total, "the right title says so"
    figure = draw(scores, planned)
    figure.savefig(HERO, dpi=130, metadata={"Description": describe(scores, planned), "Software": None})
    print(describe(scores, planned))


if __name__ == "__main__":
    main()
