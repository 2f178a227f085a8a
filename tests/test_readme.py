"""README shows what was measured and predicted, not what somebody typed once."""

import json
import re

from helpers import memory, profiles
from tests.notebooks import NOTEBOOKS, ROOT, code_cells

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_results_are_those_of_notebook_05():
    table = re.search(r"notebook 05 -->\n```\n(.*?)\n```", README, re.DOTALL).group(1)
    notebook = next(path for path in NOTEBOOKS if path.name.startswith("05"))
    assert table in printed(notebook)


def measured(profile) -> str:
    """What was measured with a profile: RAM in the rehearsal; memory of a GPU is "no" until data/measured_gpu.json has it."""
    if profile.name == "cpu-7b":
        layouts = json.loads((ROOT / "data" / "rehearsal_7b.json").read_text())["layouts"].values()
        return f"{max(layout['summary']['run_peak_bytes'] for layout in layouts) / 1e9:.1f} GB of RAM"
    file = ROOT / "data" / "measured_gpu.json"
    cards = json.loads(file.read_text()).items() if file.exists() else ()
    peaks = [
        f"{value['peak_bytes'] / 1e9:.1f} GB on {card}"
        for card, found in cards
        for value in found.values()
        if value.get("profile") == profile.name and value.get("peak_bytes")
    ]
    return ", ".join(peaks) or ("no" if profile.gpu_bytes else "runs in CI")


def profile_row(profile) -> str:
    if profile.gpu_bytes:
        card = f"{profile.name.split('-')[1].upper()}, {profile.gpu_bytes / 1e9:.0f} GB"
    else:
        card = {"tiny": "any CPU", "cpu-7b": "CPU, 24 GB of RAM"}[profile.name]
    need = f"{memory.plan(memory.known_config(profile.model), profile).total / 1e9:.1f} GB" if profile.gpu_bytes else "none"
    batch = f"{profile.micro_batch} (× {profile.accumulation}) × {profile.max_length}"
    return f"| {card} | `{profile.name}` | {profile.model} | {profile.compute_dtype} | {batch} | {need} | {measured(profile)} |"


def test_hardware_table_is_computed():
    for profile in profiles.PROFILES.values():
        assert profile_row(profile) in README, profile_row(profile)


def test_every_notebook_is_on_the_map_with_its_badge():
    rows = [line for line in README.splitlines() if line.startswith("| [")]
    for path in NOTEBOOKS:
        assert any(f"(notebooks/{path.name})" in row and f"/blob/main/notebooks/{path.name})" in row for row in rows), path.name


def printed(path) -> str:
    """All text that a notebook's cells printed, as stored."""
    return "".join("".join(o.get("text", "")) for cell in code_cells(path) for o in cell["outputs"])


def test_every_number_of_the_findings_was_printed_by_its_notebook():
    rows = [line.split(" | ") for line in README.splitlines() if line.startswith("| [")]
    numbers = 0
    for path, (_, _, finding, _) in zip(NOTEBOOKS, rows, strict=True):
        for number in re.findall(r"(?<![\w.-])[+-]?\d+(?:[.:]\d+)?(?:e-\d+)?%?(?:(?: of | ± )\d+(?:\.\d+)?)?(?![\w-])", finding):
            numbers += 1
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", printed(path)), f"{path.name} printed no {number}"
    assert numbers >= 12


def test_the_answer_on_how_much_data_is_what_notebook_07_printed():
    notebook = next(path for path in NOTEBOOKS if path.name.startswith("07"))
    found = re.findall(r"^(50|100|200|500|2000) +(0\.\d+) +(0\.\d+) +(0\.\d+) ", printed(notebook), re.MULTILINE)
    exact = {int(size): [float(score) for score in scores] for size, *scores in found}
    lost = {size: [most - some for most, some in zip(exact[2000], exact[size], strict=True)] for size in (200, 500)}
    assert "500 examples did as well as 2,000" in README and max(lost[500]) < 0.01
    assert "200 lost two to five points" in README and min(lost[200]) >= 0.02 and max(lost[200]) < 0.05


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z0-9-]+)", README)) <= targets


def rehearsal_rows() -> list[str]:
    """README's table of the rehearsal, from data/rehearsal_7b.json."""
    layouts = json.loads((ROOT / "data" / "rehearsal_7b.json").read_text())["layouts"]
    names = {"hub": "two files, as on the hub", "shards": "many safetensors files", "bin": "pickled, converted first"}
    rows = []
    for layout, name in names.items():
        phases, found = layouts[layout]["phases"], layouts[layout]["summary"]
        seconds = [
            f"{phases[phase]['load_seconds']:.0f} s" if phase in phases else "" for phase in ("plain", "load", "cache_load")
        ]
        peaks = [f"{found[key] / 1e9:.2f} GB" for key in ("loading_peak_anonymous_bytes", "run_peak_bytes")]
        rows.append(f"| {name} | {' | '.join(seconds + peaks)} |")
    return rows


def test_the_rehearsal_is_quoted_and_met_its_targets():
    record = json.loads((ROOT / "data" / "rehearsal_7b.json").read_text())
    for row in rehearsal_rows():
        assert row in README, row
    for layout in record["layouts"].values():
        found = layout["summary"]
        assert found["within_targets"] and found["linear4bit_modules"] == 128
        assert abs(found["stored_bytes"] / found["stored_bytes_predicted"] - 1) <= 0.05
        assert found["loading_peak_anonymous_bytes"] <= 4.6e9 and found["run_peak_bytes"] <= 8e9
        assert found["load_over_cache_load_seconds"] >= 3
    assert record["layouts"]["hub"]["summary"]["plain_over_load_seconds"] >= 1.5
    assert record["layouts"]["hub"]["summary"]["stored_bytes"] == record["layouts"]["bin"]["summary"]["stored_bytes"]
    assert f"{record['layouts']['hub']['summary']['stored_bytes']:,} bytes on every path" in README
    hub, pickled = record["layouts"]["hub"], record["layouts"]["bin"]["phases"]
    plan, libraries = hub["summary"]["run_planned_bytes"], pickled["refused"]["peak_rss_bytes"]
    direct, conversion = pickled["load_pickled"], pickled["convert"]
    for sentence in (
        f"said {plan / 1e9:.2f} GB for the whole run",
        f"takes {libraries / 1e9:.2f} GB more",
        f"{direct['peak_anonymous_bytes'] / 1e9:.2f} GB of anonymous memory, {direct['peak_rss_bytes'] / 1e9:.2f} GB with the mapped",
        f"in {conversion['peak_anonymous_bytes'] / 1e9:.2f} GB of anonymous memory.",
    ):
        assert sentence in README, sentence
    assert 25 < hub["phases"]["resume"]["seconds_a_step"] < 35, "half a minute"
    plain = hub["phases"]["plain"]
    assert plain["of_it_quantizing_seconds"] > 0.95 * plain["load_seconds"], "nearly all"
    bits = {layout["phases"]["load"]["base_sha256"] for layout in record["layouts"].values()}
    assert len(bits) == 1, "one seed, the same weights in each layout"
