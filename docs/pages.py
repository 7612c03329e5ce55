"""Notebooks made into pages: nbdev's processors, then what Sphinx needs in place of Quarto."""

import ast
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from execnb.nbio import mk_cell, read_nb
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor, Processor
from nbdev.processors import (
    clean_magics,
    filter_stream_,
    hide_,
    hide_line,
    populate_language,
    rm_export,
    rm_header_dash,
    strip_ansi,
    strip_hidden_metadata,
)  # fmt: skip

from docs import api

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"

# The sidebar: title of each part, then the folder or the top-level pages it holds. Unlisted folders come under "More".
DOOR = ("claims", "course", "cli")
START = ("seven_programs", "glossary")
PARTS = {
    "Start here": START, "Ground floor": None, "ETL": "etl", "Compute": "compute", "Training": "training",
    "Privacy": "privacy", "Compression": "compression", "Sharing": "sharing", "Serving": "serving",
    "Venture": "venture", "Cases": "cases", "Door": DOOR,
}  # fmt: skip

_CODE_SPAN = re.compile(r"(?<![`{}\w])`([^`\n]+)`(?!`)")
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\[\]]*\])*\])\(([^()\s]+)\)")
_NAME = re.compile(r"[A-Za-z_][\w.]*")


class Page(NamedTuple):
    """A notebook that becomes a page: its name without suffix, its title and one-line summary, its module if any."""

    name: str
    title: str
    summary: str
    module: str


@cache
def pages() -> dict[str, Page]:
    """Every page by name, in the sidebar's order within its folder."""
    found = [p for p in sorted(NBS.rglob("*.ipynb")) if not re.search(r"/[._]", f"/{p.relative_to(NBS).as_posix()}")]
    return {p.name: p for p in map(_page, found)}


def sidebar() -> dict[str, list[str]]:
    """Titles of the parts, each with the names of its pages; empty parts are left out."""
    rest = [n for n in pages() if n != "index"]
    parts: dict[str, list[str]] = {}
    for title, what in PARTS.items():
        parts[title] = [n for n in rest if _belongs(n, what)]
        if isinstance(what, tuple):
            parts[title].sort(key=lambda n: what.index(_plain(n)))
    parts["More"] = [n for n in rest if not any(n in names for names in parts.values())]
    return {title: names for title, names in parts.items() if names}


def page(name: str, base: Path = NBS) -> dict:
    """The processed notebook of one page, as the JSON that MyST-NB reads."""
    nb = processed(base / f"{name}.ipynb", [Titles, Folded, Linked])
    if pages()[name].module and (source := _module_path(pages()[name].module)).exists():
        module = api.read_module(source, pages()[name].module)
        text = api.entries(module, lambda t: link_names(t, module.name, {}))
        nb.cells.append(mk_cell(f"## API\n\n{text}", "markdown"))
    if name == "index":
        nb.cells.append(mk_cell(_toctrees(), "markdown"))
    return _plain_json(nb, pages()[name])


def processed(path: Path, more: list) -> Any:
    """`path` after nbdev's processors (all but the one that re-runs cells) and `more`."""
    steps = [FrontmatterProc, populate_language, strip_ansi, hide_line, filter_stream_, rm_header_dash, Named, Quiet,
             rm_export, clean_magics, hide_, *more, strip_hidden_metadata]
    nbp = NBProcessor(nb=read_nb(path), procs=steps)
    nbp.process()
    return nbp.nb


class Named(Processor):
    """Remember what an exported cell defines, before its directive is gone."""

    def cell(self, cell) -> None:
        if cell.cell_type == "code" and "exports" in cell.directives_:
            cell.label_ = _label(cell.source)


class Quiet(Processor):
    """Cells marked `#| echo: false` show what they made, not how."""

    def cell(self, cell) -> None:
        if cell.cell_type == "code" and cell.directives_.get("echo:") == ["false"]:
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "remove-input"]
            cell.source = re.sub(r"^#\|\s*echo:.*\n", "", cell.source, flags=re.M)


class Titles(Processor):
    """nbdev's front matter back into a heading and a lead paragraph."""

    def begin(self) -> None:
        front = getattr(self.nb, "frontmatter_", {})
        self.nb.cells = [c for c in self.nb.cells if c.cell_type != "raw"]
        head = f"# {front.get('title', 'Untitled')}"
        if front.get("description"):
            head += f"\n\n:::{{div}} lede\n{front['description']}\n:::"
        self.nb.cells.insert(0, mk_cell(head, "markdown"))


class Folded(Processor):
    """Fold the source of exported cells under a line that says what it holds."""

    def cell(self, cell) -> None:
        if label := cell.get("label_"):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
            cell.metadata["mystnb"] = {"code_prompt_show": label, "code_prompt_hide": label}


class Linked(Processor):
    """Turn back-ticked names into checked references, and links between notebooks into links between pages."""

    def begin(self) -> None:
        source = "\n".join(c.source for c in read_nb(self.nb.path_).cells if c.cell_type == "code")
        self.imported = _imported(source)
        self.name = Path(self.nb.path_).resolve().relative_to(NBS).with_suffix("").as_posix()
        self.module = pages()[self.name].module

    def cell(self, cell) -> None:
        if cell.cell_type == "markdown":
            cell.source = outside_fences(cell.source, self._line)
        for out in cell.get("outputs", []):
            for kind in ("text/markdown",):
                if kind in out.get("data", {}):
                    text = "".join(out["data"][kind])
                    out["data"][kind] = outside_fences(text, self._line)

    def _line(self, line: str) -> str:
        line = rewrite_links(line, self.name, _for_site)
        return line if line.startswith(("#", "<", "    ")) else link_names(line, self.module, self.imported)


def link_names(line: str, module: str, imported: dict[str, str]) -> str:
    """Back-ticked names of ours become `py:obj` references; names inside a link's text are left alone."""
    taken = [m.span() for m in _LINK.finditer(line)]

    def one(m: re.Match) -> str:
        text = m.group(1)
        full = resolve(text.split("(")[0].strip(), module, imported) if _NAME.match(text) else None
        if not full or not re.fullmatch(r"[\w.]+(\(.*\))?", text) or any(a <= m.start() < b for a, b in taken):
            return m.group(0)
        return f"{{py:obj}}`{text} <{full}>`"

    return _CODE_SPAN.sub(one, line)


def resolve(name: str, module: str, imported: dict[str, str]) -> str | None:
    """Full name of an object of ours: of this page's module, imported here, or unmistakable in the whole library."""
    known = symbols()
    head, _, tail = name.partition(".")
    for full in (name, f"{module}.{name}", imported.get(head, "?") + (f".{tail}" if tail else "")):
        if full in known:
            return full
    if "_" in name or "." in name or name[:1].isupper():
        ends = [s for s in known if s.endswith(f".{name}")]
        return ends[0] if len(ends) == 1 else None
    return None


@cache
def symbols() -> frozenset[str]:
    """Full names of every object that has an API entry."""
    modules = [(p.module, _module_path(p.module)) for p in pages().values() if p.module]
    return frozenset(s for name, path in modules if path.exists() for s in api.names(api.read_module(path, name)))


def rewrite_links(line: str, page_name: str, write) -> str:
    """Give each relative link of `line` to `write(target file, anchor, page)`; links elsewhere stay."""

    def one(m: re.Match) -> str:
        target, _, anchor = m.group(2).partition("#")
        if not target or re.match(r"[a-z][a-z0-9+.-]*:", target):
            return m.group(0)
        path = _target(target, page_name)
        return f"{m.group(1)}({write(path, '#' + anchor if anchor else '', page_name)})" if path else m.group(0)

    return _LINK.sub(one, line)


def files_linked() -> set[Path]:
    """Files that are no notebooks but are linked or shown from one: they are copied beside the pages."""
    found: set[Path] = set()

    def note(path: Path, anchor: str, page_name: str) -> str:
        if path.suffix != ".ipynb" and path.is_file():
            found.add(path)
        return ""

    for name in pages():
        for cell in read_nb(NBS / f"{name}.ipynb").cells:
            texts = [cell.source] if cell.cell_type == "markdown" else []
            texts += ["".join(o["data"]["text/markdown"]) for o in cell.get("outputs", [])
                      if "text/markdown" in o.get("data", {})]
            for text in texts:
                rewrite_links(text, name, note)
    return found


def forget() -> None:
    """Read the notebooks anew at the next question."""
    pages.cache_clear()
    symbols.cache_clear()


def copied_as(path: Path) -> str:
    """Where a linked file lies among the pages, as a path from their root."""
    return (path.relative_to(NBS) if path.is_relative_to(NBS) else Path("files") / path.relative_to(ROOT)).as_posix()


def _for_site(path: Path, anchor: str, page_name: str) -> str:
    path_there = copied_as(path) if path.exists() or path.is_relative_to(NBS) else path.relative_to(ROOT).as_posix()
    return os.path.relpath(path_there, Path(page_name).parent).replace(os.sep, "/") + anchor  # Sphinx reports dead ones


def _target(target: str, page_name: str) -> Path | None:
    """The file that a link means: a path from the notebook, or nbdev's own form (etl.html for 01_etl.ipynb)."""
    base = NBS if target.startswith("/") else (NBS / page_name).parent
    path = Path(os.path.normpath(base / unquote(target).lstrip("/")))
    if path.suffix == ".html" and not path.exists():
        stem = path.with_suffix("").relative_to(NBS).as_posix() if path.is_relative_to(NBS) else ""
        same = [n for n in pages() if n == stem or Path(n).with_name(_plain(n)).as_posix() == stem]
        path = NBS / f"{same[0]}.ipynb" if same else path
    return path


def outside_fences(text: str, change) -> str:
    """Change each line of Markdown that is neither code nor display maths."""
    fence, out = "", []
    for line in text.split("\n"):
        mark = re.match(r"\s*(```+|~~~+|\$\$)", line)
        if mark and (not fence or line.strip().startswith(fence)):
            one_line = mark.group(1) == "$$" and line.count("$$") > 1
            fence = "" if fence or one_line else mark.group(1)
            out.append(line)
        else:
            out.append(line if fence else change(line))
    return "\n".join(out)


def _imported(source: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for m in re.finditer(r"^from (bigmodel_nb[\w.]*) import \(?([^()\n]+|[^()]+\))", source, re.M):
        for part in m.group(2).strip("() \n").split(","):
            name, _, alias = part.strip().partition(" as ")
            names[(alias or name).strip()] = f"{m.group(1)}.{name.strip()}"
    return names


def _page(path: Path) -> Page:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    head = next(("".join(c["source"]) for c in cells if c["cell_type"] == "markdown"), "")
    title, summary = re.search(r"^# +(.+)$", head, re.M), re.search(r"^> +(.+)$", head, re.M)
    code = "\n".join("".join(c["source"]) for c in cells[:2] if c["cell_type"] == "code")
    module = re.search(r"^#\|\s*default_exp\s+(\S+)", code, re.M)
    name = path.relative_to(NBS).with_suffix("").as_posix()
    return Page(name, title.group(1).strip() if title else name, summary.group(1).strip() if summary else "",
                f"bigmodel_nb.{module.group(1)}" if module else "")


def _label(source: str) -> str:
    made = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    names = [n.name if isinstance(n, ast.ClassDef) else f"{n.name}()" for n in made]
    doc = (ast.get_docstring(made[0]) or "").split("\n")[0].replace("`", "") if len(made) == 1 else ""
    return " · ".join(["Source of " + ", ".join(names) if names else "Source", *([doc] if doc else [])])


def _module_path(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


def _plain(name: str) -> str:
    return re.sub(r"^\d+[a-zA-Z0-9]*_", "", name.rsplit("/", 1)[-1])


def _belongs(name: str, what: str | tuple[str, ...] | None) -> bool:
    if "/" in name:
        return name.split("/")[0] == what
    if what is None:
        return re.match(r"\d", name) is not None and _plain(name) not in DOOR
    return isinstance(what, tuple) and _plain(name) in what


def _toctrees() -> str:
    """The sidebar; a title with a colon is shortened to what stands before it."""
    def line(name: str) -> str:
        title = pages()[name].title
        return f"{title.split(': ')[0]} <{name}>" if ": " in title else name

    return "\n\n".join(f"```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(map(line, names)) + "\n```"
                       for title, names in sidebar().items())


def _plain_json(nb, about: Page) -> dict:
    cells = []
    for i, c in enumerate(nb.cells):
        cell = {"cell_type": c.cell_type, "id": f"c{i}", "metadata": dict(c.get("metadata", {})), "source": c.source}
        cell["metadata"].pop("language", None)
        if c.cell_type == "code":
            cell |= {"execution_count": None, "outputs": c.get("outputs", [])}
        cells.append(cell)
    meta = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "pygments_lexer": "ipython3"},
            "myst": {"html_meta": {"description": about.summary}} if about.summary else {}}
    return {"cells": cells, "metadata": meta, "nbformat": 4, "nbformat_minor": 5}
