"""The gates: each takes a notebook or the project and returns its problems, each saying how to mend it."""

from __future__ import annotations

import ast
import configparser
import io
import json
import re
import tokenize
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
SPINE = [
    "Why it hurts",
    "The idea",
    "Build it",
    "Does it work?",
    "What it costs",
    "Where it breaks",
    "Summary",
    "Exercises",
]
#: Pages that are not lessons: the home page and the dictionary have their own shape.
NO_SPINE = {"index", "glossary"}
#: A room imports only from lower shelves, or from its own package.
SHELVES = {
    "extras": 0,
    "meter": 0,
    "ledger": 0,
    "measure": 0,
    "datasets": 0,
    "pretrained": 0,
    "figures": 0,
    "etl": 1,
    "compute": 1,
    "training": 2,
    "privacy": 3,
    "compression": 3,
    "sharing": 4,
    "serving": 4,
    "venture": 5,
    "cases": 6,
    "claims": 7,
    "course": 7,
    "cli": 8,
}
MAX_CELL, MAX_NOTEBOOK_KB = 30, 300
CELLS, WORDS, MODULE_LINES = (40, 120), (800, 2500), (80, 350)
#: Sizes outside the house's limits, each with its reason.
SIZE_EXCEPTIONS: dict[tuple[str, str], str] = {
    ("cases.medical", "lines"): "one run, read from top to bottom; the rooms do everything else",
}


@dataclass
class Notebook:
    "A notebook on disk, with the few questions that gates ask of it."

    path: Path
    cells: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cells = json.loads(self.path.read_text(encoding="utf-8"))["cells"]

    @property
    def stem(self) -> str:
        return self.path.stem

    @property
    def name(self) -> str:
        parts = self.path.parts
        return "/".join(parts[parts.index("nbs") + 1 :]) if "nbs" in parts else self.path.name

    @property
    def default_exp(self) -> str | None:
        found = [m[1] for c in self.code() if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", source(c), re.M))]
        return found[0] if found else None

    def code(self) -> list[dict]:
        return [c for c in self.cells if c["cell_type"] == "code"]

    def markdown(self) -> list[str]:
        return [source(c) for c in self.cells if c["cell_type"] == "markdown"]


def source(cell: dict) -> str:
    "The text of a cell."
    return "".join(cell["source"])


def directives(cell: dict) -> set[str]:
    "The names of the `#|` directives of a cell."
    return set(re.findall(r"^#\|\s*(\w+)", source(cell), re.M))


def exported(cell: dict) -> bool:
    "Whether the cell's code goes into the library."
    return cell["cell_type"] == "code" and bool({"export", "exports", "exporti"} & directives(cell))


def parsed(cell: dict) -> ast.Module | None:
    "The cell's syntax tree, or None where IPython magic stands in it."
    try:
        return ast.parse(source(cell))
    except SyntaxError:
        return None


def defined(cell: dict) -> list[str]:
    "The functions and classes that a cell defines at its top level."
    tree = parsed(cell)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [n.name for n in tree.body if isinstance(n, kinds)] if tree else []


def imports_in(tree: ast.Module) -> list[ast.stmt]:
    "The import statements of a cell, those for type checkers only included."

    def only_types(n: ast.stmt) -> bool:
        return isinstance(n, ast.If) and isinstance(n.test, ast.Name) and n.test.id == "TYPE_CHECKING"

    return [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)) or only_types(n)]


# --- one notebook ---------------------------------------------------------------------------------------------------


def title_and_summary(nb: Notebook) -> list[str]:
    "The first text is `# Title` and `> summary`; a module's first cell is its default_exp."
    out, first = [], (nb.markdown() or [""])[0]
    if not re.match(r"# \S.*\n+> \S", first):
        out.append(f"{nb.name}: the first text cell must be '# Title', then '> one-line summary'; it becomes the docstring")
    if nb.default_exp and "default_exp" not in source(nb.cells[0]):
        out.append(f"{nb.name}: move '#| default_exp {nb.default_exp}' into the first cell")
    return out


def spine(nb: Notebook) -> list[str]:
    "The `##` headings are the house's spine, in order."
    if nb.stem in NO_SPINE:
        return []
    fenced = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)
    heads = [h.strip() for md in nb.markdown() for h in re.findall(r"^## (.+)$", fenced.sub("", md), re.M)]
    if heads == SPINE:
        return []
    return [f"{nb.name}: '##' headings are {heads}; they must be {SPINE}, in that order (use ### below them)"]


def one_definition(nb: Notebook) -> list[str]:
    "An exported cell holds one definition and at most 30 lines, unless it says why."
    out = []
    for c in filter(exported, nb.code()):
        lines = [x for x in source(c).splitlines() if x.strip() and not x.startswith("#|")]
        names, where = defined(c), f"{nb.name} cell {c['id']}"
        if len(names) > 1:
            out.append(f"{where} defines {', '.join(names)}: one definition to an exported cell; split it")
        why = re.search(r"^# long: \S.{9,}", source(c), re.M)
        if len(lines) > MAX_CELL and not why:
            out.append(f"{where} ({', '.join(names)}) has {len(lines)} lines, {MAX_CELL} at most; split it, or say '# long: why'")
    return out


def consequence(nb: Notebook) -> list[str]:
    "Within two cells of a public definition a cell uses it."
    out = []
    for i, c in enumerate(nb.cells):
        if not exported(c):
            continue
        after = [source(x) for x in nb.cells[i + 1 : i + 3] if x["cell_type"] == "code" and not exported(x)]
        for name in (n for n in defined(c) if not n.startswith("_")):
            if not any(re.search(rf"\b{name}\b", s) for s in after):
                out.append(f"{nb.name} cell {c['id']}: show what {name} does within two cells of its definition")
    return out


def absolute_imports(nb: Notebook) -> list[str]:
    "Library code imports absolutely, explicitly, and not beside other code."
    out = []
    for c in nb.code():
        tree = parsed(c)
        if tree is None:
            continue
        where = f"{nb.name} cell {c['id']}"
        for n in ast.walk(tree):
            if isinstance(n, ast.ImportFrom) and n.level:
                out.append(f"{where}: relative import; write 'from bigmodel_nb.… import …'")
            if isinstance(n, ast.ImportFrom) and n.names[0].name == "*" and (exported(c) or n.module != "fastcore.test"):
                out.append(f"{where}: star import of {n.module}; name what you use")
        if exported(c) and imports_in(tree) and len(imports_in(tree)) < len(tree.body):
            out.append(f"{where}: imports and code in one exported cell; nbdev runs such a cell for the docs. Split it")
    return out


def outputs_clean(nb: Notebook) -> list[str]:
    "No stored error, warning, progress bar or machine path."
    out = []
    path = re.compile(r"(?<![\w.])/(?:home|root|Users|work|tmp|private|var/folders)/[\w.-]+|[A-Z]:\\\\Users")
    for c in nb.code():
        where = f"{nb.name} cell {c['id']}"
        for o in c.get("outputs", []):
            data = o.get("data", {})
            text = "".join("".join(v) for m, v in data.items() if not m.startswith("image/")) + "".join(o.get("text", ""))
            if o["output_type"] == "error":
                out.append(f"{where}: a stored error ({o.get('ename')}); use test_fail to show one")
            if o.get("name") == "stderr":
                out.append(f"{where}: stored stderr ({text[:60]!r}); mend the warning or the progress bar")
            if m := path.search(text):
                out.append(f"{where}: a machine path in the output ({m[0]}); print the name only")
            if re.search(r"\d+%\|[█▏▎▍▌▋▊▉ #]", text):
                out.append(f"{where}: a stored progress bar; keep it quiet when it is not a terminal")
            if re.search(r"^(\S+:\d+: )?\w*Warning: ", text, re.M):
                out.append(f"{where}: a stored warning; mend its cause")
    return out


def executed(nb: Notebook) -> list[str]:
    "The page was run before it was stored: code that ends in an expression has an output."
    out = []
    for c in nb.code():
        tree = parsed(c)
        quiet = {"hide", "eval", "notest", "slow", "gpu"} & directives(c) or source(c).rstrip().endswith(";")
        if quiet or not tree or not tree.body or not isinstance(tree.body[-1], ast.Expr) or c.get("outputs"):
            continue
        if not isinstance(tree.body[-1].value, (ast.Call, ast.Constant)):
            out.append(f"{nb.name} cell {c['id']}: no stored output; run `bigmodel course {nb.stem} --write`")
    return out


def notebook_size(nb: Notebook) -> list[str]:
    "A page is neither a leaflet nor a book."
    kb, n = nb.path.stat().st_size / 1000, len(nb.cells)
    words = sum(len(md.split()) for md in nb.markdown())
    out = []
    if kb > MAX_NOTEBOOK_KB:
        out.append(f"{nb.name}: {kb:.0f} kB, {MAX_NOTEBOOK_KB} at most; lower a figure's dpi or print less")
    if nb.stem in NO_SPINE:
        return out
    for what, value, (low, high) in (("cells", n, CELLS), ("words", words, WORDS)):
        if not low <= value <= high and (nb.name, what) not in SIZE_EXCEPTIONS:
            out.append(f"{nb.name}: {value} {what}; the house's size is {low} to {high}")
    return out


def no_importorskip(nb: Notebook) -> list[str]:
    "A skip inside a notebook counts as a failure: use a flag."
    return [
        f"{nb.name} cell {c['id']}: no importorskip in a notebook; flag the cell '#| notest' or '#| slow'"
        for c in nb.code()
        if "importorskip" in source(c)
    ]


def names_nbdev_can_link(nb: Notebook) -> list[str]:
    "No 'auto' in a name, no numbered folder."
    out = []
    if "auto" in nb.stem:
        out.append(f"{nb.name}: nbdev leaves names containing 'auto' out of its links; rename it")
    for part in nb.name.split("/")[:-1]:
        if part[:1].isdigit():
            out.append(f"{nb.name}: number the files, not the folder {part!r}; numbered folders break the sidebar")
    return out


def links_resolve(nb: Notebook) -> list[str]:
    "Relative links lead to a file that exists."
    out = []
    for md in nb.markdown():
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", re.sub(r"`[^`\n]*`|^```.*?^```", "", md, flags=re.M | re.S)):
            if re.match(r"[a-z][a-z0-9+.-]*:", target):
                continue
            if not (nb.path.parent / unquote(target)).exists():
                out.append(f"{nb.name}: the link to {target} leads nowhere")
    return out


def stem_is_module(nb: Notebook) -> list[str]:
    "The file's stem is the module's name, its folder the sub-package."
    exp = nb.default_exp
    want = exp and exp.replace(".", "/")
    have = "/".join([*nb.name.split("/")[:-1], re.sub(r"^\d+_", "", nb.stem)])
    return (
        [f"{nb.name} exports {exp}: the file must lie at nbs/{want}.ipynb (a number may precede it)"]
        if exp and want != have
        else []
    )


NOTEBOOK_GATES = [
    title_and_summary,
    spine,
    one_definition,
    consequence,
    absolute_imports,
    outputs_clean,
    executed,
    notebook_size,
    no_importorskip,
    names_nbdev_can_link,
    links_resolve,
    stem_is_module,
]

# --- the project ----------------------------------------------------------------------------------------------------


def notebooks(root: Path = ROOT) -> list[Notebook]:
    "Every notebook of the project, in order."
    skip = {".ipynb_checkpoints", "_proc"}
    return [Notebook(p) for p in sorted((root / "nbs").rglob("*.ipynb")) if not skip & set(p.parts)]


def modules(root: Path = ROOT) -> list[Path]:
    "Every exported module."
    found = sorted((root / "bigmodel_nb").rglob("*.py"))
    return [p for p in found if p.name not in {"__init__.py", "_modidx.py"} and "__pycache__" not in p.parts]


def dotted(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root / "bigmodel_nb").with_suffix("").parts)


def unique_default_exp(root: Path) -> list[str]:
    "No two notebooks export one module: the second would overwrite the first in silence."
    seen: dict[str, str] = {}
    out = []
    for nb in notebooks(root):
        if nb.default_exp and nb.default_exp in seen:
            out.append(f"{nb.name} and {seen[nb.default_exp]} both export {nb.default_exp}; rename one")
        elif nb.default_exp:
            seen[nb.default_exp] = nb.name
    return out


def module_has_notebook(root: Path) -> list[str]:
    "Every module has its notebook, and every notebook its module."
    exps = {nb.default_exp for nb in notebooks(root) if nb.default_exp}
    mods = {dotted(p, root) for p in modules(root)}
    out = [f"bigmodel_nb/{m.replace('.', '/')}.py: no notebook exports it any more; delete it" for m in sorted(mods - exps)]
    return out + [f"{e}: its notebook was not exported; run make export" for e in sorted(exps - mods)]


def _resolve(name: str, n: ast.ImportFrom) -> str:
    "The absolute name of what a module imports from."
    if not n.level:
        return n.module or ""
    parts = ["bigmodel_nb", *name.split(".")]
    return ".".join([*parts[: len(parts) - n.level], *([n.module] if n.module else [])])


def shelf_order(root: Path) -> list[str]:
    "A module imports only from lower shelves or from its own package."
    out = []
    for p in modules(root):
        name = dotted(p, root)
        package = name.split(".")[0]
        if package not in SHELVES:
            out.append(f"bigmodel_nb/{name}: {package!r} stands on no shelf; add it to SHELVES in tests/gates.py")
            continue
        for n in ast.walk(ast.parse(p.read_text(encoding="utf-8"))):
            if isinstance(n, ast.ImportFrom) and (n.level or (n.module or "").startswith("bigmodel_nb")):
                base = _resolve(name, n)  # nbdev writes our absolute imports as relative ones
                targets = [base] if base != "bigmodel_nb" else [f"bigmodel_nb.{a.name}" for a in n.names]
            elif isinstance(n, ast.Import):
                targets = [a.name for a in n.names if a.name.startswith("bigmodel_nb.")]
            else:
                continue
            for t in (t.split(".")[1] for t in targets if t and "." in t):
                ground = SHELVES[package] == 0 and SHELVES.get(t) == 0
                if t != package and not ground and SHELVES.get(t, 0) >= SHELVES[package] and t != "__version__":
                    out.append(f"{name}:{n.lineno} imports {t}, which stands on no lower shelf; move the code down")
    return out


def _comments(text: str) -> set[int]:
    return {t.start[0] for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT}


def _undocumented(fn: ast.FunctionDef, comments: set[int], method: bool) -> list[str]:
    "What a function's signature leaves unsaid."
    args = [*fn.args.posonlyargs, *fn.args.args, *fn.args.kwonlyargs]
    args = args[1:] if method and args and args[0].arg in {"self", "cls"} else args
    named = [*args, *(a for a in (fn.args.vararg, fn.args.kwarg) if a)]
    out = [f"parameter {a.arg} has no type" for a in named if a.annotation is None]
    ends = {d.lineno: d.end_lineno for d in [*fn.args.defaults, *[d for d in fn.args.kw_defaults if d]]}
    for a in named:
        last = ends.get(a.lineno, a.end_lineno) or a.lineno
        if not {a.lineno, a.end_lineno, last} & comments:
            out.append(f"parameter {a.arg} has no comment (docment)")
    if fn.returns is None and not (method and fn.name == "__init__"):
        out.append("the return has no type")
    elif fn.returns is not None and not (isinstance(fn.returns, ast.Constant) and fn.returns.value is None):
        if not {fn.returns.lineno, fn.returns.end_lineno} & comments:
            out.append("the return has no comment (docment)")
    return out


def documented(root: Path) -> list[str]:
    "Public functions, classes and modules carry types, docments and a one-line docstring."
    out = []
    for p in modules(root):
        text = p.read_text(encoding="utf-8")
        tree, comments, where = ast.parse(text), _comments(text), f"bigmodel_nb/{dotted(p, root).replace('.', '/')}"
        if not ast.get_docstring(tree):
            out.append(f"{where}: no module docstring; the notebook's '> summary' is missing")
        todo: list[tuple[str, ast.AST, bool]] = []
        for n in tree.body:
            if isinstance(n, ast.ClassDef) and not n.name.startswith("_"):
                todo.append((n.name, n, False))
                todo += [
                    (f"{n.name}.{m.name}", m, True)
                    for m in n.body
                    if isinstance(m, ast.FunctionDef) and (m.name == "__init__" or not m.name.startswith("_"))
                ]
            elif isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and not n.name.startswith("_"):
                todo.append((n.name, n, False))
        for name, n, method in todo:
            if not name.endswith(".__init__") and not ast.get_docstring(n):  # type: ignore[arg-type]
                out.append(f"{where}: {name} has no docstring; one line says what it does")
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)):
                out += [f"{where}: {name}: {x}" for x in _undocumented(n, comments, method)]  # type: ignore[arg-type]
    return out


def module_size(root: Path) -> list[str]:
    "One topic to a module."
    out = []
    for p in modules(root):
        name = dotted(p, root)
        n = sum(bool(x.strip()) and not x.startswith("# %%") for x in p.read_text(encoding="utf-8").splitlines())
        low, high = MODULE_LINES
        if not low <= n <= high and (name, "lines") not in SIZE_EXCEPTIONS:
            out.append(f"bigmodel_nb/{name}: {n} lines; {low} to {high} is one topic. Split it, or merge it with a neighbour")
    return out


def version_agrees(root: Path) -> list[str]:
    "settings.ini and the package say the same version, and the changelog knows it."
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(root / "settings.ini", encoding="utf-8")
    want = cfg["DEFAULT"]["version"]
    text = (root / "bigmodel_nb" / "__init__.py").read_text(encoding="utf-8")
    out = [] if f'"{want}"' in text else [f"bigmodel_nb/__init__.py does not say {want} (settings.ini); run make export"]
    if f"## {want}" not in (root / "CHANGELOG.md").read_text(encoding="utf-8"):
        out.append(f"CHANGELOG.md has no section '## {want}'")
    return out


PROJECT_GATES = [unique_default_exp, module_has_notebook, shelf_order, documented, module_size, version_agrees]
