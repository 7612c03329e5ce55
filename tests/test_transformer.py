"""The decoder against `transformers` with the same weights, over random shapes, and its causal and cache properties."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bigmodel_nb.training.transformer import (
    Block,
    KeyValueCache,
    LanguageModel,
    attend,
    cache_bytes,
    forward_flops,
    from_llama,
    rotary_angles,
    rotate,
    to_llama,
)

transformers = pytest.importorskip("transformers")
FEW = settings(max_examples=25, deadline=None, derandomize=True)
SHAPES = st.fixed_dictionaries(
    {
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 4),
        "width": st.sampled_from([2, 4, 8, 16]),
        "layers": st.integers(1, 3),
        "hidden": st.integers(1, 70),
        "theta": st.sampled_from([10.0, 1e4, 5e5]),
        "tied": st.booleans(),
    }
)
SEEDS, PLACES = st.integers(0, 10_000), st.integers(1, 33)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    "Largest difference as a share of the largest value."
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def stay_double(module: nn.Module) -> None:
    "Replace norms that step down to single precision by torch's own, with the same weights."
    for part in list(module.modules()):
        for name, norm in list(part.named_children()):
            if type(norm).__name__ == "LlamaRMSNorm":
                twin = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
                twin.weight = norm.weight
                setattr(part, name, twin)


def their_config(s: dict) -> transformers.LlamaConfig:
    "A published configuration of a drawn shape."
    return transformers.LlamaConfig(
        vocab_size=37,
        hidden_size=s["kv_heads"] * s["group"] * s["width"],
        intermediate_size=s["hidden"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["kv_heads"] * s["group"],
        num_key_value_heads=s["kv_heads"],
        rope_parameters={"rope_type": "default", "rope_theta": s["theta"]},
        tie_word_embeddings=s["tied"],
        initializer_range=0.1,
        attn_implementation="eager",
    )


def pair(s: dict, seed: int, dtype: torch.dtype) -> tuple[nn.Module, LanguageModel]:
    "Theirs with random weights, scales of norms included, and ours with the same."
    torch.manual_seed(seed)
    config = their_config(s)
    theirs = transformers.LlamaForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for name, w in theirs.named_parameters():
            if "norm" in name:
                w.uniform_(0.5, 1.5)
    if dtype == torch.float64:
        stay_double(theirs)
    return theirs, from_llama(config.to_dict(), theirs.state_dict())


def softmax_in_input_dtype() -> mock._patch:
    "Their softmax steps down to single precision as well."
    return mock.patch("torch.nn.functional.softmax", lambda x, dim, dtype=None: x.softmax(dim))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@FEW
@given(s=SHAPES, seed=SEEDS, places=PLACES)
def test_model_equals_theirs(dtype: torch.dtype, tolerance: float, s: dict, seed: int, places: int) -> None:
    theirs, ours = pair(s, seed, dtype)
    tokens = torch.randint(0, 37, (2, places))
    with softmax_in_input_dtype():
        a, b = ours(tokens), theirs(tokens).logits
    assert relative(a, b) <= tolerance
    for logits in (a, b):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
    largest = max(w.grad.abs().max().item() for w in theirs.parameters())
    for name, w in ours.named_parameters():
        other = theirs.get_parameter(name if name == "lm_head.weight" else f"model.{name}")
        assert (w.grad - other.grad).abs().max().item() <= tolerance * largest, name


@FEW
@given(s=SHAPES, seed=SEEDS, places=PLACES)
def test_block_equals_their_layer(s: dict, seed: int, places: int) -> None:
    torch.manual_seed(seed)
    config = their_config(s)
    llama = transformers.models.llama.modeling_llama
    theirs = llama.LlamaDecoderLayer(config, 0).double()
    stay_double(theirs)
    dim, heads = config.hidden_size, config.num_attention_heads
    ours = Block(dim, heads, s["kv_heads"], s["hidden"]).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, places, dim, dtype=torch.float64)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    position = torch.arange(places)[None]
    embedding = llama.LlamaRotaryEmbedding(config)(x, position)
    mask = torch.full((places, places), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    with softmax_in_input_dtype():
        b = theirs(inputs[1], attention_mask=mask, position_embeddings=embedding)
    a = ours(inputs[0], rotary_angles(0, places, s["width"], s["theta"]))
    assert relative(a, b) <= 1e-6
    (a.square().sum() / 2).backward()
    (b.square().sum() / 2).backward()
    assert relative(inputs[0].grad, inputs[1].grad) <= 1e-6


@FEW
@given(s=SHAPES, seed=SEEDS, places=st.integers(2, 33), data=st.data())
def test_no_place_looks_ahead(s: dict, seed: int, places: int, data: st.DataObject) -> None:
    ours = pair(s, seed, torch.float64)[1]
    place = data.draw(st.integers(1, places - 1))
    tokens = torch.randint(0, 37, (1, places))
    other = tokens.clone()
    other[:, place:] = torch.randint(0, 37, (1, places - place))
    assert torch.equal(ours(tokens)[:, :place].argmax(-1), ours(other)[:, :place].argmax(-1))
    assert relative(ours(tokens)[:, :place], ours(other)[:, :place]) <= 1e-12


@FEW
@given(s=SHAPES, seed=SEEDS, places=PLACES, data=st.data())
def test_cache_changes_nothing(s: dict, seed: int, places: int, data: st.DataObject) -> None:
    ours = pair(s, seed, torch.float64)[1]
    tokens = torch.randint(0, 37, (3, places))
    cuts = sorted(data.draw(st.sets(st.integers(1, places), max_size=5)))
    cache = KeyValueCache()
    pieces = [p for p in tokens.tensor_split(cuts, dim=1) if p.shape[1]]
    with torch.no_grad():
        apart = torch.cat([ours(piece, cache) for piece in pieces], dim=1)
    assert relative(apart, ours(tokens)) <= 1e-6
    assert cache.length == places


@FEW
@given(new=st.integers(1, 9), old=st.integers(0, 9), kv=st.integers(1, 3), group=st.integers(1, 4), seed=SEEDS)
def test_attend_equals_formula(new: int, old: int, kv: int, group: int, seed: int) -> None:
    torch.manual_seed(seed)
    q = torch.randn(2, kv * group, new, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv, new + old, 8, dtype=torch.float64)
    wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ wide_k.transpose(-1, -2) / 8**0.5
    ahead = torch.arange(new + old)[None] > torch.arange(old, new + old)[:, None]
    by_hand = scores.masked_fill(ahead, -torch.inf).softmax(-1) @ wide_v
    assert relative(attend(q, k, v), by_hand) <= 1e-12
    plain = nn.functional.scaled_dot_product_attention(q, wide_k, wide_v, ~ahead)
    assert relative(attend(q, k, v), plain) <= 1e-12


@FEW
@given(start=st.integers(0, 2000), gap=st.integers(0, 50), seed=SEEDS, width=st.sampled_from([2, 8, 64]))
def test_rotation_knows_distance_only(start: int, gap: int, seed: int, width: int) -> None:
    torch.manual_seed(seed)
    a, b = torch.randn(2, 1, 1, 1, width, dtype=torch.float64)

    def product(s: int, t: int) -> torch.Tensor:
        return (rotate(a, *rotary_angles(s, 1, width)) * rotate(b, *rotary_angles(t, 1, width))).sum()

    size = a.norm() * b.norm()
    assert (product(start, start + gap) - product(0, gap)).abs() <= 1e-3 * size
    assert (rotate(a, *rotary_angles(start, 1, width)).norm() - a.norm()).abs() <= 1e-6 * a.norm()


@FEW
@given(s=SHAPES, seed=SEEDS)
def test_weights_travel_both_ways(s: dict, seed: int) -> None:
    ours = pair(s, seed, torch.float32)[1]
    config, state = to_llama(ours, context=33)
    again = from_llama(config, state)
    assert again.shape == ours.shape
    for (name, a), b in zip(again.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@settings(max_examples=10, deadline=None, derandomize=True)
@given(s=SHAPES, places=PLACES)
def test_costs_equal_counts(s: dict, places: int) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    ours = pair(s, 0, torch.float32)[1]
    tokens, cache = torch.zeros(2, places, dtype=torch.long), KeyValueCache()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ours(tokens)
    assert counter.get_total_flops() == 2 * forward_flops(ours, places)["total"]
    with torch.no_grad():
        ours(tokens, cache)
    held = sum(kept.nbytes for kept in cache._kept)
    assert held == cache_bytes(ours, places, texts=2, dtype=torch.float32)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="heads must divide dim"):
        LanguageModel(10, 30, 1, 4)
    with pytest.raises(ValueError, match="must be even"):
        LanguageModel(10, 15, 1, 5)(torch.zeros(1, 2, dtype=torch.long))
    model = LanguageModel(10, 16, 1, 2)
    with pytest.raises(IndexError, match="token 10 at text 0, place 1"):
        model(torch.tensor([[3, 10]]))
    with pytest.raises(IndexError, match="token -1 at text 0, place 0"):
        model(torch.tensor([[-1, 3]]))
    cache = KeyValueCache()
    model(torch.zeros(2, 3, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="the cache holds 2 texts"):
        model(torch.zeros(1, 1, dtype=torch.long), cache)
    config, state = to_llama(model, 8)
    with pytest.raises(ValueError, match="model_type is 'bert'"):
        from_llama({**config, "model_type": "bert"}, state)
    with pytest.raises(ValueError, match="has no place in the model"):
        from_llama(config, {**state, "model.layers.9.mlp.up_proj.weight": torch.zeros(1)})
