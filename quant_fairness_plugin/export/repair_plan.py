"""Step 7, what a repair would change: the metadata that every reader needs, worked out from the tensors alone.

Takes an `Inspection` and returns the new content of the metadata files, beside every key that differs. Refuses what the
tensors do not prove, and what no metadata can put right. Writes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.export.check_files import SIDE_FILES
from quant_fairness_plugin.export.formats import checkpoint_format
from quant_fairness_plugin.model.weights import read_json

if TYPE_CHECKING:
    from quant_fairness_plugin.export.inspection import Inspection

ABSENT = "(absent)"
_GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024, -1)
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


def plan_repair(found: Inspection) -> RepairPlan:
    """Work out the universal metadata of a checkpoint.

    Args:
        found: what the folder holds.

    Raises:
        UnsupportedModelError: metadata cannot make this folder load everywhere; says what stands against it.
    """
    _refuse(found)
    quantization = universal_quantization(found)
    config_path, side_path = found.folder / "config.json", found.folder / SIDE_FILES[0]
    before = {"config.json": read_json(config_path)}
    before[side_path.name] = read_json(side_path) if side_path.is_file() else {}
    dtypes = {key: found.dtype for key in ("dtype", "torch_dtype") if key in found.config}
    after = {
        "config.json": before["config.json"] | dtypes | {"quantization_config": quantization},
        side_path.name: {k: v for k, v in before[side_path.name].items() if k not in _STALE} | quantization,
    }
    renames = {} if found.weights[0].startswith("model") else {found.weights[0]: "model.safetensors"}
    changes = [Change(old, "file name", old, new) for old, new in renames.items()]
    for name in after:
        changes += _differences(name, before[name], after[name])
    return RepairPlan(tuple(changes), {name: new for name, new in after.items() if new != before[name]}, renames)


def universal_quantization(found: Inspection) -> dict[str, Any]:
    """The `quantization_config` that every reader takes right; keys that no loader's choice depends on stay.

    Raises:
        UnsupportedModelError: modules of different group sizes.
    """
    from quant_fairness_plugin.export.contents import module_map

    widths = {name: module.bits for name, module in found.packed.items()}
    bits = Counter(widths.values()).most_common(1)[0][0]
    grid = Grid(bits=bits, group_size=_group_size(found), symmetric=found.facts.symmetric)
    others = {name: width for name, width in widths.items() if width != bits}
    modules = module_map(found.model, found.family, found.packed, bits=others)
    method = "awq" if found.layout == "awq" else "gptq"
    needed = checkpoint_format(method).quantization_config(modules, grid)
    if method == "gptq":
        needed["checkpoint_format"] = found.layout
    spelled_twice = {
        "method": method,
        "format": needed["checkpoint_format"],
        "block_name_to_quantize": found.family.blocks,
    }
    needed |= {key: value for key, value in spelled_twice.items() if key in found.quantization}
    dropped = _STALE | _AUTOAWQ_ONLY
    return {key: value for key, value in found.quantization.items() if key not in dropped} | needed


def _group_size(found: Inspection) -> int:
    """The announced size if it fits every module, else the only one that does."""
    announced = found.quantization.get("group_size")
    candidates = [announced] if type(announced) is int and (announced > 0 or announced == -1) else []
    for size in (*candidates, *_GROUP_SIZES):
        if all(module.fits(size) for module in found.packed.values()):
            return int(size)
    _stop(found, "its modules have different group sizes, and the lists that every reader knows have one", "one size")


def _refuse(found: Inspection) -> None:
    """Everything that stands in the tensors and that no metadata can put right."""
    if found.layout is None or not found.packed:
        _stop(found, "holds no quantized modules", "a checkpoint in gptq or awq")
    if found.layout == "compressed-tensors":
        _stop(found, "is compressed-tensors, which has one list and no readers' dialects", "gptq or awq")
    if found.family.generic:
        _stop(found, "is of an architecture whose merged modules are not known", "a known family")
    for name in found.modules.split_groups:
        _stop(found, f"has mixed shards: {name} is merged by servers, and its parts differ", "whole fusion groups")
    for name in found.modules.quantized:
        if not name.startswith(f"{found.family.blocks}."):
            _stop(found, f"has {name} quantized, outside of the decoder blocks", "16 bit there")
    if found.layout == "awq":
        _refuse_awq(found)
    else:
        _refuse_gptq(found)


def _refuse_awq(found: Inspection) -> None:
    for name in found.facts.missing_scales:
        _stop(found, f"lacks {name}, without which Transformers computes NaN", "activation scales in every block")


def _refuse_gptq(found: Inspection) -> None:
    if not found.facts.ordered:
        _stop(found, "has act-order (desc_act true, permuted g_idx), which vLLM refuses", "groups in order")
    if not found.facts.symmetric:
        _stop(found, "has an asymmetric gptq grid, and vLLM reads symmetric ones only", "sym=True")


def _stop(found: Inspection, problem: str, allowed: str) -> NoReturn:
    raise UnsupportedModelError(
        f"{found.folder} {problem}; allowed: {allowed}. A repair changes no tensors: quantize again, or use a reader "
        "that quant-fairness verify names."
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
