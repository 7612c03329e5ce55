"""Bookmarks under SIGKILL, rotation and rivals: each line is stored once, and the state file is never torn."""

import json
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path

import pytest

pytest.importorskip("duckdb")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from postgres import postgres  # noqa: E402, F401

from bigmodel_nb.etl.bookmarks import Bookmarks, new_rows, open_bookmarks, read_tail  # noqa: E402
from bigmodel_nb.etl.databases import connected  # noqa: E402
from bigmodel_nb.etl.extract import connect  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and flock are POSIX")

#: One loader: reads the tail a little at a time, stores by key in one transaction, commits the bookmark after it.
LOADER = """
import os, sqlite3, sys
from contextlib import closing
from bigmodel_nb.etl.bookmarks import open_bookmarks, read_tail

def load(folder, limit=100):
    with open_bookmarks(f"{folder}/state.json") as marks, closing(sqlite3.connect(f"{folder}/store.db")) as store:
        while True:
            tail = read_tail(marks, f"{folder}/app.log", limit=limit)
            lines = tail.text.splitlines()
            rows = [(tail.source, tail.row + i, line) for i, line in enumerate(lines, 1)]
            store.executemany("INSERT OR REPLACE INTO lines VALUES (?, ?, ?)", rows)
            store.commit()
            marks.commit()
            assert not tail.gap
            if not tail.more and not lines:
                return

for _ in sys.stdin:  # one fork a run: what takes long to import is imported once
    child = os.fork()
    if not child:
        load(sys.argv[1])
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def store(folder: Path) -> sqlite3.Connection:
    database = sqlite3.connect(folder / "store.db")
    database.execute("CREATE TABLE IF NOT EXISTS lines (source TEXT, row INTEGER, line TEXT, PRIMARY KEY (source, row))")
    return database


def test_exactly_once_over_thirty_kills(tmp_path):
    rng, written, died = random.Random(7), 0, 0
    log = tmp_path / "app.log"
    log.write_bytes(b"")
    with closing(store(tmp_path)) as database:
        database.commit()
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    with subprocess.Popen([sys.executable, "-c", LOADER, str(tmp_path)], **pipes) as runs:

        def run(seconds: float | None) -> bool:
            "Start a loader, kill it after some time; True if it had not finished."
            runs.stdin.write("go\n")
            child = int(runs.stdout.readline())
            if seconds is not None:
                time.sleep(seconds)
                with suppress(ProcessLookupError):  # it was quicker
                    os.kill(child, signal.SIGKILL)
            return int(runs.stdout.readline()) != 0

        for round_ in range(30):
            if round_ % 6 == 5:  # rotated after a run that was left alone
                assert not run(None)
                log.rename(tmp_path / f"app.log.{round_}")
                log.write_bytes(b"")
            with open(log, "ab") as file:
                for _ in range(rng.randrange(100, 300)):
                    file.write(f"line {written}\n".encode())
                    written += 1
            died += run(rng.uniform(0, 0.08))
            if (tmp_path / "state.json").exists():
                json.loads((tmp_path / "state.json").read_text())
        assert not run(None)
        runs.stdin.close()
    with closing(store(tmp_path)) as database:
        lines = [line for (line,) in database.execute("SELECT line FROM lines ORDER BY source, row")]
    assert len(lines) == written and set(lines) == {f"line {i}" for i in range(written)}
    assert died >= 10, f"only {died} of 30 runs were killed before their end"


def hold(path: str, seconds: float) -> None:
    with open_bookmarks(path) as marks:
        marks.places["count"] = marks.places.get("count", 0) + 1
        time.sleep(seconds)
        marks.commit()


def test_two_runs_at_once_lose_nothing(tmp_path):
    path = str(tmp_path / "state.json")
    fork = multiprocessing.get_context("spawn")
    children = [fork.Process(target=hold, args=(path, 0.2)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0] * 2 and Bookmarks(path).places == {"count": 2}


def test_a_killed_holder_lets_go(tmp_path):
    path = tmp_path / "state.json"
    held = "import sys, time; from bigmodel_nb.etl.bookmarks import open_bookmarks\n"
    held += "with open_bookmarks(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", held, str(path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(TimeoutError, match=str(child.pid)), open_bookmarks(path, wait=0.2):
            pass
        os.kill(child.pid, signal.SIGKILL)
    with open_bookmarks(path, wait=5) as marks:
        marks.commit()


@given(st.lists(st.text("ab\n\r,\"é行", max_size=12), max_size=8), st.integers(40, 60), st.booleans())
@settings(max_examples=40, deadline=None)
def test_pieces_are_the_whole(tmp_path_factory, parts, limit, quoted):
    "However a file grows and however little is read at a time, the pieces put together are the file's whole lines."
    folder = tmp_path_factory.mktemp("grow")
    path, marks, read = folder / "a.csv", Bookmarks(folder / "s.json"), ""
    path.write_bytes(b"")
    rows = 0
    for part in parts:
        with open(path, "ab") as file:
            file.write(part.encode())
        try:
            while (tail := read_tail(marks, path, limit=limit * 10, quoted=quoted)).text:
                assert tail.row == rows and not tail.gap
                read, rows = read + tail.text, rows + tail.text.count("\n")
        except ValueError as error:
            assert "no line ends" in str(error)
            return
    whole = path.read_bytes().decode()
    assert whole.startswith(read) and (quoted or "\n" not in whole[len(read) :])
    assert not quoted or read.count('"') % 2 == 0


@pytest.mark.xdist_group("postgres")
def test_new_rows_of_a_server(postgres, tmp_path):  # noqa: F811
    con = connect()

    def run(*statements: str) -> None:
        with connected(postgres, write=True) as database, database.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
            database.commit()

    def read(table: str, column: str, overlap) -> list[int]:
        with open_bookmarks(tmp_path / "state.json") as marks:
            ids = new_rows(con, marks, postgres, table, column, overlap).to_pandas()["id"].tolist()
            marks.commit()
        return sorted(ids)

    for kind, early, late, overlap in [
        ("timestamptz", "2024-05-01 08:00:00+02", "2024-05-01 09:00:00+02", timedelta(minutes=90)),
        ("timestamp", "2024-05-01 08:00:00", "2024-05-01 09:00:00", timedelta(minutes=90)),
        ("date", "2024-05-01", "2024-05-02", timedelta(days=1)),
        ("bigint", "9007199254740992", "9007199254740993", 1),
        ("numeric(20,2)", "1.00", "1.01", 0.02),
        ("double precision", "0.1", "0.2", 0.15),
    ]:
        name = "events_" + kind.split("(")[0].replace(" ", "_")
        run(
            f"CREATE TABLE {name} (id int PRIMARY KEY, at {kind} NOT NULL, x text)",
            f"INSERT INTO {name} VALUES (1, '{early}', 'a'), (2, '{late}', 'b')",
        )
        assert read(name, "at", overlap) == [1, 2] and read(name, "at", overlap) == []
        run(f"INSERT INTO {name} VALUES (3, '{late}', 'tie'), (4, '{early}', 'late')", f"UPDATE {name} SET x = 'c' WHERE id = 2")
        assert read(name, "at", overlap) == [2, 3, 4] and read(name, "at", overlap) == [], kind
    assert "course" not in (tmp_path / "state.json").read_text()  # no login in the state file
    run("CREATE TABLE holes (id int, at int)", "INSERT INTO holes VALUES (1, NULL)")
    with pytest.raises(ValueError, match="1 rows have no at"):
        read("holes", "at", 0)
