"""Our kernels inside vLLM: what it asks of a quantization method. Imported by `vllm_plugin.register` alone.

vLLM's own method of the checkpoint's format makes the parameters and loads them, merged and sharded as vLLM does it.
Only then are the packed tensors repacked for our kernels, and computed with. A module that these cannot compute (8
bits) stays with vLLM's own method. The side file of 16-bit input channels is not read.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from quant_fairness_plugin.checkpoint.dense_modules import Layout, tensor_layout
from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.serve import VLLM_METHOD
from quant_fairness_plugin.serve.linear import QuantizedLinear
from quant_fairness_plugin.serve.planes import reason_against, stored_planes

SUFFIXES: dict[Layout, tuple[str, ...]] = {
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
    "gptq": ("qweight", "qzeros", "scales"),
    "gptq_v2": ("qweight", "qzeros", "scales"),
    "awq": ("qweight", "qzeros", "scales"),
}
OLDEST_CAPABILITY = 80
"""As vLLM writes it: A100. It asks on NVIDIA GPUs only."""
_logger = logging.getLogger(__name__)


class QuantFairnessConfig(QuantizationConfig):  # type: ignore[misc] # vLLM is not installed where types are checked
    """The method `quant_fairness`: vLLM's own of the format, with our kernels in its place."""

    def __init__(self, own: Any, layout: Layout) -> None:
        """Wrap vLLM's configuration `own` of a checkpoint whose packed tensors lie as `layout` says."""
        super().__init__()
        self.own, self.layout = own, layout

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantFairnessConfig:
        """From the `quantization_config` of a checkpoint.

        Raises:
            ConfigError: it has act-order groups, whose order vLLM throws away.
            UnsupportedModelError: a format that is not read here.
        """
        if config.get("desc_act"):
            raise ConfigError(
                "this checkpoint has act-order groups (desc_act), whose order vLLM does not keep; --quantization "
                f"{VLLM_METHOD} reads those without. Serve it with load_quantized."
            )
        layout = tensor_layout(config)
        if layout not in SUFFIXES:
            raise UnsupportedModelError(
                f"--quantization {VLLM_METHOD} does not read {layout}; {', '.join(SUFFIXES)} are read. Leave it out, "
                "and vLLM uses its own method."
            )
        return cls(get_quantization_config(str(config["quant_method"])).from_config(config), layout)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take a checkpoint of another name only where the user says so."""
        return VLLM_METHOD if user_quant == VLLM_METHOD else None

    @classmethod
    def get_min_capability(cls) -> int:
        """Of NVIDIA GPUs."""
        return OLDEST_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in `config.json`."""
        return []

    def get_name(self) -> str:
        """What the user asks for."""
        return VLLM_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Types of the activations."""
        return [torch.float16, torch.bfloat16]

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Ours for a quantized linear module, and vLLM's own for everything else."""
        self.own.packed_modules_mapping = self.packed_modules_mapping
        method = self.own.get_quant_method(layer, prefix)
        if not isinstance(layer, LinearBase) or method is None or isinstance(method, UnquantizedLinearMethod):
            return method
        return QuantFairnessLinearMethod(method, self.layout, prefix)

    def get_checkpoint_weight_mapper(self) -> Any:
        """How vLLM renames the tensors of this format."""
        return self.own.get_checkpoint_weight_mapper()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the modules that the configuration names."""
        self.own.apply_vllm_mapper(hf_to_vllm_mapper)

    def maybe_update_config(self, model_name: str, *args: Any, **kwargs: Any) -> None:
        """Let vLLM's own configuration look at the model."""
        self.own.maybe_update_config(model_name, *args, **kwargs)


class QuantFairnessLinearMethod(LinearMethodBase):  # type: ignore[misc] # as above
    """Parameters by vLLM's own method, products by our kernels."""

    def __init__(self, own: Any, layout: Layout, prefix: str) -> None:
        """Compute the module named `prefix`, for which vLLM would use `own`."""
        self.own, self.layout, self.prefix = own, layout, prefix
        self.linear: QuantizedLinear | None = None

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Make the parameters that the files are loaded into."""
        self.own.create_weights(layer, *args, **kwargs)
        # Kernels may want other activations than the layer: ours take those that the model computes in.
        self.dtype = kwargs["params_dtype"] if "params_dtype" in kwargs else args[4]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Repack what was loaded, and drop it; leave a module that our kernels do not compute to vLLM."""
        parts = self._parts(layer)
        reason = reason_against(parts, self.layout)
        if reason is not None:
            _logger.info("%s stays with %s: %s", self.prefix, type(self.own).__name__, reason)
            self.own.process_weights_after_loading(layer)
            return
        device = next(iter(parts.values())).device
        on_cpu = device.type == "cpu"
        planes = stored_planes(parts, self.layout, dtype=None if on_cpu else self.dtype)
        self.linear = QuantizedLinear(planes, bias=None, dtype=self.dtype, on_cpu=on_cpu).to(device)
        for suffix in parts:
            delattr(layer, suffix)
        if hasattr(layer, "scheme"):
            del layer.scheme

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W^T + bias`."""
        if self.linear is None:
            computed: Tensor = self.own.apply(layer, x, bias)
            return computed
        out: Tensor = self.linear(x)
        return out if bias is None else out + bias

    def _parts(self, layer: nn.Module) -> dict[str, Tensor]:
        """The packed tensors by suffix; the shape is that of the merged module, not of the last part loaded."""
        parameters = dict(layer.named_parameters(recurse=False))
        parts = {suffix: parameters[suffix].data for suffix in SUFFIXES[self.layout] if suffix in parameters}
        if "weight_shape" in parts:
            rows, cols = layer.output_size_per_partition, layer.input_size_per_partition
            assert isinstance(rows, int) and isinstance(cols, int)  # noqa: PT018 # vLLM's own sizes
            parts["weight_shape"] = torch.tensor([rows, cols])
        return parts
