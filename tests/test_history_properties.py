"""A history made from statements is sound, agrees with brute force, and does not depend on how they arrived."""

from datetime import datetime, timedelta

import pandas as pd
import pytest

pytest.importorskip("duckdb")
pytest.importorskip("ibis")
pa = pytest.importorskip("pyarrow")
pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from bigmodel_nb.etl.extract import connect  # noqa: E402
from bigmodel_nb.etl.history import as_of, faults, versions  # noqa: E402

DAY0, DAYS, KEYS = datetime(2024, 1, 1), 8, 3
KINDS = pa.schema({"who": pa.int64(), "since": pa.timestamp("us"), "seq": pa.int64(), "town": pa.string(), "left": pa.bool_()})
STATEMENT = st.tuples(
    st.integers(0, KEYS - 1),
    st.integers(0, DAYS - 1).map(lambda d: DAY0 + timedelta(days=d)),
    st.sampled_from(["a", "b", None]),
    st.booleans() | st.just(False),
)
CON = connect()
ASKED = pd.DataFrame([(k, DAY0 + timedelta(days=d)) for k in range(KEYS) for d in range(-1, DAYS + 1)], columns=["who", "day"])


def history(said: pd.DataFrame) -> pd.DataFrame:
    """The versions of these statements, kept as `made`."""
    rows = pa.Table.from_pandas(said, schema=KINDS, preserve_index=False)
    table = CON.create_table("said", rows, temp=True, overwrite=True)
    made = versions(table, ["who"], "since", ["town"], "seq", "left")
    made = CON.create_table("made", made, temp=True, overwrite=True)
    assert int(faults(made, ["who"]).count().to_pandas()) == 0
    return made.order_by("who", "version").to_pandas()


def true_then(said: pd.DataFrame, who: int, at: datetime) -> tuple[bool, str | None]:
    """Whether there was something at that moment, and what: by looking at every statement."""
    known = said[(said["who"] == who) & (said["since"] <= at)].sort_values(["since", "seq"])
    if not len(known) or known["left"].iloc[-1]:
        return False, None
    return True, known["town"].iloc[-1]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(STATEMENT, min_size=1, max_size=14), st.randoms(use_true_random=False))
def test_history(rows: list[tuple], shuffle) -> None:  # type: ignore[no-untyped-def]
    """No overlap, no gap but an end, one current version, the oracle's answer, and the same from any delivery."""
    said = pd.DataFrame([(k, d, i, town, left) for i, (k, d, town, left) in enumerate(rows)], columns=KINDS.names)
    made = history(said)
    asked = CON.create_table("asked", ASKED.astype({"day": "datetime64[us]"}), temp=True, overwrite=True)
    answers = as_of(asked, CON.table("made", database=("temp", "main")), ["who"], "day", ["town", "version"]).to_pandas()
    assert len(answers) == len(ASKED)
    for row in answers.itertuples():
        there, town = true_then(said, row.who, row.day)
        assert there == (not pd.isna(row.version))
        assert (None if pd.isna(row.town) else row.town) == town
    for who, own in made.groupby("who"):
        last = said[said["who"] == who].sort_values(["since", "seq"])["left"].iloc[-1]
        assert own["is_current"].sum() == (0 if last else 1)
        for before, after in zip(own.itertuples(), own.iloc[1:].itertuples(), strict=False):
            assert before.valid_to <= after.valid_from
            if before.valid_to < after.valid_from:  # a gap is an end that was told
                assert not true_then(said, who, before.valid_to)[0]
            else:
                assert pd.isna(before.town) != pd.isna(after.town) or before.town != after.town
    order = list(range(len(said))) + [shuffle.randrange(len(said)) for _ in range(4)]
    shuffle.shuffle(order)
    assert history(said.iloc[order].reset_index(drop=True)).equals(made)
