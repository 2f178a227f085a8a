"""Pictures: one palette that colour-blind readers can tell apart, sizes that a phone can show, a hero figure that says what README says."""

import base64
import io
import itertools
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from data import build_hero
from helpers import plotting
from tests.notebooks import NOTEBOOKS, ROOT, code_cells, source

README = (ROOT / "README.md").read_text(encoding="utf-8")
PHONE = 390  # CSS pixels
# Machado, Oliveira, Fernandes (2009), severity 1, on linear RGB
SIMULATED = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "full colour vision": np.eye(3).tolist(),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # sRGB, D65


def lab(color: str, kind: str) -> np.ndarray:
    """CIE L*a*b* of a colour as somebody with `kind` of colour vision sees it."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(np.array(SIMULATED[kind]) @ linear, 0, 1) / (TO_XYZ @ np.ones(3))
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def nearest(colors: list[str], kind: str) -> float:
    """The smallest colour difference (CIE76 delta E) between any two of `colors`."""
    return min(float(np.linalg.norm(lab(a, kind) - lab(b, kind))) for a, b in itertools.combinations(colors, 2))


DRAWN_TOGETHER = {
    "lines": [plotting.BLUE, plotting.ORANGE, plotting.GREEN, plotting.RED],
    "grouped bars": [plotting.GREY, plotting.BLUE, plotting.ORANGE, plotting.GREEN],
    "memory": [color for _, color in plotting.MEMORY_PARTS.values()],
}


@pytest.mark.parametrize("kind", SIMULATED)
@pytest.mark.parametrize("colors", DRAWN_TOGETHER.values(), ids=DRAWN_TOGETHER)
def test_colours_drawn_together_differ_for_every_reader(colors, kind):
    assert nearest(colors, kind) > 15  # 2.3 is just noticeable side by side


def test_the_simulation_would_see_a_bad_palette():
    assert nearest(["red", "green", "blue"], "full colour vision") > 60
    assert nearest(["#c0504d", "#7f7f32"], "deuteranopia") < 15


def test_the_cycle_of_lines_is_the_palette():
    plotting.set_style()
    cycle = [entry["color"] for entry in plt.rcParams["axes.prop_cycle"]]
    assert cycle[:4] == DRAWN_TOGETHER["lines"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_figures_can_be_read_on_a_phone(path):
    """Written letters end at 5 CSS pixels or more on a screen 390 wide, tick labels and titles at 7."""
    for number, cell in enumerate(code_cells(path), 1):
        for output in cell["outputs"]:
            if "image/png" not in output.get("data", {}):
                continue
            width = Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"]))).width
            shrunk = min(1.0, PHONE / width) * 100 / 72  # CSS pixels a point, at the 100 dpi of set_style
            smallest = min([9.0, *map(float, re.findall(r"fontsize=([\d.]+)", source(cell)))])
            assert 12 * shrunk >= 6.5, f"cell {number}: a figure {width} pixels wide"
            assert smallest * shrunk >= 4.9, f"cell {number}: letters of {smallest} points, {width} pixels wide"


def test_the_palette_is_the_only_source_of_colours():
    allowed = {"white", "black", "none", "gray", "grey"}
    for path in NOTEBOOKS:
        for cell in code_cells(path):
            named = re.findall(r"(?<!face)(?<!edge)color=\"([^\"]+)\"", source(cell))
            assert set(named) <= allowed, f"{path.name}: {named}"


def test_the_hero_says_what_readme_and_notebook_say():
    scores, planned = build_hero.printed_scores(), build_hero.plans()
    described = Image.open(build_hero.HERO).text["Description"]
    assert described == build_hero.describe(scores, planned), "run `make hero`"
    assert f"![{described}](data/hero.png)" in README
    assert build_hero.HERO.stat().st_size < 150_000


def test_the_hero_draws_these_numbers():
    scores, planned = build_hero.printed_scores(), build_hero.plans()
    left, right = build_hero.draw(scores, planned).axes
    written = [
        text.get_text() for text in [*left.texts, *right.texts, left.title, right.title, *(left._left_title, right._left_title)]
    ]
    assert f"Exact tickets: {scores['exact_match'][0]:.0%} before, {scores['exact_match'][1]:.0%} after" in written
    assert [text for text in written if text.endswith(" GB")] == [f"{plan.total / 1e9:.0f} GB" for plan in planned.values()]


def test_a_notebook_without_scores_is_told(tmp_path):
    empty = tmp_path / "05.ipynb"
    empty.write_text(json.dumps({"cells": []}))
    with pytest.raises(LookupError, match="05.ipynb holds no table of scores: run `make refresh ONLY=05`"):
        build_hero.printed_scores(empty)
