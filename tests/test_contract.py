"""The contract that every notebook keeps. It reads stored notebooks; it executes nothing."""

import ast
import json
import re
import tomllib

import pytest

from tests.notebooks import NOTEBOOKS, ROOT, SETUP_CELL, code_cells, read, source, tags

CLAIMS = tomllib.loads((ROOT / "tests" / "claims.toml").read_text())["claim"]
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@by_name
def test_runs_in_order_without_errors(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run `make refresh`"
    assert not [o for cell in cells for o in cell["outputs"] if o["output_type"] == "error"]


@by_name
def test_setup_cell_is_the_same_everywhere(path):
    assert source(code_cells(path)[0]) == SETUP_CELL.read_text(encoding="utf-8").rstrip("\n"), "run `make setup-cell`"
    assert "setup" in tags(code_cells(path)[0])


@by_name
def test_outputs_hold_no_machine_paths_tokens_widgets_or_warnings(path):
    outputs = json.dumps([cell["outputs"] for cell in code_cells(path)])
    assert not re.findall(r"(?:/home/|/root/|/Users/|/tmp/|[A-Z]:\\\\Users)[\w./-]*", outputs)
    assert not re.findall(r"\bhf_[A-Za-z0-9]{20,}|\bghp_[A-Za-z0-9]{20,}", outputs)
    assert "application/vnd.jupyter.widget" not in outputs
    assert not re.findall(r"\b\w*Warning\b|Traceback", outputs)
    assert not [o for cell in code_cells(path) for o in cell["outputs"] if o.get("name") == "stderr"]


@by_name
def test_is_small_and_has_scrubbed_metadata(path):
    assert path.stat().st_size < 1_000_000
    notebook = read(path)
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert all(set(cell["metadata"]) <= {"tags", "jupyter"} for cell in notebook["cells"])
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


@by_name
def test_cells_are_short(path):
    long = [i for i, cell in enumerate(code_cells(path), 1) if len(source(cell).splitlines()) > 32]
    assert not long, f"code cells {long} are longer than 32 lines"


@by_name
def test_has_badge_navigation_summary_exercises_and_sources(path):
    text = "\n".join(source(cell) for cell in read(path)["cells"] if cell["cell_type"] == "markdown")
    assert f"https://colab.research.google.com/github/OWNER/qlora-by-hand/blob/main/notebooks/{path.name}" in text
    at = NOTEBOOKS.index(path)
    for neighbour in NOTEBOOKS[max(0, at - 1) : at] + NOTEBOOKS[at + 1 : at + 2]:
        assert f"({neighbour.name})" in text, f"no link to its neighbour {neighbour.name}"
    for heading in ("You will be able to", "## Summary", "## Exercises", "## Sources"):
        assert heading in text


@by_name
def test_figures_have_an_alternative_text(path):
    for cell in code_cells(path):
        if any("image/png" in output.get("data", {}) for output in cell["outputs"]):
            assert "alt:" in source(cell), "a cell that draws says what the figure shows in a comment `# alt: ...`"


def _local_links(path):
    text = (
        path.read_text(encoding="utf-8")
        if path.suffix == ".md"
        else "\n".join(source(c) for c in read(path)["cells"] if c["cell_type"] == "markdown")
    )
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", link)]


@pytest.mark.parametrize(
    "path", [*NOTEBOOKS, *ROOT.glob("*.md"), *(ROOT / "data").rglob("*.md"), *(ROOT / "tests").glob("*.md")], ids=lambda p: p.name
)
def test_local_links_resolve(path):
    broken = [link for link in _local_links(path) if not (path.parent / link.split("#")[0]).exists()]
    assert not broken


def _asserts(cell) -> bool:
    """Whether a cell's code contains an assertion: `assert`, or a call whose name begins with assert."""
    for node in ast.walk(ast.parse(source(cell))):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1].startswith("assert"):
            return True
    return False


def test_every_claim_has_its_asserting_cell(capsys):
    numbers = {path.name[:2]: path for path in NOTEBOOKS}
    pending, missing = [], []
    for claim in CLAIMS:
        for number in claim["notebooks"]:
            if number not in numbers:
                pending.append(f"{claim['id']} ({number})")
            elif not any(f"claim-{claim['id']}" in tags(cell) and _asserts(cell) for cell in code_cells(numbers[number])):
                missing.append(f"{claim['id']} in {numbers[number].name}")
    homes = sum(len(claim["notebooks"]) for claim in CLAIMS)
    with capsys.disabled():
        print(
            f"\nclaims ledger: {len(CLAIMS)} claims with {homes} homes, {homes - len(pending) - len(missing)} shown, {len(pending)} pending (notebook not written yet)"
        )
    assert not missing, f"no tagged, asserting cell for: {missing}"


def test_every_claim_tag_is_in_the_ledger():
    known = {f"claim-{claim['id']}" for claim in CLAIMS}
    assert not {tag for path in NOTEBOOKS for cell in code_cells(path) for tag in tags(cell) if tag.startswith("claim-")} - known
