"""The command line as a newcomer meets it: bad input of every kind, interruptions, and what is left behind."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from bigmodel_nb import cli

SMALL_RUN = "import sys; from bigmodel_nb.cases.medical import run; run(sys.argv[1], seed=1, n_patients=3000)"


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    "A clean record in the canonical schema."
    from bigmodel_nb.cases.hospitals import write_canonical

    folder = tmp_path_factory.mktemp("template") / "clinic"
    write_canonical(folder, seed=3, n_patients=120)
    return folder


def spoil(folder: Path, table: str, **cells: str) -> None:
    "Set cells of data row 5 of one table."
    path = folder / f"{table}.csv"
    frame = pd.read_csv(path, dtype=str)
    for column, value in cells.items():
        frame.loc[4, column] = value
    frame.to_csv(path, index=False)


def drop(folder: Path) -> None:
    path = folder / "events.csv"
    pd.read_csv(path, dtype=str).drop(columns="date").to_csv(path, index=False)


def add(folder: Path) -> None:
    path = folder / "events.csv"
    pd.read_csv(path, dtype=str).assign(mood="good").to_csv(path, index=False)


def twin(folder: Path) -> None:
    path = folder / "patients.csv"
    frame = pd.read_csv(path, dtype=str)
    pd.concat([frame, frame.iloc[[4]]]).to_csv(path, index=False)


def zipped(folder: Path) -> None:
    path = folder / "patients.csv"
    with zipfile.ZipFile(folder / "z", "w") as z:
        z.write(path, "patients.csv")
    (folder / "z").replace(path)


def undecodable(folder: Path) -> None:
    path = folder / "patients.csv"
    lines = path.read_bytes().split(b"\n")
    lines[5] = lines[5] + b"\xff\xfe\x81\x00"
    path.write_bytes(b"\n".join(lines))


BROKEN = {
    "a date in 2199": (
        lambda f: spoil(f, "measurements", date="2199-12-31"),
        ["measurements.csv", "row 5", "date", "2199-12-31", "expected"],
    ),
    "a negative age": (
        lambda f: spoil(f, "patients", birth_date="2020-01-01"),
        ["patients.csv", "row 5", "birth_date", "index date"],
    ),
    "a wrong type": (
        lambda f: spoil(f, "measurements", value="high"),
        ["measurements.csv", "row 5", "value", "'high'", "a number"],
    ),
    "an unknown sex": (lambda f: spoil(f, "patients", sex="X"), ["patients.csv", "row 5", "sex", "'F'"]),
    "an unknown unit": (lambda f: spoil(f, "measurements", unit="furlong"), ["measurements.csv", "row 5", "unit", "'furlong'"]),
    "an unknown test": (lambda f: spoil(f, "measurements", test="HDL"), ["measurements.csv", "row 5", "test", "'HDL'"]),
    "a stranger's row": (lambda f: spoil(f, "events", local_id="NOPE"), ["events.csv", "row 5", "NOPE", "patients.csv"]),
    "a missing column": (drop, ["events.csv", "column 'date' is missing"]),
    "an extra column": (add, ["events.csv", "'mood' is not expected"]),
    "duplicate identifiers": (twin, ["patients.csv", "row 121", "local_id", "row 5 has it"]),
    "an empty file": (lambda f: (f / "events.csv").write_bytes(b""), ["events.csv", "empty"]),
    "a header only": (lambda f: (f / "events.csv").write_text("hospital,local_id,date,event\n"), ["events.csv", "no rows"]),
    "a ZIP called CSV": (zipped, ["patients.csv", "ZIP"]),
    "a wrong encoding": (undecodable, ["patients.csv", "UTF-16"]),
    "a file that is a folder": (lambda f: ((f / "events.csv").unlink(), (f / "events.csv").mkdir()), ["events.csv", "folder"]),
    "a missing file": (lambda f: (f / "events.csv").unlink(), ["events.csv", "does not exist"]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_bad_data_is_refused(what, template, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(template, data)
    change, words = BROKEN[what]
    change(data)
    assert cli.main(["run", "medical", "--data", str(data), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert all(w in message for w in words), message
    assert "Traceback" not in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"], "something was left behind"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read and write everything")
def test_unreadable_file_and_unwritable_out(template, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(template, data)
    (data / "events.csv").chmod(0)
    assert cli.main(["run", "medical", "--data", str(data), "--out", str(tmp_path / "o")]) == 2
    assert "events.csv" in capsys.readouterr().err
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert cli.main(["run", "medical", "--out", str(locked / "o")]) == 2
    assert "locked" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["run", "medcal"], "did you mean 'medical'"),
        (["run", "medical", "--data", "nowhere"], "no such folder"),
        (["data", "fetch", "nafld_patient"], "nafld_patients"),
        (["claims", "--only", "trainnig"], "training"),
        (["course", "no_such_page"], "there are:"),
    ],
)
def test_unknown_names(words, said, capsys, tmp_path):
    extra = ["--out", str(tmp_path / "o")] if words[0] == "run" else []
    assert cli.main([*words, *extra]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_out_that_holds_something_else_is_kept(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    assert cli.main(["run", "medical", "--out", str(tmp_path)]) == 2
    assert "something else" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "ten years of work"


def test_out_below_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert cli.main(["run", "medical", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "file" in capsys.readouterr().err


def test_a_full_disk(tmp_path):
    "A limit on the size of files stands for a disk that fills up in the middle of a run."
    code = "import sys; from bigmodel_nb.cli import main; sys.exit(main())"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "medical", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "disk is full" in done.stderr
    assert list(tmp_path.iterdir()) == []


def start(out: Path) -> subprocess.Popen:
    code = f"import sys; from bigmodel_nb import cli; cli.CASES['medical'] = ('{__name__}_small', ''); sys.exit(cli.main())"
    module = "from bigmodel_nb.cases.medical import run as _run\ndef run(out, **how): return _run(out, n_patients=3000, **how)\n"
    (out.parent / "mod").mkdir(exist_ok=True)
    (out.parent / "mod" / f"{__name__}_small.py").write_text(module)
    env = os.environ | {"PYTHONPATH": str(out.parent / "mod")}
    return subprocess.Popen(
        [sys.executable, "-c", code, "run", "medical", "--out", str(out)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(folder: Path, pattern: str, process: subprocess.Popen) -> None:
    "Wait until the run has written something that matches, inside its hidden folder."
    for _ in range(1200):
        if list(folder.glob(pattern)) or process.poll() is not None:
            return
        time.sleep(0.05)
    raise AssertionError(f"nothing like {pattern} in {sorted(folder.iterdir())}")


def test_interrupted_killed_run_again(tmp_path):
    out = tmp_path / "out"
    ctrl_c = start(out)
    wait_for(tmp_path, ".out.*/exports", ctrl_c)
    ctrl_c.send_signal(signal.SIGINT)
    _, err = ctrl_c.communicate(timeout=120)
    assert ctrl_c.returncode == 130 and "interrupted" in err, err[-1500:]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mod"], "an interrupted run left something"

    killed = start(out)
    wait_for(tmp_path, ".out.*/keys", killed)
    killed.kill()
    killed.communicate(timeout=60)
    assert not out.exists(), "a killed run must not look finished"

    again = start(out)
    _, err = again.communicate(timeout=400)
    assert again.returncode == 0, err[-2000:]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mod", "out"], "the next run clears what the killed one left"
    assert {"report.html", "metrics.json", "ledger.json", "model.onnx"} <= {p.name for p in out.iterdir()}
    assert json.loads((out / "metrics.json").read_text())["case"] == "medical"


def test_results_and_noise_are_apart(capsys):
    assert cli.main(["cases", "--json"]) == 0
    seen = capsys.readouterr()
    assert json.loads(seen.out) and seen.err == ""
    assert cli.main(["data", "--json"]) == 0
    assert {"package", "version", "licence"} <= set(json.loads(capsys.readouterr().out)[0])
