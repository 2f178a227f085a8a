"""The book as `make book` built it, in a browser: on a desk and on a phone, by day and by night."""

import json
import re
import threading
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

from tests.notebooks import NOTEBOOKS, ROOT

HTML = ROOT / "build" / "book" / "html"
NAMES = [path.stem for path in NOTEBOOKS]
PAGES = ["index", *sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.*"))]
VIEWS = [(p, width, scheme) for width in (1440, 390) for scheme in ("light", "dark") for p in PAGES]


def html(name: str) -> str:
    return (HTML / f"{name}.html").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def address():
    """Where the book is served while the tests run."""
    assert (HTML / "index.html").exists(), "build the book first: make book"
    pages = partial(SimpleHTTPRequestHandler, directory=HTML)
    server = ThreadingHTTPServer(("127.0.0.1", 0), pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def windows(browser):
    """One window for each width and scheme, with what its pages asked for and what failed."""

    @cache
    def window(width: int, scheme: str):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.asked, page.failed = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("response", lambda r: page.failed.append(r.url) if r.status >= 400 else None)
        page.on("pageerror", lambda error: page.failed.append(str(error)))
        return page

    return window


@pytest.fixture(scope="module", params=VIEWS, ids=lambda view: "-".join(map(str, view)))
def view(request, windows, address, shots):
    """A page, open, its mathematics set and its pictures loaded; a screenshot of it is kept."""
    name, width, scheme = request.param
    page = windows(width, scheme)
    page.asked.clear()
    page.failed.clear()
    page.goto(f"{address}/{name}.html", wait_until="load")
    page.wait_for_selector("body[data-ready]", state="attached")
    page.screenshot(path=shots / f"book-{name}-{width}-{scheme}.png", full_page=True)
    return SimpleNamespace(page=page, name=name, width=width, scheme=scheme)


# The elements of a selector that reach beyond the text's column, or hold more than they show, with
# no box that scrolls it
CUT_OFF = """selector => {
    const column = document.querySelector('article').getBoundingClientRect();
    const scrolls = node => ['auto', 'scroll'].includes(getComputedStyle(node).overflowX);
    const boxed = n => n.tagName != 'ARTICLE' && (scrolls(n) || boxed(n.parentElement));
    const shown = [...document.querySelectorAll(selector)].filter(node => node.checkVisibility());
    return shown.filter(node => {
        const box = node.getBoundingClientRect();
        const beyond = box.left < column.left - 1 || box.right > column.right + 1;
        const block = !node.matches('p, li') && getComputedStyle(node).display != 'inline';
        const overfull = block && node.scrollWidth > node.clientWidth + 1;
        return beyond && !boxed(node.parentElement) || overfull && !boxed(node);
    }).map(node => node.outerHTML.slice(0, 200));
}"""
WIDE = "img, svg, table, pre, .highlight, .table-wrapper, .math, mjx-container, details, p, li"


def test_nothing_is_cut_off_and_the_page_does_not_scroll_sideways(view):
    assert view.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert not view.page.evaluate(CUT_OFF, f"article :is({WIDE})")


def test_pictures_are_loaded_and_said_in_words(view):
    pictures = view.page.evaluate("[...document.images].map(i => [i.alt, i.naturalWidth, i.src])")
    assert pictures or view.name not in NAMES
    for words, width, source in pictures:
        assert width > 0 and len(words) > 15 and source.rpartition("/")[2] not in words, source


def test_no_markup_is_left_raw(view):
    """Formulas are set, and tables are tables, in what cells display too."""
    kinds = ["article .math", "article .math mjx-container", "mjx-merror"]
    count = "kinds => kinds.map(kind => document.querySelectorAll(kind).length)"
    formulas, set_, wrong = view.page.evaluate(count, kinds)
    assert formulas == set_ and not wrong
    prose = view.page.evaluate(
        """() => { const copy = document.querySelector('article').cloneNode(true);
        copy.querySelectorAll('pre, code, mjx-container').forEach(node => node.remove());
        return copy.textContent; }"""
    )
    assert not re.findall(r".{0,30}(?:\$|\\[a-zA-Z(\[]|\| \|).{0,30}", prose)


def test_contrast_and_structure(view):
    """axe-core: contrast of 4.5 to 1, and what else of WCAG 2 A and AA a machine can see."""
    if view.width > 390 and view.name != "index":
        pytest.skip("a wide window has the colours of a narrow one: the start page stands for all")
    view.page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8"))
    found = view.page.evaluate(
        """async () => { const options = {runOnly: ['wcag2a', 'wcag2aa']};
        const {violations} = await axe.run(document, options);
        const told = node => node.html.slice(0, 160) + node.failureSummary;
        return violations.map(rule => [rule.id, ...rule.nodes.slice(0, 3).map(told)]); }"""
    )
    assert not found, json.dumps(found, indent=1)


def test_nothing_is_asked_of_another_host(view, address):
    asked = [url for url in view.page.asked if not url.startswith((address, "data:"))]
    assert view.page.asked and not asked and not view.page.failed


def test_search_finds_a_word_of_a_notebook(windows, address):
    page = windows(390, "light")
    page.goto(f"{address}/search.html?q=Eckart")
    page.wait_for_selector("ul.search li a")
    assert "01_lora_math" in page.locator("ul.search li a").first.get_attribute("href")


def test_the_reader_can_choose_light_and_dark(windows, address):
    page = windows(1440, "light")
    page.goto(f"{address}/index.html")
    grounds = set()
    for _ in range(3):  # the system's choice, then both
        page.locator(".theme-toggle >> visible=true").click()
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    page.evaluate("localStorage.clear()")
    assert len(grounds) == 2


def test_navigation_is_in_the_order_of_the_series():
    tree = html("index").partition("sidebar-tree")[2]
    entries = r'class="toctree-l1"><a class="reference internal" href="(\w+)\.html"'
    assert re.findall(entries, tree)[: len(PAGES) - 1] == PAGES[1:]
    for before, after in zip(PAGES, PAGES[1:], strict=False):
        assert re.search(rf'class="next-page" href="{after}\.html"', html(before))


@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_opens_in_colab(name):
    address = r"https://colab\.research\.google\.com/github/[\w-]+/qlora-by-hand/blob/main"
    assert re.search(rf'class="colab[^"]*" href="{address}/notebooks/{name}\.ipynb"', html(name))


def test_the_start_page_shows_readmes_map():
    shown = re.sub(r"<[^>]+>", "", html("index"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\d\d · [^\]]*)\]", readme, re.MULTILINE)
    assert len(rows) == len(NOTEBOOKS) and all(row in shown for row in rows)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    """Local ones to a page and a place on it; the hosts of others are asked once a week."""
    for link in re.findall(r'<a [^>]*href="([^"]*)"', html(name)):
        url = urlsplit(link)
        if url.scheme:
            assert url.scheme == "https" and re.fullmatch(r"[\w.-]+\.\w+", url.netloc), link
            continue
        target = HTML / unquote(url.path) if url.path else HTML / f"{name}.html"
        assert target.is_file(), link
        place = f'id="{unquote(url.fragment)}"' if url.fragment else ""
        assert place in target.read_text(encoding="utf-8"), link
