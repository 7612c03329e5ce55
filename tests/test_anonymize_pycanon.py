"""A third judge for our anonymity measures: the checker pycanon, kept in a folder of its own.

pycanon pins exact old versions of numpy, pandas and others, so it is never part of our environment. It is installed
once, without its dependencies (those it needs for measuring are here already), and asked in a process of its own.
No network and no cached copy means a failed test, never a skipped one.
"""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from bigmodel_nb.datasets import load
from bigmodel_nb.privacy.anonymize import anonymize, k_anonymity, l_diversity, t_closeness

pytestmark = pytest.mark.xdist_group("pycanon")  # one worker, so that fixtures are made once

WANTED = "pycanon==1.3.*"
FOLDER = Path(__file__).resolve().parents[1] / "build" / "pycanon"

ASK = """
import json, sys
sys.path.append(sys.argv[1])
import pandas as pd
import pycanon
from pycanon import anonymity
assert pycanon.__file__.startswith(sys.argv[1]), "another pycanon answered"
table = pd.read_pickle(sys.argv[2])
names, sensitive = json.loads(sys.argv[3])
print(json.dumps({
    "k": int(anonymity.k_anonymity(table, names)),
    "l": int(anonymity.l_diversity(table, names, [sensitive])),
    "t": float(anonymity.t_closeness(table, names, [sensitive])),
}))
"""


@pytest.fixture(scope="module")
def checker() -> Path:
    FOLDER.parent.mkdir(exist_ok=True)
    with open(FOLDER.parent / "pycanon.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (FOLDER / "pycanon" / "anonymity").is_dir():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(FOLDER), WANTED]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.fail(f"{WANTED} could not be installed, so nothing was checked:\n{done.stderr[-2000:]}")
    return FOLDER


def ask(checker: Path, table: pd.DataFrame, names: list[str], sensitive: str, folder: Path) -> dict:
    table[[*names, sensitive]].reset_index(drop=True).to_pickle(folder / "release.pkl")
    command = [sys.executable, "-c", ASK, str(checker), str(folder / "release.pkl"), json.dumps([names, sensitive])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"pycanon did not answer:\n{done.stderr[-2000:]}"
    return json.loads(done.stdout)


def agree(checker: Path, table: pd.DataFrame, names: list[str], sensitive: str, folder: Path) -> dict:
    theirs = ask(checker, table, names, sensitive, folder)
    assert theirs["k"] == k_anonymity(table, names)
    assert theirs["l"] == l_diversity(table, names, sensitive)
    assert theirs["t"] == pytest.approx(t_closeness(table, names, sensitive), abs=1e-9)
    return theirs


ADULT = ["age", "gender", "race", "marital-status"]
NAFLD = ["age", "male", "height"]


@pytest.mark.parametrize(
    ("name", "names", "sensitive"),
    [
        ("adult", ADULT, "income"),
        ("adult", ADULT, "hours-per-week"),
        ("nafld_patients", NAFLD, "status"),
    ],
)
@pytest.mark.parametrize(("k", "l"), [(5, 1), (10, 2)])
def test_releases(checker, tmp_path, name, names, sensitive, k, l):  # noqa: E741
    source = load(name).head(3000).reset_index(drop=True)
    release = anonymize(source, names, sensitive, k=k, l=l)
    theirs = agree(checker, release.table, names, sensitive, tmp_path)
    assert theirs["k"] == release.k >= k
    assert theirs["l"] == release.l >= l


def test_the_judge_sees_an_unprotected_table(checker, tmp_path):
    raw = load("adult").head(2000)
    assert agree(checker, raw, ADULT, "income", tmp_path)["k"] == 1
