"Linking: what every input must survive, beyond the page's examples."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel_nb.etl.records import explain_link, link_records

WORDS = "river stone amber falcon harbor willow copper meadow winter garden silver marble thunder velvet orchid canyon".split()


def people(rows: int, seed: int) -> pd.DataFrame:
    "Invented people with a number, a date and a text each."
    rng = np.random.default_rng(seed)
    pick = lambda: rng.choice(WORDS, rows)  # noqa: E731
    name = [f"{a}{b}" for a, b in zip(pick(), pick(), strict=False)]
    day = pd.to_datetime("1950-01-01") + pd.to_timedelta(rng.integers(0, 15_000, rows), unit="D")
    return pd.DataFrame({"id": [f"r{i}" for i in range(rows)], "name": name, "place": pick(),
                         "born": day.strftime("%Y-%m-%d"), "income": rng.integers(100, 99_999, rows) / 10})


def f1(links: pd.DataFrame, truth: set) -> float:
    found = {p for p, q in zip(zip(links.left_id, links.right_id, strict=False), links.probability, strict=False) if q >= .5}
    return 2 * len(found & truth) / (len(found) + len(truth))


@pytest.fixture(scope="module")
def pair() -> tuple[pd.DataFrame, pd.DataFrame, set]:
    left = people(300, 0)
    right = left.sample(frac=1, random_state=0).reset_index(drop=True)
    return left, right, {(i, i) for i in left.id}


def test_columns_that_say_nothing_change_nothing(pair):
    left, right, truth = pair
    columns = ["name", "place", "born", "income"]
    wide = [t.assign(none=None, one="same") for t in (left, right)]
    plain, more = link_records(left, right, "id", columns), link_records(*wide, "id", [*columns, "none", "one"])
    assert f1(plain, truth) > .98
    pd.testing.assert_frame_equal(plain, more)


def test_spoilt_columns(pair):
    left, right, truth = pair
    spoilt = right.assign(born=pd.to_datetime(right.born).dt.strftime("%d.%m.%Y"), income="$" + right.income.astype(str),
                          name=right.name.str[:3] + right.name.str[4:])
    spoilt.loc[::7, "place"] = None
    assert f1(link_records(left, spoilt, "id", ["name", "place", "born", "income"]), truth) > .95


def test_order_of_rows_does_not_matter(pair):
    left, right, _ = pair
    columns = ["name", "place", "born"]
    one = link_records(left, right, "id", columns)
    two = link_records(left, right.iloc[::-1].reset_index(drop=True), "id", columns)
    merged = one.merge(two, on=["left_id", "right_id"])
    sure = one[one.probability > .5]
    assert len(merged[merged.probability_x > .5]) == len(sure)
    np.testing.assert_allclose(merged.probability_x, merged.probability_y, atol=.05)


@pytest.mark.parametrize("dtype", ["int64", "Int64", "string", "category", "object"])
def test_ids_keep_their_type(pair, dtype):
    left, right, _ = (t.copy() if isinstance(t, pd.DataFrame) else t for t in pair)
    for t in (left, right):
        t["id"] = t.id.str[1:].astype("int64").astype(dtype)
    links = link_records(left, right, "id", ["name", "born"])
    assert links.left_id.dtype == left.id.dtype and links.right_id.dtype == right.id.dtype
    assert links.probability.between(0, 1).all() and links.probability.is_monotonic_decreasing


def test_one_table_with_itself(pair):
    left, _, _ = pair
    twice = pd.concat([left, left.head(60).assign(id=lambda t: "copy" + t.id)], ignore_index=True)
    links = link_records(twice, twice, "id", ["name", "place", "born", "income"])
    found = {frozenset(p) for p in zip(links.left_id[links.probability >= .5], links.right_id, strict=False)}
    truth = {frozenset((f"r{i}", f"copyr{i}")) for i in range(60)}
    assert len(found & truth) >= .95 * len(truth) and len(found) <= 1.1 * len(truth)
    assert not links.duplicated(["left_id", "right_id"]).any() and (links.left_id != links.right_id).all()


def shop(rows: int, seed: int) -> pd.DataFrame:
    "A catalogue full of twins: few brands and kinds, a model number, a price."
    rng = np.random.default_rng(seed)
    lists = ("sony canon bose epson", "camera printer radio", "black white red")
    brand, kind, shade = (rng.choice(w.split(), rows) for w in lists)
    model = [f"{b[0]}{k[0]}{n}" for b, k, n in zip(brand, kind, rng.permutation(9000)[:rows] + 1000, strict=True)]
    name = [f"{b} {m} {k}" for b, m, k in zip(brand, model, kind, strict=True)]
    return pd.DataFrame({"id": [f"s{i}" for i in range(rows)], "name": name,
                         "text": [f"{s} {k} by {b}" for s, k, b in zip(shade, kind, brand, strict=True)],
                         "price": rng.lognormal(5, 1, rows).round(2)})


@pytest.mark.parametrize("make, columns", [(people, ["name", "place", "born", "income"]), (shop, ["name", "text", "price"])])
@pytest.mark.parametrize("seed", [0, 1])
def test_unrelated_tables_have_nothing_in_common(make, columns, seed):
    table = make(800, seed)
    links = link_records(table.iloc[:400], table.iloc[400:], "id", columns)
    assert (links.probability >= .5).sum() <= .03 * 400
    inside = link_records(table.iloc[:400], table.iloc[:400], "id", columns)
    assert (inside.probability >= .5).sum() <= .03 * 400


@pytest.mark.parametrize("rows, shared, least", [((600, 600), 12, .85), ((600, 600), 600, .95), ((40, 1500), 30, .95)])
def test_few_all_and_unequal(rows, shared, least):
    table = people(sum(rows), 5)
    left = table.iloc[:rows[0]]
    right = pd.concat([left.iloc[:shared], table.iloc[rows[0]:rows[0] + rows[1] - shared]]).copy()
    right["name"] = right.name.str[:-1]
    links = link_records(left, right.sample(frac=1, random_state=0), "id", ["name", "place", "born", "income"])
    assert f1(links, {(i, i) for i in left.id[:shared]}) > least


@pytest.mark.xfail(strict=True, reason="every row with three copies: each keeps one of them")
def test_one_to_many():
    left = people(400, 6)
    copies = [left.assign(key=left.id, id=left.id + f"-{k}", name=left.name.str[k:]) for k in range(3)]
    right = pd.concat(copies, ignore_index=True)
    right.loc[::5, "place"] = None
    links = link_records(left, right, "id", ["name", "place", "born", "income"])
    assert f1(links, set(zip(right.key, right.id, strict=True))) > .95


@pytest.mark.parametrize("change, words", [
    (dict(id_column="nobody"), "no column ['nobody']"), (dict(columns=["wage"]), "no column ['wage']"),
    (dict(columns=[]), "at least one column"),
    (dict(columns="name"), "must be a list"), (dict(id_column="place"), "more than once")])
def test_bad_input_is_refused(pair, change, words):
    left, right, _ = pair
    with pytest.raises(ValueError) as error:
        link_records(left, right, **{"id_column": "id", "columns": ["name"], **change})
    assert words in str(error.value)


def test_explanation_adds_up(pair):
    left, right, _ = pair
    told = explain_link(left, right, "id", ["name", "place", "born"], "r3", "r3")
    assert told.nats.sum() > 0 and told["column"].iloc[0] == "prior"


cells = st.one_of(st.none(), st.text(max_size=12), st.integers(-10**6, 10**6), st.floats(allow_nan=True, allow_infinity=False))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(cells, cells), max_size=8), st.lists(st.tuples(cells, cells), max_size=8))
def test_anything_in_cells(a, b):
    left, right = (pd.DataFrame({"id": range(len(t)), "x": [u for u, _ in t], "y": [v for _, v in t]}) for t in (a, b))
    links = link_records(left, right, "id", ["x", "y"])
    assert list(links) == ["left_id", "right_id", "probability"]
    assert links.probability.between(.01, 1).all() and not links.isna().any().any()
