"""Two loaders at once: one waits or fails clearly, and nothing is lost."""

import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("duckdb")
pytest.importorskip("ibis")
pytest.importorskip("deltalake")

from bigmodel_nb.etl.extract import connect  # noqa: E402
from bigmodel_nb.etl.lake import append_lake, book, commits, read_lake, save_lake, upsert_lake  # noqa: E402
from bigmodel_nb.etl.star import Dimension, Fact, Star  # noqa: E402
from bigmodel_nb.etl.warehouse import load, query  # noqa: E402
from bigmodel_nb.ledger import Ledger  # noqa: E402

ROUNDS, ROWS = 4, 2_000
LOADER = """
import sys
import pandas as pd
from bigmodel_nb.etl.lake import append_lake, upsert_lake
from bigmodel_nb.etl.warehouse import load
sys.path.insert(0, sys.argv[3])
from test_warehouse_two import ROUNDS, STAR, visits
folder, me = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for k in range(ROUNDS):
    load(f"{folder}/w.duckdb", {"fact_visit": visits(me, k)}, STAR, batch=f"{me} {k}")
    append_lake(visits(me, k), f"{folder}/lake", "visits", f"{me} {k}")
    append_lake(visits(9, k), f"{folder}/lake", "visits", f"both {k}")
    upsert_lake(pd.DataFrame({"patient": [me], "round": [k]}), f"{folder}/lake", "last", ["patient"])
"""
STAR = Star(
    [Dimension("dim_ward", "ward_key", {"ward": "varchar"}, infer=True)],
    [Fact("fact_visit", {"ward_key": ("dim_ward", ["ward"])}, {"visit": "bigint not null"}, ["visit"])],
)


def visits(who: int, k: int) -> pd.DataFrame:
    """Rows that only this loader brings in this round."""
    first = (who * ROUNDS + k) * ROWS
    return pd.DataFrame({"visit": range(first, first + ROWS), "ward": [f"ward {who} {i % 3}" for i in range(ROWS)]})


def test_two_processes(tmp_path: Path) -> None:
    """Two processes load warehouse and lake in turns of their own; every row of both is there once."""
    save_lake({"last": pd.DataFrame({"patient": [0], "round": [-1]})}, tmp_path / "lake")
    loaders = [
        subprocess.Popen(
            [sys.executable, "-c", LOADER, str(tmp_path), str(me), str(Path(__file__).parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for me in (1, 2)
    ]
    for loader in loaders:
        assert loader.stdout is not None and loader.stdout.readline() == "ready\n"
    for loader in loaders:
        assert loader.stdin is not None
        loader.stdin.write("\n")
        loader.stdin.flush()
    for loader in loaders:
        loader.communicate(timeout=120)
        assert loader.returncode == 0
    rows = query(tmp_path / "w.duckdb", "select count(*) as n, count(distinct visit) as v from fact_visit").iloc[0]
    assert (rows["n"], rows["v"]) == (2 * ROUNDS * ROWS, 2 * ROUNDS * ROWS)
    log = query(tmp_path / "w.duckdb", "select sum(rows_in) as came, sum(rows_out) as made from load_log").iloc[0]
    assert log["came"] == log["made"] == rows["n"]
    con = connect()
    raw = read_lake(con, tmp_path / "lake", "visits", "raw")
    assert int(raw.count().to_pandas()) == int(raw.visit.nunique().to_pandas()) == 3 * ROUNDS * ROWS
    batches = commits(tmp_path / "lake", "visits", "raw")["batch"].dropna().tolist()
    assert len(batches) == len(set(batches)) == 3 * ROUNDS
    last = read_lake(con, tmp_path / "lake", "last").order_by("patient").to_pandas()
    assert last.to_dict("list") == {"patient": [0, 1, 2], "round": [-1, ROUNDS - 1, ROUNDS - 1]}
    con.disconnect()


def test_second_loader_is_told(tmp_path: Path) -> None:
    """A loader that may not wait fails with the reason, and what is there stays as it is."""
    load(tmp_path / "w.duckdb", {"fact_visit": visits(1, 0)}, STAR)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
            "c.execute('begin exclusive'); print('held', flush=True); time.sleep(60)",
            str(tmp_path / ".w.duckdb.lock"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="another load of w.duckdb is still running after 0.3 s"):
        load(tmp_path / "w.duckdb", {"fact_visit": visits(1, 1)}, STAR, wait=0.3)
    assert time.monotonic() - begin < 20
    holder.kill()  # its right to write dies with it
    holder.wait()
    holder.stdout.close()
    assert load(tmp_path / "w.duckdb", {"fact_visit": visits(1, 1)}, STAR, wait=5)[0].rows_out == ROWS


def test_readers_see_one_state(tmp_path: Path) -> None:
    """While loads go on, a reader counts whole batches only."""
    load(tmp_path / "w.duckdb", {"fact_visit": visits(1, 0)}, STAR)
    seen = []
    for k in range(1, ROUNDS):
        load(tmp_path / "w.duckdb", {"fact_visit": visits(1, k)}, STAR)
        seen.append(int(query(tmp_path / "w.duckdb", "select count(*) as n from fact_visit")["n"][0]))
    assert seen == [ROWS * (k + 1) for k in range(1, ROUNDS)]


def test_repeats_answer_the_same(tmp_path: Path) -> None:
    """A batch sent again is recognised by warehouse and lake, and another one of its name is refused."""
    lines = [load(tmp_path / "w.duckdb", {"fact_visit": visits(1, 0)}, STAR, batch="one") for _ in range(2)]
    assert lines[0] == lines[1]
    with pytest.raises(ValueError, match="batch 'one' was loaded with other rows"):
        load(tmp_path / "w.duckdb", {"fact_visit": visits(1, 1)}, STAR, batch="one")
    books = [append_lake(visits(1, 0), tmp_path / "lake", "visits", "one") for _ in range(2)]
    assert [b.rows_out for b in books] == [ROWS, 0]
    again = upsert_lake(visits(1, 0), tmp_path / "lake", "wards", ["visit"])
    assert again.rows_out == ROWS


def test_books_add_up(tmp_path: Path) -> None:
    """A load's lineage stands in the ledger's own fields, and every row is accounted for."""
    rows = pd.concat([visits(1, 0), visits(1, 0).head(5), pd.DataFrame({"visit": [None], "ward": ["ward"]})])
    (line,) = load(tmp_path / "w.duckdb", {"fact_visit": rows}, STAR, batch="one", quarantine=True)
    with Ledger("night") as ledger, ledger.stage("load") as stage:
        book(stage, line)
    entry = ledger.entries[0]
    assert (entry.rows_in, entry.rows_out, entry.merged, entry.quarantined) == (ROWS + 6, ROWS, 5, 1)
    assert (entry.source, entry.target, entry.note) == ("one", "fact_visit", "")
    with pytest.raises(ValueError, match="some were lost or doubled"):
        book(stage, line._replace(rows_out=0))
