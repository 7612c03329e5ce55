"Fine-tuning and few labels: properties over random shapes, on an encoder small enough for a test."

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402

from bigmodel_nb.etl.duplicates import near_duplicates  # noqa: E402
from bigmodel_nb.training.few_labels import (  # noqa: E402
    draw_labels,
    label_curve,
    label_saving,
    labels_needed,
    learn_from_rules,
    self_train,
    vectors_learner,
)
from bigmodel_nb.training.finetune import (  # noqa: E402
    METHODS,
    TextClassifier,
    adapt,
    embed,
    fingerprint,
    load_encoder,
    load_tokenizer,
    load_trained,
    merge,
    rank_loss,
    rank_optimizer,
    rank_schedule,
    save_trained,
    split_texts,
    text_loader,
    tokenize,
    trained_part,
)
from bigmodel_nb.training.trainer import Recipe, cross_entropy, train  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"word{i}" for i in range(60))]
FEW = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
MERGED, INVENTED = ("lora", "adalora", "ia3"), ("prompt", "prefix")


def tiny(hidden: int = 16, layers: int = 2, seed: int = 0) -> torch.nn.Module:
    "A BERT of random weights, without a pooler."
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=len(WORDS), hidden_size=hidden, num_hidden_layers=layers,
                                     num_attention_heads=2, intermediate_size=2 * hidden, max_position_embeddings=64)
    return transformers.BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    "A folder as a package would carry it."
    place = tmp_path_factory.mktemp("encoder")
    tiny().save_pretrained(place)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(place / "tokenizer.json"))
    return place


def texts(n: int, seed: int = 0) -> list[str]:
    "Sentences of one to twelve words."
    rng = np.random.default_rng(seed)
    return [" ".join(f"word{w}" for w in rng.integers(0, 60, rng.integers(1, 13))) for _ in range(n)]


def batch(n: int = 6, seed: int = 1) -> dict[str, torch.Tensor]:
    "Random tokens with random padding."
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(4, len(WORDS), (n, 10)))
    mask = (torch.arange(10) < torch.from_numpy(rng.integers(1, 11, n))[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def options(method: str) -> dict:
    "What AdaLoRA has to know."
    return rank_schedule(24) if method == "adalora" else {}


def shaken(model: TextClassifier, seed: int = 3) -> TextClassifier:
    "As if it had been trained."
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trained_part(model).values():
            p.add_(.1 * torch.randn(p.shape, generator=draw))
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_addition_changes_nothing_and_frozen_weights_stay(method: str) -> None:
    base = tiny()
    plain, model = TextClassifier(copy.deepcopy(base)).eval(), TextClassifier(copy.deepcopy(base))
    model, share = adapt(model, method, **options(method))
    gap = (model.eval()(**batch()) - plain(**batch())).abs().max().item()
    assert (gap > 1e-6) == (method in INVENTED)
    assert 0 < share <= 1 and (share == 1) == (method == "full")
    tokens = [list(np.random.default_rng(i).integers(4, 60, 3 + i % 5)) for i in range(24)]
    loader = text_loader(tokens, np.arange(24) % 2, batch_size=4)
    moving = set(trained_part(model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ranks = method == "adalora"
    recipe = Recipe(epochs=4, lr=1e-2, optimizer=rank_optimizer(model) if ranks else "adamw")
    train(model, loader, rank_loss if ranks else cross_entropy, recipe, progress=False)
    for name, p in model.named_parameters():
        assert name in moving or torch.equal(p, before[name]), name
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    if ranks:
        left = [(p != 0).sum().item() for name, p in model.named_parameters() if ".lora_E." in name]
        assert sum(left) <= METHODS["adalora"]["target_r"] * len(left)


@FEW
@given(rank=st.integers(1, 9), hidden=st.sampled_from([8, 16, 24]), layers=st.integers(1, 3))
def test_lora_trains_as_many_weights_as_the_formula_says(rank: int, hidden: int, layers: int) -> None:
    model, share = adapt(TextClassifier(tiny(hidden, layers), classes=3), "lora", r=rank)
    each = 4 * rank * 2 * hidden + 2 * rank * 3 * hidden
    head = 3 * hidden + 3
    assert sum(p.numel() for p in trained_part(model).values()) == layers * each + head
    assert share == pytest.approx((layers * each + head) / sum(p.numel() for p in model.parameters()))


@FEW
@given(method=st.sampled_from(MERGED), seed=st.integers(0, 99), rank=st.integers(1, 6))
def test_merged_is_unmerged(method: str, seed: int, rank: int) -> None:
    sizes = {"lora": {"r": rank}, "adalora": {"init_r": rank + 1, "target_r": rank}, "ia3": {}}[method]
    model = shaken(adapt(TextClassifier(tiny()), method, **{**options(method), **sizes})[0], seed)
    before = model(**batch(seed=seed))
    merged = merge(model)
    assert type(merged.encoder).__name__ == "BertModel"
    assert (merged(**batch(seed=seed)) - before).abs().max() < 1e-5 * before.abs().max().clamp(min=1)


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_are_equal(method: str, tmp_path) -> None:
    base = tiny()
    model = shaken(adapt(TextClassifier(copy.deepcopy(base)), method, **options(method))[0])
    size = save_trained(model, tmp_path / "part.pt")
    back = load_trained(TextClassifier(copy.deepcopy(base), seed=9), tmp_path / "part.pt").eval()
    assert torch.equal(back(**batch()), model(**batch()))
    assert size < 4 * sum(p.numel() for p in trained_part(model).values()) + 60_000
    if method != "full":
        with pytest.raises(ValueError, match="another base model"):
            load_trained(TextClassifier(tiny(seed=5)), tmp_path / "part.pt")
    with pytest.raises(ValueError, match="classes=2"):
        load_trained(TextClassifier(copy.deepcopy(base), classes=4), tmp_path / "part.pt")


def test_a_merged_part_loads_as_a_whole_model(tmp_path) -> None:
    model = shaken(adapt(TextClassifier(tiny()), "lora")[0])
    before = model(**batch())
    save_trained(merge(model), tmp_path / "merged.pt")
    back = load_trained(TextClassifier(tiny(seed=8)), tmp_path / "merged.pt").eval()
    assert torch.allclose(back(**batch()), before, atol=1e-5)


def test_bad_input_is_named(folder, tmp_path) -> None:
    for wrong, call in {
        "holds no config.json": lambda: load_encoder(tmp_path),
        "no tokenizer.json": lambda: load_tokenizer(tmp_path),
        "text 1 is": lambda: tokenize(load_tokenizer(folder), ["word1", " "]),
        "text 2 has label 2": lambda: text_loader([[2, 3]] * 3, [0, 1, 2]),
        "text 0 has label 0.5": lambda: text_loader([[2, 3]], [.5]),
        "no method 'lroa'": lambda: adapt(TextClassifier(tiny()), "lroa"),
        "Linear layers are called dense, key, query, value": lambda: adapt(
            TextClassifier(tiny()), "lora", target_modules=["qury"]),
        "adapted already": lambda: adapt(adapt(TextClassifier(tiny()), "lora")[0], "ia3"),
        "cannot be merged": lambda: merge(adapt(TextClassifier(tiny()), "prompt")[0]),
        "rank_optimizer is for adalora": lambda: rank_optimizer(adapt(TextClassifier(tiny()), "lora")[0]),
        "too few to deal out": lambda: rank_schedule(5),
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=wrong):
            call()


@pytest.mark.parametrize("broken", [{"adapted": None}, {"drop": True}, {"shape": True}])
def test_a_damaged_part_is_refused(broken: dict, tmp_path) -> None:
    model = adapt(TextClassifier(tiny()), "lora")[0]
    save_trained(model, tmp_path / "part.pt")
    state = torch.load(tmp_path / "part.pt", weights_only=True)
    key = next(name for name in state["weights"] if "lora_A" in name)
    if "adapted" in broken:
        del state["adapted"]
    elif "drop" in broken:
        del state["weights"][key]
    else:
        state["weights"][key] = state["weights"][key][:1]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="no trained part" if "adapted" in broken else "does not fit"):
        load_trained(TextClassifier(tiny()), tmp_path / "part.pt")


@FEW
@given(n=st.integers(1, 40), limit=st.integers(3, 12), seed=st.integers(0, 99))
def test_tokens_and_vectors_keep_the_order_of_the_texts(folder, n: int, limit: int, seed: int) -> None:
    tokenizer, encoder = load_tokenizer(folder), tiny()
    lines = texts(n, seed)
    tokens = tokenize(tokenizer, lines, limit)
    assert all(len(t) == min(limit, len(line.split()) + 2) and t[0] == 2 and t[-1] == 3
               for t, line in zip(tokens, lines, strict=True))
    together = embed(encoder, tokens)
    alone = np.concatenate([embed(encoder, [t]) for t in tokens])
    assert np.allclose(together, alone, atol=1e-5) and not encoder.training


def test_the_folder_gives_the_same_encoder(folder) -> None:
    assert fingerprint(load_encoder(folder)) == fingerprint(tiny()) != fingerprint(tiny(seed=1))


@FEW
@given(seed=st.integers(0, 99), test=st.integers(1, 8))
def test_no_copy_crosses_the_split(seed: int, test: int) -> None:
    lines = ["the cat sat on the mat today", "The cat sat on the mat, today!", "rain is falling over the northern hills",
             "a long walk home from the old station", "A long walk home, from the old station.", " "]
    lines += [f"{name} wrote the {number} letter to nobody in particular" for number, name in enumerate(
        ["anna", "bertram", "cecilia", "dmitri", "eleonora", "friedrich", "guinevere", "hortensia"])]
    labels = [1, 1, 0, 0, 1, 1] + [0, 1] * 4
    kept, held, gone = split_texts(lines, labels, test, seed)
    assert len(kept) + len(held) + len(gone) == len(lines) and len(held) == test
    assert not len(near_duplicates(pd.concat([kept, held]).text))
    assert {3, 4, 5} <= set(gone.index) and len({0, 1} & set(gone.index)) == 1
    again = split_texts(lines, labels, test, seed)
    assert all(a.equals(b) for a, b in zip((kept, held, gone), again, strict=True))


@FEW
@given(scores=st.lists(st.floats(.3, 1), min_size=2, max_size=6), target=st.floats(.3, 1))
def test_labels_needed_rise_with_the_target(scores: list[float], target: float) -> None:
    sizes = [50 * 2**i for i in range(len(scores))]
    curve = pd.DataFrame({"seed": 0, "labels": sizes, "score": scores}).sample(frac=1, random_state=0)
    needed = labels_needed(curve, target)[0]
    assert needed <= labels_needed(curve, target + .01)[0]
    assert np.isinf(needed) == (max(scores) < target) and needed >= 50


def test_a_saving_counts_the_seeds_that_never_arrive() -> None:
    frame = lambda scores: pd.DataFrame([(s, n, v) for s, row in enumerate(scores) for n, v in zip((100, 400), row, strict=True)],  # noqa: E731
                                        columns=["seed", "labels", "score"])
    saving, never = label_saving(frame([(.5, .6), (.5, .9)]), frame([(.8, .9), (.8, .9)]), .8)
    assert never == 1 and saving.low > 1 and saving.value <= 4
    with pytest.raises(ValueError, match="lower the target"):
        label_saving(frame([(.5, .6)] * 2), frame([(.5, .6)] * 2), .8)


@pytest.fixture(scope="module")
def clouds():
    "Two overlapping clouds of points."
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 400)
    return rng.normal(size=(400, 5)) + 1.2 * truth[:, None] * np.array([1, 1, 0, 0, 0]), truth


def test_a_curve_goes_on_where_its_file_ends(clouds, tmp_path) -> None:
    points, truth = clouds
    calls = []

    def learn(rows: np.ndarray, seed: int) -> np.ndarray:
        calls.append((len(rows), seed))
        return vectors_learner(points[:300], truth[:300], points[300:])(rows, seed)
    arguments = (truth[:300], truth[300:], (20, 40))
    label_curve("one", learn, *arguments, range(2), tmp_path / "curve.json")
    whole = label_curve("one", learn, *arguments, range(3), tmp_path / "curve.json")
    assert len(calls) == 6 and len(whole) == 6 and whole.score.between(.5, 1).all()
    assert set(draw_labels(truth, 20, 1)) < set(draw_labels(truth, 40, 1))


def test_only_the_labels_that_were_bought_are_read(clouds) -> None:
    points, truth = clouds
    rows, other = draw_labels(truth, 40, 0), 1 - truth
    other[rows] = truth[rows]
    votes = pd.DataFrame({f"rule {j}": np.where(np.random.default_rng(j).random(400) < .5, None, (points[:, j] > .5).astype(int))
                          for j in range(3)}, dtype=object)
    for teach in (lambda y: self_train(points, y, rows)[0], lambda y: learn_from_rules(points, votes, [0, 1], rows, y)):
        assert np.array_equal(teach(truth).predict(points), teach(other).predict(points))
    believed = self_train(points, truth, rows)[1]
    assert np.array_equal(believed[rows], truth[rows])
