"""README.md from nbs/index.ipynb: `python docs/readme.py` writes it, and first the table of rooms in the notebook."""

import json
import os
import re
import sys
from pathlib import Path

if not __package__:  # started as `python docs/readme.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import TagRemovePreprocessor

from docs import pages

INDEX = pages.NBS / "index.ipynb"
README = pages.ROOT / "README.md"
ROOMS = "<!-- rooms: written by docs/readme.py -->"


class Plain(pages.Processor):
    """For a reader of README.md: a heading on top, links from the repository's root, no pictures or widgets."""

    def begin(self) -> None:
        front = self.nb.frontmatter_
        self.nb.cells = [c for c in self.nb.cells if c.cell_type != "raw"]
        head = f"# {front['title']}\n\n> {front['description']}"
        self.nb.cells.insert(0, pages.mk_cell(head, "markdown"))

    def cell(self, cell) -> None:
        if cell.cell_type == "markdown":
            cell.source = _linked(cell.source)
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            for kind in [k for k in data if k.startswith("image/") or k == "text/html"]:
                del data[kind]
            if "text" in out:
                out["text"] = "".join(out["text"])
            for kind, text in data.items():
                data[kind] = _linked("".join(text)) if kind == "text/markdown" else "".join(text)


def readme() -> str:
    """The text that README.md should hold."""
    nb = pages.processed(INDEX, [Plain])
    cells = [{"cell_type": c.cell_type, "source": c.source, "id": f"c{i}",
              "metadata": {"tags": c.get("metadata", {}).get("tags", [])}}
             | ({"execution_count": None, "outputs": c.get("outputs", [])} if c.cell_type == "code" else {})
             for i, c in enumerate(nb.cells)]
    meta = {"language_info": {"name": "python"}}
    node = nbformat.from_dict({"cells": cells, "metadata": meta, "nbformat": 4, "nbformat_minor": 5})
    quiet = TagRemovePreprocessor(remove_input_tags={"remove-input"}, enabled=True)
    exporter = MarkdownExporter(preprocessors=[quiet])
    text, _ = exporter.from_notebook_node(node)
    text = re.sub(r"^<!-- .*?-->\n", "", text, flags=re.M)
    note = "<!-- Written by docs/readme.py from nbs/index.ipynb: edit the notebook. -->\n\n"
    return note + re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.M)).strip() + "\n"


def rooms() -> str:
    """The table of rooms, from the notebooks that are there."""
    lines = [ROOMS, "", "| part | room | what it answers |", "| --- | --- | --- |"]
    for part, names in pages.sidebar().items():
        for i, name in enumerate(names):
            about = pages.pages()[name]
            summary = about.summary.rstrip(".").replace("|", "\\|")
            lines.append(f"| {f'**{part}**' if not i else ''} | [{about.title}]({name}.ipynb) | {summary} |")
    return "\n".join(lines)


def with_rooms(text: str) -> str:
    """The index notebook's text with its table of rooms brought up to date."""
    nb = json.loads(text)
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown" and "".join(cell["source"]).startswith(ROOMS):
            cell["source"] = rooms().splitlines(keepends=True)
    return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def readme_in_step() -> bool:
    """Whether README.md, and the notebook's table of rooms, are what this script would write."""
    pages.forget()
    same = json.loads(with_rooms(text := INDEX.read_text(encoding="utf-8"))) == json.loads(text)
    return same and README.exists() and README.read_text(encoding="utf-8") == readme()


def write() -> None:
    """Bring the table of rooms and README.md up to date."""
    pages.forget()
    text = INDEX.read_text(encoding="utf-8")
    if json.loads(fresh := with_rooms(text)) != json.loads(text):
        INDEX.write_text(fresh, encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")


def _linked(text: str) -> str:
    return pages.outside_fences(text, lambda line: pages.rewrite_links(line, "index", _from_root))


def _from_root(path: Path, anchor: str, page_name: str) -> str:
    return os.path.relpath(path, pages.ROOT).replace(os.sep, "/") + anchor


if __name__ == "__main__":
    write()
