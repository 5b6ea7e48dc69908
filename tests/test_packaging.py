"""The wheel holds everything that runs: built, unpacked into an empty folder, imported and used from there."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = """
import quant_fairness, quant_fairness_kernels.packing
from quant_fairness_plugin.model.resolve import resolve_model
from quant_fairness_plugin.texts.load import load_texts
assert resolve_model("demo").layers == 12 and resolve_model("demo-gpt2").layers == 12
assert len(load_texts("bundled")) == 180
assert "quick_sweep" in dir(quant_fairness)
print(quant_fairness.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # Without isolation: the tests must not need the network, and setuptools is in the environment.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    with (ROOT / "pyproject.toml").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # workers that build at once share the folder `build`
        subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_works_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n{USE}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(site)


def test_the_wheel_holds_the_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for needed in (
        "quant_fairness_plugin/py.typed",
        "quant_fairness_plugin/texts/bundled/parallel.jsonl",
        "quant_fairness_plugin/texts/bundled/parallel.sha256",
        "quant_fairness_plugin/model/bundled/demo/model.safetensors",
        "quant_fairness_plugin/model/bundled/demo-gpt2/model.safetensors",
        "quant_fairness_plugin/export/templates/card.md.j2",
    ):
        assert needed in names
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {
        "quant_fairness.py",
        "quant_fairness_kernels",
        "quant_fairness_plugin",
    }


def test_every_package_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = {name for name in project["tool"]["setuptools"]["packages"] if name.startswith("quant_fairness_plugin")}
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "quant_fairness_plugin").rglob("__init__.py")}
    assert listed == {".".join(folder.parts) for folder in folders}
