"""API entries of one exported module, read from its source: signatures and docments as Sphinx's Python domain.

The source is parsed, never imported, so the site builds without torch or any other extra.
"""

import ast
import io
import re
import tokenize
from pathlib import Path
from typing import Any, NamedTuple

Function = ast.FunctionDef | ast.AsyncFunctionDef
_MAGIC = re.compile(r"(`+[^`]*`+)")


class Module(NamedTuple):
    """A parsed module: its dotted name, syntax tree, comments by line, and what each local name stands for."""

    name: str
    tree: ast.Module
    comments: dict[int, str]
    alone: set[int]
    aliases: dict[str, str]


def read_module(path: Path, name: str) -> Module:
    """Parse the module at `path` and note its comments and its own package's names."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    comments: dict[int, str] = {}
    alone: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("#").strip()
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    package = name.split(".")[0]
    aliases = {n.name: f"{name}.{n.name}" for n in tree.body if isinstance(n, ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            aliases.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
    return Module(name, tree, comments, alone, aliases)


def public(tree: ast.Module) -> list[ast.stmt]:
    """The module's public functions and classes, then the constants that `__all__` names."""
    exported = {s for n in tree.body if isinstance(n, ast.Assign) and _targets(n) == ["__all__"]
                for s in ast.literal_eval(n.value)}
    made = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    shown: dict[str, ast.stmt] = {n.name: n for n in made if not n.name.startswith("_")}
    for node in tree.body:
        for target in _targets(node):
            if target in exported:
                shown[target] = node
    return list(shown.values())


def names(module: Module) -> list[str]:
    """Dotted names that the module's page documents: its objects, and the members of its classes."""
    found = [module.name]
    for node in public(module.tree):
        found += [f"{module.name}.{n}" for n in _names_of(node)]
        if isinstance(node, ast.ClassDef):
            found += [f"{module.name}.{node.name}.{m}" for n in members(node) for m in _names_of(n)]
    return found


def members(node: ast.ClassDef) -> list[ast.stmt]:
    """Public methods and properties of a class, and its annotated fields unless they are what it is made from."""
    kinds: Any = (ast.FunctionDef, ast.AsyncFunctionDef) + ((ast.AnnAssign,) if _init(node) else ())
    keep: dict[str, ast.stmt] = {}
    for n in node.body:
        if isinstance(n, kinds):
            for name in _names_of(n):
                if not name.startswith("_"):
                    keep.setdefault(name, n)
    return list(keep.values())


def entries(module: Module, link) -> str:
    """MyST text of the module's API section; `link` turns back-ticked names in prose into references."""
    lines = [f":::{{py:module}} {module.name}\n:::", ""]
    for node in public(module.tree):
        if isinstance(node, ast.ClassDef):
            lines += _class(module, node, link)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines += _function(module, node, link)
        else:
            lines += _constant(module, node, link)
    return "\n".join(lines)


def docments(module: Module, node: Function) -> dict[str, str]:
    """The comment on each parameter's own line (or the lines just above it), and the return's, by name."""
    args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    args += [a for a in (node.args.vararg, node.args.kwarg) if a]
    at = {a.arg: (a.lineno, a.end_lineno or a.lineno) for a in args}
    if node.returns:
        at["return"] = (node.returns.lineno, node.returns.end_lineno or node.returns.lineno)
    first_line = node.body[0].lineno
    on_line = [line for line, _ in at.values()]
    found = {}
    for name, (line, end) in at.items():
        shared = on_line.count(line) > 1 and not (name == "return" or line == max(on_line))
        text = "" if shared or line in module.alone else module.comments.get(end, "")
        above = line - 1
        while not text and above in module.alone and node.lineno <= above < first_line:
            text, above = module.comments[above], above - 1
        if text:
            found[name] = text
    return found


def escape(text: str, link) -> str:
    """Plain text as MyST: punctuation that would be read as markup is escaped, code spans are kept and linked."""
    parts = _MAGIC.split(text)
    return link("".join(p if i % 2 else re.sub(r"([\\*_<>\[\]$|#~^{}])", r"\\\1", p) for i, p in enumerate(parts)))


def _targets(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Assign):
        return [t.id for t in node.targets if isinstance(t, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def _names_of(node: ast.stmt) -> list[str]:
    return [node.name] if isinstance(node, Function | ast.ClassDef) else _targets(node)


class _Qualify(ast.NodeTransformer):
    """Write the package's own types with their full names, so that Sphinx can check and link them."""

    def __init__(self, aliases: dict[str, str]) -> None:
        self.aliases = aliases

    def visit_Name(self, node: ast.Name) -> ast.expr:
        full = self.aliases.get(node.id)
        return ast.parse(full, mode="eval").body if full else node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return self.visit(ast.parse(node.value, mode="eval").body) if isinstance(node.value, str) else node


def _type(module: Module, node: ast.expr | None) -> str:
    return ast.unparse(_Qualify(module.aliases).visit(ast.parse(ast.unparse(node), mode="eval").body)) if node else ""


def _signature(module: Module, node: Function, drop_first: bool) -> str:
    args = ast.parse(ast.unparse(node.args).join(("def f(", "): 0"))).body[0].args  # type: ignore[attr-defined]
    for a in [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]:
        if a is not None and a.annotation is not None:
            a.annotation = ast.parse(_type(module, a.annotation), mode="eval").body
    if drop_first and (args.posonlyargs or args.args):
        (args.posonlyargs or args.args).pop(0)
    returns = f" -> {_type(module, node.returns)}" if node.returns else ""
    return f"({ast.unparse(args)}){returns}"


def _doc(node: ast.AST, link) -> list[str]:
    text = ast.get_docstring(node)  # type: ignore[arg-type]
    return [escape(text, link) if text else "% no docstring", ""]


def _fields(module: Module, node: Function, link) -> list[str]:
    notes = docments(module, node)
    out = [f":param {k}: {escape(v, link)}" for k, v in notes.items() if k not in ("return", "self", "cls")]
    return out + ([f":returns: {escape(notes['return'], link)}"] if "return" in notes else [])


def _function(module: Module, node: Function, link) -> list[str]:
    body = [*_doc(node, link), *_fields(module, node, link)]
    return [f"::::{{py:function}} {node.name}{_signature(module, node, False)}", *body, "::::", ""]


def _decorators(node: Function) -> set[str]:
    return {ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list}


def _member(module: Module, node: ast.stmt, link) -> list[str]:
    if not isinstance(node, Function):
        return _field(module, node, link, "py:attribute")
    marks = _decorators(node)
    if marks & {"property", "cached_property"}:
        head = [f"::::{{py:property}} {node.name}"]
        if node.returns:
            head.append(f":type: {_type(module, node.returns)}")
        return [*head, "", *_doc(node, link), *_fields(module, node, link)[-1:], "::::", ""]
    flags = [f":{m}:" for m in ("staticmethod", "classmethod") if m in marks]
    sig = _signature(module, node, "staticmethod" not in marks)
    body = [*_doc(node, link), *_fields(module, node, link)]
    return [f"::::{{py:method}} {node.name}{sig}", *flags, "", *body, "::::", ""]


def _field(module: Module, node: ast.stmt, link, directive: str) -> list[str]:
    name, note = _targets(node)[0], module.comments.get(node.end_lineno or node.lineno, "")
    above = node.lineno - 1
    if not note and directive == "py:data" and above in module.alone and not module.comments[above].startswith("%%"):
        note = module.comments[above]
    kind = _type(module, node.annotation) if isinstance(node, ast.AnnAssign) else ""
    head = [f"::::{{{directive}}} {name}"] + ([f":type: {kind}"] if kind else [])
    return [*head, "", escape(note, link) if note else "% no comment", "", "::::", ""]


def _constant(module: Module, node: ast.stmt, link) -> list[str]:
    return _field(module, node, link, "py:data")


def _init(node: ast.ClassDef) -> ast.FunctionDef | None:
    return next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)


def _class(module: Module, node: ast.ClassDef, link) -> list[str]:
    init = _init(node)
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and not _targets(n)[0].startswith("_")]
    if init:
        signature, params = _signature(module, init, True).split(" -> ")[0], _fields(module, init, link)
    else:
        args = [f"{_targets(n)[0]}: {_type(module, n.annotation)}" + (f" = {ast.unparse(n.value)}" if n.value else "")
                for n in fields]
        notes = {_targets(n)[0]: module.comments.get(n.end_lineno or n.lineno, "") for n in fields}
        signature = f"({', '.join(args)})"
        params = [f":param {k}: {escape(v, link)}" for k, v in notes.items() if v]
    inside = [line for n in members(node) for line in _member(module, n, link)]
    return [f":::::{{py:class}} {node.name}{signature}", *_doc(node, link), *params, "", *inside, ":::::", ""]
