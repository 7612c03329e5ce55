"""Each notebook runs cold, through nbdev's own runner and with its flags, in a process of its own."""

import os
import subprocess
import sys

import gates
import pytest

RUN = """
import sys
from pathlib import Path
from nbdev.test import test_nb
ok, seconds = test_nb(Path(sys.argv[1]), skip_flags=sys.argv[2].split(), basepath=Path(sys.argv[3]))
sys.exit(0 if ok else 1)
"""
FLAGS = "notest slow gpu"


@pytest.mark.parametrize("nb", gates.notebooks(), ids=lambda nb: nb.name)
def test_notebook_runs(nb, tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", RUN, str(nb.path), FLAGS, str(gates.ROOT)]
    done = subprocess.run(command, cwd=nb.path.parent, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{nb.name} fails when run from top to bottom:\n{(done.stdout + done.stderr)[-4000:]}"


def test_flags_are_the_settings():
    import configparser

    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(gates.ROOT / "settings.ini", encoding="utf-8")
    assert cfg["DEFAULT"]["tst_flags"] == FLAGS
