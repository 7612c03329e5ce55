"""Searches that share a journal: no point twice, no point lost, whoever is killed; and bad input that stops early."""

import json
import math
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("optuna")

from bigmodel_nb.training.queue import Span, queue_of  # noqa: E402
from bigmodel_nb.training.tune import Attempt, best_so_far, best_trial, pareto, read_search, search  # noqa: E402

FEW = settings(max_examples=40, deadline=None)
SPACE = {"x": list(range(6)), "y": ["a", "b"]}
FORK = multiprocessing.get_context("fork")
SPANS = st.builds(
    lambda low, width, log, whole: Span(low, low + width, log, whole),
    st.integers(1, 50),
    st.integers(1, 1000),
    st.booleans(),
    st.booleans(),
)
SPACES = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.one_of(SPANS, st.lists(st.integers(0, 99), min_size=1, max_size=5, unique=True)),
    min_size=1,
    max_size=4,
)


def score(attempt: Attempt) -> float:
    """A known best point, (4, "b")."""
    return -abs(attempt.params["x"] - 4) + (attempt.params["y"] == "b") / 2


def slow(attempt: Attempt) -> float:
    """The same, with time to be killed in."""
    for step in (1, 2, 3):
        time.sleep(0.01)
        attempt.report(step, score(attempt))
    return score(attempt)


def work(storage: Path, method: str = "grid", trials: int | None = None) -> None:
    """What another process does."""
    search(slow, SPACE, method, trials, storage=storage)


def together(*jobs: tuple) -> list:
    """Start processes and wait for all of them."""
    running = [FORK.Process(target=work, args=job) for job in jobs]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    return running


def points(table) -> list[tuple]:
    return list(table[table.state == "complete"][["x", "y"]].itertuples(index=False, name=None))


@FEW
@given(space=SPACES, trials=st.integers(1, 12), seed=st.integers(0, 99))
def test_queue(space, trials, seed):
    """No repeats, inside the space, the longer plan begins with the shorter one."""
    sizes = [s.high - s.low + 1 if isinstance(s, Span) and s.whole else len(s) if isinstance(s, list) else math.inf
             for s in space.values()]
    trials = int(min(trials, math.prod(sizes)))
    plan = queue_of(space, "random", trials, seed)
    assert len({json.dumps(p) for p in plan}) == trials and plan[: trials // 2 + 1] == queue_of(
        space, "random", trials // 2 + 1 if trials > 1 else 1, seed
    )[: trials // 2 + 1]
    for p in plan:
        for name, s in space.items():
            inside = s.low <= p[name] <= s.high if isinstance(s, Span) else p[name] in s
            assert inside and (not isinstance(s, Span) or not s.whole or isinstance(p[name], int))


def test_a_log_span_is_drawn_by_orders_of_magnitude():
    """A third of the draws falls into each of three decades; without log nearly all into the last."""
    for log, share in ((True, 1 / 3), (False, 0.9)):
        drawn = np.array([p["lr"] for p in queue_of({"lr": Span(1e-3, 1, log)}, "random", 900)])
        assert abs((drawn > 0.1).mean() - share) < 0.06


@pytest.mark.parametrize(("method", "trials"), [("grid", None), ("random", 9)])
def test_two_processes_repeat_nothing(tmp_path, method, trials):
    """Two real processes on one journal: every planned point is run exactly once, by both of them."""
    storage = tmp_path / "journal"
    together((storage, method, trials), (storage, method, trials))
    table = read_search(storage)
    planned = [(p["x"], p["y"]) for p in queue_of(SPACE, method, trials)]
    assert sorted(points(table)) == sorted(planned) and len(table) == len(planned)
    lines = [json.loads(line) for line in storage.read_text().splitlines()]
    workers = {str(line["user_attr"]["worker"]) for line in lines if "worker" in (line.get("user_attr") or {})}
    assert len(workers) == 2


def test_kill_at_random_moments(tmp_path):
    """kill -9 of one of two workers, again and again: at most one trial is lost, tried again, and nothing else changes."""
    rng = random.Random(0)
    for k in range(6):
        storage = tmp_path / f"journal{k}"
        victim, other = (FORK.Process(target=work, args=(storage,)) for _ in range(2))
        victim.start()
        other.start()
        time.sleep(rng.uniform(0.05, 0.5))
        victim.kill()
        other.join(60)
        assert other.exitcode == 0
        table = read_search(storage)
        assert sorted(points(table)) == sorted((p["x"], p["y"]) for p in queue_of(SPACE, "grid"))
        assert (table.state == "failed").sum() <= 1 and set(table.state) <= {"complete", "failed"}
        assert (table[table.state == "failed"].why == "its worker died").all()


def test_all_workers_die_and_the_search_goes_on(tmp_path):
    """Both killed; what was finished stays, bit for bit, and the rest is done by the next call."""
    storage = tmp_path / "journal"
    pair = [FORK.Process(target=work, args=(storage,)) for _ in range(2)]
    for process in pair:
        process.start()
    while not storage.exists() or '"state":1' not in storage.read_text():
        time.sleep(0.01)
    for process in pair:
        process.kill()
        process.join()
    before = read_search(storage)
    before = before[before.state == "complete"]
    after = search(slow, SPACE, "grid", storage=storage)
    assert sorted(points(after)) == sorted((p["x"], p["y"]) for p in queue_of(SPACE, "grid"))
    assert (after.state == "failed").sum() <= 2
    assert after.loc[before.index, ["value", "x", "y", "seconds"]].equals(before[["value", "x", "y", "seconds"]])


def test_a_worker_that_dies_anywhere_loses_no_point(tmp_path, monkeypatch):
    """Killed after each line that it writes to the journal, before the first and after the last: every point is run once."""
    from optuna.storages.journal import JournalFileBackend

    append = JournalFileBackend.append_logs
    for line in range(1, 16):
        storage, written = tmp_path / f"journal{line}", []

        def dies(self, logs, line=line, written=written):
            append(self, logs)
            written.append(len(logs))
            if sum(written) >= 14 + line:  # the plan itself takes the first fourteen or so
                os.kill(os.getpid(), signal.SIGKILL)

        with monkeypatch.context() as patched:
            patched.setattr(JournalFileBackend, "append_logs", dies)
            for _ in range(2):  # the second one dies while it sweeps after the first, or soon after
                process = FORK.Process(target=work, args=(storage,))
                process.start()
                process.join(60)
                assert process.exitcode == -signal.SIGKILL
                written.clear()
        after = search(score, SPACE, "grid", storage=storage)
        assert sorted(points(after)) == sorted((p["x"], p["y"]) for p in queue_of(SPACE, "grid"))


def test_a_half_written_line_is_mended(tmp_path):
    """A journal cut anywhere in its last line loses that line only."""
    storage = tmp_path / "journal"
    search(score, SPACE, "grid", storage=storage)
    whole = storage.read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in (start + 1, (start + len(whole)) // 2, len(whole) - 1):
        storage.write_bytes(whole[:cut])
        table = search(score, SPACE, "grid", storage=storage)
        assert sorted(points(table)) == sorted((p["x"], p["y"]) for p in queue_of(SPACE, "grid"))


def kill_myself(attempt: Attempt) -> float:
    """A point that kills whoever tries it, as one that is too large for the memory does."""
    if attempt.params["x"] == 3:
        os.kill(os.getpid(), 9)
    return score(attempt)


def test_a_deadly_point_is_tried_twice_and_no_more():
    """workers=2 replaces what dies; the deadly points fail, the others are done."""
    table = search(kill_myself, {"x": [1, 2, 3], "y": ["a"]}, "grid", workers=2)
    assert sorted(points(table)) == [(1, "a"), (2, "a")]
    assert (table[table.x == 3].state == "failed").all() and (table.x == 3).sum() == 2


def interrupt(attempt: Attempt) -> float:
    raise KeyboardInterrupt


def test_interrupted_trial_waits_again(tmp_path):
    """Ctrl-C gives the point back."""
    with pytest.raises(KeyboardInterrupt):
        search(interrupt, SPACE, "grid", storage=tmp_path / "journal")
    assert sorted(points(search(score, SPACE, "grid", storage=tmp_path / "journal"))) == sorted(
        (p["x"], p["y"]) for p in queue_of(SPACE, "grid")
    )


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_alone_in_memory_a_search_can_be_repeated(method):
    """Same seed, same trials; another seed, others."""
    space = {"x": Span(0.0, 1.0), "k": Span(1, 64, True, True)}

    def run(seed: int) -> list:
        table = search(lambda a: -((a.params["x"] - 0.3) ** 2), space, method, 12, seed=seed)
        return table[["x", "k", "value"]].to_numpy().tolist()

    assert run(1) == run(1) != run(2)


def test_gp_suggests_inside_the_space():
    """The first suggestion of the Gaussian process, after ten draws."""
    table = search(lambda a: -((a.params["x"] - 0.3) ** 2), {"x": Span(0.2, 1.0)}, "gp", 11)
    assert (table.state == "complete").all() and table.x.between(0.2, 1).all()


def test_tpe_learns():
    """On a smooth bowl the second half of a guided search is better than that of a blind one, over seeds."""
    space = {"x": Span(-1.0, 1.0), "y": Span(-1.0, 1.0)}

    def late(method: str, seed: int) -> float:
        table = search(lambda a: -((a.params["x"] - 0.3) ** 2) - a.params["y"] ** 2, space, method, 24, seed=seed)
        return table.value[12:].mean()

    gain = [late("tpe", seed) - late("random", seed) for seed in range(6)]
    assert np.mean(gain) > 2 * np.std(gain, ddof=1) / 6**0.5


def curve(attempt: Attempt) -> float:
    """Learns towards x at once: early scores rank like late ones."""
    for step in range(1, 28):
        attempt.report(step, attempt.params["x"] * (1 - 0.5**step))
    return attempt.params["x"]


@pytest.mark.parametrize("stop", ["halving", "hyperband"])
def test_early_stopping_pays_and_finds(stop):
    """Where early scores tell the truth, the best is found for every seed, for a fraction of the steps."""
    space, shares = {"x": [float(k) for k in range(48)]}, []
    for seed in range(5):
        table = search(curve, space, "grid", stop=stop, steps=27, seed=seed)
        assert best_trial(table).x == 47
        assert set(table.state) == {"complete", "stopped"} and table.joules.notna().all()
        shares.append(table.steps.sum() / (48 * 27))
    assert np.mean(shares) < (0.25 if stop == "halving" else 0.45)


@FEW
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()), min_size=1, max_size=20))
def test_front_and_path_equal_their_definition(rows):
    import pandas as pd

    table = pd.DataFrame(rows, columns=["value", "joules", "ended"]).astype({"value": float})
    table["state"] = np.where(table.pop("ended"), "complete", "stopped")
    ended = table[table.state == "complete"]
    front = pareto(table)
    for row in ended.itertuples():
        beaten = ((ended.value >= row.value) & (ended.joules <= row.joules)
                  & ((ended.value > row.value) | (ended.joules < row.joules))).any()
        same = ((front.value == row.value) & (front.joules == row.joules)).any()
        assert same != beaten
    path = best_so_far(table, "joules")
    for k in range(len(table)):
        done = table[: k + 1].query("state == 'complete'").value
        assert path.paid[k] == table.joules[: k + 1].sum()
        assert path.best[k] == done.max() if len(done) else math.isnan(path.best[k])


def test_costs_are_booked_for_all(tmp_path):
    """Complete, stopped and failed trials carry seconds, joules between their bounds, and money."""

    def objective(attempt: Attempt) -> float:
        if attempt.params["x"] == 13:
            raise ValueError("unlucky")
        return curve(attempt)

    table = search(objective, {"x": [float(k) for k in range(30)]}, "grid", stop="halving", price=3.6, cores=2)
    assert set(table.state) == {"complete", "stopped", "failed"}
    assert (table.joules_low <= table.joules).all() and (table.joules <= table.joules_high).all()
    np.testing.assert_allclose(table.money, table.seconds * 2 * 3.6 / 3600)
    assert table[table.state == "failed"].why.tolist() == ["ValueError: unlucky"]


def test_what_is_refused(tmp_path):
    """Each mistake has its own message."""
    storage = tmp_path / "journal"
    search(score, SPACE, "grid", storage=storage)
    refused = {
        "empty": lambda: search(score, {}, "grid"),
        "unknown method": lambda: search(score, SPACE, "simplex", 3),
        "unknown stop": lambda: search(score, SPACE, "grid", stop="soon"),
        "needs trials": lambda: search(score, SPACE),
        "at most 12": lambda: search(score, SPACE, "random", 13),
        "another space": lambda: search(score, {"x": [1], "y": ["a"]}, "grid", storage=storage),
        "another method": lambda: search(score, SPACE, "random", 3, storage=storage),
        "another seed": lambda: search(score, SPACE, "grid", seed=5, storage=storage),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(RuntimeError, match="all 12 trials failed; the first with the objective returned nan"):
        search(lambda a: math.nan, SPACE, "grid")
    with pytest.raises(RuntimeError, match="step 1 reported inf"):
        search(lambda a: a.report(1, math.inf), SPACE, "grid")
    with pytest.raises(RuntimeError, match="worker processes stopped with code 1"):
        search(Unloadable(), SPACE, "grid", workers=2)
    lines = storage.read_text().splitlines()
    storage.write_text("\n".join([*lines[:3], "rubbish", *lines[3:]]) + "\n")
    with pytest.raises(ValueError, match="journal, line 4 is no journal entry"):
        read_search(storage)


class Unloadable:
    """An objective that no other process can read."""

    def __call__(self, attempt: Attempt) -> float:
        return 0.0

    def __reduce__(self):
        return int, ("not a number",)
