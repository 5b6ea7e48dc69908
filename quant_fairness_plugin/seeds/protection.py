"""The seeds' calls that quantize a model in place but for some layers: `quantize_except` and `fair_quantize`."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedModel

from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.layers import check_layers
from quant_fairness_plugin.plans.controls import gateway_layers
from quant_fairness_plugin.seeds.simulation import simulate_int4


def quantize_except(
    model: PreTrainedModel,
    protect: Collection[int],
    *,
    protect_biases: bool = True,
    protect_final_ln: bool | None = None,
    quantize_rest_to: str = "INT4",
) -> None:
    """Quantize every layer but the given ones, in place: `simulate_int4` under the seeds' other name.

    Args:
        model: quantized in place.
        protect: layers left alone.
        protect_biases: True; no bias is ever quantized.
        protect_final_ln: as for `simulate_int4`; with layers to protect, all norms are left alone.
        quantize_rest_to: `INT2` to `INT8`.

    Raises:
        ConfigError: `protect_biases=False`, which cannot be done, or a setting that `simulate_int4` refuses.
        InvalidLayerError: a layer that the model lacks, or all of them.
    """
    if not protect_biases:
        raise ConfigError(
            "protect_biases=False cannot be done: the seeds' simulation quantizes no bias. True is accepted; leave it "
            "out"
        )
    exclude = check_layers(list(protect), model.config.num_hidden_layers) if protect else None
    simulate_int4(model, exclude=exclude, protect_final_ln=protect_final_ln, quantize_rest_to=quantize_rest_to)


def fair_quantize(
    model: PreTrainedModel,
    disparity_target: float = 0.7,
    *,
    protect_biases: bool = True,
    protect_final_ln: bool | None = None,
    quantize_rest_to: str = "INT4",
) -> tuple[int, ...]:
    """Quantize in place by the seeds' rule for any depth: protect the first and last layer, and perhaps one between.

    This is a rule of thumb that was never shown to beat other layers; `FairQuantizer` measures instead.

    Args:
        model: quantized in place by `quantize_except`.
        disparity_target: below 0.7 the layer at 75 % depth is protected, too.
        protect_biases: as for `quantize_except`.
        protect_final_ln: as for `quantize_except`.
        quantize_rest_to: as for `quantize_except`.

    Returns:
        The protected layers, ascending.

    Raises:
        ConfigError: as for `quantize_except`.
    """
    protect = gateway_layers(model.config.num_hidden_layers, disparity_target)
    quantize_except(
        model,
        protect,
        protect_biases=protect_biases,
        protect_final_ln=protect_final_ln,
        quantize_rest_to=quantize_rest_to,
    )
    return protect
