"""Parallel training equals one process, byte by byte as its formulas say, and leaves nothing behind when it fails."""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from bigmodel_nb.training import ring  # noqa: E402
from bigmodel_nb.training.parallel import (  # noqa: E402
    SCHEMES,
    Task,
    differing_tensors,
    expected_bytes,
    expected_memory,
    new_model,
    tensor,
    train_scheme,
)
from bigmodel_nb.training.ring import (  # noqa: E402
    Wire,
    all_gather,
    buckets,
    exposed_seconds,
    fit_wire,
    in_threads,
    launch,
    reduce_gradients,
    reduce_scatter,
    ring_all_reduce,
    ring_bytes,
    root_all_reduce,
    shares,
)

pytestmark = [
    pytest.mark.xdist_group("parallel"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bytes are counted as Linux counts them"),
]
MODULE = "bigmodel_nb.training.parallel"
TASKS = {2: Task(dtype="float64"), 4: Task(dtype="float64", layers=1)}
quick = settings(max_examples=60, deadline=None)


# --- the ring, over threads ------------------------------------------------------------------------------------------


@quick
@given(st.integers(2, 5), st.integers(0, 300), st.sampled_from([torch.float32, torch.float64, torch.int64]), st.integers(0, 99))
def test_ring_sums_and_sends_what_the_formula_says(n, length, dtype, seed):
    source = torch.Generator().manual_seed(seed)
    vectors = [(torch.randn(length, generator=source) * 100).to(dtype) for _ in range(n)]

    def work(link):
        x = vectors[link.rank].clone()
        return x, ring_all_reduce(x, link), link.sent

    done = in_threads(work, n)
    exact = torch.stack([v.double() for v in vectors]).sum(0)
    for rank, (x, told, sent) in enumerate(done):
        assert told == sent == ring_bytes(length, rank, n, dtype.itemsize)
        assert torch.equal(x, done[0][0])
        assert torch.allclose(x.double(), exact, rtol=1e-5, atol=1e-3)
        assert abs(told - 2 * (n - 1) * length * dtype.itemsize / n) < 2 * dtype.itemsize
        if length % n == 0:
            assert told * n == 2 * (n - 1) * length * dtype.itemsize
    assert sum(told for _, told, _ in done) == 2 * (n - 1) * length * dtype.itemsize


@quick
@given(st.integers(1, 5), st.integers(0, 60))
def test_the_two_halves_do_their_half(n, length):
    cut = shares(length, n)
    assert [i for s in cut for i in range(length)[s]] == list(range(length))

    def work(link):
        x = torch.arange(float(length)) * (link.rank + 1)
        reduce_scatter(x, link)
        own = x[cut[link.rank]].clone()
        x = torch.full((length,), -1.0)
        x[cut[link.rank]] = own
        all_gather(x, link)
        return x

    for x in in_threads(work, n):
        assert torch.equal(x, torch.arange(float(length)) * n * (n + 1) / 2)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_root_carries_the_load(n):
    def work(link):
        x = torch.full((7,), float(link.rank))
        return x, root_all_reduce(x, link), link.sent

    for rank, (x, told, sent) in enumerate(in_threads(work, n)):
        assert torch.equal(x, torch.full((7,), n * (n - 1) / 2))
        assert told == sent == 28 * (1 if rank else n - 1)


@quick
@given(st.lists(st.integers(1, 50), max_size=12), st.integers(0, 300))
def test_buckets_keep_every_tensor_once_and_their_limit(lengths, limit):
    tensors = [torch.zeros(length) for length in lengths]
    groups = buckets(tensors, limit)
    assert [id(t) for group in groups for t in group] == [id(t) for t in reversed(tensors)]
    assert all(len(group) == 1 or sum(t.nbytes for t in group) <= limit for group in groups)


@pytest.mark.parametrize("limit", [0, 100, 2**20])
def test_reduced_gradients_are_means_in_any_bucket(limit):
    torch.manual_seed(0)
    nets = [torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2)) for _ in range(3)]
    for net in nets:
        for p in net.parameters():
            p.grad = torch.randn_like(p)
    wanted = [torch.stack(g).mean(0) for g in zip(*([p.grad.clone() for p in net.parameters()] for net in nets), strict=True)]
    in_threads(lambda link: reduce_gradients(nets[link.rank].parameters(), link, limit), 3)
    for net in nets:
        assert all(torch.allclose(p.grad, w, atol=1e-6) for p, w in zip(net.parameters(), wanted, strict=True))


@quick
@given(st.floats(1e-6, 1e-3), st.floats(1e7, 1e11))
def test_fit_finds_the_wire_that_made_the_times(alpha, beta):
    wire = Wire(alpha, beta)
    grid = [(alpha * beta * scale, n) for scale in (0.1, 1, 10, 100) for n in (2, 5)]
    found = fit_wire([m for m, _ in grid], [n for _, n in grid], [wire.ring_seconds(m, n) for m, n in grid])
    assert found.alpha == pytest.approx(alpha, rel=1e-6) and found.beta == pytest.approx(beta, rel=1e-6)


def test_overlap_never_beats_the_last_bucket_and_never_loses_to_one_piece():
    wire = Wire(1e-5, 1e9)
    waits = [exposed_seconds(0.1, 10**8, bucket, 4, wire) for bucket in (10**6, 10**7, 10**8)]
    assert waits[-1] == pytest.approx(wire.ring_seconds(10**8, 4))
    assert all(wire.ring_seconds(10**6, 4) <= wait <= waits[-1] + 1e-12 for wait in waits)


# --- real processes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def me():
    "This process as a world of its own, for the oracle."
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ring.ProcessLink()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=TASKS)
def run(request):
    n, task = request.param, TASKS[request.param]
    schemes = [name for name in SCHEMES if name != "single" and (name, n) != ("fsdp", 4)]
    return n, task, launch(MODULE, n, "--dtype", task.dtype, "--layers", task.layers, "--schemes", *schemes)


def test_every_scheme_equals_one_process_after_50_steps(me, run):
    n, task, answers = run
    one = train_scheme("single", task, me)
    assert task.steps == 50 and len(answers) == n
    for name, result in answers[0].items():
        assert set(result["model"]) == set(one["model"])
        for key, weight in one["model"].items():
            assert (result["model"][key] - weight).abs().max() < 1e-9, (name, key)
        for rank in answers:
            assert (rank[name]["losses"] - one["losses"]).abs().max() < 1e-9, name


def test_memory_and_bytes_follow_their_formulas(run):
    n, task, answers = run
    model = new_model(task)
    weights = sum(p.nbytes for p in model.parameters())
    whole = sum(p.nbytes for name, p in model.named_parameters() if "_proj" not in name)
    for name in answers[0]:
        memory, sent = expected_memory(name, weights, n, whole if name == "tensor" else 0), expected_bytes(name, task, weights, n)
        for rank in answers:
            assert {kind: rank[name][kind] for kind in memory} == memory, name
            assert 0 <= rank[name]["sent"] - sent < 0.05 * sent, name


RING = """
import torch, torch.distributed as dist
from bigmodel_nb.training.ring import answer, kernel_bytes, ring_all_reduce, ring_bytes, worker
with worker() as link:
    rows = []
    for length in (1, 2, 1000, 4321, 100_000):
        x = torch.randn(length, generator=torch.Generator().manual_seed(link.rank + length))
        theirs, before, kernel = x.clone(), link.sent, kernel_bytes()
        told = ring_all_reduce(x, link)
        kernel = kernel_bytes() - kernel
        dist.all_reduce(theirs)
        rows.append([told, link.sent - before, ring_bytes(length, link.rank, link.size), kernel, float((x - theirs).abs().max())])
    answer([link.size, rows])
"""


def test_the_same_script_runs_on_two_machines(tmp_path):
    "Two torchruns that meet at an address, as on two machines; and the kernel sees what we say we send."
    (tmp_path / "ring.py").write_text(RING)
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    call = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    call += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "pair", "--local-addr", "127.0.0.1", str(tmp_path / "ring.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "BIGMODEL_ANSWERS": str(tmp_path)}
    machines = [subprocess.Popen(call, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    try:
        for machine in machines:
            said = machine.communicate(timeout=90)[0].decode(errors="replace")
            assert machine.returncode == 0, said[-2000:]
    finally:
        for machine in machines:
            ring.end_family(machine, patience=5)
    for rank in range(2):
        size, rows = torch.load(tmp_path / f"{rank}.pt")
        assert size == 2
        for told, link, formula, kernel, off in rows:
            assert told == link == formula and off < 1e-6
            assert 0 < kernel - told < 1000
        assert len({kernel - told for told, _, _, kernel, _ in rows[2:]}) == 1


# --- failures --------------------------------------------------------------------------------------------------------


def children() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE}


def gone(folder) -> bool:
    "Whether all workers that wrote their number into the folder have ended."
    return not any(psutil.pid_exists(int(file.read_text())) for file in folder.glob("*.pid"))


NUMBER = "import os, sys, time, pathlib; pathlib.Path(sys.argv[1], os.environ['RANK'] + '.pid').write_text(str(os.getpid()))\n"


def test_a_worker_that_raises_is_named_and_no_process_stays(tmp_path):
    script = tmp_path / "raises.py"
    script.write_text(f"""{NUMBER}
import torch
from bigmodel_nb.training.ring import ring_all_reduce, worker
with worker() as link:
    if link.rank == 1:
        raise ValueError("row 7 of shard 1 has no label")
    ring_all_reduce(torch.ones(4), link)
""")
    before = children()
    with pytest.raises(RuntimeError, match="worker 1 failed first: ValueError: row 7 of shard 1 has no label"):
        launch(script, 2, tmp_path)
    assert children() <= before and gone(tmp_path)


def test_a_killed_worker_is_named_by_its_signal(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(NUMBER + f"if os.environ['RANK'] == '2': os.kill(os.getpid(), {int(signal.SIGKILL)})\ntime.sleep(60)\n")
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="worker 2 was killed by signal 9"):
        launch(script, 3, tmp_path)
    assert time.monotonic() - start < 55 and gone(tmp_path)


def test_a_script_that_cannot_start_says_why(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("import no_such_module_anywhere\n")
    with pytest.raises(RuntimeError, match="no worker could start: ModuleNotFoundError: No module named 'no_such_module"):
        launch(script, 2)


def test_a_run_that_hangs_is_ended(tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text(NUMBER + "time.sleep(600)\n")
    before = children()
    with pytest.raises(TimeoutError, match="2 workers of hangs.py did not end within 9 s"):
        launch(script, 2, tmp_path, timeout=9)
    assert children() <= before and gone(tmp_path)


def test_what_cannot_work_is_refused_before_anything_starts(monkeypatch):
    place = type("Place", (), {"rank": 0, "size": 3, "device": torch.device("cpu")})()
    with pytest.raises(ValueError, match="4 attention heads cannot be shared by 3 workers"):
        tensor(TASKS[2], place)
    with pytest.raises(ValueError, match="cannot be shared equally by 3 workers.*multiple of 3"):
        SCHEMES["ring"](TASKS[2], place)
    with socket.create_server(("127.0.0.1", 0)) as door, pytest.raises(OSError, match="is busy"):
        launch("json.tool", 2, port=door.getsockname()[1])
    monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"without torch\.distributed"):
        launch("json.tool", 2)


def test_replicas_that_differ_are_named():
    models = [new_model(TASKS[2]) for _ in range(3)]
    with torch.no_grad():
        models[2].layers[1].mlp.up_proj.weight[0, 0] += 1e-9
    for found in in_threads(lambda link: differing_tensors(models[link.rank], link), 3):
        assert found == ["layers.1.mlp.up_proj.weight"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_schemes_agree_over_nccl(me):
    "The same module, with NCCL."
    one = train_scheme("single", TASKS[2], me)
    for name, result in launch(MODULE, 2, "--dtype", TASKS[2].dtype)[0].items():
        assert (result["losses"] - one["losses"]).abs().max() < 1e-5, name
