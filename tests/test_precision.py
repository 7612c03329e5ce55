"""Precision: gradients equal under recomputation and accumulation, formats by their definition, choices that refuse."""
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bigmodel_nb.training import precision as pr
from bigmodel_nb.training.batches import TensorLoader
from bigmodel_nb.training.trainer import Recipe, cross_entropy, train

torch.set_num_threads(1)
QUICK = settings(max_examples=20, deadline=None, derandomize=True)


class Block(nn.Module):
    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2*width), nn.GELU(), nn.Dropout(drop),
                                   nn.Linear(2*width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def tower(features: int, depth: int, drop: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*[Block(features, drop) for _ in range(depth)], nn.Linear(features, 3))


def data(rows: int, features: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=draw), torch.randint(0, 3, (rows,), generator=draw)


@QUICK
@given(rows=st.integers(1, 9), features=st.integers(1, 9), depth=st.integers(1, 3), drop=st.sampled_from([0., .3]),
       seed=st.integers(0, 99))
def test_recomputed_gradients_are_bit_equal(rows, features, depth, drop, seed):
    plain, thrifty = tower(features, depth, drop, seed), tower(features, depth, drop, seed)
    batch = data(rows, features, seed)
    assert pr.recompute(thrifty, Block) == depth
    found = []
    for model in (plain, thrifty):
        torch.manual_seed(seed)
        found.append(pr.gradient(model, batch, cross_entropy))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    plain.load_state_dict(thrifty.state_dict())


@QUICK
@given(cuts=st.lists(st.integers(1, 7), min_size=1, max_size=5), features=st.integers(1, 6), seed=st.integers(0, 99))
def test_parts_weighted_by_rows_give_the_gradient_of_the_whole(cuts, features, seed):
    model, (x, y) = tower(features, 1, 0., seed), data(sum(cuts), features, seed)
    whole = pr.gradient(model, (x, y), cross_entropy)[1]
    split = zip(x.split(cuts), y.split(cuts), strict=True)
    parts = [pr.gradient(model, part, cross_entropy)[1]*len(part[1])/len(y) for part in split]
    torch.testing.assert_close(sum(parts), whole, atol=1e-6, rtol=1e-4)


@QUICK
@given(rows=st.integers(2, 24), part=st.integers(1, 6), features=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_trainer_accumulates_to_the_large_batch(rows, part, features, seed):
    x, y = data(rows, features, seed)
    ends = []
    for batch_size, accumulate in ((rows, 1), (part, math.ceil(rows/part))):
        model = tower(features, 1, 0., seed)
        train(model, TensorLoader(x, y, batch_size=batch_size, shuffle=False), cross_entropy,
              Recipe(epochs=2, lr=.1, optimizer="sgd", accumulate=accumulate), progress=False)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], atol=1e-5, rtol=1e-4)


def test_formats_are_what_they_say():
    table = pr.formats()
    assert ((table.exponent + table.fraction + 1) == table.bits).all()
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        row = table.loc[name]
        np.testing.assert_allclose(row.largest, (2 - 2.**-row.fraction)*2.**(2**(row.exponent - 1) - 1))
        np.testing.assert_allclose(row.smallest, 2.**(2 - 2**(row.exponent - 1)))
        assert torch.tensor(row.tiniest/2.1, dtype=torch.float64).to(kind) == 0


@QUICK
@given(values=st.lists(st.floats(-1, 1, width=32), max_size=20), power=st.integers(0, 10))
def test_vanished_is_a_share_and_scaling_never_hurts(values, power):
    t = torch.tensor(values, dtype=torch.float32)*1e-7
    before, after = pr.vanished(t, torch.float16), pr.vanished(t, torch.float16, 2.**power)
    assert 0 <= after <= before <= 1


@QUICK
@given(rows=st.integers(1, 9), features=st.integers(1, 9), seed=st.integers(0, 99))
def test_memory_bill_counts_weights_gradients_and_state(rows, features, seed):
    model = tower(features, 1, 0., seed)
    n = sum(p.numel() for p in model.parameters())
    bill = pr.memory_bill(model, data(rows, features, seed), cross_entropy, torch.optim.AdamW(model.parameters()))
    assert bill["weights"] == bill["gradients"] == 4*n and bill["optimizer"] == 8*n and bill["activations"] > 0
    assert all(p.grad is None for p in model.parameters())


def test_a_format_that_strays_is_refused_and_one_that_does_not_may_win():
    model, batch = tower(8, 1, 0., 0), data(64, 8, 0)
    def delicate(net, given):
        return nn.functional.cross_entropy((net(given[0]) + 4096).float() - 4096, given[1])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    refused = pr.choose(model, batch, delicate, pr.candidates(model, ["cpu"]), repeats=3, steps=1)
    assert refused.settings["precision"] == "fp32" and refused.table.status[1].startswith("refused: gradient off by")
    allowed = pr.choose(model, batch, cross_entropy, pr.candidates(model, ["cpu"]), repeats=3, steps=1)
    assert not allowed.table.status.str.startswith("refused").any() and Recipe(**allowed.settings)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_candidate_that_fails_is_noted_and_the_rest_go_on():
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.line(x)
            if out.dtype == torch.bfloat16 and self.training:
                raise RuntimeError("no kernel for this format")
            return out
    found = pr.choose(Picky(), data(8, 4, 0), cross_entropy, pr.candidates(Picky(), ["cpu"]), repeats=3, steps=1)
    assert found.settings["precision"] == "fp32" and "no kernel for this format" in found.table.status[1]


@QUICK
@given(seconds=st.floats(.01, 2), setup=st.floats(0, 500), steps=st.integers(1, 10_000))
def test_setup_must_pay_within_the_training(seconds, setup, steps):
    row = dict(device="cpu", precision="fp32", channels_last=False, gradient_off=0., status="slower")
    table = pd.DataFrame([row | dict(compile=False, seconds=1., speedup=1., low=1., high=1., setup=0.),
                          row | dict(compile=True, seconds=seconds, speedup=1/seconds, low=.99/seconds,
                                     high=1.01/seconds, setup=setup)])
    found = pr._decide(table, steps)
    pays = setup + steps*seconds < steps and .99/seconds > 1
    assert found.settings["compile"] is pays
    if pays:
        assert found.table.pays_after[1] <= steps + 1


@pytest.mark.parametrize("device, precision, words", [
    ("tpu", "fp32", "usable: cpu"), ("cpu", "fp12", "choose one of fp32, bf16, fp16"), ("", "fp32", "not here"),
])
def test_what_is_not_here_is_named(device, precision, words):
    with pytest.raises(ValueError, match=words):
        pr.check_precision(device, precision)


def test_no_cuda_here_is_said_before_anything_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = tower(4, 1, 0., 0)
    with pytest.raises(ValueError, match="'cuda' is not here; usable: cpu"):
        pr.choose(model, data(4, 4, 0), cross_entropy, pr.candidates(model, ["cpu", "cuda"]))


def test_a_card_without_bf16_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    with pytest.raises(ValueError, match="an old card has no bf16"):
        pr.check_precision("cuda", "bf16")


def test_other_errors_are_named():
    model, batch = tower(4, 1, 0., 0), data(4, 4, 0)
    with pytest.raises(ValueError, match="at least one candidate"):
        pr.choose(model, batch, cross_entropy, [])
    with pytest.raises(ValueError, match="no Conv2d in this model; it is made of Block"):
        pr.recompute(model, nn.Conv2d)
    with pytest.raises(ValueError, match="precision 'int4' is not known"):
        pr.gradient(model, batch, cross_entropy, "int4")
    def nothing(net, given):
        return cross_entropy(net, given)*float("nan")
    with pytest.raises(ValueError, match="measure of all others"):
        pr.choose(model, batch, nothing, pr.candidates(model, ["cpu"]), repeats=3)
