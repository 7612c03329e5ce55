"""The cleaning steps on random tables: clean passes unchanged, a second pass is idle, rows are conserved."""

from functools import partial

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigmodel_nb.etl.clean import (
    apply_steps,
    conversion_factor,
    drop_duplicates,
    map_codes,
    parse_dates,
    parse_numbers,
    tidy_text,
)
from bigmodel_nb.etl.extract import connect, read_csv, read_frame
from bigmodel_nb.etl.schema import Column, Schema, failures, quarantine

FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
WORD = st.text(alphabet="abcdefghijklmnopqrstuvwxyz李明é", min_size=1, max_size=8).filter(
    lambda word: word not in {"na", "nan", "nil", "none", "null", "unknown"}
)
CLEAN_ROW = st.tuples(WORD, st.dates(), st.floats(0.01, 1e6).map(lambda x: f"{x:.3f}"), st.sampled_from("FM"))
ANY_ROW = st.tuples(
    st.one_of(WORD, st.sampled_from(["", "n/a", " Ann ", "JosÃ©"])),
    st.sampled_from(["2001-02-03", "2001-02-30", "03.02.2001", "x", "", "2199-01-01"]),
    st.sampled_from(["1", "1,5", "<5", "-3", "nan", "", "9e99"]),
    st.sampled_from(["F", "M", " f", "MALE", "femle", "?", ""]),
)
STEPS = [
    tidy_text,
    partial(parse_dates, columns=["born"]),
    partial(parse_numbers, columns=["value"]),
    partial(map_codes, column="sex", mapping={"F": "F", "M": "M", "female": "F", "male": "M"}),
    partial(drop_duplicates, on=["id"]),
]
SCHEMA = Schema(
    [
        Column("id"),
        Column("name", nullable=True),
        Column("born", "date", low="1900-01-01", high="2100-12-31"),
        Column("value", "float", low=0, nullable=True),
        Column("sex", choices=["F", "M"]),
    ],
    key=["id"],
)


@pytest.fixture(scope="module")
def con():
    return connect()


def as_table(con, rows, ids=None):
    frame = pd.DataFrame(rows, columns=["name", "born", "value", "sex"]).astype(str)
    frame.insert(0, "id", list(ids) if ids else [str(i) for i in range(len(rows))])
    return read_frame(con, frame, "random")


@FEW
@given(rows=st.lists(CLEAN_ROW, min_size=1, max_size=12))
def test_a_clean_table_passes_unchanged(con, rows):
    table = as_table(con, rows)
    after, changes = apply_steps(table, *STEPS)
    assert changes.count().execute() == 0
    expected = table.mutate(born=table.born.cast("date"), value=table.value.cast("float64"))
    columns = list(expected.columns)
    pd.testing.assert_frame_equal(after.order_by("_row").to_pandas()[columns], expected.order_by("_row").to_pandas())


@FEW
@given(rows=st.lists(ANY_ROW, min_size=1, max_size=12), data=st.data())
def test_a_second_pass_is_idle(con, rows, data):
    ids = data.draw(st.lists(st.sampled_from("123456"), min_size=len(rows), max_size=len(rows)))
    once, _ = apply_steps(as_table(con, rows, ids), *STEPS)
    twice, changes = apply_steps(once, *STEPS)
    assert changes.count().execute() == 0
    pd.testing.assert_frame_equal(once.order_by("_row").to_pandas(), twice.order_by("_row").to_pandas())


@FEW
@given(rows=st.lists(ANY_ROW, min_size=1, max_size=12))
def test_quarantine_loses_no_row_and_leaves_a_valid_table(con, rows):
    table = as_table(con, rows)
    good, bad = quarantine(table, SCHEMA)
    assert good.count().execute() + bad.count().execute() == len(rows)
    assert failures(good, SCHEMA).empty
    assert set(bad.to_pandas()["_row"]) == set(failures(table, SCHEMA)["_row"])


@pytest.mark.parametrize("pair", [("lb", "kg"), ("in", "cm"), ("kPa", "mmHg"), ("st", "lb"), ("ft", "m")])
def test_conversion_there_and_back_is_one(pair):
    assert conversion_factor(*pair) * conversion_factor(*reversed(pair)) == pytest.approx(1, rel=1e-12)


@FEW
@given(
    cells=st.lists(
        st.text(alphabet="ab,;\"'\n李é0 ", min_size=1, max_size=6).filter(lambda cell: cell.strip()), min_size=1, max_size=10
    ),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "gb18030"]),
    delimiter=st.sampled_from(",;\t|"),
)
def test_what_is_written_is_read(con, tmp_path_factory, cells, encoding, delimiter):
    path = tmp_path_factory.mktemp("trip") / "t.csv"
    frame = pd.DataFrame({"cell": cells, "n": range(len(cells))}).astype(str)
    frame.to_csv(path, sep=delimiter, index=False, encoding=encoding)
    back = read_csv(con, path, encoding=encoding, delimiter=delimiter).order_by("_row").to_pandas()
    assert back["cell"].tolist() == cells
