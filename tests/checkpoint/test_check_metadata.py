"""Every metadata rule passes on what we write and fails when it is broken; each break is one seen in the wild."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.checkpoint.formats import checkpoint_format
from quant_fairness_plugin.checkpoint.module_map import ModuleMap
from quant_fairness_plugin.checkpoint.readers import check_metadata, metadata_problems
from quant_fairness_plugin.errors import ArtifactError
from tests.export.build import llama_map

LAYER_1 = "model.layers.1"
Q_OF_1 = "model.layers.1.self_attn.q_proj"
Q_OF_2 = "model.layers.2.self_attn.q_proj"
Q_OF_10 = "model.layers.10.self_attn.q_proj"
WIDE_10 = llama_map(int8=(10,))
"""As `llama_map()`, with 8 bits in layer 10, which prefixes of layer 1 would take with them."""
Break = Callable[[dict[str, Any]], Any]


def written(format_name: str, modules: ModuleMap) -> dict[str, Any]:
    return copy.deepcopy(checkpoint_format(format_name).quantization_config(modules, Grid(group_size=32)))


def check(format_name: str, modules: ModuleMap, config: dict[str, Any]) -> str:
    return check_metadata(checkpoint_format(format_name), modules, config)


def problems(format_name: str, modules: ModuleMap, config: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Rule → what breaks it."""
    rules = dict(metadata_problems(checkpoint_format(format_name), modules, config))
    return {rule.replace(f"scheme of {format_name}", SCHEME): broken for rule, broken in rules.items()}


def weights(config: dict[str, Any], group: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = config["config_groups"][f"group_{group}"]["weights"]
    return found


def targets(config: dict[str, Any]) -> list[str]:
    found: list[str] = config["config_groups"]["group_1"]["targets"]
    return found


def first(config: dict[str, Any], rule: str) -> dict[str, Any]:
    """The metadata with another `dynamic` rule before all others."""
    config["dynamic"] = {rule: {"bits": 8}} | config["dynamic"]
    return config


SCHEME = "scheme"
"""The format's, whoever reads it."""
TARGETS = "transformers: config_groups (bits and groups of unmerged modules)"
MERGED_TARGETS = "vllm: config_groups (bits and groups of merged modules)"
IGNORE = "transformers: ignore (by name)"
IGNORE_AS_PART = "sglang: ignore (as part of a name, in any case)"
BLOCK_LIST = "transformers: modules_in_block_to_quantize (as suffix)"
BLOCK_LIST_AS_PART = "vllm: modules_in_block_to_quantize (as part of a name)"
DYNAMIC = "gptqmodel: dynamic (the only list that gptqmodel reads)"
DYNAMIC_BITS = "gptqmodel: dynamic (bits and groups of unmerged modules)"
DYNAMIC_MERGED = "sglang: dynamic (of merged names)"
NOT_CONVERT_OTHERS = "others: modules_to_not_convert (as regular expression or suffix)"
MERGED_NOT_CONVERT_OTHERS = "others: modules_to_not_convert (as part of a merged name)"
NOT_CONVERT_AS_PART_OTHERS = "others: modules_to_not_convert (as part of a name)"
NOT_CONVERT = "transformers: modules_to_not_convert (as regular expression or suffix)"
MERGED_NOT_CONVERT = "sglang: modules_to_not_convert (as part of a merged name)"
NOT_CONVERT_AS_PART = "vllm: modules_to_not_convert (as part of a name)"
DYNAMIC_BITS_MERGED = "vllm: dynamic (bits and groups of merged modules)"
WHOLE_GROUPS = "whole fusion groups"


SIZED = replace(llama_map(int8=(10,)), sizes={n: 64 if "down" in n else 32 for n in llama_map().quantized})
"""As `WIDE_10`, with groups of 64 in every `down`."""


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq"])
def test_every_reader_finds_every_modules_group_size(format_name: str) -> None:
    config = written(format_name, SIZED)
    check(format_name, SIZED, config)
    gate_up = {f"model.layers.11.mlp.{name}_proj": 128 for name in ("gate", "up")}
    sizes = {**SIZED.sizes, "model.layers.2.mlp.down_proj": 128, **gate_up}
    broken = problems(format_name, replace(SIZED, sizes=sizes), config)
    of_targets = format_name == "compressed-tensors"
    down = "model.layers.2.mlp.down_proj group size 64, and it has 128"
    for rule, names in (
        (TARGETS if of_targets else DYNAMIC_BITS, [*gate_up]),
        (MERGED_TARGETS if of_targets else DYNAMIC_BITS_MERGED, ["model.layers.11.mlp.gate_up_proj"]),
    ):
        expected = {down, *(f"{name} group size 32, and it has 128" for name in names)}
        assert {line.split(" gives ")[1] for line in broken[rule]} == expected


def test_a_rule_of_layer_1_matches_nothing_of_layer_10() -> None:
    sizes = {n: 64 if n.startswith(f"{LAYER_1}.mlp") else 32 for n in llama_map(kept=()).quantized}
    rules = written("gptq", replace(llama_map(kept=()), sizes=sizes))["dynamic"]
    names = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
    assert rules == {rf"+:^model\.layers\.1\.mlp\.{name}$": {"group_size": 64} for name in names}
    assert not any(re.match(rule[2:], f"model.layers.10.mlp.{name}") for rule in rules for name in names)


def test_parts_of_a_merged_module_have_one_group_size() -> None:
    split = replace(llama_map(), sizes={n: 64 if n.endswith("2.mlp.up_proj") else 32 for n in llama_map().quantized})
    assert split.split_groups == ("model.layers.2.mlp.gate_up_proj",)


COMPRESSED_TENSORS_BREAKS: list[tuple[str, Break, str]] = [
    (SCHEME, lambda c: c.update(format="int-quantized"), "format is 'int-quantized'"),
    (SCHEME, lambda c: c.pop("quantization_status"), "quantization_status is 'missing'"),
    (SCHEME, lambda c: c["config_groups"].update(group_2={}), "targets is 'missing'"),
    (
        SCHEME,
        lambda c: c.update(config_groups={"group_2": c["config_groups"]["group_1"]} | c["config_groups"]),
        "holds 3 groups",
    ),
    (SCHEME, lambda c: c.update(config_groups={}), "a table of groups"),
    (SCHEME, lambda c: targets(c).append("Linear"), "one for the names of each other scheme"),
    (SCHEME, lambda c: weights(c, 1).update(num_bits=4), "one for the names of each other scheme"),
    (
        SCHEME,
        lambda c: targets(c).append(LAYER_1),
        f"hold '{LAYER_1}', which is no quantized module",
    ),
    (
        SCHEME,
        lambda c: targets(c).append("re:.*layers\\.10\\..*"),
        "full names of unmerged",
    ),
    (
        TARGETS,
        lambda c: targets(c).remove(Q_OF_10),
        f"gives {Q_OF_10} 4 bits, and it has 8",
    ),
    (
        TARGETS,
        lambda c: targets(c).append(Q_OF_2),
        f"gives {Q_OF_2} 8 bits, and it has 4",
    ),
    (
        MERGED_TARGETS,  # one part is not named, so the merged module is a Linear
        lambda c: targets(c).remove("model.layers.10.mlp.up_proj"),
        r"gives model\.layers\.10\.mlp\.gate_up_proj 4 bits, and it has 8",
    ),
    (
        MERGED_TARGETS,
        lambda c: targets(c).append("model.layers.2.mlp.gate_up_proj"),
        r"gives model\.layers\.2\.mlp\.gate_up_proj 8 bits, and it has 4",
    ),
    (SCHEME, lambda c: weights(c).update(num_bits=8), "num_bits is 8"),
    (SCHEME, lambda c: weights(c).update(group_size=100), "group_size 100"),
    (SCHEME, lambda c: weights(c).update(strategy="channel"), "strategy is 'channel'"),
    (SCHEME, lambda c: weights(c).update(actorder="group"), "actorder is 'group'"),
    (SCHEME, lambda c: c["ignore"].append("re:.*layers\\.1\\..*"), "holds 're:"),
    (SCHEME, lambda c: c["ignore"].append(f"{LAYER_1}."), "which is no linear module"),
    (SCHEME, lambda c: c["ignore"].append(f"{LAYER_1}.self_attn.qkv_proj"), "qkv_proj"),
    (IGNORE, lambda c: c["ignore"].remove(Q_OF_1), f"takes {Q_OF_1} for quantized"),
    (IGNORE, lambda c: c["ignore"].remove("lm_head"), "takes lm_head for quantized"),
    (IGNORE, lambda c: c["ignore"].append(Q_OF_2), f"leaves out {Q_OF_2}"),
    (
        IGNORE_AS_PART,
        lambda c: c["ignore"].append(LAYER_1),
        "leaves out model.layers.10",
    ),
    (SCHEME, lambda c: c.update(ignore="lm_head"), "a list of names"),
]
GPTQ_BREAKS: list[tuple[str, Break, str]] = [
    (SCHEME, lambda c: c.update(desc_act=True), "desc_act is True"),
    (SCHEME, lambda c: c.update(sym=False), "sym is False"),
    (SCHEME, lambda c: c.update(bits=4.0), r"bits is 4\.0"),
    (SCHEME, lambda c: c.update(checkpoint_format="gptq_v2"), "gptq_v2"),
    (SCHEME, lambda c: c.pop("lm_head"), "lm_head is 'missing'"),
    (SCHEME, lambda c: c.update(group_size=100), "group_size is 100"),
    (
        BLOCK_LIST,
        lambda c: c["modules_in_block_to_quantize"][0].remove(Q_OF_2),
        "leaves out",
    ),
    (
        BLOCK_LIST,
        lambda c: c.update(modules_in_block_to_quantize=[["self_attn.q_proj"]]),
        "takes|leaves out",
    ),
    (
        BLOCK_LIST,  # the full name of layer 11, cut: a suffix of layer 1's too
        lambda c: c["modules_in_block_to_quantize"][0].append("1.self_attn.q_proj"),
        f"takes {Q_OF_1} for quantized",
    ),
    (
        SCHEME,
        lambda c: c.update(modules_in_block_to_quantize=c["modules_in_block_to_quantize"][0]),
        "a list of lists",
    ),
    (
        BLOCK_LIST_AS_PART,
        lambda c: c["modules_in_block_to_quantize"][0].append("layers.1"),
        "takes model.layers.1.mlp.down_proj for quantized",
    ),
    (
        DYNAMIC,
        lambda c: c.update(dynamic={}),
        f"takes {LAYER_1}.mlp.down_proj for quantized",
    ),
    (
        DYNAMIC,
        lambda c: c.update(dynamic={"-:^model.layers.1.*": {}}),
        "leaves out model.layers.10",
    ),
    (
        SCHEME,
        lambda c: c.update(dynamic={"+:.*": {}}),
        r"holds '\+:\.\*': \{\}",
    ),
    (
        SCHEME,
        lambda c: c.update(dynamic={".*": {"bits": 8}}),
        "'-:' rules, and '\\+:' rules",
    ),
    (SCHEME, lambda c: c.update(dynamic=[]), r"dynamic is \[\]"),
    (
        DYNAMIC,  # the first rule that matches decides
        lambda c: first(c, r"+:^model\.layers\.1\.self_attn\.q_proj$"),
        f"takes {Q_OF_1} for quantized",
    ),
    (
        DYNAMIC_BITS,
        lambda c: first(c, r"+:^model\.layers\.2\..*"),
        r"gives model\.layers\.2\.self_attn\.q_proj 8 bits, and it has 4",
    ),
    (
        DYNAMIC_BITS,
        lambda c: c["dynamic"].pop(r"+:^model\.layers\.10\.self_attn\.q_proj$"),
        f"gives {Q_OF_10} 4 bits, and it has 8",
    ),
    (
        DYNAMIC_BITS_MERGED,
        lambda c: c["dynamic"].pop(r"+:^model\.layers\.10\.self_attn\.qkv_proj$"),
        r"gives model\.layers\.10\.self_attn\.qkv_proj 4 bits, and it has 8",
    ),
    (
        DYNAMIC_MERGED,  # one rule for each unmerged module, as AutoRound writes them
        lambda c: c.update(dynamic={f"-:^{name}$": {} for name in llama_map().kept_in_blocks}),
        "merged module model.layers.1.self_attn.qkv_proj",
    ),
    (
        SCHEME,
        lambda c: c.update(modules_to_not_convert=[f"{LAYER_1}."]),
        r"holds 'model\.layers\.1\.'",
    ),
    (
        NOT_CONVERT_OTHERS,
        lambda c: c["modules_to_not_convert"].append(f"{LAYER_1}."),
        "leaves out model.layers.10",
    ),
    (
        NOT_CONVERT_OTHERS,
        lambda c: c["modules_to_not_convert"].remove(Q_OF_1),
        f"takes {Q_OF_1}",
    ),
    (
        MERGED_NOT_CONVERT_OTHERS,
        lambda c: c["modules_to_not_convert"].remove(f"{LAYER_1}.self_attn.qkv_proj"),
        "qkv_proj",
    ),
    (
        NOT_CONVERT_AS_PART_OTHERS,
        lambda c: c["modules_to_not_convert"].append("10.mlp.down_proj"),
        "leaves out model.layers.10.mlp.down_proj",
    ),
]
AWQ_BREAKS: list[tuple[str, Break, str]] = [
    (SCHEME, lambda c: c.update(zero_point=False), "zero_point is False"),
    (SCHEME, lambda c: c.update(version="gemv"), "version is 'gemv'"),
    (SCHEME, lambda c: c.update(bits=8), "bits is 8"),
    (SCHEME, lambda c: c.update(group_size=100), "group_size is 100"),
    (
        DYNAMIC,
        lambda c: c.update(dynamic={}),
        f"takes {LAYER_1}.mlp.down_proj for quantized",
    ),
    (
        SCHEME,
        lambda c: c["modules_to_not_convert"].append(f"{LAYER_1}."),
        r"holds 'model\.layers\.1\.'",
    ),
    (
        NOT_CONVERT,
        lambda c: c["modules_to_not_convert"].remove(Q_OF_1),
        f"takes {Q_OF_1}",
    ),
    (
        NOT_CONVERT,
        lambda c: c["modules_to_not_convert"].remove("lm_head"),
        "takes lm_head",
    ),
    (
        NOT_CONVERT,
        lambda c: c["modules_to_not_convert"].append("q_proj"),
        "leaves out model.layers.0.self_attn.q_proj",
    ),
    (
        NOT_CONVERT_AS_PART,
        lambda c: c["modules_to_not_convert"].append("layers.1"),
        "leaves out model.layers.10",
    ),
    (
        MERGED_NOT_CONVERT,
        lambda c: c["modules_to_not_convert"].remove(f"{LAYER_1}.mlp.gate_up_proj"),
        "gate_up_proj",
    ),
]
FORMATS = ("compressed-tensors", "gptq", "awq")


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("kept", [(), (1,), (0, 1), (0, 9, 11), (10,)])
def test_what_we_write_passes_every_rule(format_name: str, kept: tuple[int, ...]) -> None:
    modules = llama_map(kept=kept)
    summary = check(format_name, modules, written(format_name, modules))
    assert "vllm: whole fusion groups; " in summary
    assert "sglang: whole fusion groups; " in summary


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("int8", [(10,), (0, 11), tuple(range(2, 12))])
def test_what_we_write_with_8_bit_layers_passes_every_rule(format_name: str, int8: tuple[int, ...]) -> None:
    modules = llama_map(kept=(1,), also_kept=("model.layers.11.mlp.down_proj",), int8=int8)
    check(format_name, modules, written(format_name, modules))


def test_8_bit_modules_cannot_be_in_awq() -> None:
    with pytest.raises(ArtifactError, match="has 8 bits; expected: 4 bits in awq"):
        check("awq", WIDE_10, written("awq", WIDE_10))


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize(
    "also_kept",
    [
        ("model.layers.2.mlp.down_proj",),
        ("model.layers.2.mlp.gate_proj", "model.layers.2.mlp.up_proj"),
        tuple(f"model.layers.10.self_attn.{name}_proj" for name in "qkv"),
    ],
)
def test_single_kept_units_pass_too(format_name: str, also_kept: tuple[str, ...]) -> None:
    modules = llama_map(kept=(1,), also_kept=also_kept)
    check(format_name, modules, written(format_name, modules))


@pytest.mark.parametrize(
    ("format_name", "modules", "rule", "break_", "message"),
    [
        *(("compressed-tensors", WIDE_10, *row) for row in COMPRESSED_TENSORS_BREAKS),
        *(("gptq", WIDE_10, *row) for row in GPTQ_BREAKS),
        *(("awq", llama_map(), *row) for row in AWQ_BREAKS),
    ],
)
def test_each_rule_fails_when_broken(
    format_name: str, modules: ModuleMap, rule: str, break_: Break, message: str
) -> None:
    config = written(format_name, modules)
    assert set(problems(format_name, modules, config).values()) == {()}
    break_(config)
    broken = problems(format_name, modules, config)[rule]
    assert any(re.search(message, problem) for problem in broken), broken
    with pytest.raises(ArtifactError, match="quantization_config: "):
        check(format_name, modules, config)


@pytest.mark.parametrize("format_name", FORMATS)
def test_half_of_a_fusion_group_is_refused(format_name: str) -> None:
    modules = llama_map(also_kept=("model.layers.3.self_attn.v_proj",))
    with pytest.raises(ArtifactError, match=r"model\.layers\.3\.self_attn\.qkv_proj, which is quantized in part"):
        check(format_name, modules, written(format_name, modules))


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq"])
def test_two_widths_in_a_fusion_group_are_refused(format_name: str) -> None:
    modules = replace(llama_map(), bits={"model.layers.3.self_attn.v_proj": 8})
    with pytest.raises(ArtifactError, match=r"qkv_proj, which is quantized in part, or with several widths"):
        check(format_name, modules, written(format_name, modules))


def test_another_name_of_the_head_must_be_ignored_too() -> None:
    modules = ModuleMap("b", quantized=("b.0.x",), kept=("lm_head",), fused={}, renamed={"lm_head": "embed_out"})
    config = written("compressed-tensors", modules)
    assert config["ignore"] == ["lm_head", "embed_out"]
    check("compressed-tensors", modules, config)
    config["ignore"].remove("embed_out")
    with pytest.raises(ArtifactError, match="ignore lacks embed_out"):
        check("compressed-tensors", modules, config)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ArtifactError, match="quant_method is 'bitsandbytes'"):
        check("gptq", llama_map(), {"quant_method": "bitsandbytes"})


def test_every_rule_has_a_test_that_breaks_it() -> None:
    """But whole groups, which the tests below break; servers read merged names by one rule, broken once."""
    for format_name, breaks in (
        ("compressed-tensors", COMPRESSED_TENSORS_BREAKS),
        ("gptq", GPTQ_BREAKS),
        ("awq", AWQ_BREAKS),
    ):
        rules = {rule for rule in problems(format_name, llama_map(), written(format_name, llama_map()))}
        shared = {rule.replace("sglang: dynamic", "vllm: dynamic") for rule in rules}
        broken = {rule.replace("sglang: dynamic", "vllm: dynamic") for rule, _, _ in breaks}
        assert broken == {rule for rule in shared if WHOLE_GROUPS not in rule}


@pytest.mark.parametrize(("format_name", "head"), [("gptq", ("lm_head",)), ("awq", ())])
def test_the_imitated_expression_rule_is_the_one_that_transformers_applies(
    format_name: str, head: tuple[str, ...]
) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    modules = llama_map()
    entries = [*written(format_name, modules)["modules_to_not_convert"], *head]
    converted = {name for name in (*modules.quantized, *modules.kept) if should_convert_module(name, entries)}
    assert converted == set(modules.quantized)
    assert not should_convert_module("model.layers.10.self_attn.q_proj", ["model.layers.1."])


def test_the_imitated_ignore_rule_is_the_one_that_compressed_tensors_applies() -> None:
    from compressed_tensors.utils.match import match_name

    modules = llama_map()
    ignore = written("compressed-tensors", modules)["ignore"]
    names = (*modules.quantized, *modules.kept)
    assert {name for name in names if any(match_name(name, entry) for entry in ignore)} == set(modules.kept)


def test_the_imitated_target_rule_is_the_one_that_compressed_tensors_applies() -> None:
    from compressed_tensors.utils.match import match_targets
    from torch import nn

    groups = written("compressed-tensors", WIDE_10)["config_groups"].values()
    widths = {target: group["weights"]["num_bits"] for group in groups for target in group["targets"]}
    found = {name: widths[match_targets(name, nn.Linear(1, 1), widths)[0]] for name in WIDE_10.quantized}
    assert found == dict.fromkeys(WIDE_10.quantized, 4) | dict(WIDE_10.bits)
