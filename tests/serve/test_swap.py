"""`use_kernels` replaces what Transformers loaded, and refuses by name what it does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.checkpoint.dequantize import load_dense_model, open_checkpoint
from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.serve.linear import QuantizedLinear
from quant_fairness_plugin.serve.load import load_quantized
from quant_fairness_plugin.serve.swap import use_kernels
from tests.serve.conftest import Served
from tests.serve.test_load import BFLOAT16, difference, logits, packed

DOWN = "model.layers.0.mlp.down_proj"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model


@pytest.mark.parametrize(
    ("family", "grid"),
    [("llama", Grid(group_size=32)), ("qwen2", Grid(group_size=-1)), ("opt", Grid(group_size=32, symmetric=False))],
    ids=str,
)
def test_logits_stay_those_of_transformers(served: Served, family: str, grid: Grid) -> None:
    folder = served(family, grid=grid)
    model = load(folder)
    assert use_kernels(model) is model
    assert difference(logits(model), logits(load(folder))) <= 1e-5
    found = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert found == packed(folder)


def test_in_bfloat16_they_are_those_of_load_quantized(served: Served) -> None:
    # The same scales only if they were bfloat16 in the file: Transformers rounds scales where we round weights.
    model = use_kernels(load(served("llama"), torch.bfloat16))
    assert difference(logits(model), logits(load_quantized(served("llama"), kernel="reference"))) < BFLOAT16


def test_8_bit_modules_stay_as_they_were_loaded(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    folder = served("llama", overrides={"layers.0.down": "int8"})
    model = load(folder)
    with caplog.at_level("INFO", logger="quant_fairness_plugin.serve.swap"):
        use_kernels(model)
    assert not isinstance(model.get_submodule(DOWN), QuantizedLinear)
    assert f"{DOWN} stays as it was loaded: it does not have 4 bits" in caplog.text
    assert difference(logits(model), logits(load(folder))) <= 1e-5


def test_weights_that_are_no_longer_packed_are_refused(served: Served) -> None:
    model = load(served("llama"))
    logits(model)
    with pytest.raises(UnsupportedModelError, match=r"_proj is no longer packed.*Call use_kernels on a freshly loaded"):
        use_kernels(model)


def test_protected_modules_are_not_touched_and_their_type_is_checked(served: Served) -> None:
    model = load(served("llama"), torch.float16)
    protected = model.get_submodule("model.layers.1.mlp.down_proj")
    weight = protected.weight
    use_kernels(model)
    assert model.get_submodule("model.layers.1.mlp.down_proj") is protected
    assert protected.weight is weight

    wrong = load(served("llama"), torch.float16)
    wrong.get_submodule("model.layers.1.mlp.down_proj").float()
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.down_proj is protected, and holds a weight in"):
        use_kernels(wrong)
    assert not any(isinstance(module, QuantizedLinear) for module in wrong.modules())


def test_a_head_that_transformers_left_in_16_bit_is_found(served: Served) -> None:
    with pytest.raises(UnsupportedModelError, match=r"lm_head is protected, and holds a weight in torch\.float16"):
        use_kernels(load(served("gpt_neox")))


def test_a_model_without_quantized_modules_is_refused(served: Served) -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no quantized linear modules"):
        use_kernels(load_dense_model(served("llama")))


def test_kernels_that_cannot_run_on_the_model_are_refused(served: Served) -> None:
    model = load(served("llama"), torch.bfloat16)
    with pytest.raises(ConfigError, match="'reference' computes in float32"):
        use_kernels(model, kernel="reference")
    with pytest.raises(ConfigError, match="kernel 'triton' cannot run"):
        use_kernels(model, kernel="triton")


def test_quantized_activations_are_refused(served: Served) -> None:
    model: Any = load(served("llama"))
    scheme = model.get_submodule(DOWN).quantization_scheme
    model.get_submodule(DOWN).quantization_scheme = scheme.model_copy(update={"input_activations": scheme.weights})
    with pytest.raises(UnsupportedModelError, match=rf"{DOWN} has quantized activations"):
        use_kernels(model)


class Packed(nn.Module):
    """The tensors of another package's module, whose class is renamed below."""

    def __init__(self, parts: dict[str, Tensor], version: int) -> None:
        super().__init__()
        for suffix, tensor in parts.items():
            self.register_buffer(suffix, tensor)
        self.bias = None
        self.version = version

    def qzero_format(self) -> int:
        return self.version


def foreign(name: str, package: str) -> type[Packed]:
    return type(name, (Packed,), {"__module__": package})


def with_foreign_modules(folder: Path, kind: type[Packed]) -> PreTrainedModel:
    """The model, float32, with its quantized modules as gptqmodel holds them: scales in the type of the file."""
    model, checkpoint = load_dense_model(folder), open_checkpoint(folder)
    for name in checkpoint.packed:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, kind(checkpoint.parts(name), 1))
    return model


@pytest.mark.parametrize(("name", "format_name"), [("TorchLinear", "gptq"), ("AwqTorchLinear", "awq")])
def test_plain_modules_of_gptqmodel_are_replaced(served: Served, name: str, format_name: str) -> None:
    folder = served("llama", format_name)
    model = use_kernels(with_foreign_modules(folder, foreign(name, "gptqmodel.nn_modules.qlinear.torch")))
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == len(packed(folder))
    assert difference(logits(model), logits(load_dense_model(folder))) <= 1e-6


@pytest.mark.parametrize(
    ("name", "package"), [("MarlinLinear", "gptqmodel.nn_modules.qlinear.marlin"), ("TorchLinear", "auto_gptq.torch")]
)
def test_unknown_modules_are_refused_by_name(served: Served, name: str, package: str) -> None:
    model = with_foreign_modules(served("llama", "gptq"), foreign(name, package))
    with pytest.raises(UnsupportedModelError, match=rf"_proj is a {package}\.{name}, whose tensors are not read here"):
        use_kernels(model)
