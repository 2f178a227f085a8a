"""The table of symbols and terms tells where each is explained, headings go down one level at a time, and reading times are true."""

import re

import pytest

from tests.notebooks import NOTEBOOKS, ROOT, read, source

PAGE = ROOT / "notebooks" / "00_symbols_and_terms.md"
WORDS_A_MINUTE = 230
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def rows(title: str) -> list[list[str]]:
    """The cells of each row of the table below a heading of the page."""
    part = PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def sections(path, code: bool = True) -> dict[str, str]:
    """Anchor, as Jupyter makes it, -> the text of that section, up to the next heading, with or without its code."""
    found, anchor = {}, None
    for cell in read(path)["cells"]:
        for line in source(cell).splitlines():
            if cell["cell_type"] == "markdown" and re.match(r"#+ ", line):
                anchor = line.lstrip("#").strip().replace("`", "").replace(" ", "-")
                assert anchor not in found, f"two headings {anchor!r} in {path.name}: a link to the second cannot be had"
                found[anchor] = line
            elif anchor and (code or cell["cell_type"] == "markdown"):
                found[anchor] += "\n" + line
    return found


def linked(cell: str) -> tuple[str, str, str]:
    """(words, file, anchor) of the one link in a cell."""
    return re.fullmatch(r"\[([^\]]*)\]\(([^#)]+)#(.+)\)", cell).groups()


def occurs(symbol: str, text: str) -> bool:
    """Whether `$...$` stands in a formula of the text, not as a part of a longer name."""
    formulas = " ".join(re.findall(r"\$\$?(.+?)\$\$?", text, re.DOTALL))
    return re.search(rf"(?<![A-Za-z\\]){re.escape(symbol.strip('$'))}(?![A-Za-z])", formulas) is not None


@pytest.mark.parametrize("title", ["Symbols", "Terms"])
def test_every_link_of_the_page_leads_to_a_section_that_exists(title):
    assert len(rows(title)) > 20
    for row in rows(title):
        words, file, anchor = linked(row[-1])
        there = sections(PAGE.parent / file)
        assert anchor in there, f"{file} has no heading {anchor!r}: {sorted(there)}"
        chapter = re.fullmatch(r"(\d\d), section (\d+)", words)
        assert file.startswith(chapter.group(1))
        above = [name for name in list(there)[: list(there).index(anchor) + 1] if re.match(r"\d+\.-", name)]
        assert above[-1].startswith(f"{chapter.group(2)}.-"), f"{row[0]} is in section {above[-1]} and not in {words}"


def test_every_symbol_stands_in_its_section_and_every_name_in_code():
    for symbols, _, code, link in rows("Symbols"):
        _, file, anchor = linked(link)
        text = sections(PAGE.parent / file, code=False)[anchor]
        for symbol in symbols.split(", "):
            assert occurs(symbol, text), f"{symbol} does not stand in {file}, {anchor}"
        everything = "\n".join(source(cell) for path in NOTEBOOKS for cell in read(path)["cells"] if cell["cell_type"] == "code")
        for name in re.findall(r"`([\w.]+)(?:\(\))?`", code):
            assert re.search(rf"\b{re.escape(name)}\b", everything), f"no notebook has a {name}"


def test_every_term_stands_in_its_section():
    for terms, _, link in rows("Terms"):
        _, file, anchor = linked(link)
        for term in terms.split(", "):
            assert re.search(rf"\b{re.escape(term)}", sections(PAGE.parent / file)[anchor], re.IGNORECASE), f"{term}: {anchor}"


def test_no_term_or_symbol_stands_twice():
    for title in ("Symbols", "Terms"):
        names = [name for row in rows(title) for name in row[0].split(", ")]
        assert len(names) == len(set(names))


@by_name
def test_the_page_is_linked_from_each_notebook(path):
    assert f"({PAGE.name})" in source(read(path)["cells"][0])


def test_the_page_is_linked_from_readme():
    assert f"(notebooks/{PAGE.name})" in (ROOT / "README.md").read_text(encoding="utf-8")


@by_name
def test_headings_go_down_one_level_at_a_time_and_sections_count_from_one(path):
    lines = [
        line for cell in read(path)["cells"] if cell["cell_type"] == "markdown" for line in re.sub(r"```.*?```", "", source(cell), flags=re.DOTALL).splitlines()
    ]  # fmt: skip
    headings = [line for line in lines if re.match(r"#+ ", line)]
    levels = [len(line.split()[0]) for line in headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False)), headings
    numbers = [int(number) for line in headings for number in re.findall(r"^## (\d+)\. ", line)]
    assert numbers == list(range(1, len(numbers) + 1))


def words_of_prose(path) -> int:
    """Words of a notebook's text up to its sources: no formulas, no code, no hints, no addresses."""
    text = "\n".join(source(cell) for cell in read(path)["cells"] if cell["cell_type"] == "markdown").split("## Sources")[0]
    for nothing in (r"\$\$.*?\$\$", r"```.*?```", r"<details>.*?</details>", r"\]\([^)]*\)"):
        text = re.sub(nothing, " ", text, flags=re.DOTALL)
    return len(re.findall(r"[^\W_][\w.,'’-]*", text))


@by_name
def test_reading_time_is_that_of_its_words(path):
    stated = int(re.search(r"Reading: (\d+) minutes", source(read(path)["cells"][0])).group(1))
    minutes = words_of_prose(path) / WORDS_A_MINUTE
    assert abs(stated / minutes - 1) < 0.3, f"{path.name} says {stated} minutes and has words for {minutes:.1f}"


@by_name
def test_sections_that_prose_refers_to_exist(path):
    """`notebook 02, section 7` and `(section 4)`: that notebook has a section of that number."""
    for cell in read(path)["cells"]:
        if cell["cell_type"] != "markdown":
            continue
        for number, section in re.findall(
            r"(?:[Nn]otebook (\d\d)\]?(?:\([^)]*\))?,? )?\(?section (\d+)", source(cell).split("## Sources")[0]
        ):
            target = next(p for p in NOTEBOOKS if p.name.startswith(number)) if number else path
            if re.search(rf"(?:paper|QLoRA|LLM\.int8\(\)|arXiv)[^.;]*section {section}", source(cell)):
                continue  # of a paper
            assert any(anchor.startswith(f"{section}.-") for anchor in sections(target)), (
                f"{target.name} has no section {section}"
            )


# Used before the section that explains it, in words that need no explanation there.
EARLIER = {
    "LoRA": "named at the start, the equation comes one section later",
    "merge": "the method says what it does",
    "block": "the blocks of dots in the first picture",
    "exact": "the everyday word",
    "checkpointing": "the sentence names the section to come",
    "logits": "explained in brackets there too",
    "multi-query attention": "explained in its sentence there too",
    "profile": "explained in its sentence there too",
}


def test_no_term_is_used_before_it_is_explained():
    places = [
        (path.name, anchor)
        for path in NOTEBOOKS
        for anchor in list(sections(path))[1:]
        if anchor not in ("Summary", "Exercises", "Sources")
    ]
    text = {(path.name, anchor): words for path in NOTEBOOKS for anchor, words in sections(path, code=False).items()}
    early = set()
    for terms, _, link in rows("Terms"):
        _, *place = linked(link)
        for term in terms.split(", "):
            before = places[: places.index(tuple(place))]
            early |= {term for where in before if re.search(rf"\b{re.escape(term)}", text[where], re.IGNORECASE)}
    assert early == set(EARLIER)
