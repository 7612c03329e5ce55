"""A loader killed with SIGKILL at any moment leaves the old warehouse readable, or the new one whole."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("duckdb")
pytest.importorskip("ibis")

from bigmodel_nb.etl.warehouse import load_star, query  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")

COUNTS = "select (select count(*) from fact_measurement) as m, (select count(*) from dim_patient) as p"
CHILD = """
import sys
import pandas as pd
from bigmodel_nb.etl.warehouse import load_star
folder = sys.argv[1]
tables = [pd.read_parquet(f"{folder}/{name}.parquet") for name in ("patients", "measurements", "events")]
print("ready", flush=True)
load_star(f"{folder}/warehouse.duckdb", *tables)
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small warehouse, and the tables of a larger one to be loaded over it."""
    place = tmp_path_factory.mktemp("kill")
    load_star(place / "warehouse.duckdb", *record(100))
    for name, table in zip(("patients", "measurements", "events"), record(20_000), strict=True):
        table.to_parquet(place / f"{name}.parquet")
    return place


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.4, 1.0])
def test_kill(folder: Path, delay: float) -> None:
    """Kill `delay` seconds after the half-built file appeared."""
    known = set(folder.glob(".loading-*"))
    loader = subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert loader.stdout is not None and loader.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 60
    while set(folder.glob(".loading-*")) == known and loader.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay)
    loader.send_signal(signal.SIGKILL)
    loader.wait()
    loader.stdout.close()
    rows = query(folder / "warehouse.duckdb", COUNTS).iloc[0].to_dict()
    assert rows in ({"m": 1_000, "p": 100}, {"m": 200_000, "p": 20_000})
    if delay < 0.3:
        assert rows["p"] == 100, "a load this young cannot have finished"


def test_next_load_heals(folder: Path) -> None:
    """After all the killing, a load works and is the same when repeated."""
    first = load_star(folder / "warehouse.duckdb", *record(100))
    assert load_star(folder / "warehouse.duckdb", *record(100)) == first
    assert query(folder / "warehouse.duckdb", COUNTS).iloc[0].to_dict() == {"m": 1_000, "p": 100}
