"""README shows what was measured and predicted, not what somebody typed once."""

import json
import re

import pytest

from helpers import memory, profiles
from tests.measure_gpu import MEASURED
from tests.notebooks import NOTEBOOKS, ROOT, notebook, printed

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAP = [line for line in README.splitlines() if line.startswith("| [")]


def test_results_are_those_of_notebook_05():
    table = re.search(r"notebook 05 -->\n```\n(.*?)\n```", README, re.DOTALL).group(1)
    header, *rows = table.splitlines()
    assert header.split() == ["score", "before", "after", "reworded"] and len(rows) >= 6
    assert all(row in printed(notebook("05")).splitlines() for row in rows)


def measured(profile) -> str:
    """What was measured with a profile: RAM in the rehearsal; on a GPU the stored bytes, which are
    counted, and the most that a step added to them in data/measured."""
    if profile.name == "cpu-7b":
        record = json.loads((ROOT / "data" / "rehearsal" / "rehearsal_7b.json").read_text())
        return f"{record['summary']['run_peak_bytes'] / 1e9:.1f} GB of RAM"
    if not profile.gpu_bytes:
        return "runs in CI"
    runs = [card[profile.name]["full"] for card in json.loads(MEASURED.read_text()).values()]
    stored = memory.stored(memory.known_config(profile.model), profile, "qlora")
    held = sum(stored[name] for name in ("weights", "constants", "rest", "adapter"))
    peak = held + max(run["max_memory_allocated"] - run["memory_allocated"] for run in runs)
    return f"{peak / 1e9:.1f} GB"


@pytest.mark.parametrize("profile", profiles.PROFILES.values(), ids=profiles.PROFILES)
def test_hardware_table_is_computed(profile):
    card, need = {"tiny": "any CPU", "cpu-7b": "CPU, 24 GB of RAM"}.get(profile.name), "none"
    if profile.gpu_bytes:
        card = f"{profile.name.split('-')[1].upper()}, {profile.gpu_bytes / 1e9:.0f} GB"
        plan = memory.plan(memory.known_config(profile.model), profile)
        need = f"{plan.total / 1e9:.1f} GB"
    batch = f"{profile.micro_batch} (× {profile.accumulation}) × {profile.max_length}"
    cells = [card, f"`{profile.name}`", profile.model, profile.compute_dtype, batch, need]
    assert f"| {' | '.join([*cells, measured(profile)])} |" in README


def test_every_notebook_is_on_the_map_with_its_badge():
    assert len(MAP) == len(NOTEBOOKS)
    for path, row in zip(NOTEBOOKS, MAP, strict=True):
        assert f"(notebooks/{path.name})" in row and f"/blob/main/notebooks/{path.name})" in row


def test_every_number_of_the_findings_was_printed_by_its_notebook():
    share = r"\d+(?:[.:]\d+)?(?:e-\d+)?%?(?:(?: of | ± )\d+(?:\.\d+)?)?"
    numbers = 0
    for path, row in zip(NOTEBOOKS, MAP, strict=True):
        for number in re.findall(rf"(?<![\w.-])[+-]?{share}(?![\w-])", row.split(" | ")[2]):
            numbers += 1
            there = re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", printed(path))
            assert there, f"{path.name} printed no {number}"
    assert numbers >= 12


def test_the_answer_on_how_much_data_is_what_notebook_07_printed():
    row = re.compile(r"^(50|100|200|500|2000) +(0\.\d+) +(0\.\d+) +(0\.\d+) ", re.MULTILINE)
    found = {int(n): list(map(float, s)) for n, *s in row.findall(printed(notebook("07")))}
    lost = {
        size: [most - some for most, some in zip(found[2000], found[size], strict=True)]
        for size in (200, 500)
    }
    assert "500 examples did as well as 2,000" in README and max(lost[500]) < 0.01
    assert "200 lost two to five points" in README
    assert min(lost[200]) >= 0.02 and max(lost[200]) < 0.05
