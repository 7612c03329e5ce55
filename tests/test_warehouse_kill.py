"""Loaders killed with SIGKILL at random moments leave the old state readable, or the new one whole."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("duckdb")
pytest.importorskip("ibis")
pytest.importorskip("deltalake")

from bigmodel_nb.etl.extract import connect  # noqa: E402
from bigmodel_nb.etl.lake import append_lake, commits, read_lake, save_lake, tidy_lake, upsert_lake  # noqa: E402
from bigmodel_nb.etl.warehouse import MEDICAL, load, load_star, query  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")

POINTS = 30
PEOPLE = 2_000
COUNTS = "select (select count(*) from fact_measurement) as m, (select count(*) from dim_patient) as p"
# imports are paid once: a nursery forks a child for each load, and we kill the child
NURSERY = """
import os, sys
import duckdb, ibis, pandas as pd, deltalake
from bigmodel_nb.etl.lake import append_lake, save_lake, upsert_lake
from bigmodel_nb.etl.warehouse import MEDICAL, load

def work(folder):
    names = ("patients", "measurements", "events")
    patients, measurements, events = (pd.read_parquet(f"{folder}/{name}.parquet") for name in names)
    tables = {"dim_patient": patients, "fact_measurement": measurements, "fact_event": events}
    with open(f"{folder}/steps", "w", buffering=1) as steps:
        load(f"{folder}/warehouse.duckdb", tables, MEDICAL, batch="second")
        print("warehouse", file=steps)
        append_lake(measurements, f"{folder}/lake", "measurements", "second")
        print("raw", file=steps)
        save_lake({"patients": patients}, f"{folder}/lake")
        print("clean", file=steps)
        upsert_lake(patients.assign(died=True), f"{folder}/lake", "register", ["entity"])

print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        work(line.strip())
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def record(n: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """A record of n patients with ten measurements and one event each."""
    rng, day = np.random.default_rng(n), pd.Timestamp("2000-01-01")
    patients = pd.DataFrame(
        {
            "entity": np.arange(n),
            "sex": "F",
            "birth_date": day - pd.Timedelta(days=9000),
            "index_date": day,
            "last_seen": day + pd.Timedelta(days=900),
            "died": False,
        }
    )
    who = np.repeat(np.arange(n), 10)
    measurements = pd.DataFrame(
        {
            "entity": who,
            "hospital": "north",
            "test": "hdl",
            "unit": "mg/dL",
            "date": day + pd.to_timedelta(np.tile(np.arange(10), n), unit="D"),
            "value": rng.normal(50, 5, len(who)),
        }
    )
    events = pd.DataFrame({"entity": np.arange(n), "hospital": "north", "date": day, "event": "htn"})
    return patients, measurements, events


def fresh(place: Path) -> None:
    """A small warehouse and lake, and the tables of a larger load."""
    place.mkdir()
    patients, measurements, events = record(100)
    tables = {"dim_patient": patients, "fact_measurement": measurements, "fact_event": events}
    load(place / "warehouse.duckdb", tables, MEDICAL, batch="first")
    append_lake(measurements, place / "lake", "measurements", "first")
    save_lake({"patients": patients, "register": patients}, place / "lake")
    for name, table in zip(("patients", "measurements", "events"), record(PEOPLE), strict=True):
        table.to_parquet(place / f"{name}.parquet")


def state(place: Path) -> dict[str, tuple[int, ...]]:
    """What warehouse and lake hold; every table is opened and counted."""
    rows, con = query(place / "warehouse.duckdb", COUNTS).iloc[0], connect()
    register = read_lake(con, place / "lake", "register")
    found = {
        "warehouse": (int(rows["p"]), int(rows["m"])),
        "raw": (int(read_lake(con, place / "lake", "measurements", "raw").count().to_pandas()),),
        "clean": (int(read_lake(con, place / "lake", "patients").count().to_pandas()),),
        "register": (int(register.count().to_pandas()), int(register.filter(register.died).count().to_pandas())),
    }
    con.disconnect()
    return found


OLD = {"warehouse": (100, 1_000), "raw": (1_000,), "clean": (100,), "register": (100, 0)}
NEW = {
    "warehouse": (PEOPLE, 10 * PEOPLE),
    "raw": (10 * PEOPLE + 1_000,),
    "clean": (PEOPLE,),
    "register": (PEOPLE, PEOPLE),
}


@pytest.fixture
def nursery() -> Iterator[subprocess.Popen]:
    """A process that forks a loader for each folder named to it."""
    process = subprocess.Popen([sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.communicate(timeout=60)


def run(nursery: subprocess.Popen, place: Path, step: int = 0, seconds: float | None = None) -> int:
    """Load into a folder, kill the loader so many seconds after a step, and return its exit status."""
    assert nursery.stdin is not None and nursery.stdout is not None
    (place / "steps").write_text("")
    nursery.stdin.write(f"{place}\n")
    nursery.stdin.flush()
    child = int(nursery.stdout.readline())
    if seconds is not None:
        deadline = time.monotonic() + 60
        while len((place / "steps").read_text().splitlines()) < step and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(seconds)
        with suppress(ProcessLookupError):  # it was faster
            os.kill(child, signal.SIGKILL)
    return int(nursery.stdout.readline())


def test_thirty_kills(tmp_path: Path, nursery: subprocess.Popen) -> None:
    """Kill at random moments of one run over all four tables; then let the rerun finish."""
    fresh(tmp_path / "whole")
    begin = time.monotonic()
    assert run(nursery, tmp_path / "whole") == 0
    seconds = time.monotonic() - begin
    assert state(tmp_path / "whole") == NEW
    rng, between, place = random.Random(20), 0, tmp_path / "killed 0"
    fresh(place)
    for point in range(1, POINTS + 1):
        status = run(nursery, place, rng.randrange(4), seconds * rng.random() ** 3)  # near a step as often as far from one
        found = state(place)
        for name, rows in found.items():
            assert rows in (OLD[name], NEW[name]), f"point {point}: {name} holds {rows}, half a load"
        between += OLD != found != NEW
        if found == NEW:  # nothing left to interrupt: begin anew
            place = tmp_path / f"killed {point}"
            fresh(place)
        assert status in (0, signal.SIGKILL), f"point {point}: the loader ended by itself with {status}"
    assert between, "no kill fell between two tables: the moments do not hit the load"
    assert run(nursery, place) == 0
    assert state(place) == NEW
    assert not list(place.glob(".*.loading-*"))
    assert commits(place / "lake", "measurements", "raw")["batch"].dropna().tolist() == ["first", "second"]
    tidy_lake(place / "lake", "register", keep_days=0)
    assert state(place) == NEW


def test_next_load_heals(tmp_path: Path) -> None:
    """A replacing load works beside what a killed one left, and is the same when repeated."""
    (tmp_path / ".warehouse.duckdb.loading-dead").mkdir()
    first = load_star(tmp_path / "warehouse.duckdb", *record(100))
    assert load_star(tmp_path / "warehouse.duckdb", *record(100)) == first
    assert query(tmp_path / "warehouse.duckdb", COUNTS).iloc[0].to_dict() == {"m": 1_000, "p": 100}
    assert not list(tmp_path.glob(".*.loading-*"))


def test_upsert_twice(tmp_path: Path) -> None:
    """The same correction twice changes nothing the second time."""
    patients = record(50)[0]
    save_lake({"register": patients}, tmp_path)
    change = patients.head(20).assign(died=True)
    lines = [upsert_lake(change, tmp_path, "register", ["entity"]) for _ in range(2)]
    assert [(line.rows_in, line.rows_out, line.merged) for line in lines] == [(20, 0, 20)] * 2
    con = connect()
    table = read_lake(con, tmp_path, "register")
    assert int(table.filter(table.died).count().to_pandas()) == 20
    con.disconnect()
