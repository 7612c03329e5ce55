"""Schema matching on real columns under other names, orders, units and noise: what must hold whatever the draw."""

import random

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigmodel_nb.datasets import load
from bigmodel_nb.etl.align import (
    SYNONYMS,
    as_mapping,
    column_evidence,
    grade_mapping,
    name_likeness,
    name_words,
    profile_column,
    propose_mapping,
    unit_factor,
    value_likeness,
)
from bigmodel_nb.etl.extract import connect, read_frame

FEW = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(max_examples=100, deadline=None)
SEEDS = st.integers(0, 2**31)
NAMES = st.text(max_size=20)
CHINESE = {
    "age": "年龄",
    "gender": "性别",
    "race": "种族",
    "occupation": "职业",
    "education": "学历",
    "marital-status": "婚姻状态",
    "native-country": "国籍",
    "income": "收入",
    "hours-per-week": "每周工时",
    "relationship": "家庭关系",
    "capital-gain": "资本收益",
    "capital-loss": "资本亏损",
}


@pytest.fixture(scope="module")
def census():
    return load("adult").sample(2000, random_state=0).reset_index(drop=True)


def halves(table, seed):
    "Two tables of different people, the columns of the first in random order."
    mixed = table.sample(frac=1, random_state=seed % 2**32)
    order = random.Random(seed).sample(list(table), table.shape[1])
    return mixed.iloc[: len(table) // 2][order], mixed.iloc[len(table) // 2 :]


def mapping(left, right, **options):
    return as_mapping(propose_mapping(left, right, rows=600, **options))


def f1(found, truth):
    return grade_mapping(found, truth)["f1"]


# --- accuracy -------------------------------------------------------------------------------------------------------


@FEW
@given(seed=SEEDS)
def test_equal_names_are_found_in_any_order_and_none_is_used_twice(census, seed):
    left, right = halves(census, seed)
    proposal = propose_mapping(left, right, rows=600)
    assert proposal["left"].tolist() == list(left)
    assert proposal["right"].dropna().is_unique and proposal["confidence"].between(0, 1).all()
    assert f1(as_mapping(proposal), {name: name for name in census}) >= 0.9


@FEW
@given(seed=SEEDS)
def test_chinese_names_find_their_columns(census, seed):
    left, right = halves(census, seed)
    found = mapping(left.rename(columns=CHINESE), right)
    assert f1(found, {CHINESE.get(name, name): name for name in census}) >= 0.9
    assert all(found.get(CHINESE[name]) == name for name in ("age", "occupation", "race", "income"))


@FEW
@given(seed=SEEDS)
def test_names_that_say_nothing_leave_the_values_to_speak(census, seed):
    left, right = halves(census, seed)
    names = {name: f"x{number}" for number, name in enumerate(left)}
    found = mapping(left.rename(columns=names), right)
    grade = grade_mapping(found, {names[name]: name for name in census})
    assert grade["precision"] >= 0.75 and grade["recall"] >= 0.5


@FEW
@given(seed=SEEDS, share=st.floats(0.0, 0.3))
def test_gaps_and_noise_cost_little(census, seed, share):
    left, right = halves(census, seed)
    rng, noisy = np.random.default_rng(seed), left.copy()
    for name in noisy:
        hit = rng.random(len(noisy)) < share
        if pd.api.types.is_numeric_dtype(noisy[name]):
            noisy[name] = noisy[name] * rng.normal(1, 0.02, len(noisy))
        noisy[name] = noisy[name].mask(hit)
    assert f1(mapping(noisy.rename(columns=CHINESE), right), {CHINESE.get(name, name): name for name in census}) >= 0.8


@FEW
@given(seed=SEEDS, gone=st.integers(1, 5))
def test_a_column_without_a_partner_mostly_stays_alone(census, seed, gone):
    left, right = halves(census, seed)
    dropped = random.Random(seed + 1).sample(list(right), gone)
    proposal = propose_mapping(left, right.drop(columns=dropped), rows=600)
    truth = {name: name for name in census if name not in dropped}
    assert grade_mapping(as_mapping(proposal), truth)["precision"] >= 0.8
    alone = proposal[proposal["right"].isna()]
    assert alone["why"].str.startswith("no partner; nearest is ").all() and (alone["factor"] == 1).all()


@pytest.mark.parametrize("factor", [0.45359237, 2.54, 12.0, 365.25, 1000.0, 1.0])
def test_a_known_unit_is_named(factor):
    rng = np.random.default_rng(0)
    left = pd.DataFrame({"weight": rng.lognormal(4, 0.4, 3000)})
    right = pd.DataFrame({"weight": rng.lognormal(4, 0.4, 3000) * factor})
    row = propose_mapping(left, right).iloc[0]
    assert row["right"] == "weight" and abs(row["factor"] / factor - 1) < 0.01


def test_two_cohorts_of_one_disease():
    truth = {name: name for name in ("pid", "age", "meno", "size", "grade", "nodes", "pgr", "er", "hormon")}
    truth |= {"rtime": "rfstime", "recur": "status"}
    grade = grade_mapping(as_mapping(propose_mapping(load("rotterdam"), load("gbsg"))), truth)
    assert grade["precision"] >= 0.9 and grade["recall"] >= 0.8


def test_liver_patients_in_chinese_pounds_and_months():
    table = load("nafld_patients")[["age", "male", "weight", "height"]].sample(3000, random_state=0)
    left, right = table.iloc[:1500].copy(), table.iloc[1500:]
    left["weight"], left["age"] = left["weight"] / 0.45359237, left["age"] * 12
    left = left.rename(columns={"age": "年龄", "male": "性别", "weight": "体重", "height": "身高"})
    proposal = propose_mapping(left, right).set_index("left")
    assert proposal.loc[["年龄", "体重", "身高"], "right"].tolist() == ["age", "weight", "height"]
    assert abs(proposal.loc["体重", "factor"] / 0.45359237 - 1) < 0.01 and abs(proposal.loc["年龄", "factor"] * 12 - 1) < 0.01


# --- determinism ----------------------------------------------------------------------------------------------------


def test_twice_the_same_and_from_the_engine_as_from_memory(census):
    left, right = halves(census, 3)
    once, again = propose_mapping(left, right, rows=500), propose_mapping(left.copy(), right.copy(), rows=500)
    pd.testing.assert_frame_equal(once, again)
    con = connect()
    lazy = [read_frame(con, part.reset_index(drop=True), name) for part, name in ((left, "left"), (right, "right"))]
    pd.testing.assert_frame_equal(propose_mapping(*lazy), propose_mapping(left, right))


@FEW
@given(seed=SEEDS)
def test_the_order_of_the_columns_changes_no_answer(census, seed):
    left, right = halves(census, 5)
    order = random.Random(seed)
    mixed = [part[order.sample(list(part), part.shape[1])] for part in (left, right)]
    assert mapping(*mixed) == mapping(left, right)


@FEW
@given(seed=SEEDS)
def test_the_evidence_of_a_pair_is_the_same_seen_from_the_other_side(census, seed):
    left, right = (part.iloc[:, :6].head(300) for part in halves(census, seed))
    there = column_evidence(left, right).set_index(["left", "right"])
    back = column_evidence(right, left).set_index(["right", "left"]).reindex(there.index)
    assert np.allclose(there["name"], back["name"]) and np.allclose(there["confidence"], back["confidence"], atol=0.02)


# --- the parts ------------------------------------------------------------------------------------------------------


@MANY
@given(left=NAMES, right=NAMES)
def test_names_are_alike_on_a_scale_from_0_to_1(left, right):
    there, back = name_likeness(left, right), name_likeness(right, left)
    assert 0 <= there <= 1 and there == pytest.approx(back) and name_likeness(left, left) == 1


@MANY
@given(name=NAMES)
def test_words_of_any_name(name):
    assert all(isinstance(word, str) and word for word in name_words(name))


def test_every_word_of_the_lexicon_means_its_concept():
    for concept, words in SYNONYMS.items():
        assert all(name_likeness(word, concept) >= 0.99 for word in words.split()), concept


VALUES = st.one_of(
    st.none(), st.integers(-(10**6), 10**6), st.floats(allow_infinity=False), st.text(max_size=5), st.booleans(), st.dates()
)


@MANY
@given(left=st.lists(VALUES, max_size=30), right=st.lists(VALUES, max_size=30))
def test_any_two_columns_can_be_compared(left, right):
    one, other = (profile_column(pd.Series(values, dtype=object)) for values in (left, right))
    alike, factor, why = value_likeness(one, other)
    assert 0 <= alike <= 1 + 1e-9 and factor > 0 and why
    assert sum(one.shares.values()) <= 1 + 1e-9 and one.kind in {"number", "date", "category", "text", "key", "empty"}


@MANY
@given(quantiles=st.lists(st.floats(0.01, 1e6), min_size=19, max_size=19).map(sorted), factor=st.floats(1e-3, 1e3))
def test_a_constant_between_two_distributions_is_found(quantiles, factor):
    left = np.array(quantiles)
    found, fit = unit_factor(left, left * factor)
    assert abs(np.log(found / factor)) < 0.16 and 0 < fit <= 1


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [-0.1, 1, 7, float("nan")])
def test_a_confidence_out_of_range_is_refused(census, least):
    with pytest.raises(ValueError, match=r"least is .*; give a confidence from 0 to below 1"):
        propose_mapping(census.head(30), census.head(30), least=least)


@pytest.mark.parametrize("rows", [0, -5])
def test_no_rows_to_look_at_is_refused(census, rows):
    with pytest.raises(ValueError, match=r"rows is .*; look at 1 row at least"):
        propose_mapping(census.head(30), census.head(30), rows=rows)


def test_a_name_that_stands_twice_is_refused(census):
    twice = census.head(30).set_axis(["age", "age", *census.columns[2:]], axis=1)
    for pair in ((twice, census.head(30)), (census.head(30), twice)):
        with pytest.raises(ValueError, match="column 'age' is there twice; rename one"):
            propose_mapping(*pair)


def test_a_table_without_columns_is_refused(census):
    empty, provenance = pd.DataFrame(), pd.DataFrame({"_source": ["a"], "_row": [1]})
    for pair, side in (
        ((empty, census.head(5)), "left"),
        ((census.head(5), empty), "right"),
        ((census.head(5), provenance), "right"),
    ):
        with pytest.raises(ValueError, match=f"{side} has no columns to align"):
            propose_mapping(*pair)


def test_what_is_no_table_is_refused(census):
    with pytest.raises(TypeError, match="left is a list; give a pandas or an Ibis table"):
        propose_mapping([1, 2], census.head(5))


def test_tables_without_rows_are_aligned_by_name_alone(census):
    proposal = propose_mapping(census.head(0), census.head(0))
    assert len(proposal) == census.shape[1]
    assert all(a == b for a, b in as_mapping(proposal).items())


def test_nothing_in_common_gives_no_partner():
    left = pd.DataFrame({"q": np.random.default_rng(0).normal(size=200)})
    right = pd.DataFrame({"note": [f"word {n} and {n * n}" for n in range(200)]})
    proposal = propose_mapping(left, right)
    assert proposal["right"].isna().all() and as_mapping(proposal) == {}
