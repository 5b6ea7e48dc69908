"""Where a quantization keeps what it has done, and how much of it in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from quant_fairness_plugin.artifacts import ProtectionPlan, digest, note_circumstances, package_versions
from quant_fairness_plugin.errors import ResourceError
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.outline import unit_shapes
from quant_fairness_plugin.model.provenance import model_identity
from quant_fairness_plugin.model.streamed import StreamedModel
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.memory import count_quantize_needs
from quant_fairness_plugin.quantize.methods.method import Method

ROWS_IN_MEMORY = 256 << 20
"""Bytes of hidden states that a model read block by block has in memory where no budget is given."""

SOLUTION_VERSION = 7
"""Goes up whenever the same work would come out otherwise, so that an older folder is not gone on from."""


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where a quantization keeps what it has done."""

    folder: Path | None = None
    """To go on from after an interruption; None keeps nothing beyond the run."""
    memory_budget: int | None = None
    """Bytes for all that it holds, beside the interpreter and its libraries; None sets no limit."""


def work_folder(
    loaded: LoadedModel,
    plan: ProtectionPlan,
    method: Method,
    calibration: CalibrationSet | None,
    place: Workplace,
    batch_tokens: int,
) -> Path | None:
    """Return the folder to go on from, which is named by all that the results depend on; None where none is wanted."""
    if place.folder is None:
        return None
    question = {
        "version": SOLUTION_VERSION,
        "model": model_identity(loaded),
        "storage": str(loaded.storage_dtype),
        "compute": str(loaded.model.dtype),
        "method": [method.name, method.settings],
        "plan": [asdict(plan.grid), list(plan.protected_layers), dict(plan.overrides), plan.protect_columns],
        "calibration": None if calibration is None else [calibration.sha256, calibration.shares],
        "batch_tokens": batch_tokens,
    }
    circumstances = {
        "device": str(loaded.model.device),
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
    }
    folder = place.folder / f"quantize-{digest(question | circumstances)[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        note_circumstances(place.folder, question, circumstances)
    except OSError as err:
        raise ResourceError(
            f"{place.folder}: cannot be used ({err.strerror}); use a folder that can be written"
        ) from err
    return folder


def fusion_groups(loaded: LoadedModel) -> Iterator[list[tuple[int, int]]]:
    """Yield rows and columns of the modules that are solved together; experts are solved one by one."""
    for layer in range(loaded.layers):
        for unit, matrices in zip(loaded.family.units_of(layer), unit_shapes(loaded, layer), strict=True):
            yield from ([matrix] for matrix in matrices) if unit.routed else [matrices]


def rows_allowance(
    loaded: LoadedModel,
    calibration: CalibrationSet,
    place: Workplace,
    batch_tokens: int,
    *,
    compares: bool,
    columns: bool,
) -> int | None:
    """Return how many bytes of hidden states are held in memory; None for all.

    Raises:
        ResourceError: a budget that does not hold a block and what solving it takes.
    """
    if place.memory_budget is None:
        return ROWS_IN_MEMORY if isinstance(loaded, StreamedModel) else None
    needs = count_quantize_needs(
        {name: tuple(parameter.shape) for name, parameter in loaded.model.named_parameters()},
        fusion_groups(loaded),
        blocks=loaded.family.blocks,
        tokens=max(batch_tokens, *(len(row) for rows in calibration.rows.values() for row in rows)),
        compares=compares,
        columns=columns,
    )
    return needs.left_for_states(place.memory_budget)
