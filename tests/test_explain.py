"""Explanations: exact sums, completeness, areas and planted parts, over random shapes."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bigmodel_nb.training import attribution as at
from bigmodel_nb.training.explain import deletion_test, exact_shapley, shap_values

torch.set_num_threads(1)
QUICK = settings(max_examples=20, deadline=None, derandomize=True)


def network(m: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(m, 8), nn.Tanh(), nn.Linear(8, 1)).eval()


def example(m: int, b: int, seed: int) -> at.Example:
    rng = np.random.default_rng(seed)
    return at.row_example(network(m, seed), rng.normal(size=m), rng.normal(size=(b, m)), [f"c{i}" for i in range(m)])


@QUICK
@given(m=st.integers(1, 6), b=st.integers(1, 5), seed=st.integers(0, 99))
def test_values_add_up(m, b, seed):
    e = example(m, b, seed)
    gained = float(np.diff(e.score([[0]*m, [1]*m]))[0])
    np.testing.assert_allclose(at.shapley(e, seed).sum(), gained, atol=1e-5)
    with torch.no_grad():
        ends = e.model(torch.stack([e.background.mean(0), e.inputs]))
    np.testing.assert_allclose(at.integrated_gradients(e).sum(), float(ends[1] - ends[0]), atol=1e-3)


@QUICK
@given(m=st.integers(1, 6), b=st.integers(1, 4), seed=st.integers(0, 99))
def test_all_methods_agree_on_a_line(m, b, seed):
    rng = np.random.default_rng(seed)
    w, x, back = rng.normal(size=m), rng.normal(size=m), rng.normal(size=(b, m))
    e = at.Example([str(i) for i in range(m)], torch.tensor(x), torch.tensor(back), lambda t: t @ torch.tensor(w))
    truth = w*(x - back.mean(0))
    for method in (at.shapley, at.integrated_gradients, at.gradient_input, at.occlusion):
        np.testing.assert_allclose(method(e, seed), truth, atol=1e-9)
    np.testing.assert_allclose(exact_shapley(lambda r: r @ w, x, back), truth, atol=1e-9)


@QUICK
@given(m=st.integers(2, 6), seed=st.integers(0, 99))
def test_shapley_of_sets_is_shapley_of_rows(m, seed):
    e = example(m, 3, seed)
    def score(rows):
        with torch.no_grad():
            return e.model(torch.tensor(rows)).numpy()
    truth = exact_shapley(score, e.inputs.numpy(), e.background.numpy())
    close = at.shapley(e, seed, rounds=40)
    assert np.abs(close - truth).max() < .02


@QUICK
@given(m=st.integers(1, 7), r=st.integers(1, 4), seed=st.integers(0, 99))
def test_insertion_is_the_reverse_of_deletion(m, r, seed):
    e, rng = example(m, 2, seed), np.random.default_rng(seed)
    orders = np.array([rng.permutation(m) for _ in range(r)])
    _, curves = at._areas(e, orders)
    np.testing.assert_array_equal(curves[:, 0], e.score(np.ones((r, m))))
    for j in range(m + 1):
        keep = np.array([[i not in order[:j] for i in range(m)] for order in orders])
        np.testing.assert_allclose(curves[:, j], e.score(keep), atol=1e-6)
    np.testing.assert_allclose(at._areas(e, orders[:, ::-1])[1][:, -1], curves[:, -1], atol=1e-6)


@QUICK
@given(m=st.integers(2, 9), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_tokens_of_any_width(m, width, seed):
    torch.manual_seed(seed)
    embed, out = nn.Embedding(12, width), nn.Linear(width, 1)
    ids = torch.randint(0, 11, (m,)).tolist()
    e = at.token_example(lambda v: out(v.mean(1))[:, 0], embed, ids, [str(i) for i in ids], 11)
    for method in at.METHODS.values():
        values = method(e, seed)
        assert values.shape == (m,) and np.isfinite(values).all()
    assert e.score(np.ones((1, m)))[0] >= .5


def test_a_planted_column_is_found_and_its_control_is_not():
    rng, names = np.random.default_rng(0), ["a", "b", "c", "d", "cue"]
    cue, control = np.array([.1, .1, .1, .1, 4]), np.array([1, 1, 1, 1, 0.])
    found = {}
    for name, w in (("cue", cue), ("control", control)):
        def risk(r, w=w):
            return 1/(1 + np.exp(-np.abs(r) @ w + 1))
        rows = [at.row_example(risk, np.sign(rng.normal(size=5)), np.zeros((1, 5)), names) for _ in range(20)]
        values, cost = at.explain_all(rows, {"SHAP": at.shapley, "LIME": at.lime, "occlusion": at.occlusion})
        found[name] = {k: at.found_first(rows, v, "cue").value for k, v in values.items()}
        assert all(seconds > 0 for seconds in cost.values())
    assert min(found["cue"].values()) == 1 and max(found["control"].values()) == 0


def test_faithful_passes_and_random_and_reversed_fail():
    rows = [example(6, 3, seed) for seed in range(25)]
    values = [at.shapley(e) for e in rows]
    rng = np.random.default_rng(0)
    others = {"reversed": [-v for v in values], "random": [rng.normal(size=6) for _ in rows]}
    table = at.faithfulness(rows, {"shap": values} | others)
    assert table.faithful["shap"] and not table.faithful["reversed"] and not table.faithful["random"]
    assert table.loc["reversed", "deletion_high"] < 0 and table.loc["reversed", "reverse_high"] < 0


def test_randomise_keeps_numbers_and_changes_explanations():
    net = network(6, 0)
    other = at.randomise(net, 1)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        np.testing.assert_array_equal(np.sort(a.detach().ravel()), np.sort(b.detach().ravel()))
    rng = np.random.default_rng(0)
    x, back = rng.normal(size=(30, 6)), rng.normal(size=(4, 6))
    def told(model):
        return [at.occlusion(at.row_example(model, row, back, list("abcdef"))) for row in x]
    assert at.rank_agreement(told(net), told(net)).value == pytest.approx(1)
    assert at.rank_agreement(told(net), told(other)).value < .9


@QUICK
@given(m=st.integers(1, 5), k=st.integers(1, 6), n=st.integers(6, 30), seed=st.integers(0, 99))
def test_neighbours_keep_what_is_kept_and_are_nearest(m, k, n, seed):
    rng = np.random.default_rng(seed)
    x, reference = rng.normal(size=m), rng.normal(size=(n, m))
    keep = rng.random((7, m)) < .5
    rows = at.neighbour_fill(x, reference, k)(keep).numpy()
    assert rows.shape == (7, k, m)
    for mask, filled in zip(keep, rows, strict=True):
        np.testing.assert_allclose(filled[:, mask], np.broadcast_to(x[mask], (k, mask.sum())), rtol=1e-6)
        away = ((reference - x)**2)[:, mask].sum(1)
        if mask.any() and not mask.all():
            taken = [int(np.argmin(np.abs(reference[:, ~mask] - row[~mask]).sum(1))) for row in filled]
            assert away[taken].max() <= np.sort(away)[k - 1] + 1e-5


@pytest.mark.parametrize("call, words", [
    (lambda e: at.Example(["a"], torch.zeros(2), torch.zeros(1, 2), sum), "1 parts"),
    (lambda e: at.Example(["a", "b"], torch.zeros(2), torch.zeros(2), sum), "one axis more"),
    (lambda e: at.lime(e, samples=2), "several times as many"),
    (lambda e: at.faithfulness([e, e], {"x": [np.zeros(3)]}), "1 explanations for 2 examples"),
    (lambda e: at.found_first([e], [np.zeros(3)], "z"), "no part called 'z'"),
    (lambda e: at.found_first([], [], "z"), "no examples"),
    (lambda e: at.neighbour_fill(np.zeros(2), np.zeros((3, 2)), 4), "choose 1 to 3"),
    (lambda e: at.gradient_input(at.row_example(lambda r: r[:, 0], [0.], [[0.]], ["a"])), "no gradient"),
    (lambda e: deletion_test(lambda r: r[:, 0], np.zeros((2, 3)), np.zeros((2, 2)), np.zeros(3)), "do not belong"),
    (lambda e: shap_values(lambda r: r[:, 0], np.zeros((2, 3)), np.zeros((2, 2))), "background"),
])
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(example(3, 2, 0))


def test_a_coarse_path_is_refused():
    def steep(t):
        return torch.sigmoid(60*(t.sum(1) - 1.1))
    sharp = at.Example(["a", "b"], torch.tensor([1., 1.]), torch.zeros(1, 2), steep)
    with pytest.raises(ArithmeticError, match="raise steps"):
        at.integrated_gradients(sharp, steps=2)
