"""A plan in the tools' words: which modules they must leave alone, and with how many bits they quantize the rest.

Plain data in, plain data out; imports no tool and no torch. The rules name unmerged modules, as the tools see them
while quantizing; what servers need is written by `export/formats`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from quant_fairness_plugin.artifacts import Grid

DynamicRules = dict[str, dict[str, int]]

GPTQMODEL_OPTIONS: Mapping[str, dict[str, Any]] = {
    "gptq": {"desc_act": False},  # no server reads permuted groups
    "awq": {},
}
"""Method → what its configuration takes beside the grid."""
LLMCOMPRESSOR_MODIFIERS: Mapping[str, tuple[str, ...]] = {
    "gptq": ("GPTQModifier",),
    "awq": ("AWQModifier", "QuantizationModifier"),
}
"""Method → the modifiers that do it, in their order; the last one rounds and takes the scheme."""


def gptqmodel_config(
    grids: Mapping[str, Grid], kept: Iterable[str], *, grid: Grid, blocks: str, method: str
) -> dict[str, Any]:
    """Arguments of gptqmodel's `QuantizeConfig` (`gptq`) or `AWQConfig` (`awq`).

    Args:
        grids: full name of every module to quantize → its grid.
        kept: every other linear module; those outside the blocks are left alone anyway.
        grid: the grid of the plan.
        blocks: full name of the list of decoder blocks.
        method: `gptq` or `awq`.
    """
    config: dict[str, Any] = {"bits": grid.bits, "group_size": grid.group_size, "sym": grid.symmetric}
    return config | dict(GPTQMODEL_OPTIONS[method]) | {"dynamic": dynamic_rules(grids, kept, grid=grid, blocks=blocks)}


def dynamic_rules(grids: Mapping[str, Grid], kept: Iterable[str], *, grid: Grid, blocks: str) -> DynamicRules:
    r"""The `dynamic` table of gptqmodel: `-:` skips what matches, `+:` gives it other settings.

    A layer that is skipped whole takes one rule, `-:^model\.layers\.1\..*`.
    """
    skipped = [name for name in kept if name.startswith(f"{blocks}.")]
    rules: DynamicRules = {f"-:{pattern}": {} for pattern in _patterns(skipped, grids, blocks)}
    schemes = {_scheme(other) for other in grids.values()} - {_scheme(grid)}
    for bits, size in sorted(schemes):
        same = [name for name, other in grids.items() if _scheme(other) == (bits, size)]
        others = [name for name in grids if name not in same] + skipped
        change = {"bits": bits} if bits != grid.bits else {}
        change |= {"group_size": size} if size != grid.group_size else {}
        rules |= {f"+:{pattern}": change for pattern in _patterns(same, others, blocks)}
    return rules


def _scheme(grid: Grid) -> tuple[int, int]:
    return grid.bits, grid.group_size


def compressed_groups(grids: Mapping[str, Grid]) -> dict[str, dict[str, Any]]:
    """The `config_groups` of llm-compressor: all linear modules, or lists of names where there are several schemes."""
    schemes = {_scheme(grid): grid for grid in grids.values()}
    names = {scheme: [name for name, other in grids.items() if _scheme(other) == scheme] for scheme in schemes}
    return {
        f"group_{i}": {
            "targets": ["Linear"] if len(schemes) == 1 else names[scheme],
            "weights": {
                "num_bits": grid.bits,
                "type": "int",
                "symmetric": grid.symmetric,
                "strategy": "channel" if grid.group_size == -1 else "group",
                "group_size": None if grid.group_size == -1 else grid.group_size,
                "dynamic": False,
            },
        }
        for i, (scheme, grid) in enumerate(sorted(schemes.items()))
    }


def llmcompressor_recipe(grids: Mapping[str, Grid], kept: Iterable[str], *, method: str) -> dict[str, Any]:
    """The recipe that llm-compressor's `oneshot` takes, as it is written in YAML.

    `ignore` holds full names, which match exactly; `actorder` stays the tool's `static`, which changes nothing at run
    time.
    """
    scheme = {"config_groups": compressed_groups(grids), "ignore": list(kept)}
    *before, last = LLMCOMPRESSOR_MODIFIERS[method]
    modifiers: dict[str, Any] = {name: {} for name in before} | {last: scheme}
    return {"quantization_stage": {"quantization_modifiers": modifiers}}


def _patterns(names: Collection[str], others: Collection[str], blocks: str) -> list[str]:
    """Regular expressions that match `names` and none of `others`: one for a whole layer where that is possible."""
    busy = {_layer(name, blocks) for name in others}
    layers = dict.fromkeys(_layer(name, blocks) for name in names)
    whole = [layer for layer in layers if layer not in busy]
    single = [name for name in names if _layer(name, blocks) in busy]
    return [f"^{re.escape(layer)}\\..*" for layer in whole] + [f"^{re.escape(name)}$" for name in single]


def _layer(module: str, blocks: str) -> str:
    return f"{blocks}.{module.removeprefix(f'{blocks}.').partition('.')[0]}"
