"""Tokens, windows, n-grams and saved folders of the small language model, over random texts and sizes."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

from bigmodel_nb.training.experiment import PowerLaw  # noqa: E402
from bigmodel_nb.training.language_model import (  # noqa: E402
    END,
    KneserNey,
    Windows,
    bits_per_byte,
    copied,
    encode_documents,
    generate,
    load_language_model,
    next_probabilities,
    predict_loss,
    save_language_model,
    split_documents,
    train_tokenizer,
)
from bigmodel_nb.training.transformer import LanguageModel  # noqa: E402

FEW = settings(max_examples=40, deadline=None, derandomize=True)
LINES = [f"the film number {i} was {'good' if i % 3 else 'dull'}, and {i * 7} people saw it" for i in range(200)]
TOKENIZER = train_tokenizer(LINES, 300)


@FEW
@given(st.lists(st.text(max_size=60), min_size=1, max_size=5))
def test_any_text_comes_back(texts: list[str]) -> None:
    texts = [t.encode("utf-8", "replace").decode() for t in texts] + [f"x{END}y"]
    row = encode_documents(TOKENIZER, texts)
    cuts = (row == TOKENIZER.token_to_id(END)).nonzero().flatten()
    assert len(cuts) == len(texts)
    start, back = 0, []
    for cut in cuts.tolist():
        back.append(TOKENIZER.decode(row[start:cut].tolist()))
        start = cut + 1
    assert back == texts
    assert bits_per_byte(0.0, row, texts) == 0


@FEW
@given(n=st.integers(2, 400), length=st.integers(1, 20), batch=st.integers(1, 9), seed=st.integers(0, 9), data=st.data())
def test_windows_use_each_token_once(n: int, length: int, batch: int, seed: int, data: st.DataObject) -> None:
    if n <= length:
        with pytest.raises(ValueError, match="do not fill one window"):
            Windows(torch.arange(n), length, batch, seed)
        return
    loader = Windows(torch.arange(n), length, batch, seed)
    epoch, start = data.draw(st.integers(0, 5)), data.draw(st.integers(0, len(loader) - 1))
    batches = list(loader(epoch))
    assert len(batches) == len(loader)
    targets = torch.cat([t.flatten() for _, t in batches]).sort().values
    assert torch.equal(targets, torch.arange(1, (n - 1) // length * length + 1))
    assert all(torch.equal(t, x + 1) for x, t in batches)
    late = list(loader(epoch, start))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(late, batches[start:], strict=True))


def by_dictionary(row: list[int], vocabulary: int, order: int, asked: list[int]) -> list[float]:
    "Interpolated Kneser-Ney with dictionaries, one token at a time."
    counts: dict[int, Counter] = {order: Counter(tuple(row[i : i + order]) for i in range(len(row) - order + 1))}
    for n in range(order - 1, 0, -1):
        counts[n] = Counter(gram[1:] for gram in counts[n + 1])
    contexts: dict[int, dict] = {n: defaultdict(list) for n in counts}
    for n, table in counts.items():
        for gram, c in table.items():
            contexts[n][gram[:-1]].append(c)
    out = []
    for i in range(len(asked)):
        p = 1 / vocabulary
        for n in range(1, min(order, i + 1) + 1):
            sizes = list(counts[n].values())
            once, twice = sizes.count(1), sizes.count(2)
            d = once / (once + 2 * twice) if once else 0.0
            gram = tuple(asked[i - n + 1 : i + 1])
            seen = contexts[n].get(gram[:-1])
            if seen:
                p = (max(counts[n][gram] - d, 0) + d * len(seen) * p) / sum(seen)
        out.append(p)
    return out


@FEW
@given(
    row=st.lists(st.integers(0, 5), min_size=6, max_size=80),
    order=st.integers(1, 4),
    asked=st.lists(st.integers(0, 6), min_size=2),
)
def test_kneser_ney_equals_dictionaries(row: list[int], order: int, asked: list[int]) -> None:
    counter = KneserNey(torch.tensor(row), 7, order)
    found = counter.probabilities(torch.tensor(asked))
    np.testing.assert_allclose(found, by_dictionary(row, 7, order, asked), rtol=1e-12)


@FEW
@given(st.integers(0, 1000), st.floats(0.05, 0.5))
def test_a_document_keeps_its_side(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 40)) for _ in range(60)]
    learn, held = split_documents([*texts, *texts[:20]], share, seed)
    assert sorted(learn + held) == sorted(texts)
    again_learn, again_held = split_documents(texts[::-1][:50], share, seed)
    assert set(again_learn) <= set(learn) and set(again_held) <= set(held)


@FEW
@given(st.integers(0, 1000), st.floats(0.1, 3), st.integers(1, 30), st.floats(0.05, 1))
def test_probabilities_are_probabilities(seed: int, temperature: float, k: int, p: float) -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(seed)) * 4
    drawn = next_probabilities(logits, temperature, k, p)
    torch.testing.assert_close(drawn.sum(-1), torch.ones(4))
    kept = (drawn > 0).sum(-1)
    assert ((kept >= 1) & (kept <= k)).all()
    assert (drawn.gather(1, logits.argmax(-1, keepdim=True)) > 0).all()


def test_a_law_with_little_noise_is_foretold() -> None:
    size = np.repeat(np.geomspace(1e3, 1e6, 5), 2)
    for floor, scale, rate in ((0.0, 5.0, 0.1), (2.0, 50.0, 0.3), (3.0, 10.0, 0.7)):
        law = PowerLaw(floor, scale, rate)
        noise = np.exp(np.random.default_rng(0).normal(0, 1e-4, len(size)))
        said = predict_loss(size, law.at(size) * noise, at=3e6, n=50)
        assert said.low <= said.value <= said.high
        np.testing.assert_allclose(said.value, law.at(3e6), rtol=2e-3)


def test_copied_counts_only_whole_tokens() -> None:
    training = torch.tensor([256, 1, 2, 3] * 20)
    shifted = torch.tensor([[1, 256, 512, 768] * 8])  # the same bytes, one place off
    assert not copied(shifted, training, 30).any()
    assert copied(training[None, :30], training, 30).all()


def test_saved_model_writes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for tied in (True, False):
        model = LanguageModel(300, 16, 2, 4, 2, tied=tied).eval()
        save_language_model(tmp_path / "m", model, TOKENIZER, 32)
        loaded, tokenizer, config = load_language_model(tmp_path / "m")
        prompt = torch.tensor([tokenizer.encode("the film").ids])
        assert torch.equal(generate(loaded, prompt, 10), generate(model, prompt, 10))
        assert config["max_position_embeddings"] == 32 and not list((tmp_path / "m").glob(".*"))
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        load_language_model(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="lacks model.safetensors, tokenizer.json, config.json"):
        load_language_model(tmp_path / "other")
