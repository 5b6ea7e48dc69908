"""The examples run as written, each on a tiny model whose damage is known, and stay short enough to be read."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quant_fairness_plugin.export.verify import verify

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
MAKERS = {
    "build_text_set.py", "demo_card.py", "demo_corpus.py", "smollm2.py", "train_demo_model.py", "train_demo_moe.py",
    "train_demo_student.py",
}  # fmt: skip
"""How the bundled texts and models, and the public one, were made: no examples, and trained for hours."""


def written() -> list[Path]:
    """Every file that is an example."""
    return sorted(
        path for kind in ("*.py", "*.sh") for path in EXAMPLES.rglob(kind)
        if path.name not in MAKERS and "notebooks" not in path.parts
    )  # fmt: skip


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[..., None]]:
    """The `main` of an example, in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def main_of(name: str) -> Callable[..., None]:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        main: Callable[..., None] = module.main
        return main

    return main_of


@pytest.mark.parametrize("path", written(), ids=lambda path: path.name)
def test_an_example_has_at_most_40_lines_and_says_how_it_is_run(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert str(path.relative_to(EXAMPLES)) in listed


def test_sweep_finds_the_planted_layer(
    example: Callable[..., Callable[..., None]],
    planted_model: Path,
    planted_file: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example("sweep")(str(planted_model), planted_file)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:5]] == ["none", *["protect"] * 4]
    assert "protect: (2,) stable" in printed
    assert "percentile 100" in printed[-1]


def test_protect_and_quantize_ends_with_a_verified_checkpoint(
    example: Callable[..., Callable[..., None]],
    planted_model: Path,
    planted_file: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example("protect_and_quantize")(str(planted_model), "made", planted_file)
    printed = capsys.readouterr().out.splitlines()
    assert "layers.2.down int8" in printed[0]
    assert "layers.1." not in printed[0]  # which does nothing
    assert [line.split(":")[0] for line in printed[1:3]] == ["en", "he"]
    assert "protection lowered the worst language's KL" in printed[3]
    assert verify(Path("made")).complete


def test_budgets_spend_more_bytes_where_they_may(
    example: Callable[..., Callable[..., None]],
    planted_model: Path,
    planted_file: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example("budgets")(str(planted_model), planted_file)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5
    spent = [float(line.split("}: +")[1].split("%")[0]) for line in printed[:2]]
    assert 0 <= spent[0] <= 5 < spent[1] <= 20


def test_own_languages_are_measured_with_what_keeps_them_from_being_held_out(
    example: Callable[..., Callable[..., None]], planted_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example("own_languages")(str(planted_model), "made")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:2]] == ["de", "en"]
    assert printed[2].startswith(("on ", "the parts of own-texts"))


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The example's package, installed as a user installs it, in a folder that only this module sees."""
    place = tmp_path_factory.mktemp("installed")
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(place)]
    source = tmp_path_factory.mktemp("source") / "own_backend"  # a build leaves files beside its sources
    source.mkdir()
    for path in (EXAMPLES / "own_backend").glob("*.*"):
        (source / path.name).write_bytes(path.read_bytes())
    subprocess.run([sys.executable, "-m", "pip", *install, str(source)], check=True, capture_output=True)
    sys.path.insert(0, str(place))
    importlib.invalidate_caches()
    yield
    sys.path.remove(str(place))


@pytest.fixture(scope="module")
def checkpoint(planted_model: Path, planted_file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the planted model."""
    out = tmp_path_factory.mktemp("checkpoint") / "made"
    line = ["quantize", str(planted_model), "--texts", planted_file, "--protect-layers", "2", "-o", str(out)]
    assert run_line(line) == 0
    return out


def run_line(arguments: list[str]) -> int:
    """The exit status of `quant-fairness` in this process."""
    from quant_fairness_plugin.cli.main import app, run_guarded

    return run_guarded(app, arguments, "quant-fairness")


def test_own_backend_is_found_by_its_name_and_verified_like_ours(
    backend: None, planted_model: Path, planted_file: str, tmp_path: Path
) -> None:
    out = tmp_path / "made"
    line = ["quantize", str(planted_model), "--texts", planted_file, "--protect-layers", "none", "--group-size", "32"]
    assert run_line([*line, "--backend", "nearest", "-o", str(out)]) == 0
    assert verify(out).complete


def gate(checkpoint: Path, bound: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    line = ["bash", str(EXAMPLES / "ci_gate.sh"), str(checkpoint), bound, *options]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


def test_a_language_above_the_bound_fails_the_gate(checkpoint: Path, planted_model: Path, planted_file: str) -> None:
    done = gate(checkpoint, "0.000001", "--model", str(planted_model), "--texts", planted_file, "--prompts", "none")
    assert done.returncode == 6, done.stderr
    assert "passed" in done.stdout


def test_a_damaged_checkpoint_does_not_get_as_far_as_the_gate(checkpoint: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    (damaged / "config.json").write_text("{}", encoding="utf-8")
    assert gate(damaged, "10").returncode == 5
