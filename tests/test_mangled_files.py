"""A thousand mangled files: refused with the file's name, set aside and counted, or read as Python's parser reads them."""

import csv
import io
import itertools
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigmodel_nb.etl.extract import connect, read_csv, read_sqlite, unused_name
from bigmodel_nb.etl.files import salvage_csv, write_csv
from bigmodel_nb.etl.sniff import sniff_encoding

COUNTS = {"refused": 0, "read": 0, "set aside": 0}
NUMBER = itertools.count()
MANGLED = settings(max_examples=1000, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

CELL = st.text(alphabet='ab01 ,;"\n\r\t李é=+@-\ufeff\u2028', max_size=6) | st.sampled_from(["", "NULL", "007", "1e5", "北京"])
WIDTH = st.integers(1, 5)


@st.composite
def tables(draw):
    "Rows of text, the header first."
    width, wide = draw(WIDTH), draw(st.integers(0, 99)) == 99
    width = 1200 if wide else width
    names = [f"c{at}" for at in range(width)]
    if draw(st.integers(0, 9)) == 9:
        names[-1] = draw(st.sampled_from(["c0", "C0", "", "_row", "rowid", "a\nb", "=x"]))
    rows = [["x"] * width] if wide else draw(st.lists(st.lists(CELL, min_size=width, max_size=width), max_size=6))
    return [names, *rows]


def written(rows, delimiter, end, quoting):
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows(rows)
    return out.getvalue()


MANGLES = {
    "nothing": lambda draw, text: text,
    "ragged": lambda draw, text: text + draw(st.sampled_from(["1,2,3,4,5,6,7\n", "x\n", ",\n", "1;2;3;4;5;6\n"])),
    "blank lines": lambda draw, text: text.replace("\n", "\n\n", draw(st.integers(1, 3))),
    "unclosed quote": lambda draw, text: text + '"open,1\nmore,2\n',
    "stray quote": lambda draw, text: text + 'a"b,"c"d\n',
    "mixed line ends": lambda draw, text: text + "".join(f"1{end}" for end in draw(st.permutations(["\r\n", "\n", "\r"]))),
    "cut": lambda draw, text: text[: draw(st.integers(0, len(text)))],
    "mark in the middle": lambda draw, text: text + "\ufeff" + text,
    "zero byte": lambda draw, text: put(draw, text, "\0"),
    "noise": lambda draw, text: put(draw, text, draw(st.text(alphabet='",\n\r\x1a\x85\x0b', min_size=1, max_size=4))),
    "space before a quote": lambda draw, text: text.replace(',"', ', "'),
    "space after a quote": lambda draw, text: text.replace(chr(34) + ",", chr(34) + " ,"),
    "header only": lambda draw, text: text.splitlines()[0] if text.splitlines() else text,
}


def put(draw, text, what):
    at = draw(st.integers(0, len(text)))
    return text[:at] + what + text[at:]


@st.composite
def files(draw):
    "Bytes of a file, and what was done to it."
    text = written(
        draw(tables()),
        draw(st.sampled_from(",,,;\t|")),
        draw(st.sampled_from(["\n", "\r\n", "\r"])),
        draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
    )
    kind = draw(st.sampled_from(sorted(MANGLES)))
    text = MANGLES[kind](draw, text)
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "gb18030", "cp1252", "utf-16-le"]))
    data = text.encode(encoding, errors="ignore")
    if draw(st.integers(0, 19)) == 19:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + b"\xff\xc3\x28" + data[at:]
    return data, encoding, kind


@pytest.fixture(scope="module")
def con():
    return connect()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield tmp_path_factory.mktemp("mangled")
    assert not sum(COUNTS.values()) or min(COUNTS.values()) > 20, COUNTS


def oracle(data, encoding, delimiter, width):
    "Records under the header as Python's csv module reads them; None where its strict form finds a quote out of place."
    text = data.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))[1:]
    except csv.Error:
        return None
    rows = [row or [""] for row in rows if row or width == 1]
    return [[cell or None for cell in (row[:-1] if len(row) == width + 1 and not row[-1] else row)] for row in rows]


def cells(con, table):
    "Rows of a table as it keeps them, without provenance; `_row` must rise."
    rows = con.con.execute(f"SELECT * EXCLUDE (_source) FROM {table.get_name()}").fetchall()
    assert all(a[-1] < b[-1] for a, b in itertools.pairwise(rows))
    return [list(row[:-1]) for row in rows]


@MANGLED
@given(file=files(), told=st.booleans(), delimiter=st.sampled_from([",", ",", None]))
def test_a_mangled_file_is_refused_set_aside_or_read_right(con, folder, file, told, delimiter):
    data, encoding, _ = file
    path = folder / f"{next(NUMBER)}.csv"
    path.write_bytes(data)
    encoding = encoding if told else None
    try:
        good, bad = salvage_csv(con, path, encoding, delimiter)
    except ValueError as error:
        assert path.name in str(error), error
        with pytest.raises(ValueError, match=path.name):
            read_csv(con, path, encoding, delimiter)
        COUNTS["refused"] += 1
        return
    aside = [row for (row,) in con.con.execute(f"SELECT _row FROM {bad.get_name()}").fetchall()]
    kept = [row for (row,) in con.con.execute(f"SELECT _row FROM {good.get_name()}").fetchall()]
    assert sorted(kept + aside) == list(range(1, len(kept) + len(aside) + 1))  # rows in = rows out + quarantined
    width = len(good.columns) - 2
    expected = oracle(data, encoding or sniff_encoding(path), delimiter, width) if delimiter else None
    if expected is not None:
        assert len(expected) == len(kept) + len(aside)
        assert cells(con, good) == [row for row in expected if len(row) == width]
    try:
        table = read_csv(con, path, encoding, delimiter)
    except ValueError as error:
        assert path.name in str(error), error
        assert aside, (error, data)
        COUNTS["set aside"] += 1
    else:
        assert not aside, data
        assert cells(con, table) == cells(con, good)
        con.con.execute(f"DROP VIEW {table.get_name()}")
        COUNTS["read"] += 1
    con.con.execute(f"DROP TABLE {good.get_name()}; DROP TABLE {bad.get_name()}")
    path.unlink()


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "0 bytes"),
        (b"\n\n", "no header line"),
        (b"\xef\xbb\xbf", "no header line"),
        (b"a,a\n1,2\n", "column 2 of the header repeats"),
        (b"a,\n1,2\n", "column 2 of the header has no name"),
        (b"a,b\n1,2\n3,\0\n", "line 3, a zero byte"),
        (b"a,b\n" + b"1,2\n" * 300_000 + b"1,\0\n", "line 300002, a zero byte"),
        ("a,b\n李,明\n北,京\n".encode() + b"\xff,1\n", "line 4, bytes ff"),
        (b"a,b\n1,2\n3\n", "line 3: missing columns"),
        (b"a,b\n1,2\n3,4,5\n", "line 3: too many columns"),
        (b'a,b\n1,"2\n3,4\n', "line 2: unquoted value"),
        (b"a,b\n1," + b"x" * 10_000_000 + b"\n", "line 2: line size over maximum"),
        (b'a,b\n1,2\r\n3,"4"x\r5,6\n', "mixed"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_each_refusal_names_the_file_and_the_place(con, tmp_path, data, said):
    path = tmp_path / "mixed_or_not.csv"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=path.name) as error:
        read_csv(con, path)
    assert said in str(error.value)


def test_a_large_cell_is_set_aside_or_read_whole(con, tmp_path):
    path = tmp_path / "large.csv"
    path.write_text('a,b\n1,"' + "x" * 10_000_000 + '"\n2,3\n')
    good, bad = salvage_csv(con, path)
    assert good.count().execute() == 2 and bad.count().execute() == 0
    assert good.b.length().max().execute() == 10_000_000
    path.write_text('a,b\n1,"' + "x\n" * 500_000 + '"\n2,3\n')
    assert read_csv(con, path).count().execute() == 2


@settings(MANGLED, max_examples=60)
@given(texts=st.lists(st.text(alphabet="=+-@\t\r\n'\"1a,＝", min_size=1, max_size=5), min_size=1, max_size=8))
def test_no_exported_cell_can_run(con, folder, texts):
    table = con.create_table(unused_name(), {"cell": texts, "n": list(range(len(texts)))}, temp=True)
    done = write_csv(table.order_by("n"), folder / "out.csv")
    with open(folder / "out.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert done.rows == len(rows) == len(texts)
    changed = [(old, row["cell"]) for old, row in zip(texts, rows, strict=True) if row["cell"] != old]
    assert len(changed) == done.disarmed and all(new == "'" + old for old, new in changed)
    for row in rows:
        assert row["cell"][0] not in "=+-@\t\r\n＝" or re.fullmatch(r"[+-]?[0-9]+([.,][0-9]+)?", row["cell"])


def test_a_failed_export_leaves_the_old_file(con, tmp_path):
    (tmp_path / "out.csv").write_text("old")
    table = con.sql("SELECT CASE WHEN range < 5000 THEN 'x' ELSE error('broken')::VARCHAR END AS cell FROM range(6000)")
    with pytest.raises(Exception, match="broken"):
        write_csv(table, tmp_path / "out.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["out.csv"] and (tmp_path / "out.csv").read_text() == "old"


@pytest.mark.parametrize("word", ["准确", "联通", "非常同意"])
def test_chinese_that_looks_like_utf8_is_read(con, tmp_path, word):
    path = tmp_path / "looks.csv"
    path.write_bytes(("序号,答案\n" + "".join(f"{n},{word}\n" for n in range(50))).encode("gb18030"))
    assert set(read_csv(con, path).to_pandas()["答案"]) == {word}


@settings(MANGLED, max_examples=30)
@given(
    cells=st.lists(
        st.floats(allow_nan=False) | st.binary(max_size=4) | st.integers(-(2**63), 2**63 - 1) | st.none(), min_size=1, max_size=9
    )
)
def test_sqlite_cells_keep_every_digit_and_byte(con, folder, cells):
    path = folder / f"{next(NUMBER)}.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE t (x)")
        database.executemany("INSERT INTO t VALUES (?)", [(cell,) for cell in cells])
        database.commit()
    table = read_sqlite(con, path, "t")
    read = [cell for (cell,) in con.con.execute(f"SELECT x FROM {table.get_name()} ORDER BY _row").fetchall()]
    for cell, text in zip(cells, read, strict=True):
        back = {float: float, int: int, bytes: lambda text: bytes.fromhex(text.removeprefix("\\x"))}.get(
            type(cell), lambda text: text
        )
        assert back(text) == cell
    path.unlink()


def test_a_limited_connection_spills_into_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = connect(memory_limit="100MB")
    small.con.execute(
        "CREATE TEMP TABLE t AS SELECT md5(range::VARCHAR) AS a, md5((range + 1)::VARCHAR) AS b FROM range(2_500_000)"
    )
    spill = Path(small.con.execute("SELECT current_setting('temp_directory')").fetchone()[0])
    assert any(spill.iterdir()) and not list(tmp_path.iterdir()) and spill.stat().st_mode & 0o77 == 0
    small.disconnect()
    del small
    assert not spill.exists()
