"""Sampling on random tables: splits keep groups, time, sizes and sides; reservoirs are uniform; core-sets are sets."""

import hashlib
from datetime import date, timedelta
from itertools import count, islice

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chisquare

from bigmodel_nb.etl.extract import connect, read_frame
from bigmodel_nb.etl.sample import (
    balance,
    correct_prior,
    effective_size,
    facility_location,
    herding,
    k_centre,
    leaks,
    reservoir,
    split_by_key,
    split_by_time,
    split_stratified,
    weighted_mean,
    weighted_reservoir,
)

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
KEYS = st.lists(st.one_of(st.none(), st.text(max_size=4), st.integers(0, 9).map(str)), min_size=1, max_size=60)
SHARES = st.lists(st.integers(1, 9), min_size=2, max_size=4).map(
    lambda parts: {f"side{i}": part / sum(parts) for i, part in enumerate(parts)}
)
SEEDS = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def con():
    return connect()


def as_table(con, **columns):
    return read_frame(con, pd.DataFrame(columns), "random")


def sides(table):
    return table.order_by("_row").split.execute().tolist()


@FEW
@given(keys=KEYS, shares=SHARES, seed=SEEDS)
def test_a_group_never_stands_on_two_sides(con, keys, shares, seed):
    table = split_by_key(as_table(con, key=pd.Series(keys, dtype="string")), ["key"], shares, seed)
    found = sides(table)
    assert len(found) == len(keys) and set(found) <= set(shares)
    assert all(len({side for key, side in zip(keys, found, strict=True) if key == one}) == 1 for one in set(keys))
    assert leaks(table, ["key"], sides=list(shares)) == {"rows on no side": 0, "groups on two sides": 0}


@FEW
@given(keys=KEYS, more=KEYS, shares=SHARES, seed=SEEDS, data=st.data())
def test_rows_keep_their_side_when_rows_come_and_go(con, keys, more, shares, seed, data):
    def split(rows):
        table = split_by_key(as_table(con, key=pd.Series(rows, dtype="string")), ["key"], shares, seed)
        return dict(zip(rows, sides(table), strict=True))

    before = split(keys)
    grown = split(data.draw(st.permutations(keys + more)))
    assert {key: grown[key] for key in before} == before


@FEW
@given(keys=st.lists(st.tuples(st.text("ab\x1f=", max_size=3), st.text("ab\x1f=", max_size=3)), min_size=1, max_size=30))
def test_the_side_is_what_hashlib_says(con, keys):
    table = as_table(con, a=[a for a, _ in keys], b=[b for _, b in keys])
    got = sides(split_by_key(table, ["a", "b"], {"train": 0.6, "test": 0.4}, 3))
    digests = [hashlib.md5(f"3\x1f={a}\x1f={b}".encode()).hexdigest()[:8] for a, b in keys]
    assert got == ["train" if int(digest, 16) < round(0.6 * 2**32) else "test" for digest in digests]


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, shares=SHARES)
def test_sizes_are_as_asked_within_the_binomial_interval(con, seed, shares):
    n = 4000
    found = pd.Series(sides(split_by_key(as_table(con, key=range(n)), ["key"], shares, seed))).value_counts()
    for side, share in shares.items():
        low, high = binom.interval(1 - 1e-7, n, share)
        assert low <= found.get(side, 0) <= high


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, shares=SHARES, classes=st.lists(st.integers(0, 3), min_size=1, max_size=400), cut=st.integers(1, 400))
def test_strata_are_even_in_every_beginning(con, seed, shares, classes, cut):
    def split(rows):
        return sides(split_stratified(as_table(con, c=rows), ["c"], ["_row"], shares, seed))

    found = split(classes)
    assert split(classes[:cut]) == found[:cut]
    for one in set(classes):
        mine = [side for side, c in zip(found, classes, strict=True) if c == one]
        for side, share in shares.items():
            assert abs(mine.count(side) - share * len(mine)) <= 2 + np.log(len(mine))


DAYS = st.lists(st.one_of(st.none(), st.dates(date(2020, 1, 1), date(2024, 12, 31))), min_size=1, max_size=50)


@FEW
@given(
    days=DAYS,
    starts=st.lists(st.dates(date(2020, 6, 1), date(2024, 6, 1)), min_size=1, max_size=3, unique=True),
    wait=st.integers(0, 400),
)
def test_time_never_goes_backwards(con, days, starts, wait):
    starts = {"first": None, **{f"later{i}": start for i, start in enumerate(sorted(starts))}}
    table = as_table(con, day=pd.Series(pd.to_datetime(pd.Series(days, dtype="object"))))
    embargo = timedelta(days=wait)
    found = sides(split_by_time(table, "day", {k: v and pd.Timestamp(v) for k, v in starts.items()}, embargo))
    for day, side in zip(days, found, strict=True):
        if day is None:
            assert side is None or pd.isna(side)
            continue
        held = [name for name, start in starts.items() if start is None or day >= start][-1]
        ahead = [start for start in starts.values() if start and start > day]
        assert side == ("embargo" if any(day >= start - embargo for start in ahead) else held)


def test_what_is_asked_wrongly_is_said_clearly(con):
    table = as_table(con, key=[1, 2], day=[1, 2])
    for shares in ({"train": 1.0}, {}, {"train": 0.5, "test": 0.6}, {"train": 1.2, "test": -0.2}):
        with pytest.raises(ValueError, match="shares must be"):
            split_by_key(table, ["key"], shares)
    for starts in ({"train": 1, "test": 2}, {"train": None}, {}, {"train": None, "valid": 2, "test": 2}):
        with pytest.raises(ValueError, match="starts must begin"):
            split_by_time(table, "day", starts)
    with pytest.raises(ValueError, match="no column"):
        split_by_key(table, [], {"train": 0.5, "test": 0.5})
    with pytest.raises(ValueError, match="no column 'c'"):
        leaks(split_by_key(table, ["key"], {"train": 0.5, "test": 0.5}), ["c"])


@FEW
@given(n=st.integers(0, 200), k=st.integers(1, 50), seed=SEEDS)
def test_a_reservoir_is_a_subset_of_the_right_size(n, k, seed):
    kept = reservoir(iter(range(n)), k, seed)
    assert len(kept) == len(set(kept)) == min(n, k) and set(kept) <= set(range(n))
    heavy = weighted_reservoir(((i, float(i % 3)) for i in range(n)), k, seed)
    assert len(heavy) == len(set(heavy)) == min(k, sum(i % 3 > 0 for i in range(n)))
    assert all(i % 3 for i in heavy)


@pytest.mark.parametrize(("n", "k"), [(10, 1), (25, 5), (60, 59), (300, 3)])
def test_every_item_and_every_pair_is_as_likely(n, k):
    draws = 6000
    taken = np.bincount([i for seed in range(draws) for i in reservoir(iter(range(n)), k, seed)], minlength=n)
    # within one draw the counts repel each other: the statistic is chi-square after scaling by (n - 1) / (n - k)
    statistic = ((taken - draws * k / n) ** 2).sum() / (draws * k / n) * (n - 1) / (n - k)
    low, high = np.array([n - 1]) - 6 * np.sqrt(2 * (n - 1)), np.array([n - 1]) + 8 * np.sqrt(2 * (n - 1))
    assert low[0] < statistic < high[0]
    if k == 5:
        together = sum({0, n - 1} <= set(reservoir(range(n), k, seed)) for seed in range(draws))
        assert binom.interval(1 - 1e-6, draws, k * (k - 1) / (n * (n - 1)))[0] <= together
        assert together <= binom.interval(1 - 1e-6, draws, k * (k - 1) / (n * (n - 1)))[1]


def test_a_reservoir_walks_an_endless_stream_no_further_than_asked():
    seen = count()
    kept = reservoir(islice(seen, 10_000), 7, 1)
    assert len(kept) == 7 and next(seen) == 10_000


def test_equal_weights_are_a_uniform_sample():
    taken = np.bincount([weighted_reservoir(((i, 0.3) for i in range(20)), 1, s)[0] for s in range(5000)], minlength=20)
    assert chisquare(taken).pvalue > 1e-5


@FEW
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=40), st.floats(0.001, 1000))
def test_effective_size_and_mean_ignore_the_scale_of_weights(weights, factor):
    w, x = np.array(weights), np.arange(len(weights), dtype=float)
    assert 1 - 1e-9 <= effective_size(w) <= len(w) + 1e-9
    assert np.isclose(effective_size(w), effective_size(w * factor))
    assert np.isclose(weighted_mean(x, w).value, np.average(x, weights=w))
    assert np.allclose(weighted_mean(x, w), weighted_mean(x, w * factor))


@FEW
@given(labels=st.lists(st.sampled_from("abc"), min_size=2, max_size=60).filter(lambda x: len(set(x)) > 1), seed=SEEDS)
def test_balanced_classes_are_equally_frequent(labels, seed):
    counts = pd.Series(labels).value_counts()
    over, under = (pd.Series(labels).iloc[balance(labels, how, seed)].value_counts() for how in ("over", "under"))
    assert set(over) == {counts.max()} and set(under) == {counts.min()}
    assert set(balance(labels, "over", seed)) == set(range(len(labels)))


@FEW
@given(p=st.floats(0.001, 0.999), a=st.floats(0.01, 0.99), b=st.floats(0.01, 0.99))
def test_a_prior_can_be_corrected_there_and_back(p, a, b):
    assert np.isclose(correct_prior(correct_prior(np.array([p]), a, b), b, a)[0], p)
    assert np.isclose(correct_prior(np.array([a]), a, b)[0], b)


@FEW
@given(n=st.integers(2, 40), k=st.integers(1, 40), seed=st.integers(0, 99))
def test_core_sets_are_sets_and_nested(n, k, seed):
    points, k = np.random.default_rng(seed).normal(size=(n, 3)), min(n, k)
    for choose in (k_centre, facility_location, herding):
        chosen = choose(points, k)
        assert len(chosen) == len(set(chosen)) == k
        assert np.array_equal(choose(points, max(k - 1, 1)), chosen[: max(k - 1, 1)])


@FEW
@given(seed=st.integers(0, 999))
def test_lazy_greedy_is_greedy(seed):
    points = np.random.default_rng(seed).normal(size=(25, 2))
    away, chosen = np.linalg.norm(points[:, None] - points, axis=2), facility_location(points, 6).tolist()
    for step, row in enumerate(chosen):
        costs = [away[:, [*chosen[:step], j]].min(axis=1).sum() for j in range(25)]
        assert costs[row] <= min(costs) + 1e-6  # two rows may be equally good
