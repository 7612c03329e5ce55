"""Near-duplicates: properties, degenerate inputs, and the search against brute force."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel_nb.etl.duplicates import duplicate_groups, near_duplicates
from bigmodel_nb.etl.similarity import fold_texts, text_similarity

SOME_TEXT = st.text(alphabet="ab cdé北京好上，。!AB\0\n_1１", max_size=40)


@settings(max_examples=200, deadline=None)
@given(SOME_TEXT, SOME_TEXT)
def test_similarity_is_symmetric_and_bounded(a, b):
    forth, back = text_similarity([a], [b])[0], text_similarity([b], [a])[0]
    assert forth == back and 0 <= forth <= 1


@settings(max_examples=200, deadline=None)
@given(SOME_TEXT)
def test_a_text_is_its_own_copy_unless_empty(a):
    assert text_similarity([a], [a])[0] == (1.0 if fold_texts([a])[0] else 0.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), SOME_TEXT), max_size=30), st.sampled_from([0.3, 0.5, 0.8, 1.0]))
def test_any_list_gives_sorted_verified_pairs(texts, threshold):
    pairs = near_duplicates(texts, threshold)
    assert list(pairs.columns) == ["i", "j", "similarity"]
    assert (pairs.i < pairs.j).all() and not pairs.duplicated(["i", "j"]).any()
    assert ((pairs.similarity >= threshold) & (pairs.similarity <= 1)).all()
    equal = {
        (i, j)
        for i in range(len(texts))
        for j in range(i + 1, len(texts))
        if texts[i] and fold_texts([texts[i]])[0] and texts[i] == texts[j]
    }
    assert equal <= set(zip(pairs.i, pairs.j, strict=True))


def test_result_does_not_depend_on_the_run():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdef "), 50)) for _ in range(300)]
    texts += [text[:20] + "x" + text[21:] for text in texts]
    first = near_duplicates(texts)
    pd.testing.assert_frame_equal(first, near_duplicates(pd.Series(texts, index=range(9, 609))))
    assert {(i, i + 300) for i in range(300)} <= set(zip(first.i, first.j, strict=True))


@pytest.mark.parametrize("gone", [None, float("nan"), pd.NA, "", "   "])
def test_missing_and_empty_are_never_duplicates(gone):
    assert near_duplicates([gone, gone, "a text", gone]).empty


def test_one_very_long_text_among_short_ones():
    long = "the quick brown fox jumps over the lazy dog " * 3000
    pairs = near_duplicates(["short", long, "another short one", long + " again", "shortt"])
    assert (1, 3) in set(zip(pairs.i, pairs.j, strict=True))


@pytest.mark.parametrize(
    "bad, error, words",
    [
        (["a", 1], TypeError, r"texts\[1\] is a int"),
        (["a", b"b"], TypeError, r"texts\[1\] is a bytes"),
        ("abc", TypeError, "one string"),
    ],
)
def test_bad_texts_are_named(bad, error, words):
    with pytest.raises(error, match=words):
        near_duplicates(bad)


@pytest.mark.parametrize("threshold", [0, -1, 1.01, float("nan")])
def test_bad_thresholds_are_refused(threshold):
    with pytest.raises(ValueError, match="threshold"):
        near_duplicates(["a"], threshold)


def test_too_many_pairs_are_an_error_that_names_the_text():
    with pytest.raises(ValueError, match="position 1 alone is there 6,000 times"):
        near_duplicates(["other", *["same"] * 6000])


def test_groups_keep_the_first_of_each_chain():
    pairs = pd.DataFrame({"i": [3, 5, 0], "j": [5, 9, 1], "similarity": [0.9, 0.9, 1.0]})
    assert duplicate_groups(pairs).set_index("position").keep.to_dict() == {0: 0, 1: 0, 3: 3, 5: 3, 9: 3}
    assert duplicate_groups(pairs.head(0)).empty


@pytest.mark.parametrize(
    "one, other",
    [
        ("hello world again", "hello world agian"),
        ("hello world again", "helo wrold again"),
        ("quick brown foxes run", "quick brwon foxs run"),
        ("这家酒店的服务真的非常好", "这家酒店的务服真的非常好"),
        ("please call me tonight", "please call tonight"),
        ("materialized while records", "while materialized records"),
        ("表现触动激活在市求不子还", "触动表现激活在市求不子还"),
        ("了电编辑谢当装的不到的结", "了电编辑当装谢的不到的结"),
    ],
)
def test_slips_in_short_texts_are_found(one, other):
    assert near_duplicates([one, other])[["i", "j"]].to_numpy().tolist() == [[0, 1]]


@pytest.mark.parametrize(
    "one, other",
    [
        ("order 123 was shipped", "order 124 was shipped"),
        ("订单12345已经发货请查收", "订单12945已经发货请查收"),
        ("I love horror movies", "for a horror movie, I"),
        ("flight from Berlin to Oslo", "flight from Madrid to Oslo"),
    ],
)
def test_other_numbers_and_other_words_are_not_copies(one, other):
    assert near_duplicates([one, other]).empty


def test_every_score_is_the_one_of_text_similarity_where_nothing_is_a_template():
    rng = np.random.default_rng(1)
    words = ["".join(rng.choice(list("abcdefgh"), size)) for size in rng.integers(3, 9, 4000)]
    texts = [" ".join(words[at : at + 4]) for at in range(0, 4000, 4)]
    copies = [
        text[:at] + text[at + 1] + text[at] + text[at + 2 :]
        for text, at in zip(texts, rng.integers(0, 10, len(texts)), strict=True)
    ]
    pairs = near_duplicates(texts + copies)
    again = text_similarity([(texts + copies)[i] for i in pairs.i], [(texts + copies)[j] for j in pairs.j])
    assert np.allclose(again, pairs.similarity)
    found = set(zip(pairs.i, pairs.j, strict=True))
    assert sum((i, i + 1000) in found for i in range(1000)) >= 980


def _words(rng, count, low, high):
    return list({"".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(low, high))) for _ in range(count)})


def _slip(text, rng):
    at = int(rng.integers(1, len(text) - 1))
    return text[:at] + "abcdefgh"[int(rng.integers(8))] + text[at + int(rng.integers(2)) :]


def _measured(texts, origin, pairs):
    found = set(zip(pairs.i, pairs.j, strict=True))
    right = sum(origin.get(j) == i for i, j in found)
    return right / len(origin), right / max(1, len(found))


@pytest.mark.parametrize("seed", range(3))
def test_copies_are_told_from_other_texts_of_their_template(seed):
    rng = np.random.default_rng(seed)
    names, things, towns = (_words(rng, n, 4, 9) for n in (400, 100, 40))
    texts = list(
        {
            f"{rng.choice(names)} bought a {rng.choice(things)} in {rng.choice(towns)} last week and liked it very much"
            for _ in range(3000)
        }
    )
    origin = {len(texts) + k: k for k in range(200)}
    texts += [_slip(_slip(texts[k], rng), rng) for k in range(200)]
    recall, precision = _measured(texts, origin, near_duplicates(texts))
    assert recall >= 0.95 and precision >= 0.95


@pytest.mark.parametrize("share", [0.03, 0.1])
def test_long_texts_with_many_slips_are_found(share):
    rng = np.random.default_rng(3)
    words = _words(rng, 2000, 2, 9)
    texts = [" ".join(rng.choice(words, 200)) for _ in range(60)]
    origin = {60 + k: k for k in range(20)}
    for k in range(20):
        copy = texts[k]
        for _ in range(int(share * len(copy))):
            copy = _slip(copy, rng)
        texts.append(copy)
    assert _measured(texts, origin, near_duplicates(texts)) == (1.0, 1.0)


def test_words_in_any_order_are_found_among_texts_of_the_same_few_words():
    rng = np.random.default_rng(4)
    words = _words(rng, 200, 3, 5)
    texts = list({" ".join(rng.choice(words, 6, replace=False)) for _ in range(5000)})
    origin = {len(texts) + k: k for k in range(200)}
    texts += [" ".join(rng.permutation(texts[k].split())) for k in range(200)]
    recall, precision = _measured(texts, origin, near_duplicates(texts))
    assert recall >= 0.98 and precision >= 0.98


def test_equal_texts_in_two_groups_give_every_pair_once():
    one, two = "the food was good and cheap", "the food was god and cheap"
    texts = [one, two, one, "something else", two, two]
    pairs = near_duplicates(texts)
    group = [0, 1, 2, 4, 5]
    assert pairs[["i", "j"]].to_numpy().tolist() == [[i, j] for i in group for j in group if i < j]
    equal = [texts[i] == texts[j] for i, j in zip(pairs.i, pairs.j, strict=True)]
    assert (pairs.similarity[equal] == 1).all() and pairs.similarity[~np.array(equal)].nunique() == 1


def test_folding_is_the_same_for_a_text_alone_and_among_others():
    texts = ["A_b  c!", "Ｃａｆé", "", "!!", "北京 好", "x\0y", "\t", "naïve Ünïcode"]
    assert fold_texts(texts) == [fold_texts([text])[0] for text in texts]
    assert fold_texts(["A_b  c!", "x\0y", "!!"]) == ["a b c", "x y", "!!"]
