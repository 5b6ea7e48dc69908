"""Step 7, repair: a folder that another tool wrote becomes one that Transformers, vLLM and gptqmodel all read right.

Only metadata changes (`repair_plan` says what); weight files are linked or copied and stay the same to the last byte.
The result is built beside, verified there, and only then gets its name.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quant_fairness_plugin.artifacts import write_atomically
from quant_fairness_plugin.errors import ArtifactError, ConfigError, ResourceError
from quant_fairness_plugin.export.check_files import RECORD, file_record, list_files, weight_files
from quant_fairness_plugin.export.repair_plan import Change, RepairPlan, plan_repair
from quant_fairness_plugin.export.staging import check_output, staged_folder
from quant_fairness_plugin.export.verify import VerifyReport, verify

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

    from quant_fairness_plugin.export.inspection import inspect_checkpoint

    plan = plan_repair(inspect_checkpoint(folder))
    report = RepairReport(folder=str(folder), out=None, changes=plan.changes, backups=(), verified=None)
    if dry_run:
        return report
    if not in_place:
        with staged_folder(target) as staged:
            verified = _build(folder, staged, plan)
        return replace(report, out=str(target), verified=replace(verified, folder=str(target)))
    try:
        with tempfile.TemporaryDirectory(dir=folder.resolve().parent, prefix=f"{folder.name}.partial-") as name:
            verified = _build(folder, Path(name), plan)
        backups = _replace_metadata(folder, plan)
    except OSError as err:
        raise ResourceError(
            f"{folder}: cannot be written ({err.strerror or err}). Repair into another folder."
        ) from err
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
            f"{folder} was written by this program ({RECORD}), and its checksums would no longer fit; allowed are "
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
    """Rename weights and write the changed files over the old ones, of which copies stay."""
    backups = []
    for name, content in plan.files.items():
        path = folder / name
        if path.is_file():
            backup = _free_name(path)
            shutil.copyfile(path, backup)
            backups.append(backup.name)
        write_atomically(path, _json(content).encode())
    for old, new in plan.renames.items():
        os.rename(folder / old, folder / new)
    _logger.info("%s: repaired, %d keys changed", folder, len(plan.changes))
    return tuple(backups)


def _free_name(path: Path) -> Path:
    """`config.json.before-repair`, or with a number where that is taken."""
    backup, number = path.with_name(f"{path.name}.{BACKUP}"), 1
    while backup.exists():
        number += 1
        backup = path.with_name(f"{path.name}.{number}.{BACKUP}")
    return backup


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
