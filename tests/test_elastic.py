"""Elastic runs killed from outside, and launch files held against those who will read them."""

import copy
import json
import os
import re
import shlex
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from bigmodel_nb.training.batches import TensorLoader
from bigmodel_nb.training.checkpoint import differing
from bigmodel_nb.training.elastic import (
    Agents,
    elastic_gradient,
    free_port,
    kubernetes_job,
    slurm_script,
    torchrun_command,
    train_elastic,
    wait_for,
)

SCRIPT = """
import sys, time
from pathlib import Path
import torch
from bigmodel_nb.training.batches import TensorLoader
from bigmodel_nb.training.elastic import crew, train_elastic

folder = Path(sys.argv[1])
given = torch.load(folder / "given.pt", weights_only=False)
model = given["model"]

def loss(model, batch):
    return torch.nn.functional.mse_loss(model(batch[0]), batch[1])

with crew(timeout=60) as link:
    def tell(step, value):
        time.sleep(.02)
        with open(folder / f"steps{link.rank}", "a") as diary:
            print(step, file=diary)
    loader, steps = TensorLoader(*given["data"], batch_size=12, seed=3), torch.optim.AdamW(model.parameters(), .01)
    train_elastic(model, loader, loss, steps, 60,
                  folder / "run.pt", link, shards=4, save_every=7, on_step=tell)
"""


def mean_squares(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


@pytest.fixture
def alone():
    "This process as a crew of one."
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield SimpleNamespace(rank=0, size=1, device=torch.device("cpu"))
    dist.destroy_process_group()


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(.3), nn.Linear(8, 1))
    x = torch.randn(50, 6)
    return model, (x, x[:, :1] * 2 + .1 * torch.randn(50, 1))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 50))
def test_gradient_is_the_same_however_many_compute_it(monkeypatch, size, shards, rows):
    "With dropout; the sum over workers is done here in place of all_reduce."
    model, data = small()
    loader, order = TensorLoader(*data, batch_size=50), torch.randperm(50)[:rows]
    monkeypatch.setattr(dist, "all_reduce", lambda flat: None)
    def of(rank, size):
        link = SimpleNamespace(rank=rank, size=size, device=torch.device("cpu"))
        value = elastic_gradient(model, loader, order, mean_squares, shards, link, seed=5)
        return torch.cat([torch.tensor([value]), *(p.grad.flatten() for p in model.parameters())])
    assert torch.allclose(sum(of(rank, size) for rank in range(size)), of(0, 1), atol=1e-6)


def test_resume_anywhere_is_bit_equal_and_foreign_checkpoints_are_refused(alone, tmp_path):
    model, data = small()
    def run(steps, path, model=model, batch_size=12):
        copied = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(copied.parameters(), .01)
        loader = TensorLoader(*data, batch_size=batch_size)
        return copied, train_elastic(copied, loader, mean_squares, optimizer, steps, tmp_path / path, alone, save_every=3)
    whole, losses = run(30, "whole.pt")
    for stop in (1, 3, 5, 13, 29):
        run(stop, f"{stop}.pt")
        again, found = run(30, f"{stop}.pt")
        assert found == losses and not differing(whole.state_dict(), again.state_dict())
    with pytest.raises(ValueError, match="another model: tensor '0.weight'"):
        run(40, "whole.pt", nn.Sequential(nn.Linear(6, 1)))
    with pytest.raises(ValueError, match="with batches 5, this one has 4"):
        run(40, "whole.pt", batch_size=16)
    (tmp_path / "torn.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:500])
    with pytest.raises(ValueError, match="torn.pt is damaged"):
        run(40, "torn.pt")


def wait_until(done, seconds=60):
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit
        time.sleep(.01)


def test_killed_twice_ends_with_the_bits_of_an_undisturbed_run(alone, tmp_path):
    "Kill -9 of worker 0, which saves, and then of worker 1; the oracle is one process with the same shards."
    (tmp_path / "train.py").write_text(SCRIPT)
    model, data = small()
    torch.save({"model": model, "data": data}, tmp_path / "given.pt")
    command = torchrun_command(tmp_path / "train.py", tmp_path, workers=2, endpoint=f"127.0.0.1:{free_port()}", max_restarts=2)
    with Agents(command) as agents:
        for victim, at in ((0, 17), (1, 40)):
            diary = tmp_path / "steps0"
            wait_until(lambda: diary.exists() and len(diary.read_text().split()) >= at)  # noqa: B023
            worker = next(w for w in agents.workers() if w.environ()["RANK"] == str(victim))
            worker.kill()
        wait_for(agents, 120)
        assert len(agents.workers()) == 0
    state = torch.load(tmp_path / "run.pt")
    optimizer = torch.optim.AdamW(model.parameters(), .01)
    losses = train_elastic(model, TensorLoader(*data, batch_size=12, seed=3), mean_squares, optimizer, 60, tmp_path / "one.pt",
                           alone, save_every=60)
    assert state["losses"] == pytest.approx(losses, abs=1e-5) and len(losses) == 60
    assert max((state["weights"][k] - w).abs().max() for k, w in model.state_dict().items()) < 1e-5
    steps = [int(s) for s in (tmp_path / "steps0").read_text().split()]
    assert sorted(set(steps)) == list(range(1, 61)) and len(steps) > 60  # some were done again


def test_a_worker_that_always_dies_ends_the_run_by_name(tmp_path):
    (tmp_path / "die.py").write_text("import os; os.kill(os.getpid(), 9)")
    command = torchrun_command(tmp_path / "die.py", workers=1, endpoint=f"127.0.0.1:{free_port()}", max_restarts=1)
    with Agents(command) as agents, pytest.raises(RuntimeError, match="last restart: a worker was killed by signal 9"):
        wait_for(agents, 60)


def test_no_port_left_is_said(monkeypatch):
    def bind(self, address):
        raise OSError(98, "Address already in use")
    monkeypatch.setattr("socket.socket.bind", bind)
    with pytest.raises(OSError, match="no free port on 127.0.0.1"):
        free_port()


# What `man sbatch` (Slurm 24) calls them, of those that a training job may want.
SBATCH = {"job-name": r"[\w.-]+", "nodes": r"\d+", "ntasks-per-node": r"\d+", "cpus-per-task": r"\d+", "gpus-per-node": r"\d+",
          "time": r"\d+", "output": r"\S+", "open-mode": "append|truncate", "requeue": None}
words = st.lists(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=12), max_size=4)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 64), st.integers(1, 16), st.booleans(), words)
def test_slurm_script_says_and_does_what_was_asked(tmp_path, nodes, workers, gpus, arguments):
    "Bash runs it, with programs in Slurm's place that write down how they were called."
    text = slurm_script("/shared/my train.py", *arguments, nodes=nodes, workers=workers, minutes=90, gpus=gpus)
    directives = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    options = dict(re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(.*))?", line).groups() for line in directives)
    for name, value in options.items():
        assert re.fullmatch(SBATCH[name], value) if SBATCH[name] else value is None
    assert (options["nodes"], options["ntasks-per-node"]) == (str(nodes), "1") and ("gpus-per-node" in options) == gpus
    assert text.index("#SBATCH --requeue") < text.index("set -euo")  # sbatch stops reading at the first command
    (tmp_path / "job.sh").write_text(text)
    record = f"printf '%s\\0' \"$@\" > {shlex.quote(str(tmp_path / 'called'))}"
    for name, body in (("scontrol", "for n in n07 n{08..99}; do echo $n; done"), ("srun", record)):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[07-08]", "SLURM_JOB_ID": "123"}
    subprocess.run(["bash", tmp_path / "job.sh"], env=environment, check=True, timeout=20)
    called = (tmp_path / "called").read_text().split("\0")[:-1]
    wanted = torchrun_command("/shared/my train.py", *arguments, workers=workers, nodes=nodes, endpoint="n07:29500", run_id="123")
    assert called == ["--kill-on-bad-exit=1", "python", *wanted]


@pytest.mark.parametrize("gpus", [True, False])
def test_kubernetes_job_agrees_with_itself(gpus):
    text = kubernetes_job("/shared/train.py", "a b", nodes=3, workers=2, image="i:1", claim="disk", gpus=gpus, name="my-run")
    service, job = json.loads(text)["items"]
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert (job["spec"]["completions"], job["spec"]["parallelism"], job["spec"]["completionMode"]) == (3, 3, "Indexed")
    wanted = torchrun_command("/shared/train.py", "a b", workers=2, nodes=3, endpoint="my-run-0.my-run:29500", run_id="my-run")
    assert container["command"] == ["python", *wanted]
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == gpus
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert service["spec"]["selector"] == job["spec"]["template"]["metadata"]["labels"] and service["spec"]["clusterIP"] == "None"


@pytest.mark.parametrize("version", ["1.27", "1.32", "1.36"])
def test_kubernetes_takes_the_files(version):
    "Strictly against the schemas that Kubernetes publishes; a misspelt field is refused."
    validate = pytest.importorskip("kubernetes_validate").validate
    items = json.loads(kubernetes_job("/shared/train.py", nodes=2, workers=8, image="i:1", claim="disk"))["items"]
    for item in items:
        validate(item, version, strict=True)
    items[1]["spec"]["completionmode"] = "Indexed"
    with pytest.raises(Exception, match="completionmode"):
        validate(items[1], version, strict=True)


def test_nothing_is_left_behind(tmp_path):
    (tmp_path / "sleep.py").write_text("import time; time.sleep(100)")
    command = torchrun_command(tmp_path / "sleep.py", workers=2, nodes=1, endpoint=f"127.0.0.1:{free_port()}")
    with Agents(command) as agents:
        wait_until(lambda: len(agents.workers()) == 2)
        born = [w.pid for w in agents.workers()]
        with pytest.raises(TimeoutError, match="node 0 did not end within 0.2 s"):
            wait_for(agents, .2)
    commands = [Path(f"/proc/{pid}/cmdline") for pid in born]
    assert not any(file.exists() and b"sleep.py" in file.read_bytes() for file in commands)
