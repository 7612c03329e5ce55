"""A real PostgreSQL server, read and written: types, kills, rivals, memory, and passwords that stay unsaid."""

import datetime
import decimal
import signal
import subprocess
import sys
import time
import uuid
from urllib.parse import urlsplit

import pandas as pd
import pyarrow as pa
import pytest

pytest.importorskip("duckdb")
pytest.importorskip("adbc_driver_postgresql")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from postgres import postgres  # noqa: E402, F401

from bigmodel_nb.etl.databases import (  # noqa: E402
    Written,
    connected,
    describe_table,
    list_tables,
    read_query,
    read_table,
    write_table,
)
from bigmodel_nb.etl.extract import connect  # noqa: E402

pytestmark = [
    pytest.mark.xdist_group("postgres"),
    pytest.mark.skipif(sys.platform == "win32", reason="the server is started by a POSIX shell"),
]


@pytest.fixture(scope="module")
def con():
    return connect()


def run(uri: str, *statements: str) -> None:
    with connected(uri, write=True) as database, database.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
        database.commit()


def table(con, rows: list[dict], schema: pa.Schema):
    return con.create_table(f"t_{uuid.uuid4().hex}", pa.Table.from_pylist(rows, schema=schema), temp=True)


EVERYTHING = pa.schema(
    [
        ("id", pa.int64()),
        ("text", pa.string()),
        ("number", pa.float64()),
        ("price", pa.decimal128(12, 3)),
        ("at", pa.timestamp("us", "UTC")),
        ("local", pa.timestamp("us")),
        ("day", pa.date32()),
        ("raw", pa.binary()),
        ("tags", pa.list_(pa.string())),
        ("yes", pa.bool_()),
    ]
)
words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
times = st.datetimes(datetime.datetime(1, 1, 2), datetime.datetime(9999, 12, 30))
row = st.fixed_dictionaries(
    {
        "text": st.none() | words,
        "number": st.none() | st.floats(allow_nan=False),
        "price": st.none() | st.decimals(-(10**8), 10**8, places=3),
        "at": st.none() | times.map(lambda t: t.replace(tzinfo=datetime.timezone.utc)),
        "local": st.none() | times,
        "day": st.none() | st.dates(),
        "raw": st.none() | st.binary(max_size=10),
        "tags": st.none() | st.lists(st.none() | words, max_size=3),
        "yes": st.none() | st.booleans(),
    }
)


@given(st.lists(row, min_size=1, max_size=5))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_everything_comes_back(postgres, con, rows):  # noqa: F811
    rows = [{"id": i} | r for i, r in enumerate(rows)]
    name = f"t_{uuid.uuid4().hex}"
    assert write_table(table(con, rows, EVERYTHING), postgres, name, key=["id"]) == Written(len(rows), len(rows), 0)
    back = read_table(con, postgres, name).order_by("_row").drop("_source", "_row").to_pyarrow()
    assert back.cast(EVERYTHING).to_pylist() == pa.Table.from_pylist(rows, schema=EVERYTHING).to_pylist()
    again = write_table(read_table(con, postgres, name).drop("_source", "_row"), postgres, name, key=["id"])
    assert again == Written(len(rows), 0, len(rows))
    run(postgres, f"DROP TABLE {name}")


def test_types_that_arrow_lacks(postgres, con):  # noqa: F811
    run(
        postgres,
        "CREATE TYPE mood AS ENUM ('fine', 'ill')",
        """CREATE TABLE odd (id int PRIMARY KEY, m mood, r int4range, i interval, b bit(3), u uuid, j json, n numeric[],
           z timetz, p point, h char(3), big numeric(60, 2), x xml)""",
        """INSERT INTO odd VALUES (1, 'ill', '[1,5)', '1 day 2 hours', '101', '00000000-0000-0000-0000-000000000001',
           '{"a": null}', '{1.50,NULL}', '02:30+02', '(1,2)', 'a', 123456789012345678901234567890123456789.25, '<a/>')""",
    )
    [one] = read_table(con, postgres, "odd").drop("_source", "_row").to_pyarrow().to_pylist()
    assert one == {
        "id": 1,
        "m": "ill",
        "r": "[1,5)",
        "i": "1 day 02:00:00",
        "b": "101",
        "u": "00000000-0000-0000-0000-000000000001",
        "j": '{"a": null}',
        "n": ["1.50", None],
        "z": "02:30:00+02",
        "p": "(1,2)",
        "h": "a  ",
        "big": "123456789012345678901234567890123456789.25",
        "x": "<a/>",
    }
    for text, word, sizes in [
        ("'-infinity'::timestamptz", "infinity", None),
        ("'Infinity'::date", "infinity", None),
        ("'NaN'::numeric(3, 1)", "NaN", {"c": (3, 1)}),
    ]:
        with pytest.raises(ValueError, match=f"column 'c', row 2 holds {word}"):
            read_query(con, postgres, f"SELECT NULL AS c UNION ALL SELECT {text}", decimals=sizes)
    old = read_query(con, postgres, "SELECT '4713-01-01 BC'::date AS c").to_pyarrow().column("c").cast(pa.int32())
    assert old.to_pylist() == [-2440550]


def test_json_and_nested_values_are_written(postgres, con):  # noqa: F811
    nested = table(con, [{"id": 1, "who": {"name": "Ann", "age": 3}}], pa.schema({"id": pa.int64(), "who": pa.struct(
        {"name": pa.string(), "age": pa.int64()})}))
    write_table(nested, postgres, "nested", key=["id"])
    assert describe_table(postgres, "nested")["type"].tolist() == ["bigint", "jsonb"]
    assert read_query(con, postgres, "SELECT who->>'age' AS age FROM nested").to_pandas()["age"].tolist() == ["3"]


def test_keys_names_and_schemas(postgres, con):  # noqa: F811
    run(
        postgres,
        'CREATE SCHEMA "Old Ward"',
        'CREATE TABLE "Old Ward"."Pa""tients" (a int, b text NOT NULL, PRIMARY KEY (b, a))',
        "CREATE TABLE parent (id int PRIMARY KEY)",
        "CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent)",
    )
    name = 'Old Ward.Pa"tients'
    found = describe_table(postgres, name).set_index("name")
    assert found.loc["b", "key"] == 1 and found.loc["a", "key"] == 2 and not found.loc["b", "nullable"]
    assert describe_table(postgres, "child").set_index("name").loc["parent", "refers_to"] == "parent"
    rows = table(con, [{"a": 1, "b": "x'; DROP TABLE child; --"}], pa.schema({"a": pa.int64(), "b": pa.string()}))
    assert write_table(rows, postgres, name, key=["a", "b"]).inserted == 1
    assert write_table(rows, postgres, name, key=["a", "b"]).updated == 1
    assert read_table(con, postgres, name).count().execute() == 1
    assert {"Old Ward", "public"} <= set(list_tables(postgres)["schema"])
    with pytest.raises(ValueError, match="Near it: child"):
        read_table(con, postgres, "childs")


def test_a_failed_write_changes_nothing(postgres, con):  # noqa: F811
    run(postgres, "CREATE TABLE strict (id int PRIMARY KEY, n int NOT NULL CHECK (n < 10))", "INSERT INTO strict VALUES (1, 1)")
    kinds = pa.schema({"id": pa.int64(), "n": pa.string()})
    for rows, said in [
        ([{"id": 2, "n": "2"}, {"id": 3, "n": "many"}], 'invalid input syntax for type integer: "many"'),
        ([{"id": 2, "n": "2"}, {"id": 3, "n": "30"}], "check constraint"),
        ([{"id": 2, "n": "2"}, {"id": 3, "n": None}], 'null value in column "n"'),
        ([{"id": 2, "n": "2"}, {"id": 3, "n": "\0"}], "0x00"),
        ([{"id": 2, "n": "2"}, {"id": 2, "n": "3"}], "2 rows have the key id=2"),
        ([{"id": 2, "n": "2"}, {"id": 2**40, "n": "3"}], "out of range"),
    ]:
        with pytest.raises(ValueError, match=said):
            write_table(table(con, rows, kinds), postgres, "strict", key=["id"], replace=True)
        assert read_table(con, postgres, "strict").to_pandas()["id"].tolist() == [1]
    done = write_table(table(con, [{"id": 7, "n": "7"}], kinds), postgres, "strict", key=["id"], replace=True)
    assert done == Written(1, 1, 0) and read_table(con, postgres, "strict").to_pandas()["id"].tolist() == [7]


def test_a_reading_session_cannot_write(postgres, con):  # noqa: F811
    run(postgres, "CREATE SEQUENCE numbers", "CREATE TABLE kept (id int)", "INSERT INTO kept VALUES (1)")
    for query in ["SELECT nextval('numbers') AS n", "DELETE FROM kept RETURNING id", "SELECT 1 AS a) q; DROP TABLE kept; --"]:
        with pytest.raises(ValueError):
            read_query(con, postgres, query)
    assert read_query(con, postgres, "SELECT * FROM kept -- all of it").count().execute() == 1


def test_no_message_holds_the_password(postgres, con):  # noqa: F811
    password = urlsplit(postgres).password
    unhappy = [
        postgres.replace(password, password + "@x/y"),
        postgres.replace("course", "nobody"),
        postgres.replace("/postgres", "/no-such"),
        postgres.replace("127.0.0.1", "no-such-host.invalid"),
        postgres.replace(f":{urlsplit(postgres).port}", ":1"),
        postgres.replace("postgresql:", "mysql:"),
        postgres.replace(password, password + "%zz"),
        postgres + "?sslmode=nonsense",
    ]
    for uri in unhappy:
        with pytest.raises((ConnectionError, PermissionError, ValueError)) as error:
            list_tables(uri)
        assert password not in str(error.value) and "***" in str(error.value)
        assert not isinstance(error.value, ConnectionError) or "that the server runs" in str(error.value)
    for query in ["SELECT 1/0 AS x", "SELECT * FROM nowhere"]:
        with pytest.raises(ValueError) as error:
            read_query(con, postgres, query)
        assert password not in str(error.value)


WRITER = """
import sys
from bigmodel_nb.etl.databases import write_table
from bigmodel_nb.etl.extract import connect
uri, value, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
con = connect()
rows = con.sql(f"SELECT i AS id, {value} AS value, repeat('x', 50) AS pad FROM range({count}) t(i)")
print("ready", flush=True)
print(write_table(rows, uri, "killed", key=["id"]), flush=True)
"""


def writer(uri: str, value: int, count: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, uri, str(value), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def values(uri: str) -> dict[int, int]:
    with connected(uri) as database, database.cursor() as cursor:
        cursor.execute("SELECT value, count(*) FROM killed GROUP BY value")
        return dict(cursor.fetchall())


def test_a_killed_writer_leaves_all_or_nothing(postgres):  # noqa: F811
    count = 30_000
    with writer(postgres, 0, count) as first:
        first.communicate(timeout=120)
    assert values(postgres) == {0: count}
    state, finished = 0, 0
    for attempt, delay in enumerate([0.05, 0.15, 0.3, 3.0], 1):
        with writer(postgres, attempt, count) as child:
            assert child.stdout.readline() == "ready\n"
            time.sleep(delay)
            child.send_signal(signal.SIGKILL)
        for _ in range(200):  # the server notices the broken connection, and rolls back
            with connected(postgres) as database, database.cursor() as cursor:
                cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE state <> 'idle' AND pid <> pg_backend_pid() "
                               "AND backend_type = 'client backend'")
                if cursor.fetchone() == (0,):
                    break
            time.sleep(0.05)
        found = values(postgres)
        assert found in ({state: count}, {attempt: count}), found
        finished += found == {attempt: count}
        state = next(iter(found))
    assert finished < 4


def test_two_writers_at_once_both_succeed(postgres):  # noqa: F811
    run(postgres, "DROP TABLE IF EXISTS killed", "CREATE TABLE killed (id bigint PRIMARY KEY, value int, pad text)")
    rivals = [writer(postgres, value, 20_000) for value in (1, 2)]
    said = [child.communicate(timeout=120) for child in rivals]
    assert [child.returncode for child in rivals] == [0, 0], said
    assert sorted("inserted=20000" in out for out, _ in said) == [False, True]  # one waited, and then saw the other's rows
    assert list(values(postgres).values()) == [20_000]


MEMORY = """
import resource, sys
from bigmodel_nb.etl.databases import read_query, stream
from bigmodel_nb.etl.extract import connect
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
query = "SELECT i AS id, repeat(md5(i::text), 10) AS t FROM generate_series(1, {}) i"
with stream(sys.argv[1], query.format(2000), "q") as reader:
    sum(len(batch) for batch in reader)
before = peak()
with stream(sys.argv[1], query.format(400_000), "q") as reader:
    total = sum(batch.nbytes for batch in reader)
print(total / 2**20, peak() - before)
"""


def test_memory_is_bounded_by_the_batch(postgres):  # noqa: F811
    done = subprocess.run([sys.executable, "-c", MEMORY, postgres], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    total, grown = map(float, done.stdout.split())
    assert total > 100 and grown < 60, f"{total:.0f} MiB read, memory grew by {grown:.0f} MiB"


def test_a_dropped_connection_is_said_and_leaves_no_table(postgres, con):  # noqa: F811
    before = len(con.con.execute("SELECT * FROM duckdb_tables()").fetchall())
    with pytest.raises(ValueError, match=r"\*\*\*.*: division by zero"):
        read_query(con, postgres, "SELECT CASE WHEN i = 150000 THEN 1 / (i - 150000) END AS x FROM generate_series(1, 200000) i")
    assert len(con.con.execute("SELECT * FROM duckdb_tables()").fetchall()) == before


def test_amounts_add_up_exactly(postgres, con):  # noqa: F811
    run(postgres, "CREATE TABLE amounts AS SELECT i AS id, 0.10::numeric(10, 2) AS fee FROM generate_series(1, 100000) i")
    fees = read_table(con, postgres, "amounts")
    assert fees.fee.sum().execute() == decimal.Decimal("10000.00")
    assert pd.Series([0.1] * 100_000).sum() != 0 and sum([0.1] * 100_000) != 10_000
