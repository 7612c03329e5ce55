"""The site: builds without a warning, opens from disk without a network, is found by search, and links hold."""

from __future__ import annotations

import ast
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

if sys.version_info < (3, 11):
    pytest.skip("Sphinx 9 needs Python 3.11; on 3.10 the site is not built", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "docs" / "_ext")]

from browser import Browser, find_browser  # noqa: E402

from docs import api, pages, readme  # noqa: E402
from docs.build import SITE, build_site  # noqa: E402

pytestmark = pytest.mark.xdist_group("site")
SHOWN = "document.querySelector('[role=main], main')"


@pytest.fixture(scope="module")
def site() -> Path:
    "The site's folder, built with warnings as errors unless nothing changed since the last build."
    return build_site(quiet=True).parent


@pytest.fixture(scope="module")
def browser():
    "One headless browser for all pages."
    if not find_browser():
        pytest.fail("no Chromium found: sh tests/system_parts.sh installs it")
    with Browser() as b:
        b.resize(1400)
        yield b


class Links(HTMLParser):
    "What a page links to or loads, and the anchors it offers."

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key in ("id", "name") and value:
                self.anchors.add(value)
            if key in ("href", "src") and value:
                self.targets.append(value)


def html_pages(site: Path) -> list[Path]:
    return sorted(p for p in site.rglob("*.html") if "_static" not in p.parts)


def test_every_notebook_has_a_page_and_a_place_in_the_sidebar(site: Path) -> None:
    listed = {n for names in pages.sidebar().values() for n in names} | {"index"}
    assert listed == set(pages.pages())
    assert [n for n in listed if not (site / f"{n}.html").exists()] == []
    home = Links((site / "index.html").read_text(encoding="utf-8")).targets
    assert [n for n in listed - {"index"} if f"{n}.html" not in home] == []


def test_every_internal_link_and_anchor_exists(site: Path) -> None:
    parsed = {p: Links(p.read_text(encoding="utf-8")) for p in html_pages(site)}
    dead = []
    for page, links in parsed.items():
        for target in links.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            path = (page.parent / unquote(url.path)).resolve() if url.path else page
            if not path.exists():
                dead.append(f"{page.relative_to(site)} -> {target}")
            elif url.fragment and path in parsed and unquote(url.fragment) not in parsed[path].anchors:
                dead.append(f"{page.relative_to(site)} -> {target} (no such anchor)")
    assert dead == []


def test_every_page_opens_from_disk_without_network_or_console_error_and_fits_a_phone(
    site: Path, browser: Browser,
) -> None:  # fmt: skip
    problems = []
    for page in html_pages(site):
        browser.open(page.as_uri(), until=f"{SHOWN} && !document.querySelector('pre.mermaid:not([data-processed])')")
        browser.resize(400)
        width = browser.eval("document.documentElement.scrollWidth")
        browser.resize(1400)
        found = [f"asks for {u[:100]}" for u in browser.requests if not u.startswith(("file:", "data:", "blob:"))]
        found += browser.errors + ([f"is {width} px wide in a window of 400"] if width > 401 else [])
        problems += [f"{page.relative_to(site)}: {f[:300]}" for f in found]
    assert problems == []


@pytest.mark.parametrize(("query", "expected"), [
    ("ledger", "02_ledger"), ("ledgers", "02_ledger"), ("差分隐私", "glossary"), ("匿名", "glossary"),
    ("账", "glossary"), ("bootstrap_interval", "03_measure"),
])  # fmt: skip
def test_search_finds_english_and_chinese_from_disk(site: Path, browser: Browser, query: str, expected: str) -> None:
    browser.open(f"{(site / 'search.html').as_uri()}?q={query}", until="document.querySelector('#search-results li a')")
    found = browser.eval("[...document.querySelectorAll('#search-results li a')].map(a => a.getAttribute('href'))")
    assert any(f.startswith(f"{expected}.html") for f in found), found
    assert browser.errors == []


def test_search_for_a_word_that_is_nowhere_finds_nothing(site: Path, browser: Browser) -> None:
    done = "document.querySelector('.search-summary')?.innerText.length > 9"
    browser.open(f"{(site / 'search.html').as_uri()}?q=鲸鱼罐头", until=done)
    assert browser.eval("document.querySelectorAll('#search-results li').length") == 0


def test_diagram_is_drawn_again_in_the_dark(site: Path, browser: Browser) -> None:
    fill = "getComputedStyle(document.querySelector('pre.mermaid svg .node rect')).fill"
    seen = []
    for dark in (False, True):
        browser.dark(dark)
        browser.open((site / "index.html").as_uri(), until="document.querySelector('pre.mermaid svg .node rect')")
        seen.append(browser.eval(fill))
    browser.dark(False)
    assert seen[0] != seen[1]


def test_mathematics_is_typeset(site: Path, browser: Browser) -> None:
    with_maths = [p for p in html_pages(site) if 'class="math notranslate' in p.read_text(encoding="utf-8")]
    for page in with_maths[:1]:
        browser.open(page.as_uri(), until="document.querySelector('mjx-container')")
        assert [r for r in browser.requests if r.endswith(".woff")] != [] and browser.errors == []


def test_download_button_hands_out_the_notebook_as_written(site: Path) -> None:
    for name in pages.pages():
        assert (site / "_sources" / f"{name}.ipynb").read_bytes() == (pages.NBS / f"{name}.ipynb").read_bytes()


def test_readme_is_in_step_with_the_home_page() -> None:
    assert readme.readme_in_step(), "run: make readme"


def test_readme_names_the_two_commands_on_its_first_screen_and_no_other_before_them() -> None:
    blocks = [b.split("```")[0] for b in readme.README.read_text(encoding="utf-8").split("```bash")[1:]]
    first = [line.split("#")[0].strip() for line in blocks[0].strip().splitlines()]
    assert first == ["make run", "make test"]
    assert readme.README.read_text(encoding="utf-8").index("```bash") < 2500


def test_a_build_stops_at_a_dead_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = pages.page("glossary")
    broken["cells"] = [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# A\n\n{py:obj}`no.such.thing`"}]
    monkeypatch.setattr(pages, "pages", lambda: {"index": pages.Page("index", "A", "", "")})
    monkeypatch.setattr(pages, "page", lambda name: broken)
    monkeypatch.setattr(pages, "files_linked", set)
    monkeypatch.setattr(pages, "forget", lambda: None)
    with pytest.raises(RuntimeError, match=r"no\.such\.thing"):
        build_site(tmp_path / "site", tmp_path / "work", quiet=True)
    assert not (tmp_path / "site" / ".inputs").exists()


SOURCE = """
from bigmodel_nb.measure import Interval
__all__ = ["f", "LIMIT", "Box"]
#: the most
LIMIT = 3
def f(
    a: int, # how many, in `rows`
    *more: str, # a [list] of names
    # above its line
    b: Interval | None = None,
) -> "Box": # what it holds
    "Does it."
class Box:
    "Holds."
    size: int = 1 # of the box
    def _hidden(self): ...
    @property
    def area(self) -> float: # in m2
        "Area."
"""


def test_api_entry_reads_signature_and_docments_without_importing(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(SOURCE)
    module = api.read_module(tmp_path / "m.py", "bigmodel_nb.m")
    function = next(n for n in module.tree.body if isinstance(n, ast.FunctionDef))
    notes = {"a": "how many, in `rows`", "more": "a [list] of names", "b": "above its line", "return": "what it holds"}
    assert api.docments(module, function) == notes
    text = api.entries(module, lambda t: t)
    assert "(a: int, *more: str, b: bigmodel_nb.measure.Interval | None=None) -> bigmodel_nb.m.Box" in text
    assert ":param more: a \\[list\\] of names" in text and "_hidden" not in text and "{py:property} area" in text
    assert "{py:class} Box(size: int = 1)" in text and ":param size: of the box" in text
    assert {"bigmodel_nb.m.f", "bigmodel_nb.m.LIMIT", "bigmodel_nb.m.Box.area"} <= set(api.names(module))


def test_links_between_notebooks_are_rewritten_by_one_function() -> None:
    def name(path: Path, anchor: str, page: str) -> str:
        return f"<{path.relative_to(ROOT).as_posix()}{anchor}>"

    def to(link: str, page: str) -> str:
        return pages.rewrite_links(f"see [x]({link}).", page, name)

    same = [("index", "02_ledger.ipynb"), ("etl/01_extract", "../02_ledger.ipynb"), ("index", "ledger.html")]
    for page, link in same:
        assert to(link, page) == "see [x](<nbs/02_ledger.ipynb>)."
    assert to("02_ledger.ipynb#the-idea", "index").endswith("#the-idea>).")
    assert to("https://example.org/a.html", "index") == "see [x](https://example.org/a.html)."
    assert to("../LICENSE", "index") == "see [x](<LICENSE>)."


def test_back_ticked_names_become_references_only_when_they_are_ours() -> None:
    def link(line: str) -> str:
        return pages.link_names(line, "bigmodel_nb.measure", {})

    assert link("`compare` runs") == "{py:obj}`compare <bigmodel_nb.measure.compare>` runs"
    assert link("`bootstrap_interval(x)`") == "{py:obj}`bootstrap_interval(x) <bigmodel_nb.measure.bootstrap_interval>`"
    for plain in ("`len`", "[`compare`](a.html)", "``compare``", "`a = compare`"):
        assert link(plain) == plain


def test_chinese_is_indexed_as_pairs_and_english_is_stemmed() -> None:
    from two_languages import EnglishChinese

    language = EnglishChinese({})
    assert language.split("k-匿名化 of ledgers") == ["k", "匿", "名", "化", "匿名", "名化", "of", "ledgers"]
    assert language.stem("ledgers") == "ledger"


def test_the_site_folder_is_not_kept_in_git() -> None:
    assert f"{SITE.name}/" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()
