"""The gates over this project, and proof that each gate bites."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gates
import pytest


@pytest.mark.parametrize("nb", gates.notebooks(), ids=lambda nb: nb.name)
def test_notebook_gates(nb):
    problems = [p for gate in gates.NOTEBOOK_GATES for p in gate(nb)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("gate", gates.PROJECT_GATES, ids=lambda g: g.__name__)
def test_project_gates(gate):
    problems = gate(gates.ROOT)
    assert not problems, "\n".join(problems)


def copy_project(to: Path, *extra: str) -> Path:
    "A copy of what an export reads and writes."
    for name in ("settings.ini", "pyproject.toml", "README.md", *extra):
        shutil.copy(gates.ROOT / name, to / name)
    for name in ("nbs", "bigmodel_nb"):
        shutil.copytree(gates.ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    return to


def tree(folder: Path) -> dict[str, bytes]:
    "Every file under `folder` with its bytes."
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and "__pycache__" not in p.parts
    }


def differences(a: dict[str, bytes], b: dict[str, bytes]) -> list[str]:
    "The names that are missing on one side or differ in a byte."
    return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))


def stale_export(root: Path, tmp: Path) -> list[str]:
    "What a fresh export of `root`'s notebooks would change in its library."
    copy = copy_project(tmp)
    shutil.rmtree(copy / "bigmodel_nb")
    (copy / "bigmodel_nb").mkdir()
    for p in (root / "bigmodel_nb").rglob("*"):  # what no notebook writes
        if p.is_file() and p.suffix not in {".py", ".pyc"}:
            (copy / p.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(p, copy / p.relative_to(root))
    subprocess.run(
        [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"],
        cwd=copy,
        check=True,
        capture_output=True,
    )
    return differences(tree(root / "bigmodel_nb"), tree(copy / "bigmodel_nb"))


def test_export_in_step(tmp_path):
    changed = stale_export(gates.ROOT, tmp_path)
    assert not changed, (
        f"the library differs from its notebooks in {changed}; run make export (edit the notebook, never the export)"
    )


def test_export_gate_bites(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    root = copy_project(tmp_path / "a")
    module = gates.modules(root)[0]
    module.write_text(module.read_text() + "\nedited_by_hand = True\n")
    assert str(module.relative_to(root / "bigmodel_nb")) in stale_export(root, tmp_path / "b")


def unclean(root: Path) -> list[str]:
    "The notebooks under `root` that nbdev_clean would change; it is run on them."
    before = tree(root / "nbs")
    subprocess.run(
        [sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean()"], cwd=root, check=True, capture_output=True
    )
    return differences(before, tree(root / "nbs"))


def test_notebooks_clean(tmp_path):
    changed = unclean(copy_project(tmp_path))
    assert not changed, f"{changed} carry execution counts or metadata; run make export, or make hooks once"


def test_clean_gate_bites(tmp_path):
    root = copy_project(tmp_path)
    path = next((root / "nbs").rglob("*_meter.ipynb"))
    nb = json.loads(path.read_text())
    next(c for c in nb["cells"] if c["cell_type"] == "code")["execution_count"] = 7
    path.write_text(json.dumps(nb, indent=1))
    assert "01_meter.ipynb" in unclean(root)


# --- a small project that breaks each rule in turn ------------------------------------------------------------------


def md(text: str) -> dict:
    return {"cell_type": "markdown", "id": f"m{abs(hash(text)) % 10**7}", "metadata": {}, "source": text}


def py(text: str, *outputs: dict) -> dict:
    return {
        "cell_type": "code",
        "id": f"c{abs(hash(text)) % 10**7}",
        "metadata": {},
        "execution_count": None,
        "outputs": list(outputs),
        "source": text,
    }


SHOWN = {"output_type": "execute_result", "data": {"text/plain": "3"}, "metadata": {}, "execution_count": None}
ADD = (
    "#| exports\ndef add(\n    a: int, # first\n    b: int, # second\n) -> int: # their sum\n"
    '    "Add two numbers."\n    return a + b'
)
MODULE = '"""Adding."""\n\n__all__ = ["add"]\n\nimport math\n\n' + ADD.split("\n", 1)[1] + "\n"


def good_cells() -> list[dict]:
    "A page that keeps every rule."
    start = [py("#| default_exp etl.adder"), md("# Adder\n\n> Adding.\n"), py("#| export\nimport math")]
    body = [md(f"## {h}\n\n" + "word " * 110) for h in gates.SPINE]
    lesson = [py(ADD), md("Why this form."), py("assert add(1, 2) == 3\nadd(1, 2)", SHOWN)]
    return start + body[:3] + lesson + [py(f"x = {i}") for i in range(40)] + body[3:]


def write_project(root: Path, cells: list[dict], module: str = MODULE, where: str = "etl/01_adder.ipynb") -> Path:
    "A project of one notebook and its module."
    path = root / "nbs" / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    (root / "bigmodel_nb" / "etl").mkdir(parents=True, exist_ok=True)
    pad = "".join(f"_c{i} = {i}\n" for i in range(80))
    (root / "bigmodel_nb" / "etl" / "adder.py").write_text(module + pad)
    (root / "bigmodel_nb" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    (root / "settings.ini").write_text("[DEFAULT]\nversion = 1.2.3\n")
    (root / "CHANGELOG.md").write_text("## 1.2.3\n")
    return path


def problems_of(root: Path) -> dict[str, list[str]]:
    "Every gate's problems in a small project, by the gate's name."
    out = {g.__name__: [p for nb in gates.notebooks(root) for p in g(nb)] for g in gates.NOTEBOOK_GATES}
    return {k: v for k, v in (out | {g.__name__: g(root) for g in gates.PROJECT_GATES}).items() if v}


def swap(cells: list[dict], old: str, new: str) -> list[dict]:
    "The cells with one text replaced."
    text = json.dumps(cells)
    a, b = json.dumps(old)[1:-1], json.dumps(new)[1:-1]
    assert a in text, f"the fixture lost {old!r}"
    return json.loads(text.replace(a, b))


def with_output(**output) -> list[dict]:
    return [*good_cells(), py("y = 1", {"metadata": {}, **output})]


BROKEN_PAGES = {
    "title_and_summary: no summary": lambda c: swap(c, "> Adding.", "Adding."),
    "title_and_summary: late default_exp": lambda c: [c[1], c[0], *c[2:]],
    "spine: a heading missing": lambda c: swap(c, "## What it costs", "### What it costs"),
    "spine: two swapped": lambda c: swap(
        swap(swap(c, "## Summary", "## X"), "## Exercises", "## Summary"), "## X", "## Exercises"
    ),
    "one_definition: two in a cell": lambda c: swap(c, "return a + b", "return a + b\ndef sub():\n    return 0"),
    "one_definition: long cell": lambda c: swap(c, "return a + b", "\n    ".join(["a += 0"] * 40) + "\n    return a + b"),
    "consequence: never used": lambda c: swap(c, "assert add(1, 2) == 3\nadd(1, 2)", "1 + 2"),
    "absolute_imports: relative": lambda c: swap(c, "import math", "from .core import x"),
    "absolute_imports: star": lambda c: swap(c, "import math", "from math import *"),
    "absolute_imports: mixed": lambda c: swap(c, "import math", "import math\npi = math.pi"),
    "outputs_clean: error": lambda c: with_output(output_type="error", ename="ValueError", evalue="", traceback=[]),
    "outputs_clean: stderr": lambda c: with_output(output_type="stream", name="stderr", text="oh"),
    "outputs_clean: machine path": lambda c: with_output(output_type="stream", name="stdout", text="saved /home/ann/x.csv"),
    "outputs_clean: progress bar": lambda c: with_output(output_type="stream", name="stdout", text="50%|█████     | 5/10"),
    "outputs_clean: warning": lambda c: with_output(output_type="stream", name="stdout", text="x.py:3: UserWarning: no"),
    "executed: no output": lambda c: [*c, py("add(1, 2) == 3")],
    "notebook_size: too few words": lambda c: swap(c, "word " * 110, "word "),
    "notebook_size: too many cells": lambda c: c + [py(f"z = {i}") for i in range(100)],
    "notebook_size: too big": lambda c: [*c, py("w = 1", {**SHOWN, "data": {"image/png": "A" * 400_000}})],
    "no_importorskip": lambda c: [*c, py("import pytest\npytest.importorskip('x')")],
    "links_resolve": lambda c: [*c, md("see [there](../nowhere.ipynb)")],
    "stem_is_module": lambda c: swap(c, "default_exp etl.adder", "default_exp etl.other"),
}


def test_a_good_project_passes(tmp_path):
    write_project(tmp_path, good_cells())
    assert problems_of(tmp_path) == {}


@pytest.mark.parametrize("rule", BROKEN_PAGES)
def test_page_gate_bites(rule, tmp_path):
    write_project(tmp_path, BROKEN_PAGES[rule](good_cells()))
    found = problems_of(tmp_path)
    assert rule.split(":")[0] in found, f"{rule} was not caught; caught: {found}"


@pytest.mark.parametrize("where", ["etl/01_autoadder.ipynb", "01_etl/01_adder.ipynb"])
def test_name_gate_bites(where, tmp_path):
    write_project(tmp_path, good_cells(), where=where)
    assert "names_nbdev_can_link" in problems_of(tmp_path)


BROKEN_MODULES = {
    "shelf_order": MODULE.replace("import math", "from bigmodel_nb.training.trainer import fit"),
    "shelf_order: inside a function": MODULE.replace("    return", "    import bigmodel_nb.cases.medical\n    return"),
    "shelf_order: relative": MODULE.replace("import math", "from ..serving.engine import Engine"),
    "documented: no docment": MODULE.replace("a: int, # first", "a: int,"),
    "documented: no type": MODULE.replace("a: int,", "a,"),
    "documented: no return type": MODULE.replace(") -> int: # their sum", "):"),
    "documented: no return comment": MODULE.replace("# their sum", ""),
    "documented: no docstring": MODULE.replace('    "Add two numbers."\n', ""),
    "documented: no module docstring": MODULE.replace('"""Adding."""', ""),
    "documented: a method": MODULE + 'class Box:\n    "A box."\n    def open(self, hard): return hard\n',
    "module_size": MODULE + "".join(f"_d{i} = {i}\n" for i in range(400)),
}


@pytest.mark.parametrize("rule", BROKEN_MODULES)
def test_module_gate_bites(rule, tmp_path):
    write_project(tmp_path, good_cells(), BROKEN_MODULES[rule])
    found = problems_of(tmp_path)
    assert rule.split(":")[0] in found, f"{rule} was not caught; caught: {found}"


def test_twin_gate_bites(tmp_path):
    write_project(tmp_path, good_cells())
    write_project(tmp_path, good_cells(), where="etl/02_adder.ipynb")
    assert "unique_default_exp" in problems_of(tmp_path)


def test_orphan_gate_bites(tmp_path):
    write_project(tmp_path, good_cells())
    (tmp_path / "bigmodel_nb" / "etl" / "left_behind.py").write_text(MODULE)
    found = problems_of(tmp_path)["module_has_notebook"]
    assert re.search("left_behind.py: no notebook", found[0])


@pytest.mark.parametrize("file, text", [("settings.ini", "[DEFAULT]\nversion = 1.2.4\n"), ("CHANGELOG.md", "# none\n")])
def test_version_gate_bites(file, text, tmp_path):
    write_project(tmp_path, good_cells())
    (tmp_path / file).write_text(text)
    assert "version_agrees" in problems_of(tmp_path)


def test_unstored_shelf_is_caught(tmp_path):
    write_project(tmp_path, good_cells())
    (tmp_path / "bigmodel_nb" / "attic.py").write_text(MODULE)
    assert any("no shelf" in p for p in problems_of(tmp_path)["shelf_order"])
