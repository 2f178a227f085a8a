"""README shows what was measured and predicted, not what somebody typed once."""

import re

from helpers import memory, profiles
from tests.notebooks import NOTEBOOKS, ROOT, code_cells

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_results_are_those_of_notebook_05():
    table = re.search(r"notebook 05 -->\n```\n(.*?)\n```", README, re.DOTALL).group(1)
    notebook = next(path for path in NOTEBOOKS if path.name.startswith("05"))
    outputs = "".join("".join(o.get("text", "")) for cell in code_cells(notebook) for o in cell["outputs"])
    assert table in outputs


def profile_row(profile) -> str:
    if profile.gpu_bytes:
        card = f"{profile.name.split('-')[1].upper()}, {profile.gpu_bytes / 1e9:.0f} GB"
    else:
        card = {"tiny": "any CPU", "cpu-7b": "CPU, 24 GB of RAM"}[profile.name]
    need = f"{memory.plan(memory.known_config(profile.model), profile).total / 1e9:.1f} GB" if profile.gpu_bytes else "none"
    batch = f"{profile.micro_batch} (× {profile.accumulation}) × {profile.max_length}"
    return f"| {card} | `{profile.name}` | {profile.model} | {profile.compute_dtype} | {batch} | {need} |"


def test_hardware_table_is_computed():
    for profile in profiles.PROFILES.values():
        assert profile_row(profile) in README, profile_row(profile)


def test_every_notebook_is_on_the_map_with_its_badge():
    rows = [line for line in README.splitlines() if line.startswith("| [")]
    for path in NOTEBOOKS:
        assert any(f"(notebooks/{path.name})" in row and f"/blob/main/notebooks/{path.name})" in row for row in rows), path.name


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z0-9-]+)", README)) <= targets
