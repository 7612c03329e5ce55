"""A thousand mangled files: refused with the file's name, set aside and counted, or read as Python's parser reads them."""

import csv
import io
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigmodel_nb.etl.extract import connect, read_csv
from bigmodel_nb.etl.files import read_file, salvage_csv, write_csv

COUNTS = {"refused": 0, "read": 0, "set aside": 0}
NUMBER = itertools.count()
MANGLED = settings(max_examples=1000, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

CELL = st.text(alphabet='ab01 ,;"\n\r\t李é=+@-\ufeff\u2028', max_size=6) | st.sampled_from(["", "NULL", "007", "1e5", "=1+1", "北京"])
WIDTH = st.integers(1, 5)


@st.composite
def tables(draw):
    "Rows of text, the header first."
    width, wide = draw(WIDTH), draw(st.integers(0, 60)) == 60
    width = 2000 if wide else width
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
    "header only": lambda draw, text: text.splitlines()[0] if text.splitlines() else text,
}


def put(draw, text, what):
    at = draw(st.integers(0, len(text)))
    return text[:at] + what + text[at:]


@st.composite
def files(draw):
    "Bytes of a file, and what was done to it."
    text = written(draw(tables()), draw(st.sampled_from(",,,;\t|")), draw(st.sampled_from(["\n", "\r\n", "\r"])),
                   draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])))
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
    assert sum(COUNTS.values()) == 0 or min(COUNTS.values()) > 20, COUNTS


def oracle(data, encoding, delimiter, width):
    "Records under the header as Python's csv module reads them; None where its strict form finds a quote out of place."
    text = data.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))[1:]
    except csv.Error:
        return None
    rows = [row or [""] for row in rows if row or width == 1]
    return [[cell or None for cell in (row[:-1] if len(row) == width + 1 and not row[-1] else row)] for row in rows]


def cells(table):
    frame = table.order_by("_row").to_pandas()
    assert frame["_row"].is_monotonic_increasing
    return frame.drop(columns=["_source", "_row"]).astype(object).where(lambda f: f.notna(), None).to_numpy().tolist()


@MANGLED
@given(file=files(), told=st.booleans())
def test_a_mangled_file_is_refused_set_aside_or_read_right(con, folder, file, told):
    data, encoding, _ = file
    path = folder / f"{next(NUMBER)}.csv"
    path.write_bytes(data)
    try:
        good, bad = salvage_csv(con, path, encoding if told else None, ",")
    except ValueError as error:
        assert path.name in str(error), error
        with pytest.raises(ValueError, match=path.name):
            read_csv(con, path, encoding if told else None, ",")
        COUNTS["refused"] += 1
        return
    finally:
        path.unlink()
    path.write_bytes(data)
    aside = bad.order_by("_row").to_pandas()
    numbers = sorted([*good.to_pandas()["_row"], *aside["_row"]])
    assert numbers == list(range(1, len(numbers) + 1))          # rows in = rows out + quarantined
    width = len(good.columns) - 2
    expected = oracle(data, encoding, ",", width) if told else None
    if expected is not None:
        assert len(expected) == len(numbers)
        assert cells(good) == [row for row in expected if len(row) == width]
    try:
        table = read_csv(con, path, encoding if told else None, ",")
    except ValueError as error:
        assert path.name in str(error), error
        COUNTS["set aside" if len(aside) else "refused"] += 1
        assert len(aside), (error, data)
    else:
        assert len(aside) == 0, (aside, data)
        assert cells(table) == cells(good)
        COUNTS["read"] += 1
    finally:
        path.unlink()
