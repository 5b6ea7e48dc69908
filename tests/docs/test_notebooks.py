"""The notebooks: their form always, and each from end to end where `make test-notebooks` asks for it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(path: Path, kind: str = "code") -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def test_every_question_of_the_gpu_experiments_has_its_notebook() -> None:
    names = ["quick_validation", "layer_sweep", "real_gptq", "cross_model", "mmlu_eval", "your_languages"]
    assert [path.name for path in NOTEBOOKS] == [f"{number:02}_{name}.ipynb" for number, name in enumerate(names, 1)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_what_running_it_adds(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    document = json.loads(text)
    assert text == json.dumps(document, indent=1, ensure_ascii=False) + "\n"  # as written by hand: diffs stay readable
    assert [cell["id"] for cell in document["cells"]] == [f"cell-{i:02d}" for i in range(len(document["cells"]))]
    for cell in cells(path):
        assert (cell["outputs"], cell["execution_count"], cell["metadata"]) == ([], None, {})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_one_cell_is_to_be_edited_and_the_install_line_the_gpu_and_the_forecast_follow_it(path: Path) -> None:
    sources = ["".join(cell["source"]) for cell in cells(path)]
    assert ["Edit this cell, and no other" in source for source in sources] == [True] + [False] * (len(sources) - 1)
    assert "%pip install" in sources[1]
    assert "torch.cuda" in sources[2]
    assert "quant-fairness plan" in sources[3]


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_to_its_end(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))  # the kernel has another working folder
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        errors = [output for output in cell.outputs if output.output_type == "error"]
        assert not errors, (number, errors)
    printed = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any(output.output_type == "stream" and output.name == "stdout" for output in printed)
