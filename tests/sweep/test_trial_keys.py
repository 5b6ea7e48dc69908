"""What a trial's result depends on is in its name: nothing else is ever reused."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quant_fairness_plugin.artifacts import Precision
from quant_fairness_plugin.measure.rows import Row
from quant_fairness_plugin.model.load import LoadedModel, from_loaded, load_model
from quant_fairness_plugin.plans.units import map_units
from quant_fairness_plugin.sweep import jobs, trials
from quant_fairness_plugin.sweep.bank import RtnBank
from quant_fairness_plugin.sweep.execution import Execution
from quant_fairness_plugin.sweep.jobs import Job
from quant_fairness_plugin.sweep.trials import score_plans_resumably
from quant_fairness_plugin.sweep.walk import plan_tree
from tests.sweep.trial_cases import BATCH_TOKENS, GRID, PLANS, Asked, texts
from tests.tiny import write_tiny_model

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tiny_model: Build) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder))


Change = Callable[[pytest.MonkeyPatch], None]


def _versions(name: str) -> Change:
    return lambda patch: patch.setattr(jobs, "package_versions", lambda: trials_versions() | {name: "0"})


def trials_versions() -> dict[str, str]:
    return {name: "1" for name in ("quant-fairness", "torch", "transformers")}


AROUND: dict[str, Change] = {
    "result version": lambda patch: patch.setattr(jobs, "RESULT_VERSION", jobs.RESULT_VERSION + 1),
    "version of this package": _versions("quant-fairness"),
    "version of torch": _versions("torch"),
    "version of transformers": _versions("transformers"),
    "processor": lambda patch: patch.setattr(platform, "machine", lambda: "pdp11"),
    "instructions": lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NONE"),
    "device": lambda patch: patch.setattr(jobs, "describe_device", lambda device: "abacus"),
    "precision of products": lambda patch: patch.setattr(torch, "get_float32_matmul_precision", lambda: "medium"),
}


@pytest.mark.parametrize("change", AROUND)
def test_results_of_other_software_or_hardware_are_not_reused(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(jobs, "package_versions", trials_versions)
    batch = Row("en", 0, (0, 5, 6), 1)
    before = path_of(loaded, tmp_path, [batch])
    assert path_of(loaded, tmp_path, [batch]) == before
    AROUND[change](monkeypatch)
    assert path_of(loaded, tmp_path, [batch]) != before


def path_of(loaded: LoadedModel, work: Path, rows: Sequence[Row], *, batch_tokens: int = 64, threads: int = 1) -> Path:
    units = map_units(loaded)
    job = Job(loaded, plan_tree(PLANS, units), RtnBank(loaded, units, GRID), texts(), threads)
    return trials.open_store(work, job, batch_tokens=batch_tokens).path(rows)


def run(
    loaded: LoadedModel,
    work: Path,
    *,
    plans: dict[str, dict[str, Precision]] = PLANS,
    bank: RtnBank | None = None,
) -> list[int]:
    """Which trials of a sweep were run, because no file had their result."""
    units, executor = map_units(loaded), Asked()
    bank = bank or RtnBank(loaded, units, GRID)
    score_plans_resumably(
        loaded,
        plans,
        texts().choose(["en"]),
        units=units,
        bank=bank,
        batch_tokens=BATCH_TOKENS,
        execution=Execution(work=work, executor=executor),
    )
    return executor.asked


def test_another_model_grid_plan_set_or_way_to_compute_reuses_no_result(
    loaded: LoadedModel, folder: Path, tmp_path: Path
) -> None:
    units = map_units(loaded)
    assert run(loaded, tmp_path) != []
    assert run(loaded, tmp_path) == []
    sibling = tmp_path.parent / "sibling"
    write_tiny_model(sibling, "llama")
    assert run(load_model(str(sibling)), tmp_path) == [], "the same model in another folder is the same model"
    path = sibling / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert run(load_model(str(sibling)), tmp_path) != [], "one bit of a weight"
    assert run(loaded, tmp_path, bank=RtnBank(loaded, units, replace(GRID, group_size=-1))) != []
    assert run(loaded, tmp_path, bank=RtnBank(loaded, units, replace(GRID, symmetric=False))) != []
    assert run(loaded, tmp_path, plans=PLANS | {"mixed": {"layers.0": "int4"}}) != []
    assert run(loaded, tmp_path, plans=PLANS | {"one more": {"layers.0": "int4"}}) != []
    assert run(replace(loaded, storage_dtype=torch.bfloat16), tmp_path) != []
    assert run(load_model(str(folder), dtype=torch.bfloat16), tmp_path) != []
    assert run(loaded, tmp_path) == []


def test_other_tokens_batches_or_threads_reuse_no_result(loaded: LoadedModel, tmp_path: Path) -> None:
    rows = [Row("en", 0, (0, 5, 6), 1)]
    before = path_of(loaded, tmp_path, rows)
    assert path_of(loaded, tmp_path, [Row("en", 0, (0, 5, 7), 1)]) != before
    assert path_of(loaded, tmp_path, [Row("en", 0, (0, 5, 6), 2)]) != before
    assert path_of(loaded, tmp_path, rows * 2) != before
    assert path_of(loaded, tmp_path, rows, batch_tokens=65) != before
    assert path_of(loaded, tmp_path, rows, threads=2) != before
    assert path_of(loaded, tmp_path, [Row("he", 3, (0, 5, 6), 1)]) == before, "the numbers are those of the tokens"


def test_another_attention_reuses_no_result(folder: Path, tmp_path: Path) -> None:
    loaded, rows = load_model(str(folder)), [Row("en", 0, (0, 5, 6), 1)]
    before = path_of(loaded, tmp_path, rows)
    loaded.model.set_attn_implementation("eager")
    assert path_of(loaded, tmp_path, rows) != before


def test_a_model_in_memory_that_has_changed_since_it_was_wrapped_reuses_no_result(folder: Path, tmp_path: Path) -> None:
    files_ = load_model(str(folder))
    memory = from_loaded(files_.model, files_.tokenizer)
    assert run(memory, tmp_path) != []
    assert run(memory, tmp_path) == []
    with torch.no_grad():
        memory.model.get_parameter("model.norm.weight")[0] += 1
    assert run(memory, tmp_path) != []
    memory.model.config.rms_norm_eps *= 2
    assert run(memory, tmp_path) != []
