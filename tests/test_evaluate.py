"""Judging models: metrics, paired tests, experiment plans, calibration, slices, leaks and cards against oracles."""

import itertools
import math
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk
from sklearn.isotonic import IsotonicRegression

from bigmodel_nb.datasets import load
from bigmodel_nb.measure import Interval
from bigmodel_nb.training import calibrate, compare, evaluate, experiment, leakage, model_card

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10**6)


def scored(seed, ties=True):
    "Labels of both kinds and two related scores, with ties if asked for."
    rng = np.random.default_rng(seed)
    n = int(rng.integers(6, 120))
    y = np.r_[1, 1, 0, 0, rng.integers(0, 2, n - 4)]
    a, b = (rng.normal(size=n) + k * y for k in (1.0, 0.4))
    return (y, a.round(1), b.round(1)) if ties else (y, a, b)


# --- evaluate: weights and proportions ----------------------------------------------------------------------------


@few
@given(seeds)
def test_weighted_metrics_equal_repeated_rows(seed):
    y, score, _ = scored(seed)
    k = np.random.default_rng(seed).integers(1, 4, len(y))
    again, more = np.repeat(y, k), np.repeat(score, k)
    assert evaluate.auroc(y, score, k) == pytest.approx(sk.roc_auc_score(again, more))
    assert evaluate.sensitivity_at_specificity(y, score, 0.8, k) == pytest.approx(
        evaluate.sensitivity_at_specificity(again, more, 0.8)
    )


@few
@given(st.integers(0, 60), st.integers(1, 60), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_equals_scipy(wins, extra, level):
    n = wins + extra
    expected = stats.binomtest(wins, n).proportion_ci(level, method="wilson")
    assert evaluate.wilson(wins, n, level) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert evaluate.wilson(0, n, level)[0] == 0 and evaluate.wilson(n, n, level)[1] == 1
    low, high = evaluate.wilson(np.array([wins, wins]), np.array([n, n]), level)
    assert low == pytest.approx([expected.low] * 2, abs=1e-9) and high == pytest.approx([expected.high] * 2, abs=1e-9)


@pytest.mark.parametrize("wins, n", [(3, 0), (-1, 5), (6, 5), (float("nan"), 5)])
def test_wilson_refuses(wins, n):
    with pytest.raises(ValueError, match="nothing to estimate"):
        evaluate.wilson(wins, n)


BAD = [
    (([1, 1, 1], [0.1, 0.2, 0.3]), "both outcomes"),
    (([0, 1, 2], [0.1, 0.2, 0.3]), "only 0 and 1"),
    (([0, 1, 1], [0.1, np.nan, 0.3]), "row 1 has no prediction"),
    (([0, 1, 1], [0.1, 0.2]), "one length"),
]


@pytest.mark.parametrize("args, words", BAD)
@pytest.mark.parametrize("judge", [evaluate.auroc, evaluate.brier, compare.delong, compare.auroc_interval])
def test_bad_columns_are_named(judge, args, words):
    with pytest.raises(ValueError, match=words):
        judge(*args)


# --- compare ------------------------------------------------------------------------------------------------------


def delong_by_pairs(y, *scores):
    "DeLong's definition, pair by pair."
    won = [(s[y == 1][:, None] > s[y == 0]) + 0.5 * (s[y == 1][:, None] == s[y == 0]) for s in scores]
    pos, neg = np.array([w.mean(1) for w in won]), np.array([w.mean(0) for w in won])
    return pos.mean(1), np.atleast_2d(np.cov(pos)) / pos.shape[1] + np.atleast_2d(np.cov(neg)) / neg.shape[1]


@few
@given(seeds, st.booleans())
def test_delong_equals_its_definition(seed, ties):
    y, a, b = scored(seed, ties)
    value, covariance = compare.delong(y, a, b)
    expected = delong_by_pairs(y, a, b)
    np.testing.assert_allclose(value, expected[0], atol=1e-12)
    np.testing.assert_allclose(covariance, expected[1], atol=1e-12)
    np.testing.assert_allclose(value, [sk.roc_auc_score(y, a), sk.roc_auc_score(y, b)], atol=1e-12)


@few
@given(seeds)
def test_delong_does_not_care_about_order_scale_or_names(seed):
    y, a, b = scored(seed)
    p = np.random.default_rng(seed).permutation(len(y))
    base = compare.delong(y, a, b)
    for other in (compare.delong(y[p], a[p], b[p]), compare.delong(y, np.exp(a), 3 * b + 2), compare.delong(1 - y, -a, -b)):
        np.testing.assert_allclose(other.value, base.value, atol=1e-12)
        np.testing.assert_allclose(other.covariance, base.covariance, atol=1e-12)
    one, back = compare.auroc_test(y, a, b), compare.auroc_test(y, b, a)
    assert one.p == pytest.approx(back.p) and one.difference == pytest.approx(-back.difference)
    assert one.low == pytest.approx(-back.high)


def test_delong_interval_covers_and_test_keeps_its_level():
    rng, y = np.random.default_rng(0), np.r_[np.ones(30), np.zeros(120)]
    area, covered, alarms, repeats = stats.norm.cdf(2 / 2**0.5), 0, 0, 600
    for _ in range(repeats):
        shared = rng.normal(size=150)
        a, b = (2 * y + 0.8 * shared + 0.6 * rng.normal(size=150) for _ in range(2))
        interval = compare.auroc_interval(y, a)
        covered += interval.low <= area <= interval.high
        alarms += compare.auroc_test(y, a, b).p < 0.05
    assert 0.925 <= covered / repeats <= 0.975 and alarms / repeats <= 0.075


def test_separated_classes_have_no_interval():
    interval = compare.auroc_interval([0, 0, 0, 1, 1, 1], [1, 2, 3, 4, 5, 6])
    assert interval.value == 1 and math.isnan(interval.low) and math.isnan(interval.high)


@few
@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 5))
def test_mcnemar_equals_the_binomial_sum(wins, losses, rest):
    n = wins + losses + rest
    if not n:
        return
    y, a, b = (
        np.zeros(n, int),
        np.r_[np.zeros(wins), np.ones(losses + rest)],
        np.r_[np.ones(wins), np.zeros(losses), np.ones(rest)],
    )
    test, k = compare.mcnemar(y, a, b), wins + losses
    expected = min(1.0, 2 * sum(math.comb(k, i) for i in range(min(wins, losses) + 1)) / 2**k)
    assert test.p == pytest.approx(expected) and test.difference == pytest.approx((wins - losses) / n)
    assert test.low <= test.difference <= test.high or wins * losses == 0
    assert compare.mcnemar(y, b, a).p == pytest.approx(test.p)


@few
@given(seeds)
def test_swap_test_approaches_all_swaps(seed):
    rng = np.random.default_rng(seed)
    y, a, b = rng.integers(0, 2, (3, 9))

    def acc(y, c):
        return float((y == c).mean())

    seen = abs(acc(y, a) - acc(y, b))
    every = []
    for bits in itertools.product([False, True], repeat=9):
        s = np.array(bits)
        every.append(abs(acc(y, np.where(s, b, a)) - acc(y, np.where(s, a, b))) >= seen - 1e-12)
    assert compare.swap_test(acc, y, a, b, n=600, seed=seed) == pytest.approx(np.mean(every), abs=0.1)


@few
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_adjusted_equals_closed_testing_and_scipy(p):
    p = np.array(p)
    k = len(p)
    closed = [
        max(min(1.0, len(s) * p[list(s)].min()) for r in range(1, k + 1) for s in itertools.combinations(range(k), r) if i in s)
        for i in range(k)
    ]
    np.testing.assert_allclose(compare.adjusted(p), closed, atol=1e-12)
    np.testing.assert_allclose(compare.adjusted(p, "bh"), stats.false_discovery_control(p), atol=1e-12)


@few
@given(seeds, st.integers(1, 4))
def test_groups_of_copies_are_one_witness(seed, copies):
    rng = np.random.default_rng(seed)
    y = rng.normal(size=40)
    alone = compare.resampled(np.mean, y, n=60, seed=seed)
    together = compare.resampled(np.mean, np.repeat(y, copies), groups=np.repeat(np.arange(40), copies), n=60, seed=seed)
    np.testing.assert_allclose(together, alone, atol=1e-12)


def test_corrected_t_limits_and_errors():
    d = np.random.default_rng(0).normal(0.1, 1, 20)
    t = compare.corrected_t(d, 10**12, 1)
    expected = stats.ttest_1samp(d, 0)
    assert t.p == pytest.approx(expected.pvalue, rel=1e-6)
    np.testing.assert_allclose((t.low, t.high), expected.confidence_interval(0.95), rtol=1e-6)
    assert compare.corrected_t([0.0, 0.0, 0.0], 8, 2).p == 1
    for args in (([0.1], 8, 2), ([0.1, 0.2], 0, 2)):
        with pytest.raises(ValueError, match="two splits"):
            compare.corrected_t(*args)


@few
@given(seeds)
def test_class_metrics_are_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    y = np.r_[np.arange(4), rng.integers(0, 4, 40)]
    p = rng.dirichlet(np.ones(4), len(y))
    own = {name: metric(y, p) for name, metric in compare.class_metrics(range(4)).items()}
    best = p.argmax(1)
    assert own["accuracy"] == pytest.approx(sk.accuracy_score(y, best))
    assert own["balanced accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, best))
    assert own["macro F1"] == pytest.approx(sk.f1_score(y, best, average="macro"))
    assert own["log loss"] == pytest.approx(sk.log_loss(y, p))


@pytest.mark.parametrize(
    "work, words",
    [
        (lambda: compare.resampled(np.mean, []), "length above 0"),
        (lambda: compare.resampled(np.mean, [1.0, 2.0], groups=["a", "a"]), "two different"),
        (lambda: compare.mcnemar([0, 1], [0, 1], [0]), "one length"),
        (lambda: compare.mcnemar([0, 1], [0, None], [0, 1]), "column 1 has no value in row 1"),
        (lambda: compare.adjusted([0.1], "bonferroni"), "'holm' or 'bh'"),
        (lambda: compare.adjusted([float("nan"), 0.5]), "row 0"),
    ],
)
def test_compare_refuses(work, words):
    with pytest.raises(ValueError, match=words):
        work()


# --- experiment ---------------------------------------------------------------------------------------------------


@few
@given(st.integers(5, 40), st.floats(0.05, 0.9), st.floats(-1, 1))
def test_paired_power_is_the_sum_over_all_outcomes(rows, disagree, lean):
    difference, power = lean * disagree, 0.0
    for wins in range(rows + 1):
        for losses in range(rows + 1 - wins):
            if wins + losses and stats.binom.cdf(min(wins, losses), wins + losses, 0.5) * 2 <= 0.05:
                chances = [(disagree + difference) / 2, (disagree - difference) / 2, 1 - disagree]
                power += stats.multinomial.pmf([wins, losses, rows - wins - losses], rows, np.clip(chances, 0, 1))
    assert experiment.paired_power(rows, disagree, difference) == pytest.approx(power, abs=1e-6)


@few
@given(st.floats(0.02, 0.5), st.floats(0.2, 0.9), st.sampled_from([0.5, 0.8, 0.95]))
def test_planned_rows_reach_the_power(disagree, share, power):
    rows = experiment.paired_rows(disagree, share * disagree, power)
    assert experiment.paired_power(rows, disagree, share * disagree) >= power
    assert experiment.paired_power(max(1, int(0.8 * rows)), disagree, share * disagree) < power + 0.05


@few
@given(st.floats(0.1, 3), st.sampled_from([0.5, 0.8, 0.95]))
def test_seeds_needed_is_the_least(effect, power):
    k = experiment.seeds_needed(1.0, effect, power)

    def reached(n):
        limit, shift = stats.t.ppf(0.975, n - 1), effect * n**0.5
        return stats.nct.sf(limit, n - 1, shift) + stats.nct.cdf(-limit, n - 1, shift)

    assert k >= 2 and reached(k) >= power and (k == 2 or reached(k - 1) < power)


@few
@given(st.integers(0, 200), st.integers(0, 200))
def test_evidence_is_a_fair_game(wins, losses):
    e = experiment.evidence([wins, wins + 1, wins], [losses, losses, losses + 1])
    assert e[0] == pytest.approx((e[1] + e[2]) / 2, rel=1e-9)
    assert experiment.evidence(wins, losses) == pytest.approx(experiment.evidence(losses, wins))


def test_evidence_survives_peeking():
    rng, alarms = np.random.default_rng(1), 0
    for _ in range(800):
        w = np.cumsum(rng.integers(0, 2, 1500))
        alarms += (experiment.evidence(w, np.arange(1, 1501) - w) >= 20).any()
    assert alarms / 800 <= 0.05 + 2 * (0.05 * 0.95 / 800) ** 0.5
    assert np.isfinite(experiment.evidence(10**6, 0))


@few
@given(st.floats(0, 0.5), st.floats(0.5, 5), st.floats(0.2, 1.2))
def test_power_law_is_found(floor, scale, rate):
    n = np.array([50, 100, 200, 400, 800, 1600])
    truth = experiment.PowerLaw(floor, scale, rate)
    np.testing.assert_allclose(experiment.fit_power_law(n, truth.at(n)).at(6400), truth.at(6400), rtol=0.03, atol=2e-4)


def test_spread_blames_the_right_source():
    def run(rows, weights):
        return float(np.random.default_rng(rows).normal() + 0.01 * np.random.default_rng(weights).normal())

    parts = experiment.spread(run, ["rows", "weights"], repeats=20)
    assert parts["std"]["rows"] > 20 * parts["std"]["weights"]
    assert parts.low["rows"] < 1 < parts.high["rows"]


@pytest.mark.parametrize(
    "work, words",
    [
        (lambda: experiment.paired_power(0, 0.1, 0.1), "0 rows"),
        (lambda: experiment.paired_rows(0.1, 0), "worth acting on"),
        (lambda: experiment.paired_rows(0.1, 0.2), "at most d"),
        (lambda: experiment.unpaired_rows(0.8, 0.8), "two different shares"),
        (lambda: experiment.seeds_needed(1, 0), "worth seeing"),
        (lambda: experiment.spread(lambda: 0.0, []), "one source"),
        (lambda: experiment.evidence([1, 2], [1]), "one shape"),
        (lambda: experiment.fit_power_law([1, 2, 3], [0.1, 0.1, np.nan]), "three sizes"),
    ],
)
def test_experiment_refuses(work, words):
    with pytest.raises(ValueError, match=words):
        work()


# --- calibrate ----------------------------------------------------------------------------------------------------


def test_debiased_square_is_unbiased():
    rng, ours, plain = np.random.default_rng(0), [], []
    for _ in range(150):
        p = np.repeat(np.linspace(0.1, 0.8, 10), 40)
        y = (rng.random(400) < p + 0.05).astype(int)
        groups = evaluate.calibration(y, p)
        plain.append(np.average((groups.predicted - groups.observed) ** 2, weights=groups.rows))
        ours.append(calibrate.debiased_error(y, p) ** 2)
    assert abs(np.mean(ours) - 0.0025) < 0.0007 and np.mean(plain) > 0.006


@few
@given(seeds, st.floats(0.3, 4), st.integers(2, 5))
def test_temperature_undoes_a_temperature(seed, heat, k):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(k), 3000)
    y = (p.cumsum(1) < rng.random((3000, 1))).sum(1)
    hot = p**heat / (p**heat).sum(1, keepdims=True)
    assert calibrate.temperature(y, hot) == pytest.approx(heat, rel=0.15)


@few
@given(seeds, st.sampled_from(["temperature", "platt", "isotonic"]))
def test_repairs_keep_order_shape_and_range(seed, how):
    rng = np.random.default_rng(seed)
    p = rng.beta(1, 2, 400)
    y = (rng.random(400) < p**2).astype(int)
    fixed = calibrate.recalibrate(y, p, how)
    grid = np.linspace(0, 1, 101)
    q = fixed(grid)
    assert q.shape == grid.shape and q.min() >= 0 and q.max() <= 1 and (np.diff(q) >= -1e-9).all()
    if how == "isotonic":
        np.testing.assert_allclose(fixed(p), IsotonicRegression(y_min=0, y_max=1).fit_transform(p, y), atol=1e-12)
    if how == "platt":
        assert fixed(p).mean() == pytest.approx(y.mean(), abs=1e-3)
    assert sk.log_loss(y, fixed(p).clip(1e-6, 1 - 1e-6)) <= sk.log_loss(y, p) + 1e-6


def test_weights_of_a_repair_are_repeated_rows():
    rng = np.random.default_rng(0)
    p, k = rng.beta(1, 2, 200), rng.integers(1, 4, 200)
    y = (rng.random(200) < p).astype(int)
    for how in ("temperature", "platt", "isotonic"):
        a = calibrate.recalibrate(y, p, how, k)(p)
        np.testing.assert_allclose(a, calibrate.recalibrate(np.repeat(y, k), np.repeat(p, k), how)(p), atol=2e-3)


def test_slices_are_what_they_say_and_null_worlds_stay_quiet():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {"sex": rng.choice(["f", "m"], 900), "age": rng.normal(50, 10, 900), "town": rng.choice(list("abcd"), 900)}
    )
    masks = calibrate.slice_masks(table, least=30)
    np.testing.assert_array_equal(masks["sex = f and town = b"], (table.sex == "f") & (table.town == "b"))
    ages = [m for s, m in masks.items() if s.startswith("age") and " and " not in s]
    assert len(ages) == 4 and (np.sum(ages, axis=0) == 1).all()
    naive = called = found = uneven = 0
    for seed in range(120):
        r = np.random.default_rng(seed)
        loss = (r.random(900) < 0.2).astype(float)
        t = calibrate.worst_slices(loss, masks, n=200, seed=seed)
        errors = pd.Series({s: (loss[m].var() / m.sum() + loss[~m].var() / (~m).sum()) ** 0.5 for s, m in masks.items()})
        naive += (t.gap.abs() > 1.96 * errors[t.index]).any()
        called += ((t.low > 0) | (t.high < 0)).any()
        wide = np.where(table.town == "a", 3.0, 1.0) * r.normal(size=900)
        other = calibrate.worst_slices(wide, masks, n=200, seed=seed)
        uneven += ((other.low > 0) | (other.high < 0)).any()
        if seed < 20:
            planted = masks["sex = f and town = b"]
            hurt = calibrate.worst_slices(np.where(planted & (r.random(900) < 0.4), 1.0, loss), masks, n=200, seed=seed)
            found += hurt.low["sex = f and town = b"] > 0
    assert naive > 60 and called <= 14 and uneven <= 18 and found >= 18


def test_slices_do_not_depend_on_order_of_rows():
    rng = np.random.default_rng(0)
    table, loss, p = (
        pd.DataFrame({"g": rng.choice(list("ab"), 300), "x": rng.normal(size=300)}),
        rng.random(300),
        rng.permutation(300),
    )
    one = calibrate.worst_slices(loss, calibrate.slice_masks(table, least=20))
    two = calibrate.worst_slices(loss[p], calibrate.slice_masks(table.iloc[p], least=20))
    np.testing.assert_allclose(one.gap.sort_index(), two.gap.sort_index(), atol=1e-5)
    assert set(calibrate.distinct_slices(one, calibrate.slice_masks(table, least=20)).index) <= set(one.index)


@pytest.mark.parametrize(
    "work, words",
    [
        (lambda: calibrate.slice_masks(pd.DataFrame({"x": ["a"] * 200})), "no slice"),
        (lambda: calibrate.worst_slices([0.1, 0.2, 0.3], {"none": np.zeros(3, bool)}), "empty"),
        (lambda: calibrate.worst_slices([0.1, np.nan] * 5, {"x": np.arange(10) < 5}), "5 of 10 losses"),
        (lambda: calibrate.temperature([0, 3], [[0.5, 0.5], [0.1, 0.9]]), "labels from 0 to 3"),
        (lambda: calibrate.recalibrate([0, 1], [[0.5, 0.6], [0.1, 0.9]], "temperature"), "sum to 1"),
        (lambda: calibrate.recalibrate([1, 1], [0.5, 0.6]), "both outcomes"),
        (lambda: calibrate.calibration_test([0, 1], [-2.0, 3.0]), "not scores"),
    ],
)
def test_calibrate_refuses(work, words):
    with pytest.raises(ValueError, match=words):
        work()


# --- leakage ------------------------------------------------------------------------------------------------------


def random_table(seed, n=600):
    "A table of numbers, words and gaps, with a target that they predict a little."
    rng = np.random.default_rng(seed)
    t = pd.DataFrame({"a": rng.normal(5, 2, n), "b": rng.exponential(3, n).round(2), "word": rng.choice(list("uvwxyz"), n)})
    t["gap"] = np.where(rng.random(n) < 0.2, np.nan, rng.normal(0.5, 0.2, n))
    t["y"] = (t.a + rng.normal(0, 3, n) > 5).astype(int)
    return t


@few
@given(seeds)
def test_clean_tables_are_clean(seed):
    t = random_table(seed)
    report = leakage.leakage_report(t[:400], t[400:], "y")
    assert set(report.verdict) == {"clean", "not checked"}
    assert (report.verdict == "not checked").sum() == 3


@few
@given(seeds, st.sampled_from(["standard", "range", "fill", "encode", "copies", "column", "gaps", "codes"]))
def test_planted_leaks_are_found_and_proper_steps_are_not(seed, kind):
    t = random_table(seed)
    part = t[:400]

    def step(fit):
        out = t.copy()
        if kind == "standard":
            out["a"] = (t.a - fit.a.mean()) / fit.a.std()
        if kind == "range":
            out["a"] = (t.a - fit.a.min()) / (fit.a.max() - fit.a.min())
        if kind == "fill":
            out["gap"] = t.gap.fillna(fit.gap.mean()) * 3 + 1
        if kind == "encode":
            out["word"] = t.word.map(fit.groupby("word").y.mean())
        return out

    if kind in ("standard", "range", "fill", "encode"):
        right, wrong, check = step(part), step(t), "fitted on everything"
        if kind == "range" and {int(t.a.argmin()), int(t.a.argmax())} <= set(range(400)):
            return
    else:
        right, wrong, check = t, t.copy(), "copies" if kind == "copies" else "target leakage"
        if kind == "copies":
            wrong.iloc[400:410] = t.iloc[:10].to_numpy()
            wrong = wrong.infer_objects()
        if kind == "column":
            wrong["code"] = t.y * 7 + np.random.default_rng(seed).normal(0, 1, len(t))
        if kind == "codes":
            wrong["code"] = [
                f"{'AB'[y]}{n}" for y, n in zip(t.y, np.random.default_rng(seed).integers(0, 30, len(t)), strict=True)
            ]
        if kind == "gaps":
            wrong["form"] = np.where(t.y == 1, t.b, np.nan)
    assert leakage.leakage_report(right[:400], right[400:], "y").verdict[check] == "clean"
    assert leakage.leakage_report(wrong[:400], wrong[400:], "y").verdict[check] == "found"


@few
@given(seeds)
def test_shared_rows_equal_a_search(seed):
    rng = np.random.default_rng(seed)
    a, b = (pd.DataFrame({"x": rng.choice([1, 2, np.nan], k), "w": rng.choice(["p", None], k)}) for k in (9, 7))
    across, within = leakage.shared_rows(a, b)

    def key(row):
        return str(row.x), str(row.w)

    old = [key(r) for r in a.itertuples()]
    assert across.tolist() == [key(r) in old for r in b.itertuples()]
    assert within.tolist() == [old.count(k) > 1 for k in old]


def test_groups_times_and_texts():
    t = pd.DataFrame(
        {"who": np.arange(60) // 2, "day": np.arange(60), "x": np.random.default_rng(0).normal(size=60), "y": np.arange(60) % 2}
    )
    t["note"] = [f"patient number {i} complains of {'head' if i % 2 else 'heart'}ache since {i * 37} hours" for i in range(60)]

    def verdicts(train, test, **kw):
        return leakage.leakage_report(train, test, "y", **kw).verdict

    assert verdicts(t[:40], t[40:], group="who", when="day").isin(["clean", "not checked"]).all()
    assert verdicts(t[:41], t[41:], group="who")["group overlap"] == "found"
    assert verdicts(t[20:], t[:20], when="day")["time travel"] == "found"
    twin = t.copy()
    twin.loc[50, "note"] = "Patient number 3 complains of headache since 111 hours."
    assert verdicts(twin[:40], twin[40:], text="note", near=0.95)["near copies"] == "found"


@pytest.mark.parametrize(
    "work, words",
    [
        (lambda t: leakage.leakage_report(t, t[:0], "y"), "test has 0 rows"),
        (lambda t: leakage.leakage_report(t, t, "z"), r"no column \['z'\]"),
        (lambda t: leakage.leakage_report(t, t, "y", group="id"), r"no column \['id'\]"),
        (lambda t: leakage.leakage_report(t, t.drop(columns="a"), "y"), r"only one side has the columns \['a'\]"),
        (lambda t: leakage.leakage_report(t.assign(y=1), t, "y"), "two classes"),
        (lambda t: leakage.leakage_report(t.assign(y=np.nan), t, "y"), "no value in row 0"),
    ],
)
def test_leakage_refuses(work, words):
    with pytest.raises(ValueError, match=words):
        work(random_table(0))


def test_column_strength_on_real_data_agrees_with_ranking():
    adult = load("adult")[:4000]
    strength = leakage.column_strength(adult[["age", "relationship", "fnlwgt"]], adult.income)
    y = (adult.income == ">50K").astype(int)
    by_mean = adult.relationship.map(y.groupby(adult.relationship).mean())
    assert strength["relationship"] == pytest.approx(sk.roc_auc_score(y, by_mean), abs=0.02)
    assert strength["fnlwgt"] < 0.6 and strength.index[0] == "relationship"


# --- model card ---------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    "Checks nesting and gathers attributes and text."

    def __init__(self, text):
        super().__init__()
        self.open, self.bad, self.links, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ("src", "href") or k.startswith("on")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.bad.append(tag)

    def handle_data(self, data):
        self.text.append(data)


odd = st.text(min_size=1, max_size=20).filter(str.strip) | st.sampled_from(
    ["</section>", "<script>x</script>", "\"'&<>", "--><b>"]
)


@few
@given(odd, odd, st.floats(-5, 5))
def test_cards_are_sound_whatever_they_are_told(name, word, value):
    metrics = {word: Interval(value, value - 1, value + 1)}
    table = pd.DataFrame({word: [value, None]}, index=[word, "b"])
    card = model_card.model_card(name, {word: word}, word, [word], metrics, {word: word}, None, {word: table}, caveats=word)
    page = Page(card)
    assert not page.bad and not page.open and not page.links
    assert model_card.missing_sections(card) == ["Training data", "Costs", "Ethical considerations"]
    if "\r" not in word and "\x00" not in word:
        assert word in page.text


def test_data_facts_see_every_cell_and_row():
    t = random_table(0)
    mark = model_card.data_facts(t, "y")["fingerprint (SHA-256)"]
    assert mark == model_card.data_facts(t.copy(), "y")["fingerprint (SHA-256)"]
    changed = t.assign(b=t.b.where(t.index != 17, -1))
    assert mark != model_card.data_facts(changed, "y")["fingerprint (SHA-256)"]
    assert mark != model_card.data_facts(t[::-1], "y")["fingerprint (SHA-256)"]


@pytest.mark.parametrize("metric", [0.9, Interval(float("nan"), 0, 1), Interval(0.5, 0.6, 0.7), "good", None])
def test_cards_refuse_numbers_without_intervals(metric):
    with pytest.raises(ValueError, match="metric 'accuracy'"):
        model_card.model_card("m", metrics={"accuracy": metric})
