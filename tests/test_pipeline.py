"""Pipeline schedules by property, and real processes against one."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bigmodel_nb.training.pipeline import (
    Slot,
    bubble,
    cut,
    expected_bubble,
    gpipe,
    in_flight,
    one_forward_one_backward,
    simulate,
    train_pipeline,
)
from bigmodel_nb.training.ring import launch

sizes = st.integers(1, 6).flatmap(lambda p: st.tuples(st.just(p), st.integers(p, 20)))
times = st.floats(.01, 10)


@given(sizes, times, times)
def test_equal_stages_waste_what_the_formula_says(size, forward, backward):
    p, m = size
    for orders in (gpipe(p, m), one_forward_one_backward(p, m)):
        assert bubble(simulate(orders, forward, backward)) == pytest.approx(expected_bubble(p, m), abs=1e-9)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_interleaving_does_every_piece_once_and_shrinks_the_bubble(p, rounds, v):
    orders = one_forward_one_backward(p, p * rounds, v)
    for device, order in enumerate(orders):
        mine = [device + p * k for k in range(v)]
        assert sorted(order) == sorted(itertools.product("BF", mine, range(p * rounds)))
    assert bubble(simulate(orders)) == pytest.approx(expected_bubble(p, p * rounds, v), abs=1e-9)


@given(sizes)
def test_micro_batches_in_flight(size):
    p, m = size
    assert in_flight(simulate(gpipe(p, m))) == [m] * p
    assert in_flight(simulate(one_forward_one_backward(p, m))) == [p - s for s in range(p)]


@given(sizes, st.data())
def test_unequal_stages_obey_order_and_wait_for_the_dearest(size, data):
    p, m = size
    forward, backward = (data.draw(st.lists(times, min_size=p, max_size=p)) for _ in range(2))
    slots = simulate(one_forward_one_backward(p, m), forward, backward)
    ends = {(s.kind, s.stage, s.micro): s.end for s in slots}
    for s in slots:
        before = [("F", s.stage - 1, s.micro)] if s.kind == "F" else [("B", s.stage + 1, s.micro), ("F", s.stage, s.micro)]
        assert all(s.start >= ends[need] for need in before if need in ends)
    for a, b in itertools.pairwise(sorted((s for s in slots if s.device == 0), key=lambda s: s.start)):
        assert b.start >= a.end
    length = max(s.end for s in slots)
    for stage in range(p):  # it works for all micro-batches, and those before it fill and drain the pipe
        ahead = sum(forward[:stage]) + sum(backward[:stage])
        assert length >= m * (forward[stage] + backward[stage]) + ahead - 1e-9


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.data())
def test_cut_is_the_best_there_is(costs, data):
    stages = data.draw(st.integers(1, len(costs)))
    pieces = cut(nn.Sequential(*[nn.Identity() for _ in costs]), stages, costs)
    sums = [sum(costs[int(name)] for name, _ in piece.named_children()) for piece in pieces]
    ways = itertools.combinations(range(1, len(costs)), stages - 1)
    best = min(max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *way, len(costs)))) for way in ways)
    assert max(sums) == best and len(pieces) == stages
    assert [name for piece in pieces for name, _ in piece.named_children()] == [str(k) for k in range(len(costs))]


def test_mistakes_are_named_before_anybody_waits(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    pieces = cut(nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]), 3)
    with pytest.raises(ValueError, match="3 stages for 2 processes"):
        train_pipeline(pieces, [], nn.functional.mse_loss, torch.optim.SGD, 4)
    with pytest.raises(ValueError, match="1 micro-batches cannot fill a pipeline of 2 devices"):
        one_forward_one_backward(2, 1)
    with pytest.raises(ValueError, match="a multiple of 2"):
        one_forward_one_backward(2, 3, chunks=2)


SCRIPT = """
import copy, sys, torch
from torch import nn
from bigmodel_nb.training.pipeline import cut, train_pipeline
from bigmodel_nb.training.ring import answer, worker

given, out = torch.load(sys.argv[1], weights_only=False), []
with worker() as link:
    for model, batches, micro, schedule, stages in given:
        pieces = cut(model, stages)
        run = train_pipeline(pieces, batches, nn.functional.mse_loss, lambda w: torch.optim.SGD(w, .05), micro, schedule)
        out.append([run.losses, run.weights, [[list(s) for s in step] for step in run.slots]])
    answer(out)
"""


def test_two_processes_train_like_one(tmp_path):
    "Random widths, depths and micro-batches; 50 steps; all schedules."
    (tmp_path / "run.py").write_text(SCRIPT)
    rng, cases = torch.Generator().manual_seed(0), []
    for micro, schedule, stages in ((2, "gpipe", 2), (3, "1f1b", 2), (4, "1f1b", 4)):
        width, depth = (int(torch.randint(2, 9, (), generator=rng)) for _ in range(2))
        torch.manual_seed(width)
        blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth + 2)]
        model, n = nn.Sequential(nn.Linear(5, width), *blocks, nn.Linear(width, 1)), 2 * micro
        batches = [(torch.randn(n, 5, generator=rng), torch.randn(n, 1, generator=rng)) for _ in range(50)]
        cases.append((model, batches, micro, schedule, stages))
    torch.save(cases, tmp_path / "given.pt")
    answers = launch(tmp_path / "run.py", 2, tmp_path / "given.pt", timeout=200)
    for k, (model, batches, micro, schedule, stages) in enumerate(cases):
        one, losses = copy.deepcopy(model), []
        optimizer = torch.optim.SGD(one.parameters(), .05)
        for x, y in batches:
            loss = nn.functional.mse_loss(one(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        weights = {name: w for answer in answers for name, w in answer[k][1].items()}
        assert weights.keys() == one.state_dict().keys()
        assert max((weights[name] - w).abs().max() for name, w in one.state_dict().items()) < 1e-5
        assert answers[1][k][0] == pytest.approx(losses, abs=1e-5) and answers[0][k][0] == []
        orders = gpipe(2, micro) if schedule == "gpipe" else one_forward_one_backward(2, micro, stages // 2)
        for step in (0, 49):
            slots = [Slot(*s) for answer in answers for s in answer[k][2][step]]
            assert len(slots) == 2 * micro * stages
            for device, order in enumerate(orders):
                real = sorted((s for s in slots if s.device == device), key=lambda s: s.start)
                if stages == 2:  # PyTorch's interleaving may warm up in another order
                    assert [(s.kind, s.stage, s.micro) for s in real] == order


@settings(max_examples=20)
@given(st.integers(1, 5))
def test_an_order_that_waits_for_itself_is_named(p):
    with pytest.raises(ValueError, match="deadlock: device 0"):
        simulate([[("B", s, 0), ("F", s, 0)] for s in range(p)])
