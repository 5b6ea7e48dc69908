"""Folders of any tool: what is quantized by their tensors, and which reader's rules take that right.

The verdicts are those that the real readers gave (Transformers with optimum and gptqmodel, vLLM, gptqmodel) when they
were run on such folders.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant_fairness_plugin.checkpoint.inspection import Inspection, inspect_checkpoint
from quant_fairness_plugin.checkpoint.readers import reader_problems
from quant_fairness_plugin.errors import ArtifactError, UnsupportedModelError
from tests.export import foreign_folders as tools
from tests.export.conftest import Exported, rewrite_json

Edit = Callable[[Path], Any]
NAME = "model.layers.10.mlp.down_proj"
Q_OF_1 = "model.layers.1.self_attn.q_proj"


def metadata(**changes: object) -> Edit:
    return lambda folder: tools.change_metadata(folder, **changes)


def tensors(change: Callable[[tools.Tensors], object]) -> Edit:
    return lambda folder: tools.change_tensors(folder, change)


def ours_without(*keys: str) -> Edit:
    """Our own metadata without some of its lists."""

    def edit(folder: Path) -> None:
        (folder / tools.RECORD).unlink()
        rewrite_json(folder / "config.json", lambda c: [c["quantization_config"].pop(key) for key in keys])

    return edit


def asymmetric(folder: Path) -> None:
    tools.gptqmodel(folder)
    tools.change_metadata(folder, sym=False)
    zeros = f"{NAME}.qzeros"
    tools.change_tensors(folder, lambda t: t.update({zeros: torch.full_like(t[zeros], 0x66666666)}))


def in_act_order(folder: Path) -> None:
    tools.gptqmodel(folder)
    tools.change_metadata(folder, desc_act=True)
    tools.change_tensors(folder, lambda t: t.update({f"{NAME}.g_idx": t[f"{NAME}.g_idx"].flip(0)}))


def mixed_shards(folder: Path) -> None:
    tools.change_tensors(folder, tools.keep_one_part)
    ours_without()(folder)
    name = "model.layers.3.self_attn.q_proj"
    rewrite_json(
        folder / "config.json",
        lambda c: c["quantization_config"]["modules_in_block_to_quantize"][0].remove(name),
    )


def under_its_own_name(folder: Path) -> None:
    tools.autogptq(folder)
    rewrite_json(folder / "config.json", lambda c: c.pop("quantization_config"))


LISTS = ("dynamic", "modules_in_block_to_quantize", "modules_to_not_convert")
SGLANG = "the metadata, as SGLang reads it, takes model.layers.1"
OPTIMUM = "modules_in_block_to_quantize \\(as suffix\\)"
CASES: list[tuple[str, str, str, Edit, dict[str, str]]] = [
    ("as we write it", "llama", "gptq", ours_without(), {}),
    ("as we write it", "llama", "awq", ours_without(), {}),
    ("as we write it", "llama", "compressed-tensors", ours_without(), {}),
    ("gptqmodel: dynamic only", "llama", "gptq", tools.gptqmodel, {"transformers": f"{OPTIMUM} takes .*layers.1"}),
    (
        "AutoRound",
        "llama",
        "gptq",
        tools.autoround_gptq,
        {"transformers": f"{OPTIMUM} takes", "vllm": "takes model.layers.1.mlp.gate_proj", "sglang": SGLANG},
    ),
    (
        "AutoRound",
        "llama",
        "awq",
        tools.autoround_awq,
        {"gptqmodel": "dynamic .* takes model.layers.1", "sglang": SGLANG},
    ),
    (
        "AutoAWQ: a trailing dot takes layers 10 and 11",
        "llama",
        "awq",
        tools.autoawq,
        {"transformers": "leaves out model.layers.10", "gptqmodel": "dynamic"},
    ),
    (
        "AutoGPTQ, weights under a name of its own",
        "llama",
        "gptq",
        under_its_own_name,
        {reader: "only quantize_config.json" for reader in ("transformers", "vllm", "sglang")}
        | {"gptqmodel": "dynamic"},
    ),
    (
        "only the block list",
        "llama",
        "gptq",
        ours_without(LISTS[0], LISTS[2]),
        {"gptqmodel": r"dynamic \(the only list", "sglang": SGLANG},
    ),
    (
        "no list at all: vLLM looks at the dtypes",
        "llama",
        "gptq",
        ours_without(*LISTS),
        {"transformers": "takes", "gptqmodel": "takes", "sglang": SGLANG},
    ),
    (
        "no list at all: vLLM looks at the dtypes",
        "llama",
        "awq",
        ours_without(LISTS[0], LISTS[2]),
        {"transformers": "takes", "gptqmodel": "takes", "sglang": SGLANG},
    ),
    ("asymmetric", "llama", "gptq", asymmetric, {"transformers": "takes", "vllm": "asymmetric gptq grid"}),
    ("act-order", "llama", "gptq", in_act_order, {"transformers": "takes", "vllm": "act-order"}),
    (
        "one shard in 16 bit",
        "llama",
        "gptq",
        mixed_shards,
        {"vllm": "vLLM merges the parts", "gptqmodel": "takes", "sglang": "SGLang merges the parts"},
    ),
    ("Conv1D", "gpt2", "gptq", ours_without(), {"transformers": "Conv1D"}),
    ("Conv1D", "gpt2", "compressed-tensors", ours_without(), {"transformers": "Conv1D", "gptqmodel": "Conv1D"}),
    ("BLOOM", "bloom", "gptq", ours_without(), {"vllm": "BLOOM"}),
    ("BLOOM", "bloom", "awq", ours_without(), {"vllm": "BLOOM"}),
    (
        "BLOOM without activation scales",
        "bloom",
        "awq",
        lambda folder: (
            ours_without()(folder),
            tools.change_tensors(folder, lambda t: t.pop("transformer.h.1.mlp.gelu_impl.scales")),
        ),
        {"transformers": r"transformer\.h\.1\.mlp\.gelu_impl\.scales is missing", "vllm": "BLOOM"},
    ),
    (
        "gptqmodel's symmetric AWQ",
        "llama",
        "awq",
        lambda folder: (ours_without()(folder), tools.change_metadata(folder, zero_point=False)),
        {"transformers": "zero_point is False", "vllm": "zero_point is False"},
    ),
    (
        "a regular expression that takes too much",
        "llama",
        "compressed-tensors",
        lambda folder: (
            ours_without()(folder),
            tools.change_metadata(folder, ignore=[r"re:model\.layers\.1.*", "lm_head"]),
        ),
        dict.fromkeys(("transformers", "vllm", "gptqmodel", "sglang"), "leaves out model.layers.10"),
    ),
    (
        "regular expressions that are right, as llm-compressor takes them",
        "llama",
        "compressed-tensors",
        lambda folder: (
            ours_without()(folder),
            tools.change_metadata(folder, ignore=[r"re:.*layers\.1\..*", "lm_head"]),
        ),
        {},
    ),
]


@pytest.mark.parametrize(
    ("family", "format_name", "edit", "expected"),
    [case[1:] for case in CASES],
    ids=[f"{case[0]}-{case[1]}-{case[2]}" for case in CASES],
)
def test_each_reader_gets_its_own_verdict(
    damaged: Exported, family: str, format_name: str, edit: Edit, expected: dict[str, str]
) -> None:
    folder = damaged(family, format_name, "transformers" if family == "bloom" else "vllm")
    edit(folder)
    problems = reader_problems(inspect_checkpoint(folder).case)
    assert {reader for reader, text in problems.items() if text} == set(expected), problems
    for reader, pattern in expected.items():
        assert re.search(pattern, problems[reader]), problems


def found(damaged: Exported, *edits: Edit, format_name: str = "gptq") -> Inspection:
    folder = damaged("llama", format_name)
    tools.gptqmodel(folder) if format_name == "gptq" else ours_without()(folder)
    for edit in edits:
        edit(folder)
    return inspect_checkpoint(folder)


def test_the_tensors_say_which_modules_are_quantized(damaged: Exported) -> None:
    seen = found(damaged)
    assert (seen.layout, seen.dtype, seen.tensors) == ("gptq", "float16", 11 * (7 * 4 + 2) + 9 + 3)
    assert Q_OF_1 in seen.modules.kept
    assert len(seen.modules.quantized) == 11 * 7
    assert (seen.packed[NAME].bits, seen.packed[NAME].groups, seen.packed[NAME].cols) == (4, 2, 64)
    assert seen.facts.symmetric
    assert seen.facts.ordered


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (tensors(lambda t: t.pop("model.norm.weight")), r"missing tensors: model\.norm\.weight"),
        (tensors(lambda t: t.pop(f"{NAME}.g_idx")), rf"missing tensors: {NAME}\.g_idx"),
        (tensors(lambda t: t.update({"model.extra": torch.zeros(2).half()})), r"unexpected tensors: model\.extra"),
        (tensors(lambda t: t.update({"model.layers.1.mlp.up_proj.g_idx": torch.zeros(2)})), "unexpected tensors"),
        (
            tensors(lambda t: t.update({f"model.layers.12.q.{s}": t[f"{NAME}.{s}"] for s in ("qweight", "scales")})),
            r"model\.layers\.12\.q is quantized in the weight files, and the architecture has no such",
        ),
        (tensors(lambda t: t.update({f"{NAME}.scales": t[f"{NAME}.scales"][:, :8]})), r"scales is \(2, 8\), expected"),
        (tensors(lambda t: t.update({f"{NAME}.qweight": t[f"{NAME}.qweight"][:5]})), "5 words for 64 integers"),
        (tensors(lambda t: t.update({f"{NAME}.qzeros": t[f"{NAME}.qzeros"][:1]})), r"qzeros is \(1, 4\), expected"),
        (tensors(lambda t: t.update({f"{NAME}.scales": t[f"{NAME}.scales"] / 0})), "scales holds NaN or infinite"),
        (tensors(lambda t: t.update({f"{NAME}.g_idx": t[f"{NAME}.g_idx"] + 1})), "groups 1 to 2, and there are 2"),
        (
            tensors(lambda t: t.update({f"{Q_OF_1}.weight": t[f"{Q_OF_1}.weight"].bfloat16()})),
            "mixed dtypes: .* is BF16, .* is F16.*The tensors would have to change",
        ),
    ],
)
def test_a_wrong_tensor_is_named(damaged: Exported, edit: Edit, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        found(damaged, edit)


@pytest.mark.parametrize(("format_name", "width"), [("gptq", 2), ("compressed-tensors", 2)])
def test_modules_of_8_bits_are_told_by_their_shapes(damaged: Exported, format_name: str, width: int) -> None:
    name = "qweight" if format_name == "gptq" else "weight_packed"
    dim = 0 if format_name == "gptq" else 1

    def widen(stored: tools.Tensors) -> None:
        stored[f"{NAME}.{name}"] = stored[f"{NAME}.{name}"].repeat_interleave(width, dim)
        if format_name == "gptq":
            stored[f"{NAME}.qzeros"] = torch.full((2, 8), 0x7F7F7F7F, dtype=torch.int32)

    seen = found(damaged, tensors(widen), format_name=format_name)
    assert seen.packed[NAME].bits == 8
    assert seen.facts.symmetric
    if format_name == "gptq":
        problems = reader_problems(seen.case)
        assert "of 4 and of 8 bits side by side" in problems["transformers"]
        assert "dynamic gives" in problems["gptqmodel"]


def test_a_zero_point_of_0_in_version_1_is_a_trap_for_two_readers(damaged: Exported) -> None:
    seen = found(damaged, tensors(lambda t: t[f"{NAME}.qzeros"].fill_(-1)), metadata(sym=False))
    assert seen.facts.wrapped_zeros
    problems = reader_problems(seen.case)
    assert "stored as the largest integer" in problems["gptqmodel"]
    assert "stored as the largest integer" in problems["transformers"]


def test_a_mixture_of_experts_or_an_unknown_method_is_refused(damaged: Exported) -> None:
    with pytest.raises(UnsupportedModelError, match="quant_method 'auto-round'"):
        found(damaged, metadata(quant_method="auto-round"))


def test_a_plain_checkpoint_has_no_problems(tiny_model: Callable[..., Path]) -> None:
    seen = inspect_checkpoint(tiny_model("llama"))
    assert seen.layout is None
    assert reader_problems(seen.case) == {"transformers": "", "vllm": "", "gptqmodel": "", "sglang": ""}


def test_a_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a folder"):
        inspect_checkpoint(tmp_path / "absent")
