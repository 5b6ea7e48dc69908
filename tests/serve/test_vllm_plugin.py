"""The vLLM plugin with stand-ins for what it asks of vLLM; `tests/readers/test_vllm_plugin.py` runs the real one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from quant_fairness_plugin.checkpoint.dequantize import open_checkpoint
from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.serve import vllm_plugin
from tests.serve.conftest import Served

ROOT = Path(__file__).parents[2]
LAYERS = "vllm.model_executor.layers"
Q_PROJ = "model.layers.0.self_attn.q_proj"


class LinearBase(nn.Module):
    """As vLLM's: knows its own sizes."""

    def __init__(self, rows: int, cols: int) -> None:
        super().__init__()
        self.output_size_per_partition, self.input_size_per_partition = rows, cols


class UnquantizedLinearMethod:
    """As vLLM's."""


class OwnMethod:
    """vLLM's own method of a format: makes parameters, and can compute with them."""

    def __init__(self) -> None:
        self.processed = 0

    def create_weights(self, layer: nn.Module, tensors: dict[str, torch.Tensor], **_: Any) -> None:
        for name, tensor in tensors.items():
            layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.processed += 1

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.full((len(x), 1), 7.0)


class OwnConfig:
    """vLLM's own configuration of a format: everything but `head` is quantized."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> OwnConfig:
        return cls(config)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        return UnquantizedLinearMethod() if prefix == "head" else OwnMethod()


def module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(content)
    return made


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Stand-ins for the modules that the plugin imports; its own module is forgotten afterwards."""
    known: dict[str, Any] = {}
    methods = ["gptq", "awq", "compressed-tensors"]

    def register_quantization_config(name: str) -> Callable[[type], type]:
        def keep(found: type) -> type:
            methods.append(name)
            known[name] = found
            return found

        return keep

    linear = module(
        f"{LAYERS}.linear",
        LinearBase=LinearBase,
        LinearMethodBase=object,
        UnquantizedLinearMethod=UnquantizedLinearMethod,
    )
    quantization = module(
        f"{LAYERS}.quantization",
        QUANTIZATION_METHODS=methods,
        register_quantization_config=register_quantization_config,
        get_quantization_config=lambda name: OwnConfig,
        known=known,
    )
    base = type("QuantizationConfig", (), {"__init__": lambda self: setattr(self, "packed_modules_mapping", {})})
    for made in (linear, quantization, module(f"{LAYERS}.quantization.base_config", QuantizationConfig=base)):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.delitem(sys.modules, "quant_fairness_plugin.serve.vllm_quantization", raising=False)
    yield quantization
    sys.modules.pop("quant_fairness_plugin.serve.vllm_quantization", None)


def config_of(vllm: ModuleType, quantization: dict[str, Any]) -> Any:
    vllm_plugin.register()
    return vllm.known["quant_fairness"].from_config(quantization)


def test_the_entry_point_names_the_function() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    target = project["entry-points"]["vllm.general_plugins"]["quant_fairness"]
    name, _, function = target.partition(":")
    assert getattr(importlib.import_module(name), function) is vllm_plugin.register


def test_the_plugin_is_imported_without_vllm_and_without_torch() -> None:
    code = (
        "import sys; from quant_fairness_plugin.serve import vllm_plugin; "
        "assert not {'torch', 'vllm'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_registering_says_what_is_missing() -> None:
    with pytest.raises(ModuleNotFoundError, match="vllm"):
        vllm_plugin.register()


def test_registering_twice_is_registering_once(vllm: ModuleType) -> None:
    vllm_plugin.register()
    vllm_plugin.register()
    assert vllm.QUANTIZATION_METHODS.count("quant_fairness") == 1
    assert vllm.QUANTIZATION_METHODS[:3] == ["gptq", "awq", "compressed-tensors"]


@pytest.mark.parametrize("asked", [None, "gptq", "awq", "awq_marlin", "compressed-tensors"])
def test_a_checkpoint_is_taken_only_where_the_user_says_so(vllm: ModuleType, asked: str | None) -> None:
    vllm_plugin.register()
    take = vllm.known["quant_fairness"].override_quantization_method
    for method in ("gptq", "awq", "compressed-tensors"):
        assert take({"quant_method": method}, asked, hf_config=None) is None
        assert take({"quant_method": method}, "quant_fairness", hf_config=None) == "quant_fairness"


def test_what_is_not_read_is_refused(vllm: ModuleType) -> None:
    with pytest.raises(ConfigError, match="act-order groups .desc_act., whose order vLLM does not keep"):
        config_of(vllm, {"quant_method": "gptq", "desc_act": True})
    with pytest.raises(UnsupportedModelError, match="quanto"):
        config_of(vllm, {"quant_method": "quanto"})


def test_only_quantized_linear_modules_are_ours(vllm: ModuleType) -> None:
    config = config_of(vllm, {"quant_method": "gptq"})
    assert isinstance(config.get_quant_method(LinearBase(1, 1), "head"), UnquantizedLinearMethod)
    assert isinstance(config.get_quant_method(nn.Embedding(1, 1), "embeddings"), OwnMethod)
    assert type(config.get_quant_method(LinearBase(1, 1), "model.a")).__name__ == "QuantFairnessLinearMethod"


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq", "awq"])
def test_the_product_is_that_of_the_files(vllm: ModuleType, served: Served, format_name: str) -> None:
    checkpoint = open_checkpoint(served("llama", format_name))
    layer = LinearBase(32, 32)
    layer.scheme = "vLLM's own"  # type: ignore[assignment]
    method = config_of(vllm, {"quant_method": format_name}).get_quant_method(layer, Q_PROJ)
    parts = checkpoint.parts(Q_PROJ)
    parts.pop("g_idx", None)  # as vLLM does
    if "weight_shape" in parts:  # vLLM leaves that of the last part of a merged module there
        parts["weight_shape"] = torch.tensor([1, 1])
    method.create_weights(layer, parts, params_dtype=torch.bfloat16)
    method.process_weights_after_loading(layer)
    assert not list(layer.parameters())
    assert not hasattr(layer, "scheme")
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = x.float() @ checkpoint.dense(Q_PROJ).T
    # bfloat16 keeps 8 bits: weights, products and the sum with the bias are rounded
    torch.testing.assert_close(method.apply(layer, x).float(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(method.apply(layer, x, torch.ones(32)).float(), expected + 1, rtol=0.02, atol=0.02)


def test_what_the_kernels_cannot_compute_stays_with_vllm(vllm: ModuleType, served: Served) -> None:
    checkpoint = open_checkpoint(served("llama", "gptq", overrides={"layers.0": "int8"}))
    layer = LinearBase(32, 32)
    method = config_of(vllm, {"quant_method": "gptq"}).get_quant_method(layer, Q_PROJ)
    method.create_weights(layer, checkpoint.parts(Q_PROJ), params_dtype=torch.float16)
    method.process_weights_after_loading(layer)
    assert method.own.processed == 1
    assert method.apply(layer, torch.ones(2, 32)).tolist() == [[7.0], [7.0]]
