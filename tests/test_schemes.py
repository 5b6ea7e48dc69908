"""`--scheme`: what goes with it is settled before a model is read, and the whole line takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quant_fairness_plugin import FairQuantizer
from quant_fairness_plugin.artifacts import Grid, ProtectionPlan, save
from quant_fairness_plugin.cli.saved_plan import planned
from quant_fairness_plugin.config import FairConfig, make_config
from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.preflight import ModelSource, preflight
from quant_fairness_plugin.quantize.schemes import SCHEMES
from tests.export.build import TEXTS

LEAVE_OUT = r"Leave it out, or use scheme 'int'"


def test_a_scheme_brings_its_bits_and_groups() -> None:
    for name, scheme in SCHEMES.items():
        config = make_config(scheme=name)
        assert config.bits == scheme.bits
        assert config.grid == scheme.grid("mse")
        assert FairConfig.from_dict(config.to_dict()) == config
    assert make_config().grid == Grid(clip="mse")
    assert make_config(scheme="nvfp4", clip="absmax").grid.clip == "absmax"
    assert make_config(scheme="fp8", bits=8).grid == SCHEMES["fp8"].grid("mse")


def test_a_plan_may_give_what_is_wider() -> None:
    assert make_config(scheme="nvfp4").menu == ("fp16", "int8")
    assert make_config(scheme="fp8").menu == ("fp16",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 8}, "bits 8 cannot be used with scheme 'nvfp4'; accepted with it: bits 4"),
        ({"group_size": 32}, "group_size 32 cannot be used with scheme 'nvfp4'; accepted with it: groups of 16"),
        ({"symmetric": False}, r"symmetric False \(--asym\) cannot be used"),
        ({"clip": "laplace"}, "clip 'laplace' cannot be used .* accepted with it: clip absmax or mse"),
        ({"format": "gguf"}, "format 'gguf' cannot be used .* accepted with it: format compressed-tensors"),
        ({"clip": "minimax"}, "clip 'minimax' cannot be used"),
        ({"method": "awq"}, "method 'awq' cannot be used .* accepted with it: method 'rtn' or 'gptq'"),
        ({"backend": "gptqmodel"}, "backend 'gptqmodel' cannot be used"),
        ({"quantize_rest_to": "INT4"}, "quantize_rest_to 'INT4' cannot be used"),
        ({"protect_columns": 0.01}, "protect_columns 0.01 cannot be used"),
        ({"embedding": "16bit"}, "embedding has an effect on format 'gguf' alone"),
        ({"scheme": "fp8", "bits": 4}, "bits 4 cannot be used with scheme 'fp8'; accepted with it: bits 8"),
        ({"scheme": "fp8", "group_size": -1}, "a scale for each output channel, which nothing can change"),
        ({"scheme": "fp8", "int8_layers": (0,)}, "int8_layers 0 cannot be used with scheme 'fp8'"),
        ({"scheme": "fp8", "precisions": ("fp16", "int8")}, "bits 8 is no less; leave int8 out"),
        ({"scheme": "fp4"}, "scheme 'fp4': Input should be 'int', 'fp8', 'nvfp4' or 'mxfp4'"),
    ],
)
def test_what_does_not_go_with_a_scheme_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**({"scheme": "nvfp4"} | options))


@pytest.mark.parametrize("format_name", ["gptq", "awq"])
def test_other_formats_are_refused_before_the_model_is_looked_for(format_name: str, tmp_path: Path) -> None:
    config = make_config(scheme="mxfp4", format=format_name)
    with pytest.raises(UnsupportedModelError, match=f"format '{format_name}' has no place for the floats of scheme"):
        preflight(ModelSource("no such model"), config, out=tmp_path / "out")


def test_fp4_of_a_float16_model_is_refused_by_its_config(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="stored in float16 is not read"):
        preflight(ModelSource(str(tiny_model("llama"))), make_config(scheme="nvfp4"), out=tmp_path / "out", texts=TEXTS)


def test_a_plan_brings_its_scheme(tmp_path: Path) -> None:
    plan = ProtectionPlan.unprotected("m", 2, SCHEMES["mxfp4"].grid("mse"))
    save(plan, tmp_path / "plan.json")
    _, config = planned(tmp_path / "plan.json", make_config())
    assert (config.scheme, config.group_size, config.grid) == ("mxfp4", "auto", plan.grid)
    with pytest.raises(ConfigError, match="--scheme fp8 and --plan .* contradict each other"):
        planned(tmp_path / "plan.json", make_config(scheme="fp8"))
    save(replace(plan, grid=Grid(clip="mse"), units={"layers.0": "int4", "layers.1": "int4"}), tmp_path / "int.json")
    with pytest.raises(ConfigError, match="--scheme nvfp4 and --plan .* contradict each other"):
        planned(tmp_path / "int.json", make_config(scheme="nvfp4"))


def test_the_class_plans_and_writes_floats(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model("llama", layers=3, width=64, dtype="bfloat16")
    quantizer = FairQuantizer.from_pretrained(
        str(model), scheme="nvfp4", texts=TEXTS, method="rtn", protect_layers=[1], protect_units=["2.down"],
        prompts="none", reference=None,
    )  # fmt: skip
    quantized = quantizer.quantize()
    assert {grid.scheme for grid in quantized.module_grids.values()} == {"nvfp4"}
    assert quantized.plan.singled_out == {"layers.1": "fp16", "layers.2.down": "fp16"}
