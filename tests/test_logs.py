"""Logs: every line is a row, part of a row, or quarantined; what was written is what is read; times keep their zone."""

import datetime as dt
import itertools
import json

import pytest

pytest.importorskip("duckdb")

from hypothesis import HealthCheck, Phase, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from bigmodel_nb.etl.bookmarks import new_lines, open_bookmarks, read_tail  # noqa: E402
from bigmodel_nb.etl.extract import connect  # noqa: E402
from bigmodel_nb.etl.logs import PATTERNS, find_pattern, parse_lines, read_lines, sessions  # noqa: E402

NUMBER = itertools.count()
STEADY = settings(
    phases=[Phase.explicit, Phase.generate],
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

SOUND = {
    "combined": [
        '10.0.0.1 - ann [01/May/2024:08:00:00 +0200] "GET / HTTP/1.1" 200 12 "-" "x"',
        '::1 - - [01/May/2024:08:00:00 +0000] "" 400 -',
    ],
    "java": ["2024-05-01 08:00:00,123 ERROR [main] a.B - broke", "2024-05-01T08:00:00 [t-1] INFO a.B - "],
    "python": ["2024-05-01 08:00:00,123 - app - WARNING - low", "2024-05-01 08:00:00 INFO started"],
    "syslog": ["<34>1 2024-05-01T08:00:00.5Z host su 12 ID47 - login failed", '<191>1 - - - - - [x@1 a="b\\]c"]'],
    "json": ['{"a": 1}', ' {"a": {"b": "}"}} '],
}
FOLLOW = [
    "\tat a.B.c(B.java:1)",
    "java.io.IOException: x",
    "Caused by: y",
    "... 3 more",
    "",
    "ValueError: z",
    "Traceback (most recent call last):",
    '  File "x.py", line 1, in f',
]
JUNK = [
    "####",
    "{",
    '"',
    "10.0.0.1 - - [bad",
    "<999>1 - - - - - -",
    "2024-13-45 99:99:99,000 ERROR [m] a - b",
    "'; DROP TABLE x; --",
    "{0}",
    "\ufffd",
    "行",
    "<html>",
    "+",
    "2024-05-01",
    '{"a": }',
    "\u2028",
    "\x0c",
    "\x1c",
]


@pytest.fixture(scope="module")
def con():
    return connect()


def parsed(con, folder, data, kind):
    "What `parse_lines` makes of a file with these bytes; and tables are dropped again."
    path = folder / f"{next(NUMBER)}.log"
    path.write_bytes(data)
    lines = read_lines(con, path)
    found = parse_lines(lines, kind)
    frames = lines.to_pandas(), found.rows.to_pandas(), found.quarantined.to_pandas()
    for (name,) in con.con.execute("SELECT table_name FROM duckdb_tables() WHERE temporary").fetchall():
        con.con.execute(f'DROP TABLE temp.main."{name}"')
    path.unlink()
    return *frames, found.counts


@st.composite
def logs(draw):
    "A pattern and lines of every sort, some of them mangled."
    kind = draw(st.sampled_from(sorted(PATTERNS)))
    line = (
        st.sampled_from(SOUND[kind]) | st.sampled_from(FOLLOW) | st.sampled_from(JUNK) | st.sampled_from(sum(SOUND.values(), []))
    )
    lines = draw(st.lists(line | st.text(alphabet='ab [{"}]:-\\<1>\t\x0b\x85', max_size=12), min_size=1, max_size=12))
    end = draw(st.sampled_from(["\n", "\r\n"]))
    data = end.join(lines).encode() + (end.encode() if draw(st.booleans()) else b"")
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.sampled_from([b"\xff", b"\xc3(", b"\r", b"\n\n", b"\x1a"])) + data[at:]
    return kind, data or b"\n"


@settings(STEADY, max_examples=100)
@given(log=logs())
def test_every_line_is_a_row_a_part_of_one_or_quarantined(con, tmp_path_factory, log):
    kind, data = log
    lines, rows, bad, counts = parsed(con, tmp_path_factory.getbasetemp(), data, kind)
    assert len(lines) == data.count(b"\n") + (not data.endswith(b"\n"))  # as many lines as the file has
    assert lines["_row"].tolist() == list(range(1, len(lines) + 1))
    assert counts["lines"] == counts["rows"] + counts["continuations"] + counts["quarantined"] == len(lines)
    details = rows["detail"].dropna()
    follow = sum(detail.count("\n") + 1 for detail in details)
    assert (len(rows), len(bad), follow) == (counts["rows"], counts["quarantined"], counts["continuations"])
    text = dict(zip(lines["_row"], lines["line"], strict=True))
    assert not set(rows["_row"]) & set(bad["_row"])
    assert all(text[number] == line for number, line in zip(bad["_row"], bad["line"], strict=True))  # kept as it stood
    for start, detail in zip(rows["_row"], rows["detail"], strict=True):
        if isinstance(detail, str):
            assert detail == "\n".join(text[start + at] for at in range(1, detail.count("\n") + 2))  # the lines right below


WORD = st.text(alphabet="abcXYZ019_.-", max_size=7).map(lambda end: "a" + end)  # a dash in front would be part of the separator
WORDS = st.lists(WORD, min_size=1, max_size=4).map(" ".join)
MOMENT = st.datetimes(dt.datetime(1990, 1, 1), dt.datetime(2099, 1, 1)).map(
    lambda at: at.replace(microsecond=at.microsecond // 1000 * 1000)
)
ZONE = st.integers(-14 * 4, 14 * 4).map(lambda quarters: dt.timezone(dt.timedelta(minutes=15 * quarters)))


def one(con, folder, line, kind):
    _, rows, bad, _ = parsed(con, folder, (line + "\n").encode(), kind)
    assert not len(bad), (line, bad["reason"].tolist())
    return rows.iloc[0]


@settings(STEADY, max_examples=12)
@given(
    at=MOMENT, zone=ZONE, status=st.integers(100, 599), size=st.none() | st.integers(0, 10**12), agent=WORDS, quote=st.booleans()
)
def test_a_web_server_line_comes_back(con, tmp_path_factory, at, zone, status, size, agent, quote):
    at = at.replace(microsecond=0, tzinfo=zone)
    agent = agent + ' \\"q\\"' * quote
    line = f'h - - [{at:%d/%b/%Y:%H:%M:%S %z}] "GET /a HTTP/1.1" {status} {"-" if size is None else size} "-" "{agent}"'
    row = one(con, tmp_path_factory.getbasetemp(), line, "combined")
    assert row["time"].to_pydatetime() == at  # the same moment, whatever the zone it was written in
    assert (row["status"], row["agent"], row["request"]) == (status, agent, "GET /a HTTP/1.1")
    assert (row["bytes"] is None or row["bytes"] != row["bytes"]) if size is None else row["bytes"] == size


@settings(STEADY, max_examples=12)
@given(
    at=MOMENT,
    level=st.sampled_from(["TRACE", "DEBUG", "INFO", "WARN", "ERROR", "FATAL"]),
    thread=WORD,
    logger=WORD,
    message=WORDS | st.just(""),
    sides=st.sampled_from(["before", "after"]),
)
def test_a_java_line_comes_back(con, tmp_path_factory, at, level, thread, logger, message, sides):
    stamp = f"{at:%Y-%m-%d %H:%M:%S},{at.microsecond // 1000:03d}"
    line = (
        f"{stamp} [{thread}] {level} {logger} - {message}"
        if sides == "before"
        else f"{stamp} {level} [{thread}] {logger} - {message}"
    )
    row = one(con, tmp_path_factory.getbasetemp(), line, "java")
    assert (row["time"].to_pydatetime(), row["level"], row["logger"], row["message"]) == (at, level, logger, message)
    assert row[f"thread_{sides}"] == thread


@settings(STEADY, max_examples=12)
@given(at=MOMENT, level=st.sampled_from(["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]), logger=WORD, message=WORDS)
def test_a_python_line_comes_back(con, tmp_path_factory, at, level, logger, message):
    line = f"{at:%Y-%m-%d %H:%M:%S},{at.microsecond // 1000:03d} - {logger} - {level} - {message}"
    row = one(con, tmp_path_factory.getbasetemp(), line, "python")
    assert (row["time"].to_pydatetime(), row["logger"], row["level"]) == (at, logger, level)
    assert row["message"] == message


@settings(STEADY, max_examples=12)
@given(
    at=MOMENT,
    zone=ZONE,
    priority=st.integers(0, 191),
    host=WORD,
    app=WORD,
    message=WORDS,
    data=st.sampled_from(["-", '[x@1 a="b"]', '[x@1 a="]\\"\\]"][y]']),
)
def test_a_syslog_line_comes_back(con, tmp_path_factory, at, zone, priority, host, app, message, data):
    line = f"<{priority}>1 {at.replace(tzinfo=zone).isoformat()} {host} {app} - - {data} {message}"
    row = one(con, tmp_path_factory.getbasetemp(), line, "syslog")
    assert row["time"].to_pydatetime() == at.replace(tzinfo=zone)
    assert (row["priority"], row["host"], row["app"], row["message"]) == (priority, host, app, message)
    assert row["data"] is None if data == "-" else row["data"] == data


@settings(STEADY, max_examples=12)
@given(
    record=st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=5,
        ),
        max_size=4,
    )
)
def test_a_json_line_comes_back(con, tmp_path_factory, record):
    row = one(con, tmp_path_factory.getbasetemp(), json.dumps(record), "json")
    assert json.loads(row["fields"]) == record


@pytest.mark.parametrize("priority", [192, 999])
def test_a_priority_that_syslog_does_not_have_is_quarantined(con, tmp_path, priority):
    _, rows, bad, _ = parsed(con, tmp_path, f"<{priority}>1 2024-05-01T08:00:00Z h a - - - x\n".encode(), "syslog")
    assert len(rows) == 0 and bad["reason"].tolist() == ["no priority in it"]


@pytest.mark.parametrize(
    "line, kind", [("31/Feb/2024", "combined"), ("2024-02-31", "java"), ("2024-02-31", "python"), ("2024-02-31", "syslog")]
)
def test_a_day_that_does_not_exist_is_quarantined(con, tmp_path, line, kind):
    texts = {
        "combined": f'h - - [{line}:08:00:00 +0000] "GET / HTTP/1.1" 200 1',
        "java": f"{line} 08:00:00 INFO a - b",
        "python": f"{line} 08:00:00 - a - INFO - b",
        "syslog": f"<1>1 {line}T08:00:00Z h a - - - x",
    }
    _, rows, bad, _ = parsed(con, tmp_path, texts[kind].encode(), kind)
    assert len(rows) == 0 and bad["reason"].tolist() == ["no time in it"]


def test_a_trace_under_a_quarantined_line_is_quarantined_with_it(con, tmp_path):
    _, rows, bad, counts = parsed(
        con, tmp_path, b"junk\n\tat a.B.c(B.java:1)\n2024-05-01 08:00:00,000 INFO a.B - ok\n\tat x\n", "java"
    )
    assert counts == {"lines": 4, "rows": 1, "continuations": 1, "quarantined": 2} and rows["detail"].tolist() == ["\tat x"]
    assert sorted(bad["reason"]) == ["continues a line set aside", "fits no pattern"]


@pytest.mark.parametrize("kind", sorted(PATTERNS))
def test_the_pattern_of_a_log_is_found(con, tmp_path, kind):
    (tmp_path / "a.log").write_text("\n".join(SOUND[kind] * 20) + "\n")
    found = find_pattern(read_lines(con, tmp_path / "a.log"))
    assert found["pattern"][0] == kind and found["share"][0] == 1


@settings(STEADY, max_examples=8)
@given(parts=st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=6))
@example(parts=[(3, True), (0, True), (2, False)])
def test_a_rotated_log_is_read_once_and_whole(con, tmp_path_factory, parts):
    folder, number = tmp_path_factory.mktemp("rotated"), itertools.count()
    log, written, got = folder / "app.log", [], []

    def write(more):
        fresh = [f"2024-05-01 08:00:00,000 INFO a.B - n={next(number)}" for _ in range(more)]
        with open(log, "a") as file:
            file.writelines(line + "\n" for line in fresh)
        written.extend(fresh)

    def read():
        for _ in range(2):  # one call reads one file: first the rotated one's rest
            with open_bookmarks(folder / "state.json") as marks:
                found = parse_lines(new_lines(con, read_tail(marks, log)), "java")
                got.extend(found.rows.order_by("_row").message.to_pandas())
                assert found.counts["quarantined"] == 0
                marks.commit()

    write(1)
    read()  # a bookmark knows a file that it has seen
    for at, (more, rotate) in enumerate(parts):
        write(more)
        if rotate and log.stat().st_size:
            log.rename(folder / f"app.log.{at}")
            write(1)
        read()
    assert got == [line.split(" - ")[1] for line in written]


@settings(STEADY, max_examples=15)
@given(
    pauses=st.lists(st.sampled_from([0, 1, 1799, 1800, 1801, 86400]), min_size=1, max_size=12),
    who=st.lists(st.sampled_from("ab"), min_size=12, max_size=12),
)
def test_sessions_are_cut_as_a_loop_would(con, tmp_path_factory, pauses, who):
    at, lines, expected, last = dt.datetime(2024, 5, 1, tzinfo=dt.timezone.utc), [], [], {}
    for pause, name in zip(pauses, who, strict=False):
        at += dt.timedelta(seconds=pause)
        lines.append(f'{name} - - [{at:%d/%b/%Y:%H:%M:%S %z}] "GET / HTTP/1.1" 200 1')
        before, number = last.get(name, (at, 1))
        number += (at - before).total_seconds() > 1800
        last[name] = at, number
        expected.append(number)
    path = tmp_path_factory.getbasetemp() / f"{next(NUMBER)}.log"
    path.write_text("\n".join(lines) + "\n")
    cut = sessions(parse_lines(read_lines(con, path), "combined").rows, who="host").order_by("_row").to_pandas()
    assert cut["session"].tolist() == expected
