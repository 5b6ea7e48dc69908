"""To elsewhere: a plan as the configuration of another tool, for those who quantize with that tool themselves.

Takes a plan and the model's files (weights are not read); returns text. What gptqmodel and llm-compressor get is tested
by using it; AutoRound's, optimum's, llama.cpp's and mlx's follow their documentation and were not run:

- AutoRound: `layer_config`, module name → settings (its user guide);
- mlx-lm: the `quantization` of its `config.json`, module name → bits and group size, or false; a `quant_predicate` that
  looks a module up in it makes `mlx_lm.convert` follow the plan;
- optimum and Transformers: `GPTQConfig(modules_in_block_to_quantize=…)`, names relative to the block, so that one layer
  cannot be treated otherwise than another;
- llama.cpp: `llama-quantize --tensor-type REGEX=TYPE`, the last match wins (pull requests 12511 and 14572).
"""

from __future__ import annotations

import json
import re
import shlex
from typing import TYPE_CHECKING, Any, Literal

from quant_fairness_plugin.artifacts import ProtectionPlan
from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.model.architectures import ARCHITECTURES
from quant_fairness_plugin.model.families import Family
from quant_fairness_plugin.model.outline import outline_model
from quant_fairness_plugin.model.resolve import ModelFiles
from quant_fairness_plugin.quantize.backends.rules import gptqmodel_config, llmcompressor_recipe

if TYPE_CHECKING:
    from quant_fairness_plugin.quantize.selection import Selection

Tool = Literal["gptqmodel", "llmcompressor", "autoround", "optimum", "llama.cpp", "mlx"]


def plan_for_tool(tool: Tool, plan: ProtectionPlan, files: ModelFiles, *, trust_remote_code: bool = False) -> str:
    """Return the plan as a tool's configuration: JSON, for llm-compressor YAML, for llama.cpp command line arguments.

    Modules that the plan's grid does not fit are left in 16 bit, as an export of ours would leave them.

    Args:
        tool: whose configuration.
        plan: the plan.
        files: the model's files; only `config.json` is read.
        trust_remote_code: build the model with code that its folder brings.

    Raises:
        ConfigError: the plan has another number of layers than the model, or its grid fits no module.
        UnsupportedModelError: the tool has no way to say this plan; says why, and the way out.
    """
    from quant_fairness_plugin.model.linear import is_linear
    from quant_fairness_plugin.model.load import empty_model
    from quant_fairness_plugin.quantize.selection import select_modules

    if plan.layers != files.layers:
        raise ConfigError(
            f"the plan is for {plan.layers} layers, {files.name} has {files.layers}; give the plan's model "
            f"({plan.model}) with --model"
        )
    model = empty_model(files, trust_remote_code=trust_remote_code)
    outline = outline_model(files, trust_remote_code=trust_remote_code)
    family = outline.family
    if plan.grid.scheme != "int":
        raise UnsupportedModelError(
            f"--as {tool}: the plan is of {plan.grid}, and configurations are written for integers; make the plan with "
            "--scheme int, or quantize here: quant-fairness quantize --plan"
        )
    selection = select_modules(outline, plan.grid, protected=plan.protected_layers, overrides=plan.overrides)
    rest = [name for name, module in model.named_modules() if is_linear(module) and name not in selection.grids]
    match tool:
        case "gptqmodel":
            settings = gptqmodel_config(selection.grids, rest, grid=plan.grid, blocks=family.blocks, method="gptq")
            return _json(settings)
        case "llmcompressor":
            return _llmcompressor(selection, rest, family)
        case "autoround":
            return _json(_layer_config(selection, rest, plan, family))
        case "mlx":
            return _json(_mlx(selection, rest, plan, family))
        case "optimum":
            return _json(_optimum(selection, plan, family, files.layers))
        case "llama.cpp":
            return _llama_cpp(selection, rest, plan, family, files)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def _llmcompressor(selection: Selection, rest: list[str], family: Family) -> str:
    import yaml

    if family.conv1d:
        raise UnsupportedModelError(
            f"llm-compressor quantizes Linear modules only, and {family.name} has Conv1D. Use --as gptqmodel."
        )
    text: str = yaml.safe_dump(llmcompressor_recipe(selection.grids, rest, method="gptq"), sort_keys=False)
    return text


def _layer_config(
    selection: Selection, rest: list[str], plan: ProtectionPlan, family: Family
) -> dict[str, dict[str, int]]:
    """Return what differs from the scheme of the whole model; modules outside the blocks are left alone anyway."""
    sixteen = {name: {"bits": 16} for name in rest if name.startswith(f"{family.blocks}.")}
    others: dict[str, dict[str, int]] = {}
    for name, grid in selection.grids.items():
        both = {"bits": (grid.bits, plan.grid.bits), "group_size": (grid.group_size, plan.grid.group_size)}
        others[name] = {key: own for key, (own, of_all) in both.items() if own != of_all}
    return sixteen | {name: settings for name, settings in others.items() if settings}


def _mlx(selection: Selection, rest: list[str], plan: ProtectionPlan, family: Family) -> dict[str, Any]:
    """Return mlx's table; it quantizes every module that the table does not name, the embedding among them."""
    if family.conv1d:
        raise UnsupportedModelError(
            f"mlx quantizes Linear modules only, and {family.name} has Conv1D. Use --as gptqmodel."
        )
    whole = {"group_size": plan.grid.group_size, "bits": plan.grid.bits}
    own = {name: {"group_size": grid.group_size, "bits": grid.bits} for name, grid in selection.grids.items()}
    others = {name: settings for name, settings in own.items() if settings != whole}
    return whole | {name: False for name in (*family.embeddings, *rest)} | others


def _optimum(selection: Selection, plan: ProtectionPlan, family: Family, layers: int) -> dict[str, Any]:
    prefix = [f"{family.blocks}.{layer}." for layer in range(layers)]
    per_layer = [tuple(n.removeprefix(p) for n in selection.modules if n.startswith(p)) for p in prefix]
    grids = set(selection.grids.values())
    if len(set(per_layer)) > 1 or len({grid.bits for grid in grids}) > 1:
        raise UnsupportedModelError(
            "optimum names modules relative to the block, so it cannot treat one layer otherwise than another; it "
            "takes plans that are the same in every layer. Use --as gptqmodel, or quantize here: quant-fairness "
            "quantize --format gptq, which optimum reads."
        )
    sizes = {grid.group_size for grid in grids}
    if len(sizes) > 1:
        raise UnsupportedModelError(
            f"optimum takes one group size for a whole model, and the units of this plan take "
            f"{', '.join(map(str, sorted(sizes)))}. Make the plan with --group-size {min(sizes)}, or use --as "
            "gptqmodel."
        )
    units = [[name for name in unit.modules if name in per_layer[0]] for unit in family.units_of(0)]
    return {
        "bits": plan.grid.bits,
        "group_size": sizes.pop(),
        "sym": plan.grid.symmetric,
        "desc_act": False,
        "modules_in_block_to_quantize": [names for names in units if names],
    }


def _llama_cpp(selection: Selection, rest: list[str], plan: ProtectionPlan, family: Family, files: ModelFiles) -> str:
    names = family.architecture.gguf_names
    if not names:
        known = sorted(name for record in ARCHITECTURES if record.gguf_names for name in record.families)
        raise UnsupportedModelError(
            f"llama.cpp's names of the tensors of {family.name!r} are not known; known are those of "
            f"{', '.join(known)}. Use --as with another tool."
        )
    dtype = str(files.config.get("dtype") or files.config.get("torch_dtype"))
    types = {name: "bf16" if dtype == "bfloat16" else "f16" for name in rest}
    types |= {name: _ggml_type(grid.bits) for name, grid in selection.grids.items() if grid.bits != plan.grid.bits}
    lines = []
    for layer in range(files.layers):
        given = {names[name]: types.get(f"{family.blocks}.{layer}.{name}") for name in family.modules(layer)}
        for kind in sorted({kind for kind in given.values() if kind is not None}):
            same = "|".join(re.escape(name) for name, type_ in given.items() if type_ == kind)
            lines.append("--tensor-type " + shlex.quote(rf"^blk\.{layer}\.({same})\.weight$={kind}"))
    return "".join(f"{line}\n" for line in lines)


def _ggml_type(bits: int) -> str:
    types = {8: "q8_0", 6: "q6_k", 5: "q5_k", 4: "q4_k", 3: "q3_k", 2: "q2_k"}
    return types[bits]
