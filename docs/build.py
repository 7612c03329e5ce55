"""Build the site from the notebooks: `python docs/build.py [--out DIR] [--fresh]`. It opens from disk, offline."""

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # started as `python docs/build.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from docs import pages

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ROOT = pages.ROOT
WORK = ROOT / "_proc"
SITE = ROOT / "_site"
MADE_BY_SPHINX = ("search", "genindex", "py-modindex")


def build_site(out: Path = SITE, work: Path = WORK, fresh: bool = False, quiet: bool = False) -> Path:
    """Process the notebooks and run Sphinx under `work`, warnings as errors; put the site in `out`, return its home."""
    work.mkdir(parents=True, exist_ok=True)
    with _alone(work / ".lock"):
        return _build(out, work, fresh, quiet)


def _build(out: Path, work: Path, fresh: bool, quiet: bool) -> Path:
    if fresh:
        for part in ("pages", "doctrees", "html"):
            shutil.rmtree(work / part, ignore_errors=True)
    stamp, now = out / ".inputs", fingerprint()
    if not fresh and stamp.exists() and stamp.read_text() == now:
        return out / "index.html"
    pages.forget()
    html = work / "html"
    write_pages(work / "pages")
    house = hashlib.sha256(json.dumps(pages.sidebar()).encode() + _digest("docs").encode()).hexdigest()
    known = work / ".house"
    again = ["-E", "-a"] if not known.exists() or known.read_text() != house else []  # every page shows the sidebar
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-n", "-c", str(ROOT / "docs"),
               "-d", str(work / "doctrees"), *again, *(["-q"] if quiet else []), str(work / "pages"), str(html)]
    done = subprocess.run(command, cwd=ROOT, capture_output=quiet, text=True)
    if done.returncode:
        # Sphinx shows a warning only for a page that it reads again: let the next build read all of them.
        shutil.rmtree(work / "doctrees", ignore_errors=True)
        raise RuntimeError(f"the site has warnings; mend what is listed\n{done.stdout or ''}{done.stderr or ''}")
    known.write_text(house)
    copy_scripts(html / "_static")
    for name in pages.pages():  # the download button hands out the notebook as written
        shutil.copyfile(pages.NBS / f"{name}.ipynb", html / "_sources" / f"{name}.ipynb")
    for extra in set(html.rglob("*.html")) - {html / f"{n}.html" for n in [*pages.pages(), *MADE_BY_SPHINX]}:
        extra.unlink()
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(html, out)
    stamp.write_text(now)
    return out / "index.html"


def write_pages(folder: Path) -> None:
    """The pages and the files they link to; unchanged ones keep their date, so Sphinx reads only what is new."""
    wanted: dict[Path, bytes] = {}
    for name in pages.pages():
        text = json.dumps(pages.page(name), indent=1, ensure_ascii=False) + "\n"
        wanted[folder / f"{name}.ipynb"] = text.encode()
    for path in pages.files_linked():
        wanted[folder / pages.copied_as(path)] = path.read_bytes()
    for old in [p for p in folder.rglob("*") if p.is_file() and p not in wanted]:
        old.unlink()
    for path, content in wanted.items():
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def copy_scripts(static: Path) -> None:
    """MathJax with its fonts and TeX parts, and mermaid, out of the packages that carry them."""
    mathjax = _inside("sphinx-mathjax-offline", "static/mathjax/tex-chtml.js").parent
    for part in ("output/chtml/fonts/woff-v2", "input/tex/extensions"):
        shutil.copytree(mathjax / part, static / "mathjax" / part, dirs_exist_ok=True)
    shutil.copyfile(mathjax / "tex-chtml.js", static / "mathjax" / "tex-chtml.js")
    (static / "mermaid").mkdir(exist_ok=True)
    shutil.copyfile(_inside("mermaidx", "assets/mermaid.js"), static / "mermaid" / "mermaid.js")


def fingerprint() -> str:
    """A name for the state of everything that the site is made from."""
    digest = hashlib.sha256(sys.version.encode())
    for package in ("sphinx", "myst-nb", "myst-parser", "sphinx-book-theme", "sphinx-mathjax-offline", "mermaidx"):
        digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest() + _digest("nbs", "docs", "bigmodel_nb", "settings.ini", "LICENSE")


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    files = [p for part in parts for p in (ROOT / part, *(ROOT / part).rglob("*")) if p.is_file()]
    for path in sorted(p for p in files if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _inside(package: str, end: str) -> Path:
    files = importlib.metadata.files(package) or []
    return Path(str(next(f for f in files if f.as_posix().endswith(end)).locate()))


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One build at a time, where the system can lock a file."""
    with open(lock, "w") as handle:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Build, and say where the home page is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=SITE, help="folder for the site")
    parser.add_argument("--fresh", action="store_true", help="forget earlier builds")
    args = parser.parse_args()
    try:
        home = build_site(args.out.resolve(), fresh=args.fresh)
    except RuntimeError as error:
        sys.exit(f"{error}")
    print(f"Open {home.as_uri()}")


if __name__ == "__main__":
    main()
