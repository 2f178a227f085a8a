"""GitHub's view of the notebooks: it runs no script, knows no widget, and sets only part of LaTeX."""

import re

import pytest
from nbconvert.filters import markdown2html

from tests.notebooks import NOTEBOOKS, code_cells, read, source

by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
SHOWN = {"text/plain", "text/html", "text/markdown", "image/png"}
HTML = {"table", "thead", "tbody", "tr", "th", "td", "div", "p", "b", "strong", "em", "code", "br"}  # in outputs
TAGS = {"details", "summary", "code", "br", "sub", "sup", "b", "i", "em", "strong", "kbd"}  # in prose
DISPLAY, INLINE = re.compile(r"\$\$(.+?)\$\$", re.DOTALL), re.compile(r"(?<![\\$])\$(?!\s)([^$\n]+?)(?<!\s)\$(?![\d$])")
# What GitHub refuses, or MathJax does not know
REFUSED = r"\\(?:label|ref|eqref|require|def|newcommand|renewcommand|DeclareMathOperator|href|unicode|class|style|cssId|bbox|mbox|intertext)\b"


def prose(path) -> list[str]:
    """The markdown cells without their code."""
    cells = [source(cell) for cell in read(path)["cells"] if cell["cell_type"] == "markdown"]
    return [without_code(text) for text in cells]


def without_code(text: str) -> str:
    return re.sub(r"<code>.*?</code>|`+[^`\n]+`+", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def faults(text: str) -> list[str]:
    """What GitHub would show otherwise than it was meant, in a text without code."""
    found = [f"{match} is shown as it stands" for match in re.findall(r"\\[(\[]", text)]
    found += [f"{formula}: {refused}" for formula in DISPLAY.findall(text) for refused in re.findall(REFUSED, formula)]
    for block in DISPLAY.finditer(text):
        line = text[: block.start()].rsplit("\n", 1)[-1]
        if line.strip():
            found.append(f"$${block.group(1)}$$ does not begin its line")
        if block.group(1).count(r"\begin") != block.group(1).count(r"\end"):
            found.append(f"$${block.group(1)}$$ begins what it does not end")
    rest = DISPLAY.sub("", text)
    found += [f"{formula}: {refused}" for formula in INLINE.findall(rest) for refused in re.findall(REFUSED, formula)]
    rest = INLINE.sub("", rest)
    found += [f"a dollar stands alone: {part!r}" for part in re.findall(r".{0,20}\$.{0,20}", rest)]
    found += [f"{part} outside of a formula" for part in re.findall(r"\\(?:begin|end|frac|mathrm|alpha)\b", rest)]
    return found


@pytest.mark.parametrize(
    "text",
    [
        r"the scale \(\alpha\)",
        r"\[x^2\]",
        "$ x $",
        "costs $5",
        "$a$ and $b",
        r"$$x \label{eq}$$",
        r"with $\def\a{1} x$",
        r"\begin{align} x \end{align}",
        r"so $$x$$",
        r"$$\begin{aligned} x$$",
    ],
)
def test_what_github_cannot_show_is_found(text):
    assert faults(text)


@by_name
def test_formulas_are_those_github_sets(path):
    found = [fault for text in prose(path) for fault in faults(text)]
    assert not found


@by_name
def test_no_formula_is_taken_for_emphasis_or_html(path):
    """A renderer of notebooks leaves each formula as it was written, underscores, stars and < included."""
    for text in prose(path):
        plain = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
        html = markdown2html(plain)
        for formula in DISPLAY.findall(plain) + INLINE.findall(DISPLAY.sub("", plain)):
            assert formula.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in html, formula


@by_name
def test_html_in_prose_is_what_github_keeps(path):
    for text in prose(path):
        outside = INLINE.sub("", DISPLAY.sub("", text))
        assert set(re.findall(r"</?([a-zA-Z][\w-]*)[ />]", outside)) <= TAGS
        assert not re.search(r"\son\w+=|style=", outside)


@by_name
def test_outputs_are_text_pictures_and_tables(path):
    for cell in code_cells(path):
        for output in cell["outputs"]:
            assert set(output.get("data", {})) <= SHOWN, output["data"].keys()
            html = "".join(output.get("data", {}).get("text/html", ""))
            assert set(re.findall(r"</?([a-zA-Z][\w-]*)", html)) <= HTML
            assert not re.search(r"\bon\w+=|javascript:", html)
            shown = "".join(output.get("text", "")) + "".join(output.get("data", {}).get("text/plain", ""))
            assert not re.search(r"[\x1b\x08\r]", shown), "colours and overwritten lines are shown as signs"


@by_name
def test_pictures_are_whole(path):
    """A picture that is cut off is shown as a broken one: each begins and ends as a PNG does."""
    from base64 import b64decode

    for cell in code_cells(path):
        for output in cell["outputs"]:
            if picture := output.get("data", {}).get("image/png"):
                data = b64decode("".join(picture))
                assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
