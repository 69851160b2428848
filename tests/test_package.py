"""The wheel works without the checkout: commands, configurations, measured rates and kernel sources."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import tiny

ROOT = Path(__file__).resolve().parent.parent
PACKAGED = ["pyproject.toml", "README.md", "LICENSE", "apc", "configs", "benchmarks/results.csv"]
BUILD_EDITABLE = "import sys; from hatchling.build import build_editable; build_editable(sys.argv[1])"


def run(folder: Path, *words: str | Path, exit_code: int = 0) -> str:
    """stdout of a command that runs in `folder`, where nothing but its own environment says where packages are."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == exit_code, f"{words}\n{finished.stdout[-2000:]}\n{finished.stderr[-2000:]}"
    return finished.stdout


def install(wheel: Path, folder: Path) -> Path:
    """The Python of a new environment that has this wheel, and every other package of the environment of the tests."""
    venv.EnvBuilder(symlinks=True).create(folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site_packages)
    # Python ignores .pth files in folders that are appended to sys.path, so the checkout can't be imported by them.
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "others.pth").write_text(f"import sys; sys.path.extend({others})\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(ROOT, sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("installed"))


def test_the_wheel_has_every_file_of_the_package(wheel):
    archive = zipfile.ZipFile(wheel)
    packed = {name: archive.read(name) for name in archive.namelist() if name.startswith("apc/")}
    sources = {str(path.relative_to(ROOT)): path for path in (ROOT / "apc").rglob("*.*")}
    sources |= {f"apc/{path.relative_to(ROOT)}": path for path in (ROOT / "configs").rglob("*.yaml")}
    sources["apc/estimate/results.csv"] = ROOT / "benchmarks" / "results.csv"
    expected = {name: path.read_bytes() for name, path in sources.items() if "__pycache__" not in name}
    assert packed.keys() == expected.keys() and packed == expected
    assert {"apc/ops/cuda/assign_sm90.cu", "apc/ops/cuda/barriers_sm90.cuh"} <= packed.keys()


def test_an_installed_package_is_imported_and_finds_its_files(python, tmp_path):
    script = (
        "import apc; from importlib.metadata import entry_points; from apc.config.load import CONFIGS;"
        "from apc.estimate.measured_rates import RESULTS, rate; rate('assign', 'apc b1', 2048, 14336);"
        "(command,) = entry_points(group='console_scripts', name='apc'); command.load();"
        "print(apc.__file__, CONFIGS, RESULTS, sep='\\n')"
    )
    places = [Path(line) for line in run(tmp_path, python, "-c", script).splitlines()]
    assert len(places) == 3 and all(place.is_relative_to(python.parents[1]) for place in places)


def test_commands_that_only_read_work_in_an_empty_folder(python, tmp_path):
    assert run(tmp_path, python, "-m", "apc", "--version").startswith("apc ")
    (sweep,) = python.parents[1].rglob("sweep/demo.yaml")
    assert "cluster.k=" in run(tmp_path, python, "-m", "apc", "sweep", sweep, "--dry-run")
    table = run(tmp_path, python, "-m", "apc", "train", "experiment=paper", "--dry-run")
    assert "GiB" in table or "GB" in table
    assert not list(tmp_path.iterdir())


def test_a_run_from_text_to_results(python, tmp_path):
    folder, place = tmp_path / "files", tmp_path / "empty"
    folder.mkdir(), place.mkdir()
    tiny.make_workplace(folder)
    words = tiny.tiny_overrides(folder, policies="[dense,oracle]")
    run(place, python, "-m", "apc", "train", *words)
    results = json.loads((folder / "runs" / "run" / "results.json").read_text())
    assert [record["policy"] for record in results["policies"]] == ["dense", "oracle"]
    assert not list(place.iterdir())


def test_a_clone_called_apc_does_not_hide_the_package_from_a_script_beside_it(tmp_path):
    """Python sees the clone's folder as a package without code; the editable install must come before it."""
    clone = tmp_path / "apc"
    for name in PACKAGED:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, clone / name)
    run(clone, sys.executable, "-c", BUILD_EDITABLE, tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    python = install(wheel, tmp_path / "installed")
    (tmp_path / "script.py").write_text("import apc; print(apc.__file__, apc.load_config().seed)")
    assert run(tmp_path, python, "script.py").split() == [str(clone / "apc" / "__init__.py"), "0"]
