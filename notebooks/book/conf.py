"""Sphinx configuration of the book, which `make book` builds from stored notebooks and README.

Nothing is executed, nothing is fetched. Sphinx with myst-nb, since it reads notebooks as they are
stored and checks every internal link; furo, since its search, its dark mode and its fonts need no
other host, and it reads well on a phone.
"""

import json
import os
import re
import shutil
from importlib.resources import files
from operator import methodcaller
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BOOK = ROOT / "build" / "book" / "source"  # where `make book` lays notebooks and start page
SETUP_CELL = (ROOT / "tests" / "setup_cell.py").read_text(encoding="utf-8")
HOME = re.search(r"https://github\.com/[\w-]+/[\w.-]+", SETUP_CELL).group()
BADGE = re.compile(r"\[!\[([^\]]*)\]\(https:[^)]*\)\]\(([^)]*)\)")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r"(?<![\\$])\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\d)")
ALT = re.compile(r"^# alt: (.+(?:\n# .+)*)\n", re.MULTILINE)  # goes on in the next comment lines
CHECKED = re.compile(r"^# NBVAL_CHECK_OUTPUT\n", re.MULTILINE)
# By the tag of the cell: what is shown when asked for
FOLDED = {"setup": "the setup cell and its output", "solution": "the solution"}

project = "QLoRA by hand"
html_title = project
language = "en"
extensions = ["myst_nb"]

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables in what a cell displays, too
myst_enable_extensions = ["dollarmath", "attrs_inline", "html_image"]
myst_heading_anchors = 3
# Links in notebooks name headings as Jupyter does
myst_heading_slug_func = methodcaller("replace", " ", "-")

linkcheck_anchors = False
linkcheck_ignore = [r"https://[\w./]*/OWNER/"]  # of a copy that is not published yet

html_theme = "furo"
html_static_path = ["book.css", "book.js"]
html_css_files, html_js_files = ["book.css"], ["book.js"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_use_index = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "github-dark"
highlight_language = "none"  # of blocks in prose; cells are Python
mathjax_path = "mathjax/tex-chtml.js"


def at_home(text: str, folder: Path) -> str:
    """Text of a file in `folder`: local links lead to the book's pages, else to the repository."""

    def badge(found: re.Match) -> str:
        words, address = found.groups()
        return f"[{words}]({address}){{.colab}}" if words == "Open in Colab" else ""

    def replace(link: re.Match) -> str:
        picture, words, path, anchor = link.groups(default="")
        target = (folder / path).resolve()
        if not target.exists():
            raise FileNotFoundError(f"{folder.name}: the link to {path} leads nowhere: correct it")
        if picture:
            return f"![{words}]({os.path.relpath(target, BOOK)})"
        if target.parent == ROOT / "notebooks":
            return f"[{words}]({target.name}{anchor})"
        kind, name = "tree" if target.is_dir() else "blob", target.relative_to(ROOT)
        return f"[{words}]({HOME}/{kind}/main/{name}{anchor})"

    def hint(found: re.Match) -> str:
        """Markdown leaves HTML as it is: formulas in it are marked for MathJax here."""
        return FORMULA.sub(r'<span class="math">\\(\1\\)</span>', found.group())

    text = LINK.sub(replace, BADGE.sub(badge, text))
    return re.sub("<details>.*?</details>", hint, text, flags=re.DOTALL)


def as_page(notebook: dict) -> dict:
    """A stored notebook: links at home, `# alt:` as alternative texts, solutions folded."""
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cell["source"] = at_home(text, ROOT / "notebooks")
            continue
        tags = cell["metadata"].setdefault("tags", [])
        options = cell["metadata"]["mystnb"] = {}
        if alt := ALT.search(text):
            options["image"] = {"alt": alt.group(1).replace("\n# ", " ")}
        for tag in FOLDED.keys() & set(tags):
            tags.append("hide-cell")
            options["code_prompt_show"] = f"Show {FOLDED[tag]}"
            options["code_prompt_hide"] = f"Hide {FOLDED[tag]}"
        cell["source"] = CHECKED.sub("", ALT.sub("", text))
    return notebook


def read_page(app, name: str, text: list[str]) -> None:
    if Path(app.env.doc2path(name)).suffix == ".ipynb":
        text[0] = json.dumps(as_page(json.loads(text[0])))
    elif name != "index":
        text[0] = at_home(text[0], ROOT / "notebooks")


def read_include(app, path: Path, parent: str, text: list[str]) -> None:
    text[0] = at_home(text[0], (BOOK / path).resolve().parent)


def copy_mathjax(app, error) -> None:
    """What MathJax needs to set formulas as text: one script and its fonts."""
    if error is None:
        package = files("mathjax") / "static" / "mathjax" / "es5"
        target = Path(app.outdir) / "_static" / "mathjax"
        fonts = Path("output") / "chtml" / "fonts" / "woff-v2"
        shutil.copytree(package / fonts, target / fonts, dirs_exist_ok=True)
        shutil.copy(package / "tex-chtml.js", target)


def setup(app) -> None:
    app.connect("source-read", read_page)
    app.connect("include-read", read_include)
    app.connect("build-finished", copy_mathjax)
