"""What pip installs: every sub-package, every data file, and light enough to import."""

import configparser
import subprocess
import sys
import zipfile

import gates
import pytest

pytestmark = pytest.mark.xdist_group("packaging")  # one worker, so that fixtures are made once


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    "The files of a wheel built from a copy of the tracked tree."
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=gates.ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\0"
    )
    for name in filter(None, tracked):
        target = folder / "src" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (gates.ROOT / name).is_file():
            target.write_bytes((gates.ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "src")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (built,) = (folder / "dist").glob("*.whl")
    return set(zipfile.ZipFile(built).namelist())


def test_wheel_holds_every_module_and_data_file(wheel):
    wanted = {
        str(p.relative_to(gates.ROOT))
        for p in (gates.ROOT / "bigmodel_nb").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert wanted <= wheel, f"missing from the wheel: {sorted(wanted - wheel)}"


def test_wheel_holds_nothing_else(wheel):
    strange = [n for n in wheel if not n.startswith(("bigmodel_nb/", "bigmodel_nb-"))]
    assert not strange, f"the wheel would install {strange[:5]} beside the package"


def test_extras():
    from importlib.metadata import metadata

    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(gates.ROOT / "settings.ini", encoding="utf-8")
    want = {k.removesuffix("_requirements") for k in cfg["DEFAULT"] if k.endswith("_requirements")} | {"all"}
    assert set(metadata("bigmodel_nb").get_all("Provides-Extra")) == want


def test_requirements_have_no_spaces():
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(gates.ROOT / "settings.ini", encoding="utf-8")
    from packaging.requirements import Requirement

    for key, value in cfg["DEFAULT"].items():
        if key.endswith("requirements"):
            for word in value.split():
                assert Requirement(word).name, f"{key}: {word!r} is no requirement; write it without spaces"
