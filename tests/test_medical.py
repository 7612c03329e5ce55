"""The main job: repeatable, true to its targets, the same in its parts."""

import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("medical")  # one worker, so that fixtures are made once

TIMES = {"latency_ratio", "latency_ms", "requests_per_second", "ledger_balance"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    "The whole case twice with one seed, on all patients."
    from bigmodel_nb.cases.medical import run

    folders = [tmp_path_factory.mktemp("medical") / f"run{i}" for i in range(2)]
    for folder in folders:
        run(folder, seed=0)
    return folders


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_same_seed_same_metrics(runs):
    a, b = ({k: v for k, v in metrics(f).items() if k not in TIMES} for f in runs)
    assert a == b


def test_metrics_have_the_promised_shape(runs):
    m = metrics(runs[0])
    promised = {"case", "seed", "rows", "match", "k", "reidentification", "auroc", "epsilon", "delta", "size_ratio"} | TIMES
    assert set(m) == promised | {"stop"}
    assert set(m["rows"]) == {"read", "quarantined", "merged", "loaded"}
    assert set(m["auroc"]) == {"baseline", "model", "private", "compressed"}
    assert all(a["low"] <= a["value"] <= a["high"] for a in m["auroc"].values())


def test_targets(runs):
    m = metrics(runs[0])
    assert m["match"]["f1"] >= 0.95
    assert m["reidentification"]["before"] >= 5 * m["reidentification"]["after"]
    assert m["epsilon"] <= 3 and m["k"] >= 10
    assert m["auroc"]["model"]["value"] - m["auroc"]["private"]["value"] <= 0.05
    assert abs(m["auroc"]["compressed"]["value"] - m["auroc"]["private"]["value"]) <= 0.005
    assert m["size_ratio"] >= 4


def test_report_needs_nothing_from_elsewhere(runs):
    from bigmodel_nb.cases.report import requests

    page = (runs[0] / "report.html").read_text(encoding="utf-8")
    assert requests(page) == []
    for title in ("Targets", "The bill", "When to abandon this model"):
        assert f">{title}</h2>" in page
    assert not re.search(r">\s*nan\b|None<", page)


def test_identities_are_in_no_file_but_the_exports_and_the_sealed_one(runs):
    import pandas as pd

    names = pd.read_parquet(runs[0] / "exports" / "truth.parquet").family_name.dropna().unique()
    rare = [n.encode() for n in names if len(n) > 9][:300]
    assert len(rare) > 50
    for path in runs[0].rglob("*"):
        if path.is_file() and "exports" not in path.parts:
            data = path.read_bytes()
            assert not [n for n in rare if n in data], f"a family name stands in {path.name}"


def test_keys_are_for_their_owner(runs):
    for key in (runs[0] / "keys").iterdir():
        assert key.stat().st_mode & 0o077 == 0, key.name


def test_sealed_identities_open_with_the_key(runs, tmp_path):
    import pandas as pd

    from bigmodel_nb.privacy.encrypt import decrypt_file, load_key

    plain = tmp_path / "people.parquet"
    said = decrypt_file(runs[0] / "identified.parquet.sealed", plain, load_key(runs[0] / "keys" / "reader.key"))
    people = pd.read_parquet(plain)
    assert said["rows"] == len(people) and people.pseudonym.is_unique


def test_release_is_k_anonymous_by_counting(runs):
    import pandas as pd

    table = pd.read_csv(runs[0] / "release.csv", dtype=str)
    groups = table.groupby(["birth_date", "sex", "postcode"])
    assert groups.size().min() >= 10 and groups.died.nunique().min() >= 2


def test_served_file_alone_answers(runs):
    import numpy as np

    from bigmodel_nb.cases.cohort import encode
    from bigmodel_nb.serving.engine import Engine

    engine = Engine(runs[0] / "model.onnx")
    young, old = engine.predict(encode([{"age": 30, "male": 0}, {"age": 85, "male": 1, "heart_failure": 1}]))
    assert 0 <= young < old <= 1 and np.isfinite([young, old]).all()
