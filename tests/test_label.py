"""Labels: the queue survives kill -9 and two writers; aggregation and weak supervision against oracles on random input."""

import random
import subprocess
import sys
import time
from pathlib import Path

import krippendorff
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigmodel_nb.etl.crowd import dawid_skene, decide, krippendorff_alpha, thin, vote_shares
from bigmodel_nb.etl.label import annotate, answers, create_queue, key_codes, label_issues, next_item, open_queue, record, undo
from bigmodel_nb.etl.weak import apply_functions, fit_label_model, keywords, train_on_beliefs

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
WRITER = """
import sys
from bigmodel_nb.etl.label import open_queue, record
queue = open_queue(sys.argv[1])
for i in range(int(sys.argv[3]), 400):
    record(queue, sys.argv[2], str(i), "yes")
    print(i, flush=True)
"""


def writer(path: Path, annotator: str, first: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(path), annotator, str(first)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def new_queue(folder: Path, n: int = 400):
    return create_queue(folder / "q.db", pd.Series([f"text {i}" for i in range(n)]), ["yes", "no"])


def test_killed_annotators_lose_nothing(tmp_path):
    queue, seen, first = new_queue(tmp_path), set(), 0
    rng = random.Random(0)
    for _ in range(5):
        with writer(queue.path, "ann", first) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(rng.randrange(1, 8))]
            time.sleep(rng.random() / 50)
            process.kill()
            lines += process.stdout.readlines()
        seen |= {line.strip() for line in lines if line.endswith("\n")}
        kept = set(answers(open_queue(queue.path)).item)
        assert seen <= kept
        assert len(kept) <= len(seen) + 5
        following = next_item(queue, "ann", gold_every=10**6)
        assert following is not None
        first = int(following[0])
        assert str(first) not in kept


def test_two_annotators_at_once_lose_nothing(tmp_path):
    queue = new_queue(tmp_path)
    processes = [writer(queue.path, name, 370) for name in ("ann", "bob")]
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    table = answers(queue)
    assert table.groupby("annotator").item.nunique().to_dict() == {"ann": 30, "bob": 30}


@FEW
@given(st.lists(st.one_of(st.sampled_from(["yes", "no", "skip"]), st.just("undo")), max_size=25))
def test_queue_equals_a_stack(tmp_path_factory, moves):
    queue = new_queue(tmp_path_factory.mktemp("q"), 30)
    stack: list[tuple[str, str | None]] = []
    for move in moves:
        if move == "undo":
            expected = stack.pop()[0] if stack else None
            assert undo(queue, "ann") == expected
        else:
            item = str(len(stack))
            record(queue, "ann", item, None if move == "skip" else move)
            stack.append((item, None if move == "skip" else move))
    assert answers(queue)[["item", "label"]].values.tolist() == [list(pair) for pair in stack]


def test_sitting_resumes_and_ends(tmp_path):
    queue = new_queue(tmp_path, 5)
    keys = iter(["y", "n", "q", "u", "y", "y", "y", "y"])

    def ask(_: str) -> str:
        return next(keys)

    assert annotate(queue, "ann", ask=ask, show=lambda text: None) == 2
    assert annotate(queue, "ann", ask=ask, show=lambda text: None) == 3
    assert answers(queue).label.tolist() == ["yes"] * 5


@FEW
@given(st.lists(st.text(min_size=1, max_size=6), min_size=2, max_size=9, unique=True))
def test_keys_are_one_to_one_and_reserve_commands(labels):
    keys = key_codes(labels)
    assert sorted(keys.values()) == sorted(labels)
    assert not set(keys) & set("suq?")
    assert all(len(key) == 1 for key in keys)


GRID = st.lists(st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=6, max_size=6), min_size=2, max_size=5)


@FEW
@given(GRID, st.sampled_from(["nominal", "ordinal", "interval"]))
def test_alpha_equals_the_package(grid, level):
    rows = [(i, r, v) for r, row in enumerate(grid) for i, v in enumerate(row)]
    table = pd.DataFrame(rows, columns=["item", "annotator", "label"])
    given_labels = table.dropna()
    pairable = given_labels[given_labels.groupby("item").label.transform("size") > 1]
    if pairable.label.nunique() < 2:
        return
    data = np.array([[np.nan if v is None else v for v in row] for row in grid], dtype=float)
    assert krippendorff_alpha(table, level) == pytest.approx(krippendorff.alpha(data, level_of_measurement=level), abs=1e-10)


def crowd(seed: int, items: int = 40, people: int = 6) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, items)
    said = np.where(rng.random((items, people)) < 0.75, truth[:, None], rng.integers(0, 3, (items, people)))
    rows = [(i, f"p{r}", int(said[i, r])) for i in range(items) for r in range(people)]
    return pd.DataFrame(rows, columns=["item", "annotator", "label"])


@pytest.mark.parametrize("one_coin", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_consensus_ignores_order_of_rows_and_names(seed, one_coin):
    table = crowd(seed)
    before = dawid_skene(table, one_coin=one_coin).belief
    renamed = table.assign(annotator=table.annotator.map(lambda name: "x" + name[::-1])).sample(frac=1, random_state=seed)
    after = dawid_skene(renamed, one_coin=one_coin).belief
    np.testing.assert_allclose(before, after.loc[before.index, before.columns], atol=1e-7)
    np.testing.assert_allclose(before.sum(axis=1), 1)


@pytest.mark.parametrize("seed", range(3))
def test_likelihood_never_falls(seed):
    scores = [dawid_skene(crowd(seed), rounds=n, tolerance=0).log_likelihood for n in range(2, 12)]
    assert (np.diff(scores) > -1e-7).all()


def test_thin_keeps_whole_annotators():
    table = crowd(0)
    kept = thin(table, 2)
    assert (kept.groupby("item").size() == 2).all()
    assert len(kept.merge(table)) == len(kept)


def test_many_pseudo_answers_approach_the_majority():
    table = crowd(1, people=5)
    shares = vote_shares(table)
    clear = shares.max(axis=1) > 0.7
    strong = dawid_skene(table, one_coin=True, pseudo=1e6).belief
    assert (decide(strong)[clear] == decide(shares)[clear]).all()


def test_label_model_swaps_with_its_classes():
    texts = pd.Series(["good film", "bad film", "good and bad", "film", "good good", "bad bad"] * 20)
    functions = [keywords("g", "good", "pos"), keywords("b", "bad", "neg"), keywords("f", "good film", "pos")]
    votes = apply_functions(functions, texts)
    one = fit_label_model(votes, ["pos", "neg"]).belief
    other = fit_label_model(votes, ["neg", "pos"]).belief
    np.testing.assert_allclose(one["pos"], other["pos"], atol=1e-9)


def test_gold_is_kept_and_silence_teaches_nothing():
    texts = pd.Series(["good", "bad", "neither"] * 10)
    votes = apply_functions([keywords("g", "good", 1), keywords("b", "bad", 0)], texts)
    belief = fit_label_model(votes, [0, 1], gold={2: 1}).belief
    assert belief.loc[2, 1] == 1
    features = np.eye(3)[np.arange(30) % 3]
    model = train_on_beliefs(features, fit_label_model(votes, [0, 1], pseudo=1).belief)
    assert model.predict_proba(features[:2])[0, 1] > 0.5 > model.predict_proba(features[:2])[1, 1]


def test_clean_separable_labels_are_not_flagged():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 200)
    features = truth[:, None] * 10 + rng.normal(size=(200, 2))
    assert not label_issues(features, truth).flagged.any()
    wrong = truth.copy()
    wrong[:5] = 1 - wrong[:5]
    assert set(np.flatnonzero(label_issues(features, wrong).flagged)) == set(range(5))
