"""Our backpropagation, layers, losses, optimisers against torch on random shapes, and against what theory promises."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigmodel_nb.training import backprop as ag
from bigmodel_nb.training import network as nw
from bigmodel_nb.training import optimizers as op
from bigmodel_nb.training.backprop import Tensor, check_gradients, gradients

MANY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SOME = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SEED = st.integers(0, 2**31)
DIM = st.integers(1, 4)
CLOSE = {"rtol": 1e-9, "atol": 1e-10}
TORCH_BENDS = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
BINARY = {
    "add": (ag.add, torch.add),
    "multiply": (ag.multiply, torch.mul),
    "subtract": (lambda a, b: a - b, torch.sub),
    "divide": (lambda a, b: a / (b * b + 1.0), lambda a, b: a / (b * b + 1)),
}
UNARY = {
    "exp": (ag.exp, torch.exp),
    "log": (lambda x: ag.log(x * x + 0.5), lambda x: (x * x + 0.5).log()),
    "power": (lambda x: (x * x + 0.5) ** -1.5, lambda x: (x * x + 0.5) ** -1.5),
    "negated": (lambda x: 1.0 - (-x) / 2.0, lambda x: 1.0 + x / 2.0),
    "softmax": (nw.softmax, lambda x: torch.softmax(x, -1)),
    "log_softmax": (nw.log_softmax, lambda x: torch.log_softmax(x, -1)),
    **{name: (nw.ACTIVATIONS[name], theirs) for name, theirs in TORCH_BENDS.items()},
}


def agree(ours, theirs, *arrays):
    "Value and every gradient of a scalar made from the result with random weights."
    mine = [Tensor(a, requires_grad=True) for a in arrays]
    reference = [torch.tensor(a, requires_grad=True) for a in arrays]
    out, expected = ours(*mine), theirs(*reference)
    np.testing.assert_allclose(out.data, expected.detach().numpy(), **CLOSE)
    weight = np.random.default_rng(0).normal(size=out.shape)
    (expected * torch.tensor(weight)).sum().backward()
    for g, t in zip(gradients(ag.sum_of(out * weight), *mine), reference, strict=True):
        assert g.shape == tuple(t.shape)
        np.testing.assert_allclose(g, t.grad.numpy(), **CLOSE)


@st.composite
def broadcastable(draw):
    "Two shapes that broadcast: equal dimensions, ones, and missing leading ones."
    full = draw(st.lists(DIM, min_size=1, max_size=4))
    shapes = []
    for _ in range(2):
        ones = draw(st.lists(st.booleans(), min_size=len(full), max_size=len(full)))
        shape = [1 if one else n for n, one in zip(full, ones, strict=True)]
        shapes.append(tuple(shape[draw(st.integers(0, len(full))) :]))
    return shapes


@MANY
@given(shapes=broadcastable(), name=st.sampled_from(sorted(BINARY)), seed=SEED)
def test_binary_operations_broadcast_as_torch(shapes, name, seed):
    rng = np.random.default_rng(seed)
    agree(*BINARY[name], *(rng.normal(size=s) for s in shapes))


@MANY
@given(shape=st.lists(DIM, min_size=1, max_size=4), name=st.sampled_from(sorted(UNARY)), seed=SEED)
def test_unary_operations_as_torch(shape, name, seed):
    agree(*UNARY[name], np.random.default_rng(seed).normal(size=shape) * 3)


@MANY
@given(shape=st.lists(DIM, min_size=1, max_size=4), keep=st.booleans(), ties=st.booleans(), seed=SEED, data=st.data())
def test_sums_means_and_maxima_as_torch(shape, keep, ties, seed, data):
    axis = data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1).map(lambda s: tuple(sorted(s))))
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 3, shape).astype(float) if ties else rng.normal(size=shape)
    agree(lambda t: ag.sum_of(t, axis, keep), lambda t: t.sum(axis, keep), x)
    agree(lambda t: ag.mean_of(t, axis, keep), lambda t: t.mean(axis, keep), x)
    agree(lambda t: ag.max_of(t, axis, keep), lambda t: t.amax(axis, keep), x)
    agree(lambda t: ag.sum_of(t) + ag.mean_of(t) + ag.max_of(t), lambda t: t.sum() + t.mean() + t.amax(), x)


@MANY
@given(lead=broadcastable(), n=DIM, k=DIM, m=DIM, seed=SEED)
def test_batched_matrix_product_as_torch(lead, n, k, m, seed):
    rng = np.random.default_rng(seed)
    agree(ag.matmul, torch.matmul, rng.normal(size=(*lead[0], n, k)), rng.normal(size=(*lead[1], k, m)))


@MANY
@given(shape=st.lists(DIM, min_size=2, max_size=4), seed=SEED)
def test_moving_and_picking_as_torch(shape, seed):
    rng = np.random.default_rng(seed)
    x, axes = rng.normal(size=shape), tuple(int(i) for i in rng.permutation(len(shape)))
    rows = rng.integers(0, shape[0], 5)
    agree(lambda t: ag.transpose(t, axes), lambda t: t.permute(axes), x)
    agree(lambda t: ag.transpose(t), lambda t: t.permute(tuple(range(len(shape)))[::-1]), x)
    agree(lambda t: ag.reshape(t, (-1,)), lambda t: t.reshape(-1), x)
    agree(lambda t: t[rows] * t[rows, ..., :1], lambda t: t[rows] * t[rows, ..., :1], x)


@SOME
@given(seed=SEED, n=DIM, m=DIM)
def test_central_differences_agree_and_convict(seed, n, m):
    x = np.random.default_rng(seed).normal(size=(n, m))
    assert check_gradients(lambda t: ag.sum_of(ag.tanh(t) * t * ag.sigmoid(t)), x) < 1e-6
    with pytest.raises(ValueError, match="input 0"):
        check_gradients(lambda t: ag.sum_of(Tensor(np.sin(t.data), edges=[(t, lambda g: 1.01 * g * np.cos(t.data))])), x)


def test_gradients_add_over_uses_and_calls_and_never_alias():
    x, y = (Tensor(np.ones(3), requires_grad=True) for _ in range(2))
    ag.sum_of((x + y) * np.arange(3.0)).backward()
    x.grad[:] = 7
    np.testing.assert_array_equal(y.grad, np.arange(3.0))
    for _ in range(2):
        (ag.sum_of(x + y) + ag.sum_of(x)).backward()
    np.testing.assert_array_equal(x.grad, np.full(3, 7 + 4.0))
    np.testing.assert_array_equal(y.grad, np.arange(3.0) + 2)


def test_tape_is_long_lean_and_optional():
    leaf = Tensor(np.ones(2), requires_grad=True)
    deep = leaf
    for _ in range(5000):
        deep = deep + 0.0
    np.testing.assert_array_equal(gradients(ag.sum_of(deep), leaf)[0], np.ones(2))
    assert not (Tensor(np.ones(2)) * 3).edges
    with pytest.raises(RuntimeError), ag.no_tape():
        raise RuntimeError
    assert (leaf * 1).edges, "the tape runs again after an error under no_tape"


# --- networks -------------------------------------------------------------------------------------------------------

NETS = {
    "sizes": st.lists(st.integers(1, 9), min_size=2, max_size=5),
    "activation": st.sampled_from(sorted(nw.ACTIVATIONS)),
    "norm": st.booleans(),
    "start": st.sampled_from([nw.kaiming, nw.xavier]),
    "rows": st.integers(1, 8),
    "loss": st.sampled_from(["cross_entropy", "mse", "binary_cross_entropy"]),
    "seed": SEED,
}


def twin(network):
    "The same layers in torch, holding copies of the same numbers."
    layers = []
    for layer in network.layers:
        if isinstance(layer, nw.Linear):
            theirs = torch.nn.Linear(*layer.weight.shape, dtype=torch.float64)
            theirs.weight.data = torch.tensor(layer.weight.data.T.copy())
            theirs.bias.data = torch.tensor(layer.bias.data)
        elif isinstance(layer, nw.LayerNorm):
            theirs = torch.nn.LayerNorm(layer.scale.shape, eps=layer.eps, dtype=torch.float64)
        else:
            name = next(k for k, v in nw.ACTIVATIONS.items() if v is layer.bend)
            theirs = {"relu": torch.nn.ReLU, "gelu": torch.nn.GELU, "tanh": torch.nn.Tanh, "sigmoid": torch.nn.Sigmoid}[name]()
        layers.append(theirs)
    return torch.nn.Sequential(*layers)


def problem(sizes, activation, norm, start, rows, loss, seed):
    "A random network, its twin, and both losses as functions of nothing."
    rng = np.random.default_rng(seed)
    ours = nw.multilayer(sizes, activation, norm=norm, seed=seed, start=start)
    theirs, x = twin(ours), rng.normal(size=(rows, sizes[0]))
    target = rng.integers(0, sizes[-1], rows) if loss == "cross_entropy" else rng.integers(0, 2, (rows, sizes[-1])) * 1.0
    functional = torch.nn.functional
    reference = {
        "cross_entropy": functional.cross_entropy,
        "mse": functional.mse_loss,
        "binary_cross_entropy": functional.binary_cross_entropy_with_logits,
    }[loss]
    return (
        ours,
        theirs,
        lambda: getattr(nw, loss)(ours(Tensor(x)), target),
        lambda: reference(theirs(torch.tensor(x)), torch.tensor(target)),
    )


def same_shape(parameter, theirs):
    "A torch array in our orientation: weights of a linear layer are transposed."
    return theirs.T if parameter.data.ndim == 2 else theirs


@MANY
@given(**NETS)
def test_networks_as_torch_forward_and_every_gradient(**choice):
    ours, theirs, loss, reference = problem(**choice)
    value, expected = loss(), reference()
    np.testing.assert_allclose(value.data, expected.item(), **CLOSE)
    value.backward()
    expected.backward()
    for p, t in zip(ours.parameters(), theirs.parameters(), strict=True):
        np.testing.assert_allclose(p.grad, same_shape(p, t.grad.numpy()), **CLOSE)


POSITIVE = st.floats(1e-3, 0.3)
SHARE = st.floats(0.1, 0.99)
CHOICES = st.one_of(
    st.fixed_dictionaries({"kind": st.just("SGD"), "lr": POSITIVE, "weight_decay": st.floats(0, 0.3)}),
    st.fixed_dictionaries(
        {"kind": st.just("SGD"), "lr": POSITIVE, "momentum": SHARE, "nesterov": st.booleans(), "weight_decay": st.floats(0, 0.3)}
    ),
    st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["Adam", "AdamW"]),
            "lr": POSITIVE,
            "betas": st.tuples(SHARE, SHARE),
            "eps": st.floats(1e-8, 1e-3),
            "weight_decay": st.floats(0, 0.3),
        }
    ),
)
CLIPS = st.one_of(st.none(), st.tuples(st.sampled_from(["norm", "value"]), st.floats(1e-3, 2)))


@MANY
@given(optimizer=CHOICES, clip=CLIPS, cosine=st.booleans(), **NETS)
def test_ten_optimiser_steps_as_torch(optimizer, clip, cosine, **choice):
    ours, theirs, loss, reference = problem(**choice)
    options = {k: v for k, v in optimizer.items() if k != "kind"}
    mine = getattr(op, optimizer["kind"])(ours.parameters(), **options)
    their = getattr(torch.optim, optimizer["kind"])(theirs.parameters(), **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        their, lambda t: (op.warmup_cosine(t, 10, 1.0, 3) if cosine else op.inverse_time(t, 1.0, 0.1))
    )
    for t in range(10):
        for p in ours.parameters():
            p.grad = None
        their.zero_grad()
        value, expected = loss(), reference()
        value.backward()
        expected.backward()
        if clip and clip[0] == "norm":
            before = op.clip_norm(ours.parameters(), clip[1])
            expected_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip[1])
            assert math.isclose(before, expected_norm.item(), rel_tol=1e-6, abs_tol=1e-8)
        elif clip:
            op.clip_value(ours.parameters(), clip[1])
            torch.nn.utils.clip_grad_value_(theirs.parameters(), clip[1])
        mine.lr = options["lr"] * (op.warmup_cosine(t, 10, 1.0, 3) if cosine else op.inverse_time(t, 1.0, 0.1))
        mine.step()
        their.step()
        schedule.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            np.testing.assert_allclose(p.data, same_shape(p, q.detach().numpy()), rtol=1e-6, atol=1e-6)


@SOME
@given(kind=st.sampled_from(["SGD", "Adam", "AdamW"]), seed=SEED)
def test_a_parameter_without_gradient_rests_as_in_torch(kind, seed):
    rng = np.random.default_rng(seed)
    start = [rng.normal(size=3), rng.normal(size=2)]
    ours, theirs = [Tensor(a, requires_grad=True) for a in start], [torch.tensor(a, requires_grad=True) for a in start]
    mine, their = getattr(op, kind)(ours, 0.1, weight_decay=0.1), getattr(torch.optim, kind)(theirs, lr=0.1, weight_decay=0.1)
    for t in range(6):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            g = rng.normal(size=p.shape) if (t + i) % 2 else None
            p.grad, q.grad = g, None if g is None else torch.tensor(g)
        mine.step()
        their.step()
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(p.data, q.detach().numpy(), **CLOSE)


@MANY
@given(share=st.floats(0, 0.9), rows=DIM, n=DIM, seed=SEED)
def test_dropout_keeps_scales_and_repeats(share, rows, n, seed):
    x = Tensor(np.random.default_rng(seed).normal(size=(rows, n)) + 9, requires_grad=True)
    drop = nw.Dropout(share)
    once, again = (drop(x, np.random.default_rng(seed)) for _ in range(2))
    np.testing.assert_array_equal(once.data, again.data)
    kept = once.data != 0
    np.testing.assert_allclose(once.data[kept], (x.data / (1 - share))[kept])
    np.testing.assert_allclose(gradients(ag.sum_of(once * 2.0), x)[0], kept * 2.0 / (1 - share))
    np.testing.assert_array_equal(drop(x).data, x.data)


@SOME
@given(n_in=st.integers(1, 300), n_out=st.integers(1, 300), seed=SEED)
def test_starts_have_their_variance(n_in, n_out, seed):
    for start, variance in ((nw.kaiming, 2 / n_in), (nw.xavier, 2 / (n_in + n_out))):
        drawn = start(n_in, n_out, np.random.default_rng(seed))
        assert drawn.shape == (n_in, n_out)
        spread = 6 * math.sqrt(2 / drawn.size)  # six standard errors of a mean of squares of normals
        assert abs((drawn**2).mean() / variance - 1) < spread + 18 / drawn.size


@SOME
@given(rows=st.integers(1, 50), size=st.integers(1, 20), seed=SEED)
def test_every_row_once_an_epoch(rows, size, seed):
    batches = list(nw.minibatches(rows, size, np.random.default_rng(seed)))
    assert sorted(np.concatenate(batches)) == list(range(rows))
    assert [len(b) for b in batches[:-1]] == [size] * (len(batches) - 1) and 1 <= len(batches[-1]) <= size


# --- what theory promises -------------------------------------------------------------------------------------------


@MANY
@given(
    h=st.floats(0.1, 10),
    lr=st.floats(0.001, 0.3),
    momentum=st.one_of(st.just(0.0), st.floats(0.05, 0.95)),
    nesterov=st.booleans(),
    steps=st.integers(1, 40),
)
def test_descent_on_a_bowl_is_a_power_of_a_matrix(h, lr, momentum, nesterov, steps):
    nesterov = nesterov and momentum > 0
    w = Tensor([1.0], requires_grad=True)
    ball = op.SGD([w], lr, momentum, nesterov)
    for _ in range(steps):
        w.grad = h * w.data
        ball.step()
    keep = momentum * (momentum if nesterov else 1)
    matrix = np.array([[1 - lr * h * (1 + momentum * nesterov), -lr * keep], [h, momentum]])
    exact = (np.linalg.matrix_power(matrix, steps) @ [1.0, 0.0])[0]
    size = max(1.0, np.linalg.norm(matrix, 2)) ** steps
    np.testing.assert_allclose(w.data[0], exact, rtol=1e-8, atol=1e-12 * size)
    assert math.isclose(op.contraction([h], lr, momentum, nesterov), np.abs(np.linalg.eigvals(matrix)).max())


@MANY
@given(flat=st.floats(1e-3, 1), ratio=st.floats(1, 1e4), seed=SEED)
def test_polyak_settings_cannot_be_bettered(flat, ratio, seed):
    ends = [flat, flat * ratio]
    lr, momentum = op.best_momentum(*ends)
    best = op.contraction(ends, lr, momentum)
    np.testing.assert_allclose(best, (math.sqrt(ratio) - 1) / (math.sqrt(ratio) + 1), atol=1e-5)
    rng = np.random.default_rng(seed)
    other = op.contraction(ends, lr * rng.uniform(0.5, 1.5), rng.uniform(0, 0.999))
    assert other >= best - 1e-5


@SOME
@given(scale=st.floats(-6, 6), seed=SEED)
def test_adam_does_not_see_units(scale, seed):
    rng = np.random.default_rng(seed)
    pulls = rng.normal(size=(10, 4))
    ends = []
    for factor in (1.0, 10.0**scale):
        w = Tensor(np.zeros(4), requires_grad=True)
        adam = op.Adam([w], 0.1, eps=1e-30)
        for g in pulls:
            w.grad = g * factor
            adam.step()
        ends.append(w.data)
    np.testing.assert_allclose(*ends, rtol=1e-9)


@MANY
@given(total=st.integers(2, 60), share=st.floats(0, 0.9), lr=st.floats(1e-3, 1), floor=st.floats(0, 1e-3), decay=st.floats(0, 2))
def test_schedules_as_torch_and_as_defined(total, share, lr, floor, decay):
    warmup = int(share * total)
    dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(dummy, T_max=total - warmup, eta_min=floor)
    for t in range(total - warmup):
        np.testing.assert_allclose(op.warmup_cosine(warmup + t, total, lr, warmup, floor), cosine.get_last_lr()[0], atol=1e-9)
        dummy.step()
        cosine.step()
    for t in range(warmup):
        np.testing.assert_allclose(op.warmup_cosine(t, total, lr, warmup, floor) * warmup, lr * t)
    assert op.inverse_time(0, lr, decay) == lr
    gaps = np.diff([1 / op.inverse_time(t, lr, decay) for t in range(total)])
    np.testing.assert_allclose(gaps, decay / lr, rtol=1e-6, atol=1e-9)


# --- errors ---------------------------------------------------------------------------------------------------------

PLAIN = nw.multilayer([2, 2])


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: Tensor(np.ones((2, 3))) * np.ones((3, 2)), ValueError, r"multiply: shapes \(2, 3\) and \(3, 2\)"),
        (lambda: Tensor(np.ones((2, 3))) @ np.ones(3), ValueError, r"matmul: \(2, 3\) @ \(3,\)"),
        (lambda: Tensor(np.ones((2, 1, 3))) @ np.ones((4, 3, 2)) @ np.ones((3, 2, 1)), ValueError, "leading dimensions"),
        (lambda: Tensor(np.ones(2), requires_grad=True).backward(), ValueError, r"one number, not from shape \(2,\)"),
        (lambda: nw.mse(Tensor(np.ones((3, 1))), np.ones(3)), ValueError, r"\(3, 1\), target \(3,\)"),
        (lambda: nw.cross_entropy(Tensor(np.ones((2, 3))), np.array([0, 3])), ValueError, "label 3 in row 1"),
        (lambda: nw.cross_entropy(Tensor(np.ones((2, 3))), np.array([0.0, 1.0])), ValueError, "whole-number labels"),
        (lambda: nw.train_network(PLAIN, np.ones((0, 2)), np.ones(0, int), print), ValueError, "nothing to train"),
        (lambda: nw.train_network(PLAIN, np.ones((3, 2)), np.ones(2, int), print), ValueError, "3 rows but 2"),
        (lambda: op.warmup_cosine(-1, 10, 0.1), ValueError, "step >= 0"),
        (lambda: op.Adam([Tensor([1.0])], betas=(1.0, 0.9)), ValueError, "betas"),
        (lambda: op.clip_value([], 0.0), ValueError, "above 0"),
    ],
)
def test_bad_input_is_named(call, kind, says):
    with pytest.raises(kind, match=says):
        call()


def test_an_exploding_run_stops_and_names_the_batch():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 5)) * 1e3, rng.normal(size=(64, 1))
    network = nw.multilayer([5, 8, 1], seed=0)
    optimizer = op.SGD(network.parameters(), lr=1.0)
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match=r"epoch \d+, batch \d+.*lower the learning rate"):
        nw.train_network(network, x, y, optimizer.step, loss=nw.mse, epochs=50, batch_size=16)
