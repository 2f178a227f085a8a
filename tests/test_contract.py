"""The contract that notebooks, helpers and pages keep. It reads what is stored; nothing is run."""

import ast
import base64
import getpass
import io
import json
import platform
import re
import tomllib

import nbformat
import pytest
from PIL import Image

from tests.notebooks import NOTEBOOKS, ROOT, SETUP_CELL, code_cells, prose, read, source, tags
from tests.publish import linked
from tests.refresh import scrubbed

CLAIMS = tomllib.loads((ROOT / "tests" / "claims.toml").read_text())["claim"]
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FOLDERS = ("notebooks", "helpers", "data", "tests", ".github")
PAGES = [*ROOT.glob("*.md"), *(page for name in FOLDERS for page in (ROOT / name).rglob("*.md"))]
PAGES = [page for page in PAGES if page.name != "card.md"]  # a template
HUB = r"'[\w-]+/[\w.-]+'"  # a name on it, in code
by_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def outputs(path) -> list[dict]:
    return [output for cell in code_cells(path) for output in cell["outputs"]]


def without_code(text: str) -> str:
    fenced = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"<code>.*?</code>|`+[^`\n]+`+", "", fenced)


@by_notebook
def test_runs_in_order_without_errors_from_the_same_setup_cell(path):
    cells = code_cells(path)
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "run `make refresh`"
    assert not [output for output in outputs(path) if output["output_type"] == "error"]
    wanted = SETUP_CELL.read_text(encoding="utf-8").rstrip("\n")
    assert source(cells[0]) == wanted, "run `make setup-cell`"
    assert "setup" in tags(cells[0]) and "NBVAL_CHECK_OUTPUT" not in wanted


@by_notebook
def test_outputs_hold_no_machine_paths_warnings_widgets_or_scripts(path):
    """They are text, pictures and tables, whole, and name neither this machine nor its user."""
    stored = json.dumps([cell["outputs"] for cell in code_cells(path)])
    assert not re.findall(r"(?:/home/|/root/|/Users/|/tmp/|[A-Z]:\\\\Users)[\w./-]*", stored)
    assert not re.findall(r"\b\w*Warning\b|Traceback|<\s*script|<iframe|javascript:", stored)
    assert not re.findall(r"\\u001b|\\r|\\b", stored), "colours and overwritten lines"
    here = {platform.node(), platform.node().partition(".")[0], getpass.getuser()}
    for name in here - {"localhost", "root", "runner"}:
        assert len(name) < 5 or not re.search(rf"\b{re.escape(name)}\b", stored)
    for output in outputs(path):
        assert output.get("name") != "stderr"
        data = output.get("data", {})
        assert set(data) <= {"text/plain", "text/markdown", "text/html", "image/png"}
        if "image/png" in data:  # a picture that is cut off is shown as a broken one
            assert base64.b64decode(data["image/png"]).endswith(b"IEND\xaeB`\x82")


@by_notebook
def test_is_small_with_short_cells_and_scrubbed_metadata(path):
    assert path.stat().st_size < 1_000_000
    notebook = read(path)
    stored = nbformat.read(path, as_version=4)
    assert scrubbed(stored) == stored  # solutions are folded, nothing tells of a machine or moment
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    long = [i for i, cell in enumerate(code_cells(path), 1) if source(cell).count("\n") > 31]
    assert not long, f"code cells {long} are longer than 32 lines"
    forms = "\n".join(map(source, code_cells(path)))
    assert not re.search(r"(?m)^\s*# @param", forms), "Colab shows a field beside its value only"


@by_notebook
def test_has_badge_navigation_summary_exercises_and_sources(path):
    text, home = prose(path), linked(SETUP_CELL.read_text())[0]
    colab = f"https://colab.research.google.com/github/{home}/blob/main/notebooks"
    assert f"{colab}/{path.name}" in text
    at = NOTEBOOKS.index(path)
    neighbours = [*NOTEBOOKS[max(0, at - 1) : at], *NOTEBOOKS[at + 1 : at + 2]]
    for name in [neighbour.name for neighbour in neighbours] + ["00_symbols_and_terms.md"]:
        assert f"({name})" in text, f"no link to {name}"
    for heading in ("You will be able to", "## Summary", "## Exercises", "## Sources"):
        assert heading in text


@by_notebook
def test_figures_have_an_alternative_text_and_can_be_read_on_a_phone(path):
    """On a screen 390 pixels wide tick labels end at 6.5 pixels or more, the smallest at 4.9."""
    for number, cell in enumerate(code_cells(path), 1):
        for picture in filter(None, (o.get("data", {}).get("image/png") for o in cell["outputs"])):
            assert "alt:" in source(cell), f"cell {number} draws: say what in `# alt: ...`"
            width = Image.open(io.BytesIO(base64.b64decode(picture))).width
            pixels = min(1.0, 390 / width) * 100 / 72  # a point, at the 100 dpi of set_style
            sizes = map(float, re.findall(r"fontsize=([\d.]+)", source(cell)))
            readable = 12 * pixels >= 6.5 and min([9.0, *sizes]) * pixels >= 4.9
            assert readable, f"cell {number}: a figure {width} pixels wide"


@by_notebook
def test_github_sets_every_formula(path):
    """It sets `$...$` and `$$...$$`, and refuses some of LaTeX in them."""
    text = without_code(prose(path))
    refused = r"\\(?:label|ref|eqref|def|newcommand|DeclareMathOperator|href|class|style|mbox)\b"
    rest = re.sub(r"\$\$.+?\$\$", "", text, flags=re.DOTALL)
    rest = re.sub(r"(?<![\\$])\$(?!\s)[^$\n]+?(?<!\s)\$(?![\d$])", "", rest)
    assert not re.findall(r".{0,20}\$.{0,20}|\\[(\[]|\\(?:begin|frac|alpha)\b", rest)
    assert not re.findall(refused, text)


def asserts(cell) -> bool:
    """Whether a cell asserts: by `assert`, or by a call whose name begins with assert."""
    nodes = list(ast.walk(ast.parse(source(cell))))
    calls = [ast.unparse(n.func).split(".")[-1] for n in nodes if isinstance(n, ast.Call)]
    called = any(name.startswith("assert") for name in calls)
    return called or any(isinstance(n, ast.Assert) for n in nodes)


def test_every_claim_has_its_asserting_cell_and_every_tag_its_claim():
    cells = {path.name[:2]: code_cells(path) for path in NOTEBOOKS}
    for claim in CLAIMS:
        for number in claim["notebooks"]:
            shown = [c for c in cells[number] if f"claim-{claim['id']}" in tags(c) and asserts(c)]
            assert shown, f"no tagged, asserting cell for {claim['id']} in notebook {number}"
    used = {tag for found in cells.values() for cell in found for tag in tags(cell)}
    known = {f"claim-{claim['id']}" for claim in CLAIMS}
    assert {tag for tag in used if tag.startswith("claim-")} <= known


def anchors(path) -> set[str]:
    """The headings of a page or notebook, as Jupyter and GitHub make anchors of them."""
    text = path.read_text(encoding="utf-8") if path.suffix == ".md" else prose(path)
    titles = [t.replace("`", "").strip() for t in re.findall(r"^#+ (.*)", text, re.MULTILINE)]
    github = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.replace(" ", "-") for title in titles + github}


@pytest.mark.parametrize("path", [*NOTEBOOKS, *PAGES], ids=lambda path: path.name)
def test_local_links_and_their_sections_exist(path):
    text = path.read_text(encoding="utf-8") if path.suffix == ".md" else prose(path)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        if not re.match(r"[a-z]+:", link):
            target = path.parent / name if name else path
            assert target.exists(), f"{link} leads nowhere"
            assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("path", [*PAGES, *WORKFLOWS, ROOT / ".ci" / "run"], ids=lambda p: p.name)
def test_files_and_make_targets_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", MAKEFILE, re.MULTILINE))
    for command in re.findall(r"^make [^\n#]+|`make [^`]+`|run: make .*", text, re.MULTILINE):
        words = re.sub(r'"[^"]*"', "", command.strip("`")).split("make ", 1)[1].split()
        assert {word for word in words if "=" not in word and "/" not in word} <= targets, command
    for name in re.findall(r"`((?:notebooks|helpers|data|tests)/[\w./-]*\w)", text):
        assert (ROOT / name).exists(), name


def test_nothing_shipped_holds_a_secret_or_a_machines_path():
    keys = r"\bhf_[A-Za-z0-9]{30,}|\bgh[pos]_[A-Za-z0-9]{36}|\bAKIA[A-Z0-9]{16}\b|PRIVATE KEY--"
    place = r"(?:/home|/Users|/root|[A-Z]:\\+Users)[/\\]+\w+|(?<![\w.])/" + r"tmp/\w+"
    kinds = {".py", ".ipynb", ".md", ".json", ".jsonl", ".toml", ".txt", ".csv", ".cfg", ".yml"}
    for path in [*ROOT.glob("*.*"), *(p for name in FOLDERS for p in (ROOT / name).rglob("*"))]:
        if path.suffix in kinds and path.name != "test_contract.py" and path.is_file():
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert not re.findall(f"{keys}|{place}", text), path.name


def python_sources() -> dict[str, str]:
    """Name -> code of the modules of helpers and data, and of each notebook."""
    files = [path for name in ("helpers", "data") for path in (ROOT / name).rglob("*.py")]
    code = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}
    return code | {path.name: "\n".join(map(source, code_cells(path))) for path in NOTEBOOKS}


@pytest.mark.parametrize(("name", "code"), python_sources().items(), ids=python_sources())
def test_no_code_comes_with_data(name, code):
    """No pickle, no remote code, no eval; of the hub only fixed commits."""
    for call in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)):
        called, found = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        runs = r"(?:pickle|dill|joblib|marshal)\.loads?|(?:pd|pandas)\.read_pickle|eval|exec"
        assert not re.fullmatch(rf"{runs}|yaml\.load", called), f"{name}:{call.lineno}: {called}"
        assert called != "torch.load" or found.get("weights_only") == "True", call.lineno
        for option in ("trust_remote_code", "allow_pickle"):
            assert found.get(option, "False") == "False", f"{name}:{call.lineno}: {option}"
        if called.endswith("from_pretrained") and re.fullmatch(HUB, ast.unparse(call.args[0])):
            assert re.fullmatch(r"'[0-9a-f]{40}'", found.get("revision", "")), call.lineno
        if called.startswith("AutoModel") and ast.unparse(call.args[0]) == "MODEL":
            assert found.get("use_safetensors") == "True", call.lineno  # the reader's choice


def test_workflows_only_read_and_their_actions_are_pinned_to_commits():
    """A tag can be moved by whoever takes over the action's repository; a commit cannot."""
    for path in WORKFLOWS:
        text = path.read_text()
        granted = set(re.findall(r"^ +(\w[\w-]*: write)", text, re.MULTILINE))
        assert "permissions:\n  contents: read\n" in text
        assert granted <= {"pages: write", "id-token: write"}
        assert text.count("timeout-minutes:") == text.count("runs-on:")
        assert text.count("actions/checkout@") == text.count("persist-credentials: false")
        for use in re.findall(r"uses: (.*)", text):
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use), use


def test_jupyter_listens_on_this_machine_only_and_keeps_its_token():
    recipe = re.search(r"^lab:.*\n\t(.*)", MAKEFILE, re.MULTILINE).group(1)
    assert "--ip=127.0.0.1" in recipe
    assert not re.search("token|password|allow_origin|xsrf", recipe, re.IGNORECASE)


def test_what_is_installed_is_locked_with_hashes():
    lock = (ROOT / "tests" / "requirements-lock.txt").read_text()
    pins = re.findall(r"^[\w-]+==\S+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    torch = (ROOT / "tests" / "requirements-torch.txt").read_text()
    assert all(f"{pin} " in lock or f"{pin}\n" in torch for pin in pins), "run `make lock`"
    entries = re.findall(r"^\S.*\n(?:[ \t]+.*\n)*", lock, re.MULTILINE)
    assert all("--hash=sha256:" in entry for entry in entries if not entry.startswith("#"))
    assert "--no-deps --require-hashes --requirement tests/requirements-lock.txt" in MAKEFILE


def test_the_citation_names_the_version_that_the_setup_cell_fetches():
    version = re.search(r"^version: (.*)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert f'"v{version}"' in SETUP_CELL.read_text()
