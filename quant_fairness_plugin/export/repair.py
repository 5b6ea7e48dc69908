"""Repair: a folder that another tool wrote becomes one that Transformers, vLLM and gptqmodel all read right.

Only metadata changes (`repair_plan` says what); weight files are linked or copied and stay the same to the last byte.
The result is built beside, verified there, and only then gets its name.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from quant_fairness_plugin.artifacts import Grid, write_atomically
from quant_fairness_plugin.checkpoint.folder import RECORD, SIDE_FILES, file_record, list_files, weight_files
from quant_fairness_plugin.checkpoint.formats import format_of_layout
from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnsupportedModelError
from quant_fairness_plugin.export.staging import check_output, scratch_folder, staged_folder
from quant_fairness_plugin.export.verify import VerifyReport, verify
from quant_fairness_plugin.model.weights import read_json

if TYPE_CHECKING:
    from quant_fairness_plugin.checkpoint.inspection import Inspection

BACKUP = "before-repair"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """What a repair changed."""

    folder: str
    out: str | None
    """The folder that loads everywhere; None after a dry run."""
    changes: tuple[Change, ...]
    backups: tuple[str, ...]
    """Copies of the changed metadata files, of a repair in place."""
    verified: VerifyReport | None
    """What `verify` saw in the result; None after a dry run."""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        return {
            "folder": self.folder,
            "out": self.out,
            "changes": [asdict(change) for change in self.changes],
            "backups": list(self.backups),
            "verified": self.verified.to_dict() if self.verified is not None else None,
        }


def default_repaired(folder: Path) -> Path:
    """`<name>-repaired`, beside the folder."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}-repaired")


def repair(
    folder: str | Path, out: str | Path | None = None, *, in_place: bool = False, dry_run: bool = False
) -> RepairReport:
    """Give a checkpoint folder the metadata that every reader needs. Never changes a tensor.

    Reads folders of gptqmodel, AutoRound (its gptq and awq), AutoAWQ and AutoGPTQ. A second repair changes nothing.

    Args:
        folder: what another tool wrote.
        out: the folder to make; None is `<folder>-repaired`. Weight files are hard links where the disk allows.
        in_place: change `folder` itself, and keep its metadata files as `<name>.before-repair`.
        dry_run: say what would change, and write nothing.

    Raises:
        ConfigError: `out` exists, or both `out` and `in_place` were given.
        ArtifactError: files that are missing or malformed, or one of our exports, whose checksums would no longer fit.
        UnsupportedModelError: what stands in the tensors, so that no metadata can put it right.
        ResourceError: no space or permission.
    """
    folder = Path(folder)
    target = _check_target(folder, None if out is None else Path(out), in_place=in_place, dry_run=dry_run)

    from quant_fairness_plugin.checkpoint.inspection import inspect_checkpoint

    plan = plan_repair(inspect_checkpoint(folder))
    report = RepairReport(folder=str(folder), out=None, changes=plan.changes, backups=(), verified=None)
    if dry_run:
        return report
    if not in_place:
        with staged_folder(target) as staged:
            verified = _build(folder, staged, plan)
        return replace(report, out=str(target), verified=replace(verified, folder=str(target)))
    with scratch_folder(folder) as scratch:
        verified = _build(folder, scratch, plan)
        backups = _replace_metadata(folder, plan)
    return replace(report, out=str(folder), backups=backups, verified=replace(verified, folder=str(folder)))


def _check_target(folder: Path, out: Path | None, *, in_place: bool, dry_run: bool) -> Path:
    """Where the result goes, checked before anything is read."""
    if out is not None and in_place:
        raise ConfigError(
            f"both an output ({out}) and --in-place; one of them says where the result goes. Leave one out."
        )
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder; expected a checkpoint folder. Check the path.")
    if (folder / RECORD).is_file():
        raise ArtifactError(
            f"{folder} was written by this program ({RECORD}), and its checksums would no longer fit; accepted are "
            "folders of other tools. Use quant-fairness verify, and export again what it finds."
        )
    target = out if out is not None else default_repaired(folder)
    if not in_place and not dry_run:
        check_output(target.resolve(), overwrite=False)
        if folder.resolve() in (target.resolve(), *target.resolve().parents):
            raise ConfigError(f"{target} lies inside of {folder}; the output must be outside. Choose another name.")
    return target


def _build(folder: Path, staged: Path, plan: RepairPlan) -> VerifyReport:
    """Fill an empty folder with the repaired checkpoint and verify it."""
    weights = {path.name: file_record(path) for path in weight_files(folder)}
    for name in list_files(folder):
        if name.endswith(f".{BACKUP}"):
            continue
        destination = staged / plan.renames.get(name, name)
        destination.parent.mkdir(parents=True, exist_ok=True)
        if name in weights:
            _link(folder / name, destination)
        elif name not in plan.files:
            shutil.copyfile(folder / name, destination)
    for name, content in plan.files.items():
        (staged / name).write_text(_json(content), encoding="utf-8")
    for name, expected in weights.items():
        if file_record(staged / plan.renames.get(name, name)) != expected:
            raise ArtifactError(f"{folder / name} changed while it was copied. Repair again when nothing writes to it.")
    return verify(staged)


def _link(source: Path, destination: Path) -> None:
    try:
        os.link(source.resolve(), destination)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, destination)


def _replace_metadata(folder: Path, plan: RepairPlan) -> tuple[str, ...]:
    """Keep copies of the files that change, then replace each in one step, and rename weights.

    Killed in between, every file is as before or as after, and the next repair does the rest.
    """
    backups = tuple(_backup(folder / name) for name in plan.files if (folder / name).is_file())
    for name, content in plan.files.items():
        write_atomically(folder / name, _json(content).encode())
    for old, new in plan.renames.items():
        os.rename(folder / old, folder / new)
    _logger.info("%s: repaired, %d keys changed", folder, len(plan.changes))
    return backups


def _backup(path: Path) -> str:
    """Copy a file to `NAME.before-repair`, or with a number where that is another's; return the name."""
    content, number = path.read_bytes(), 1
    backup = path.with_name(f"{path.name}.{BACKUP}")
    while backup.exists() and backup.read_bytes() != content:
        number += 1
        backup = path.with_name(f"{path.name}.{number}.{BACKUP}")
    if not backup.exists():
        write_atomically(backup, content)
    return backup.name


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


ABSENT = "(absent)"


_STALE = frozenset({"model_file_base_name"})
"""Keys that are untrue once the weights have their standard name."""


_AUTOAWQ_ONLY = frozenset({"w_bit", "q_group_size"})


@dataclass(frozen=True, slots=True)
class Change:
    """One key that differs, or one file that gets another name."""

    file: str
    key: str
    before: Any
    """`(absent)` where the key was not there."""
    after: Any
    """`(absent)` where it is no longer there."""


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """What a repair would write."""

    changes: tuple[Change, ...]
    files: Mapping[str, dict[str, Any]]
    """New content of each metadata file that changes."""
    renames: Mapping[str, str]
    """Weight file → the name that loaders look for."""


def plan_repair(inspection: Inspection) -> RepairPlan:
    """Work out the universal metadata of a checkpoint.

    Args:
        inspection: what the folder holds.

    Raises:
        UnsupportedModelError: metadata cannot make this folder load everywhere; says what stands against it.
    """
    _refuse(inspection)
    quantization = universal_quantization(inspection)
    config_path, side_path = inspection.folder / "config.json", inspection.folder / SIDE_FILES[0]
    before = {"config.json": read_json(config_path)}
    before[side_path.name] = read_json(side_path) if side_path.is_file() else {}
    dtypes = {key: inspection.dtype for key in ("dtype", "torch_dtype") if key in inspection.config}
    after = {
        "config.json": before["config.json"] | dtypes | {"quantization_config": quantization},
        side_path.name: {k: v for k, v in before[side_path.name].items() if k not in _STALE} | quantization,
    }
    renames = {} if inspection.weights[0].startswith("model") else {inspection.weights[0]: "model.safetensors"}
    changes = [Change(old, "file name", old, new) for old, new in renames.items()]
    for name in after:
        changes += _differences(name, before[name], after[name])
    return RepairPlan(tuple(changes), {name: new for name, new in after.items() if new != before[name]}, renames)


def universal_quantization(inspection: Inspection) -> dict[str, Any]:
    """The `quantization_config` that every reader takes right; keys that no loader's choice depends on stay.

    Raises:
        UnsupportedModelError: modules of several group sizes in a format that holds one.
    """
    from quant_fairness_plugin.checkpoint.module_map import module_map

    widths = {name: module.bits for name, module in inspection.packed.items()}
    bits = Counter(widths.values()).most_common(1)[0][0]
    others = {name: width for name, width in widths.items() if width != bits}
    modules = module_map(
        inspection.model, inspection.family, inspection.packed, bits=others, sizes=_group_sizes(inspection)
    )
    assert inspection.layout is not None  # says `_refuse`
    layout = format_of_layout(inspection.layout)
    if layout.uniform and len(set(modules.sizes.values())) > 1:
        _stop(inspection, f"has modules of several group sizes, and {layout.name} holds one", "one size")
    grid = Grid(bits=bits, group_size=modules.usual_size(-1), symmetric=inspection.facts.symmetric)
    needed = layout.quantization_config(modules, grid)
    other_names = {
        "method": layout.method,
        "format": needed["checkpoint_format"],
        "block_name_to_quantize": inspection.family.blocks,
    }
    needed |= {key: value for key, value in other_names.items() if key in inspection.quantization}
    dropped = _STALE | _AUTOAWQ_ONLY
    return {key: value for key, value in inspection.quantization.items() if key not in dropped} | needed


def _group_sizes(inspection: Inspection) -> dict[str, int]:
    """The announced size for every module if it fits all, else the only one that does, else that of each module."""
    from quant_fairness_plugin.checkpoint.inspection import STORED_SIZES

    announced = inspection.quantization.get("group_size")
    candidates = [announced] if type(announced) is int and (announced > 0 or announced == -1) else []
    for size in (*candidates, *STORED_SIZES):
        if all(module.fits(size) for module in inspection.packed.values()):
            return dict.fromkeys(inspection.packed, int(size))
    for name in sorted(inspection.packed.keys() - inspection.modules.sizes.keys()):
        _stop(inspection, f"has {name} in groups of no size that tools write", "groups of one size in a module")
    return dict(inspection.modules.sizes)


def _refuse(inspection: Inspection) -> None:
    """Everything that stands in the tensors and that no metadata can put right."""
    if inspection.layout is None or not inspection.packed:
        _stop(inspection, "holds no quantized modules", "a checkpoint in gptq or awq")
    if inspection.layout == "compressed-tensors":
        _stop(inspection, "is compressed-tensors, which has one list and no readers' dialects", "gptq or awq")
    if inspection.family.generic:
        _stop(inspection, "is of an architecture whose merged modules are not known", "a known family")
    for name in inspection.modules.split_groups:
        _stop(inspection, f"has mixed shards: {name} is merged by servers, and its parts differ", "whole fusion groups")
    for name in inspection.modules.quantized:
        if not name.startswith(f"{inspection.family.blocks}."):
            _stop(inspection, f"has {name} quantized, outside of the decoder blocks", "16 bit there")
    if inspection.layout == "awq":
        _refuse_awq(inspection)
    else:
        _refuse_gptq(inspection)


def _refuse_awq(inspection: Inspection) -> None:
    for name in inspection.facts.missing_scales:
        _stop(inspection, f"lacks {name}, without which Transformers computes NaN", "activation scales in every block")


def _refuse_gptq(inspection: Inspection) -> None:
    if not inspection.facts.ordered:
        _stop(inspection, "has act-order (desc_act true, permuted g_idx), which vLLM refuses", "groups in order")
    if not inspection.facts.symmetric:
        _stop(inspection, "has an asymmetric gptq grid, and vLLM reads symmetric ones only", "sym=True")


def _stop(inspection: Inspection, problem: str, allowed: str) -> NoReturn:
    raise UnsupportedModelError(
        f"{inspection.folder} {problem}; allowed: {allowed}. A repair changes no tensors: quantize again, or use a "
        "reader that quant-fairness verify names."
    )


def _differences(file: str, before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[Change]:
    """Every key that differs, those of `quantization_config` one by one."""
    changes = []
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key, ABSENT), after.get(key, ABSENT)
        if key == "quantization_config":
            changes += _differences(file, old if isinstance(old, dict) else {}, new, f"{key}.")
        elif old != new or type(old) is not type(new):
            changes.append(Change(file, prefix + key, old, new))
    return changes
