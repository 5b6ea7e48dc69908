"""Step 7, the independent reading: dense weights from the files of an export alone.

This is what every other reader is compared with, so it shares no code with the packing that wrote the files, nor with
the loaders: nibbles are taken out in the plainest way, and every weight is `(integer - zero point) * scale` in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from quant_fairness_plugin.errors import ArtifactError, UnsupportedModelError
from quant_fairness_plugin.export.check_files import check_headers, read_config
from quant_fairness_plugin.model.headers import read_header
from quant_fairness_plugin.model.linear import is_conv1d
from quant_fairness_plugin.model.load import quiet_transformers
from quant_fairness_plugin.model.weights import find_weights


def read_dense_state(folder: Path) -> dict[str, Tensor]:
    """The whole model as float32 tensors on the CPU, by the parameter names of the unquantized model.

    Args:
        folder: an export in any of our formats.

    Raises:
        ArtifactError: files that are missing or malformed.
        UnsupportedModelError: a quantization method that is not ours.
    """
    return dict(iterate_dense(folder))


def iterate_dense(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """As `read_dense_state`, one tensor at a time."""
    folder = Path(folder)
    shapes = check_headers(folder)
    _, quantization = read_config(folder)
    marker = _marker(quantization)
    transposed = {name for name, module in bare_model(folder).named_modules() if is_conv1d(module)}
    where: dict[str, Any] = {}
    for path in find_weights(folder, allow_pickle=False):
        where |= dict.fromkeys(read_header(path), safe_open(path, framework="pt"))
    packed: dict[str, list[str]] = {
        name.removesuffix(marker): [] for name in shapes if marker and name.endswith(marker)
    }
    for name in shapes:
        module, _, suffix = name.rpartition(".")
        if module in packed and suffix != "bias":
            packed[module].append(suffix)
            continue
        tensor = where[name].get_tensor(name)
        yield name, tensor.float() if tensor.is_floating_point() else tensor
    for module, suffixes in packed.items():
        parts = {suffix: where[f"{module}.{suffix}"].get_tensor(f"{module}.{suffix}") for suffix in suffixes}
        weight = _dense(module, parts, quantization or {})
        yield f"{module}.weight", weight.t().contiguous() if module in transposed else weight


def load_dense_model(folder: Path) -> PreTrainedModel:
    """The model that an export stands for, in float32 on the CPU, without any quantization code of another package.

    Args:
        folder: an export in any of our formats.

    Raises:
        ArtifactError: tensors that are missing, unexpected or of another shape.
    """
    folder = Path(folder)
    bare = bare_model(folder)
    with quiet_transformers():
        loaded: Any = type(bare).from_pretrained(
            None, config=bare.config, state_dict=read_dense_state(folder), dtype=torch.float32, output_loading_info=True
        )
        model: PreTrainedModel = loaded[0]
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    check_loading_info(folder, loaded[1])
    model.train(False)
    return model


def bare_model(folder: Path) -> PreTrainedModel:
    """The unquantized architecture of an export, on the meta device.

    Raises:
        ArtifactError: a config that Transformers cannot build a model from.
    """
    try:
        with quiet_transformers(), torch.device("meta"):
            build: Any = AutoModelForCausalLM.from_config
            model: PreTrainedModel = build(_plain_config(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as err:
        reason = " ".join(str(err).split())[:200]
        raise ArtifactError(
            f"{folder / 'config.json'}: describes no model that can be built ({reason}). Restore the exported file."
        ) from err
    return model


def check_loading_info(folder: Path, info: Mapping[str, Any]) -> None:
    """Refuse a load in which Transformers would have filled gaps with random numbers.

    Raises:
        ArtifactError: tensors that are missing, unexpected or of another shape.
    """
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info.get(problem) or ())
        if keys:
            raise ArtifactError(
                f"{folder}: {problem.replace('_', ' ')}: {', '.join(keys[:5])} ({len(keys)} in all); the files do not "
                "hold exactly the model's tensors. Export again."
            )


def _plain_config(folder: Path) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _marker(quantization: Mapping[str, Any] | None) -> str:
    if quantization is None:
        return ""
    method = quantization.get("quant_method")
    markers = {"compressed-tensors": ".weight_packed", "gptq": ".qweight"}
    if method not in markers:
        raise UnsupportedModelError(f"quant_method {method!r} cannot be dequantized here; allowed: {list(markers)}.")
    return markers[method]


def _dense(module: str, parts: Mapping[str, Tensor], quantization: Mapping[str, Any]) -> Tensor:
    """One module's weight `[rows, cols]` in float32."""
    try:
        if "qweight" in parts:
            if quantization.get("checkpoint_format") != "gptq":
                raise UnsupportedModelError(f"{module}: only gptq version 1 can be read. Export again.")
            return _dense_gptq(parts)
        return _dense_compressed_tensors(parts)
    except (KeyError, RuntimeError, IndexError) as err:
        raise ArtifactError(f"{module}: its tensors do not fit together ({err}). Export again.") from err


def _dense_gptq(parts: Mapping[str, Tensor]) -> Tensor:
    integers = _nibbles(parts["qweight"].t())
    zeros = ((_nibbles(parts["qzeros"]) + 1) % 16).t()
    scales = parts["scales"].float().t()
    group = parts["g_idx"].long()
    return (integers - zeros[:, group]) * scales[:, group]


def _dense_compressed_tensors(parts: Mapping[str, Tensor]) -> Tensor:
    rows, cols = parts["weight_shape"].tolist()
    integers = _nibbles(parts["weight_packed"])[:, :cols]
    scales = parts["weight_scale"].float()
    zeros = torch.full(scales.shape, 8)
    if "weight_zero_point" in parts:
        zeros = _nibbles(parts["weight_zero_point"].t())[:, :rows].t()
    group = torch.arange(cols) // (cols // scales.shape[1])
    return (integers - zeros[:, group]) * scales[:, group]


def _nibbles(words: Tensor) -> Tensor:
    """The eight 4-bit integers of each word of the last dimension, lowest bits first."""
    return torch.stack([(words >> (4 * i)) & 15 for i in range(8)], dim=-1).flatten(-2)
