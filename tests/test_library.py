"""The library as a whole: linted, typed, light to import."""

import subprocess
import sys

import gates


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=gates.ROOT, capture_output=True, text=True)


def test_ruff():
    done = run(sys.executable, "-m", "ruff", "check", "--no-cache", ".")
    assert done.returncode == 0, done.stdout


def test_mypy():
    done = run(sys.executable, "-m", "mypy", "--no-incremental")
    assert done.returncode == 0, done.stdout


def test_import_is_light():
    code = "import sys, bigmodel_nb as b; print(b.__version__, 'torch' in sys.modules, 'pandas' in sys.modules)"
    version, torch, pandas = run(sys.executable, "-c", code).stdout.split()
    assert version.count(".") == 2 and torch == pandas == "False"


def test_help_loads_no_heavy_library():
    code = (
        "import sys\nfrom bigmodel_nb.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'sklearn', 'duckdb', 'matplotlib.pyplot', 'shap') if m in sys.modules])"
    )
    assert run(sys.executable, "-c", code).stdout.splitlines()[-1] == "[]"


def test_environment_is_consistent():
    done = run(sys.executable, "-m", "pip", "check")
    assert done.returncode == 0, done.stdout
