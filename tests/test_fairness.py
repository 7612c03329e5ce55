"""Group rates and gaps against fairlearn, scikit-learn and counting by hand; mitigation on rows that nobody trained on."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

fl = pytest.importorskip("fairlearn.metrics")
from sklearn import metrics as sk  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402

from bigmodel_nb.training.fairness import (  # noqa: E402
    METHODS,
    cross_groups,
    gaps,
    group_rates,
    implied_false_alarms,
    mitigate,
    price_of_fairness,
    reweigh,
    tally,
    trade_off,
)

FEW = settings(max_examples=20, deadline=None)
#: Two groups at least; a group may lack a class.
ROWS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.sampled_from("abc")), min_size=2, max_size=80).map(
    lambda rows: [*rows, (0, 0, "a"), (1, 1, "b")]
)
#: Any rows, and one of either class in each of three groups, whatever was decided on them.
BOTH = st.tuples(ROWS, st.lists(st.integers(0, 1), min_size=6, max_size=6)).map(
    lambda drawn: drawn[0] + [(i % 2, decided, "abc"[i // 2]) for i, decided in enumerate(drawn[1])]
)


def columns_of(rows):
    """Truth, decision and group."""
    return tuple(np.array(column) for column in zip(*rows, strict=True))


@FEW
@given(rows=ROWS)
def test_counts_and_rates_equal_their_oracles(rows):
    """Every count by hand, every rate by scikit-learn or fairlearn, on random tables."""
    y, d, g = columns_of(rows)
    counts = tally(y, d, g)
    rates = group_rates(counts, n=5)
    for name in counts.index:
        here = g == name
        by_hand = [np.sum((y[here] == a) & (d[here] == b)) for a, b in ((0, 0), (0, 1), (1, 0), (1, 1))]
        assert counts.loc[name].tolist() == by_hand
        theirs = {"right": sk.accuracy_score(y[here], d[here]), "chosen": d[here].mean(), "positives": y[here].mean()}
        if y[here].any():
            theirs["found"] = sk.recall_score(y[here], d[here])
        if not y[here].all():
            theirs["false_alarms"] = fl.false_positive_rate(y[here], d[here])
        if d[here].any():
            theirs["precision"] = sk.precision_score(y[here], d[here])
        for rate in ("right", "chosen", "positives", "found", "false_alarms", "precision"):
            value = rates.loc[(name, rate), "value"]
            assert np.isnan(value) if rate not in theirs else np.isclose(value, theirs[rate])


@FEW
@given(rows=BOTH)
def test_gaps_equal_their_oracles(rows):
    """Every gap by fairlearn, on random tables in which all of them exist."""
    y, d, g = columns_of(rows)
    ours = gaps(tally(y, d, g), n=5).value
    for name, metric in (
        ("demographic parity", fl.demographic_parity_difference),
        ("equal opportunity", fl.equal_opportunity_difference),
        ("equalised odds", fl.equalized_odds_difference),
    ):
        assert np.isclose(ours[name], metric(y, d, sensitive_features=g))
    if d.any():
        assert np.isclose(ours["selection ratio"], fl.demographic_parity_ratio(y, d, sensitive_features=g))


@FEW
@given(rows=BOTH)
def test_the_identity_holds_in_every_group(rows):
    """False alarms follow from share of positives, precision and share found, to the last digit."""
    y, d, g = columns_of(rows)
    rates = group_rates(tally(y, d, g), n=2).value.unstack()
    usable = rates[(rates.positives > 0) & (rates.positives < 1) & (rates.precision > 0)]
    forced = implied_false_alarms(usable.positives, usable.precision, usable.found)
    np.testing.assert_allclose(forced, usable.false_alarms, atol=1e-12)


@FEW
@given(rows=BOTH)
def test_reweighing_makes_outcome_and_group_independent(rows):
    y, _, g = columns_of(rows)
    w = reweigh(y, g)
    assert np.isclose(w.mean(), 1) and (w > 0).all()
    for name in set(g):
        assert np.isclose(np.average(y[g == name], weights=w[g == name]), y.mean())


def test_bootstrap_equals_that_over_rows():
    """Drawing counts gives the interval that drawing rows gives, within the noise of resampling."""
    rng = np.random.default_rng(0)
    y, g = rng.integers(0, 2, 600), rng.choice(["a", "b"], 600, p=[0.8, 0.2])
    d = np.where(rng.random(600) < 0.7, y, 1 - y)
    ours = group_rates(tally(y, d, g), n=4000).loc[("b", "found")]
    draws = []
    for _ in range(2000):
        rows = rng.integers(0, 600, 600)
        draws.append(d[rows][(g[rows] == "b") & (y[rows] == 1)].mean())
    assert np.allclose([ours.low, ours.high], np.quantile(draws, [0.025, 0.975]), atol=0.02)


def test_shuffling_equals_shuffled_labels():
    """`luck` is the quantile that permuted labels give, and p is uniform where nothing differs."""
    rng = np.random.default_rng(1)
    y, d, g = rng.integers(0, 2, 300), rng.integers(0, 2, 300), rng.choice(["a", "b", "c"], 300)
    naive = [np.ptp([d[s == n].mean() for n in "abc"]) for s in (rng.permutation(g) for _ in range(2000))]
    assert abs(gaps(tally(y, d, g)).luck["demographic parity"] - np.quantile(naive, 0.95)) < 0.02
    p = [
        gaps(tally(rng.integers(0, 2, 300), rng.integers(0, 2, 300), g), n=200, seed=k).p["equalised odds"]
        for k in range(100)
    ]
    assert np.mean(np.array(p) < 0.05) < 0.11 and 0.4 < np.mean(p) < 0.6


def people(n: int, seed: int) -> tuple:
    """Invented people whose features carry the group, with unequal shares of positives."""
    rng = np.random.default_rng(seed)
    group = rng.choice(["a", "b"], n, p=[0.4, 0.6])
    b = group == "b"
    skill = rng.normal(size=n) + 0.8 * b
    X = np.c_[skill + rng.normal(size=n) / 2, b + rng.normal(size=n) / 3, rng.normal(size=n)]
    return X, (skill + rng.normal(size=n) > 1).astype(int), group


RECIPES = {
    "reweigh": ({"method": "reweigh"}, "demographic parity"),
    "decorrelate": ({"method": "decorrelate"}, "demographic parity"),
    "thresholds": ({"method": "thresholds"}, "demographic parity"),
    "reduction": ({"method": "reduction"}, "demographic parity"),
    "thresholds, odds": ({"method": "thresholds", "criterion": "equalized_odds"}, "equalised odds"),
    "reduction, odds": ({"method": "reduction", "criterion": "equalized_odds"}, "equalised odds"),
}


@pytest.fixture(scope="module")
def runs():
    X, y, group = people(6000, 0)
    recipes = {name: recipe for name, (recipe, _) in RECIPES.items()}
    return trade_off(LogisticRegression(), X, y, group, recipes, rows=1000, seeds=range(5))


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_closes_its_gap_on_held_out_rows(runs, name):
    """Over five splits, the whole interval of what it closes lies above zero."""
    assert price_of_fairness(runs, RECIPES[name][1]).closed_low[name] > 0


def test_parity_costs_accuracy_where_shares_differ(runs):
    price = price_of_fairness(runs)
    assert (price.price_low[["thresholds", "reduction"]] > 0).all()


def test_nothing_to_close():
    """Where groups do not differ, mild recipes cost nothing; a reduction that must equalise noise pays for it."""
    X, y, _ = people(6000, 1)
    group = np.random.default_rng(2).choice(["a", "b"], len(y))
    table = trade_off(LogisticRegression(), X, y, group, {m: {"method": m} for m in METHODS[1:]}, 2000, range(3))
    price = price_of_fairness(table).price
    assert price[["reweigh", "decorrelate"]].abs().max() < 0.005 < price["reduction"]


def test_model_given_is_left_alone():
    X, y, group = people(500, 0)
    model = LogisticRegression()
    for method in METHODS:
        mitigate(method, model, X, y, group)
    assert not hasattr(model, "coef_")


def test_crossed_groups():
    table = pd.DataFrame({"sex": ["f", "m"] * 60, "race": ["x"] * 110 + ["y"] * 9 + [None], "age": 3})
    names = cross_groups(table, ["sex", "race"], minimum=10)
    assert set(names.dropna()) == {"f, x", "m, x"} and names.isna().sum() == 10
    assert len(tally([0] * 120, [0] * 120, names)) == 2


def test_what_is_refused():
    X, y, group = people(300, 0)
    model = LogisticRegression()
    refused = {
        "no column 'sexx' to group by; did you mean sex": lambda: cross_groups(pd.DataFrame({"sex": [1]}), ["sexx"]),
        "lower minimum": lambda: cross_groups(pd.DataFrame({"sex": ["a", "b"]}), ["sex"]),
        "decision must be 0 or 1; row 1": lambda: tally([0, 1], [0, 0.5], ["a", "b"]),
        "y must be 0 or 1; row 0": lambda: tally([2, 1], [0, 1], ["a", "b"]),
        "columns of one length": lambda: tally([0, 1], [0, 1, 1], ["a", "b"]),
        "one group only": lambda: tally([0, 1], [0, 1], ["a", None]),
        "group 'b' holds no positive": lambda: gaps(tally([0, 1, 0], [0, 1, 0], ["a", "a", "b"])),
        "unknown method": lambda: mitigate("hope", model, X, y, group),
        "row 2 has no group": lambda: reweigh([0, 1, 1], ["a", "b", None]),
        "row 0 belongs to group 'z'": lambda: mitigate("thresholds", model, X, y, group)(X[:1], ["z"]),
        "missing among the 2 test rows": lambda: trade_off(model, X, y, group, {}, rows=298, seeds=[1, 2, 3, 4, 5]),
        "at least 3 seeds": lambda: price_of_fairness(trade_off(model, X, y, group, {}, rows=150, seeds=[0])),
        "rows must lie between": lambda: trade_off(model, X, y, group, {}, rows=300),
    }
    for message, call in refused.items():
        with pytest.raises((ValueError, KeyError), match=message):
            call()
