"A run that is killed at any moment goes on to the same bits, and bad input never reaches the last good checkpoint."

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bigmodel_nb.training.batches import TensorLoader, TextLoader, seed_everything
from bigmodel_nb.training.checkpoint import differing, load_checkpoint, save_checkpoint
from bigmodel_nb.training.trainer import Recipe, cross_entropy, outputs, rate_factor, train, validate

FORK = multiprocessing.get_context("fork")  # torch is imported once, not once for each of twenty deaths


def _texts(n: int, seed: int) -> tuple[list[list[int]], np.ndarray]:
    "Token sequences whose label is the parity of their first token."
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(1, 50, rng.integers(2, 12)).tolist() for _ in range(n)]
    return tokens, np.array([text[0] % 2 for text in tokens])


class Reader(nn.Module):
    "A small text network with everything that could hide state: dropout, batch normalisation, attention."

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.layer(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        states = states * attention_mask.unsqueeze(-1)
        return self.head(self.norm(states.sum(1) / attention_mask.sum(1, keepdim=True)))


def _sitting(file: str, seed: int, place: Any = None) -> None:
    "Train, or go on training, from whatever is on the disk; tell how far it got."
    torch.set_num_threads(1)
    seed_everything(seed if Path(file).exists() else 0)  # a resumed sitting starts from other weights: they must not matter
    data = TextLoader(*_texts(300, 0), batch_size=8, seed=1)
    held = TextLoader(*_texts(100, 1), batch_size=50, shuffle=False)
    recipe = Recipe(epochs=4, lr=3e-3, accumulate=2, validate_every=7, precision="bf16", seed=5)

    def heard(record: dict) -> None:
        if place is not None:
            place.value = record["step"]
            time.sleep(0.005)

    train(Reader(), data, cross_entropy, recipe, held, checkpoint=file, save_every=3, progress=False, track=heard)


def _process(file: Path, seed: int, place: Any = None) -> multiprocessing.process.BaseProcess:
    process = FORK.Process(target=_sitting, args=(str(file), seed, place), daemon=True)
    process.start()
    return process


def test_twenty_kills_change_no_bit(tmp_path: Path) -> None:
    unbroken = _process(tmp_path / "peace.pt", 0)
    unbroken.join(120)
    assert unbroken.exitcode == 0
    peace = load_checkpoint(tmp_path / "peace.pt")
    assert peace["history"]["steps"] == 4 * 19 and len(peace["history"]["val_loss"]) == 11
    rng, file, kills, places, steps_done = random.Random(0), tmp_path / "cut.pt", 0, [], 0
    while kills < 20:
        place = FORK.Value("i", 0)
        process = _process(file, 100 + kills, place)
        wanted = steps_done + rng.randint(1, 12)
        while process.exitcode is None and place.value < wanted:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        if process.exitcode is None:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join(30)
            kills, places = kills + 1, [*places, place.value]
        if process.exitcode == 0:  # it came to its end first: another run must die instead
            assert [path for path in differing(peace, load_checkpoint(file)) if path != "history.seconds"] == []
            file.unlink()
        steps_done = load_checkpoint(file)["history"]["steps"] if file.exists() else 0
    last = _process(file, 999)
    last.join(120)
    assert last.exitcode == 0
    assert [path for path in differing(peace, load_checkpoint(file)) if path != "history.seconds"] == []
    assert len(set(places)) > 10, f"the kills must fall into different places, not {places}"


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"

    def fills_up() -> None:
        torch.set_num_threads(1)
        X, y = torch.randn(64, 200), torch.zeros(64, dtype=torch.long)

        def heard(record: dict) -> None:
            if record["step"] == 3:  # the next checkpoint is larger than what is left
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

        try:
            train(nn.Linear(200, 50), TensorLoader(X, y, batch_size=8), cross_entropy, checkpoint=file, save_every=2, track=heard)
        except OSError as error:
            os._exit(7 if "could not save run.pt: the disk is full; the last good one is untouched" in str(error) else 8)
        os._exit(9)

    process = FORK.Process(target=fills_up)
    process.start()
    process.join(60)
    assert process.exitcode == 7
    assert load_checkpoint(file)["history"]["steps"] == 2
    assert [found.name for found in tmp_path.iterdir()] == ["run.pt"]


def test_kills_while_saving_leave_a_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"

    def saves_on() -> None:
        for step in range(10**9):
            save_checkpoint({"step": step, "weights": torch.full((500_000,), float(step % 1000))}, file)

    for _ in range(5):
        process = FORK.Process(target=saves_on, daemon=True)
        process.start()
        process.join(random.uniform(0.2, 0.5))
        process.kill()
        process.join(30)
        if file.exists():
            state = load_checkpoint(file)
            assert (state["weights"] == state["step"] % 1000).all()
    assert file.exists()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_no_number_never_reaches_weights_or_checkpoint(tmp_path: Path, poison: float) -> None:
    torch.manual_seed(0)
    X, y = torch.randn(64, 5), torch.zeros(64, dtype=torch.long)
    loader = TensorLoader(X, y, batch_size=8, seed=3)
    row = int(loader.rows(0)[5][0])
    X[row, 2] = poison
    model = nn.Linear(5, 3)
    with pytest.raises(FloatingPointError, match=r"epoch 1, batch 6 \(float32\[8, 5\], int64\[8\]\)"):
        train(model, loader, cross_entropy, checkpoint=tmp_path / "run.pt", save_every=1)
    assert all(p.isfinite().all() for p in model.parameters())
    assert load_checkpoint(tmp_path / "run.pt")["history"]["steps"] == 5


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(5, 60), size=st.integers(1, 20), accumulate=st.integers(1, 5), epochs=st.integers(1, 3),
    dies=st.integers(1, 40), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_any_cut_resumes_to_the_same_bits(tmp_path_factory, rows, size, accumulate, epochs, dies, seed) -> None:
    folder = tmp_path_factory.mktemp("runs")
    X, y = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)), torch.arange(rows) % 3
    loader, recipe = TensorLoader(X, y, batch_size=size, seed=seed), Recipe(epochs=epochs, accumulate=accumulate, seed=seed)

    def run(name: str, dies_at: int | None) -> dict:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))

        def heard(record: dict) -> None:
            if record["step"] == dies_at:
                raise KeyboardInterrupt

        try:
            train(model, loader, cross_entropy, recipe, loader, checkpoint=folder / name, save_every=2, track=heard)
        except KeyboardInterrupt:
            return {}
        return load_checkpoint(folder / name)

    run("cut", dies)
    left = [path for path in differing(run("peace", None), run("cut", None)) if path != "history.seconds"]
    assert left == []


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 10**6))
def test_accumulated_batches_step_like_one(sizes, seed) -> None:
    torch.manual_seed(seed)
    rows = sum(sizes)
    X, y = torch.randn(rows, 6, dtype=torch.float64), torch.randint(0, 4, (rows,))

    class Parts:
        def __len__(self) -> int:
            return len(sizes)

        def __call__(self, epoch: int, start: int = 0):
            return iter([(a, b) for a, b in zip(X.split(sizes), y.split(sizes), strict=True)][start:])

        def rows(self, epoch: int) -> list[torch.Tensor]:
            return list(torch.arange(rows).split(sizes))

    models = []
    for loader, accumulate in ((Parts(), len(sizes)), (TensorLoader(X, y, batch_size=rows, shuffle=False), 1)):
        torch.manual_seed(seed)
        model = nn.Linear(6, 4).double()
        train(model, loader, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), Recipe(epochs=2, accumulate=accumulate))
        models.append(model)
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=0, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    schedule=st.sampled_from(["one_cycle", "cosine", "linear", "constant"]), total=st.integers(1, 500), rise=st.floats(0, 1)
)
def test_every_schedule_stays_between_nought_and_the_top(schedule, total, rise) -> None:
    factors = [rate_factor(schedule, step, total, rise) for step in range(total)]
    assert all(0 <= factor <= 1 for factor in factors)
    top = int(np.argmax(factors))
    assert all(a <= b + 1e-12 for a, b in zip(factors[:top], factors[1 : top + 1], strict=True))
    assert all(a >= b - 1e-12 for a, b in zip(factors[top:-1], factors[top + 1 :], strict=True))


def test_answers_come_back_in_the_order_of_the_rows() -> None:
    torch.manual_seed(0)
    model = Reader().eval()
    tokens, labels = _texts(57, 3)
    straight = outputs(model, TextLoader(tokens, labels, batch_size=1, shuffle=False, buckets=False))
    for shuffle in (False, True):
        mixed = outputs(model, TextLoader(tokens, labels, batch_size=10, shuffle=shuffle))
        np.testing.assert_allclose(straight, mixed, atol=1e-5)


def test_early_stopping_keeps_the_best_and_stays_stopped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    X, y = torch.randn(40, 30), torch.randint(0, 2, (40,))  # nothing to learn: every epoch makes it worse on other rows
    held = TensorLoader(torch.randn(200, 30), torch.randint(0, 2, (200,)), shuffle=False, batch_size=200)
    model, recipe = nn.Linear(30, 2), Recipe(epochs=50, lr=0.1, patience=3, schedule="constant")
    history = train(model, TensorLoader(X, y), cross_entropy, recipe, held, checkpoint=tmp_path / "run.pt")
    assert history.stopped_early and history.epochs < 50
    assert validate(model, held, cross_entropy) == pytest.approx(min(history.val_loss), abs=1e-6)
    again = train(nn.Linear(30, 2), TensorLoader(X, y), cross_entropy, recipe, held, checkpoint=tmp_path / "run.pt")
    assert again.steps == history.steps


def test_other_rows_and_a_broken_judge_are_refused(tmp_path: Path) -> None:
    "A checkpoint goes on with the rows it began with; a validation loss that is no number stops the run."
    X, y, file = torch.randn(63, 4), torch.randint(0, 2, (63,)), tmp_path / "run.pt"
    recipe = Recipe(epochs=1, lr=np.float64(1e-3))
    train(nn.Linear(4, 2), TensorLoader(X, y, batch_size=16), cross_entropy, recipe, checkpoint=file, progress=False)
    train(nn.Linear(4, 2), TensorLoader(X, y, batch_size=16), cross_entropy, recipe, checkpoint=file, progress=False)
    for other in (TensorLoader(X, y, batch_size=16, seed=5), TensorLoader(X[:62], y[:62], batch_size=16)):
        with pytest.raises(ValueError, match="rows"):
            train(nn.Linear(4, 2), other, cross_entropy, recipe, checkpoint=file, progress=False)
    holes = TensorLoader(torch.full_like(X, torch.nan), y, batch_size=16)
    with pytest.raises(FloatingPointError, match="validation loss is nan"):
        train(nn.Linear(4, 2), TensorLoader(X, y, batch_size=16), cross_entropy, recipe, holes, progress=False)



@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_trains_in_every_precision(precision: str) -> None:
    torch.manual_seed(0)
    X = torch.randn(512, 16)
    y = (X[:, 0] > 0).long()
    model, data = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2)).cuda(), TensorLoader(X, y, batch_size=32)
    history = train(model, data, cross_entropy, Recipe(epochs=5, lr=1e-2, precision=precision))
    assert history.train_loss[-1] < history.train_loss[0] / 2
