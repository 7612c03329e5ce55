"""Cleaning and matching on a real Spark cluster of processes return DuckDB's rows, cell by cell, change logs included."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pandas as pd
import psutil
import pytest

pytest.importorskip("duckdb")
pytest.importorskip("pyspark", reason="the extra 'spark' is not installed")

from bigmodel_nb.datasets import load  # noqa: E402
from bigmodel_nb.etl import clean, evidence, match, missing  # noqa: E402
from bigmodel_nb.etl.categories import merge_variants  # noqa: E402
from bigmodel_nb.etl.extract import connect, read_frame, store  # noqa: E402
from bigmodel_nb.etl.spark import carry, connect_spark, differences, java_version, local_cluster  # noqa: E402

pytestmark = [
    pytest.mark.xdist_group("spark"),  # one session a process, one cluster a machine
    pytest.mark.slow,
    pytest.mark.skipif(java_version() < 17, reason="Spark 4 needs Java 17 or newer; tests/system_parts.sh installs it"),
    pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX"),
]
QUICK = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
SETTINGS = {f"spark.{side}.extraJavaOptions": QUICK for side in ("driver", "executor")}


def frame(columns: dict[str, Any]) -> pd.DataFrame:
    table = pd.DataFrame(columns).astype(object)
    return table.where(table.notna(), None)


@pytest.fixture(scope="module")
def duck() -> Any:
    return connect()


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    with local_cluster(workers=2, cores=1) as master:
        con = connect_spark(master, SETTINGS)
        driver = con._session.sparkContext._gateway.proc
        folder = Path(con.folder)
        yield con
        executors = con._session.sparkContext._jsc.sc().getExecutorMemoryStatus().size() - 1
        con.disconnect()
        assert driver.poll() is not None and not folder.exists()
    assert executors == 2, "the work was not done by two executor processes"


@pytest.fixture(scope="module")
def people(duck: Any) -> ibis.Table:
    rows = load("febrl_copies").head(500).astype(object)
    dirt = ["  x ", " \u00a0tab\there", "\u3000full", "JosÃ© MÃ¼ller", "N/A", " unknown", "-", "不详", "a\nb", "", "two  words",
            "\\d $1 \\1", "it's", "\u2003em", "\x0bivanov", "\x0cff", "\x85nel", "café", "â‚¬uro"]
    rng = np.random.default_rng(0)
    for column in ("given_name", "surname", "suburb"):
        for i, at in enumerate(rng.choice(len(rows), 100, replace=False)):
            rows.loc[rows.index[at], column] = dirt[i % len(dirt)]
    return read_frame(duck, rows.where(rows.notna(), None), "people")


@pytest.fixture(scope="module")
def readings(duck: Any) -> ibis.Table:
    rows = load("nafld_measurements").query("test in ['sbp', 'chol']").head(3000).astype({"value": "float64"})
    rows, rng = rows.reset_index(drop=True), np.random.default_rng(1)
    at = rng.choice(len(rows), 90, replace=False)
    rows.loc[at[:40], "value"] *= 10
    rows.loc[at[40:80], "value"] *= 0.1
    rows.loc[at[80:], "value"] = -1
    again = [rows, rows.sample(30, random_state=1), rows.sample(20, random_state=2).assign(value=3.0)]
    return read_frame(duck, pd.concat(again, ignore_index=True), "readings")


@pytest.fixture(scope="module")
def toys(duck: Any) -> dict[str, ibis.Table]:
    numbers = ["1", "1,5", " 2.50 ", "1e3", "1E-05", ".5", "5.", "-7", "+8,25", "abc", "", "  ", "1.2.3", "nan", "inf", "0x10",
               "1_000", None, "12345678901234567890", "0.1", "1e99", "３"]
    dates = ["2024-01-02", "02.01.2024", "1/2/2024", "2024-01-02 12:30:00", "someday", " 2024-13-02 ", None, "2023-02-30", "",
             "0001-01-01", "１９７０-01-01", "2024-01-02T12:30", "2024-1-2", "2024-01-02\x85", "2024-01-02\n", "02-01-2024"]
    sexes = ["m", "M ", "male", "Female", "f", "x", "01", "1", "2", "FEMAL", "男", None, "femalee", "' or", "\\'"]
    units = {"v": [70.0, 154.0, 5.2, 1.8, None, 11.0], "u": ["kg", "lb", "mmol/L", "m", None, "stone"],
             "q": ["w", "w", "chol", "h", "w", "w"]}
    return {"numbers": read_frame(duck, frame({"v": numbers}), "numbers"),
            "dates": read_frame(duck, frame({"d": dates}), "dates"),
            "codes": read_frame(duck, frame({"sex": sexes * 3}), "codes"),
            "units": read_frame(duck, pd.DataFrame(units), "units")}


STEPS: dict[str, tuple[str, Callable[[ibis.Table], tuple[ibis.Table, ibis.Table]]]] = {
    "rename": ("people", lambda t: clean.rename(t, {"rec_id": "id", "surname": "family"}, others=True)),
    "tidy_text": ("people", clean.tidy_text),
    "repair_mojibake": ("people", lambda t: clean.repair_mojibake(t, ["given_name", "surname", "suburb"])),
    "parse_dates": ("dates", lambda t: clean.parse_dates(t, ["d"], ["%Y-%m-%d", "%d.%m.%Y", "%m/%d/%Y"])),
    "parse_numbers": ("numbers", lambda t: clean.parse_numbers(t, ["v"])),
    "map_codes": ("codes", lambda t: clean.map_codes(t, "sex", {"m": "male", "f": "female", "1": "male", "男": "male"})),
    "map_codes to bool": ("codes", lambda t: clean.map_codes(t, "sex", {"m": True, "f": False, "1": True})),
    "convert_units": ("units", lambda t: clean.convert_units(t, "v", "u", {"w": "kg", "chol": "mg/dL", "h": "cm"}, "q")),
    "convert one unit": ("units", lambda t: clean.convert_units(t, "v", "lb", "kg")),
    "drop_duplicates": ("readings", lambda t: clean.drop_duplicates(t, ["id", "days", "test"])),
    "repair_slips": ("readings", lambda t: clean.repair_slips(t, "value", group=["test"], person=["id"])),
    "apply_steps": ("people", lambda t: clean.apply_steps(t, clean.tidy_text, lambda t: clean.repair_mojibake(t, ["surname"]),
                                                          lambda t: clean.drop_duplicates(t, ["soc_sec_id"]))),
    "merge_variants": ("people", lambda t: merge_variants(t, "suburb")),
    "empty_codes": ("readings", lambda t: missing.empty_codes(t, {"value": [-1.0]})),
    "impute": ("people", lambda t: missing.impute(t, missing.fit_imputer(t, ["state", "given_name"]))),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_returns_the_same_rows_and_changes(name: str, duck: Any, spark: Any, tmp_path: Path,
                                                  request: pytest.FixtureRequest) -> None:
    source, step = STEPS[name]
    table = request.getfixturevalue(source) if source in ("people", "readings") else request.getfixturevalue("toys")[source]
    here, there = step(table), step(carry(table, spark, tmp_path))
    for one, two in zip(here, there, strict=True):
        assert differences(one, two, tolerance=1e-12).empty, differences(one, two, tolerance=1e-12).head(9).to_string()


def test_linkage_and_merge_return_the_same_rows(duck: Any, spark: Any, tmp_path: Path) -> None:
    def as_hospital(table: pd.DataFrame, name: str) -> pd.DataFrame:
        born = table["date_of_birth"]
        return pd.DataFrame({
            "hospital": name, "local_id": table["rec_id"], "given_name": table["given_name"], "family_name": table["surname"],
            "birth_date": born.str[:4] + "-" + born.str[4:6] + "-" + born.str[6:], "suburb": table["suburb"],
            "street": table["street_number"].str.cat(table["address_1"], sep=" ", na_rep="").str.strip(),
            "postcode": table["postcode"]})
    left, right = load("febrl_people").head(250), load("febrl_copies")
    person = r"rec-(\d+)-"
    right = right[right["rec_id"].str.extract(person)[0].isin(left["rec_id"].str.extract(person)[0])]
    both = pd.concat([as_hospital(left, "north"), as_hospital(right, "south")], ignore_index=True).astype(object)
    patients = read_frame(duck, both.where(both.notna(), None), "hospitals")
    far = carry(patients, spark, tmp_path)
    here, there = match.resolve(patients), match.resolve(far)
    for part in ("people", "pairs", "entities"):
        assert differences(getattr(here, part), getattr(there, part)).empty, part
    assert here.weights.prior == there.weights.prior
    for kind in ("m", "u"):
        for column, shares in getattr(here.weights, kind).items():
            assert np.array_equal(shares, getattr(there.weights, kind)[column]), (kind, column)
    for one, two in zip(match.merge(patients, here.entities), match.merge(far, there.entities), strict=True):
        assert differences(one, two).empty
    truth = both[["hospital", "local_id"]].assign(person=both["local_id"].str.extract(person)[0])
    assert match.pair_scores(there.entities.to_pandas(), truth).recall > 0.8


def test_stored_rows_are_computed_once(spark: Any, toys: dict[str, ibis.Table], tmp_path: Path) -> None:
    kept = store(carry(toys["codes"], spark, tmp_path).select(r=ibis.random()))
    assert kept.r.sum().execute() == kept.r.sum().execute()


def test_types_and_missing_cells_survive_the_way(duck: Any, spark: Any, tmp_path: Path) -> None:
    columns = {"n": pd.array([1, None, 3], "Int64"), "yes": pd.array([True, None, False], "boolean"), "f": [1.5, None, 2.0],
               "at": pd.to_datetime(["2020-01-01T00:00:00.123456", None, "1900-01-01"], format="ISO8601"),
               "text": ["", None, "😀"], "day": [pd.Timestamp("2020-02-02").date(), None, pd.Timestamp("1890-02-02").date()]}
    table = read_frame(duck, pd.DataFrame(columns), "types")
    assert differences(table, carry(table, spark, tmp_path)).empty
    assert differences(table, read_frame(spark, pd.DataFrame(columns), "types")).empty


def test_agreement_of_names_is_the_same_bits(duck: Any, spark: Any, tmp_path: Path) -> None:
    names = load("febrl_people")["surname"].dropna().unique()[:300]
    table = read_frame(duck, frame({"a": names, "b": np.roll(names, 1)}), "names")
    near = [t.select("_row", near=evidence.alike(t.get_backend())(t.a, t.b)) for t in (table, carry(table, spark, tmp_path))]
    assert differences(*near, tolerance=1e-12).empty


def test_no_process_is_left_when_the_owner_is_killed(tmp_path: Path) -> None:
    code = ("import time\nfrom bigmodel_nb.etl.spark import local_cluster\n"
            "with local_cluster(workers=1) as url:\n    print(url, flush=True)\n    time.sleep(600)")
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline().startswith("spark://")
    started = psutil.Process(owner.pid).children(recursive=True)
    assert sum("java" in child.name() for child in started) == 2
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive, alive


def test_a_cluster_that_ends_leaves_no_process() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with local_cluster(workers=1):
        started = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert started
    assert not [child for child in started if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
