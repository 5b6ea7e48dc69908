"""Every causal architecture of Transformers, by its default config: a refusal gives the true reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model.architectures.experts import expert_counts
from quant_fairness_plugin.model.architectures.records import ARCHITECTURES
from quant_fairness_plugin.model.architectures.refused import refusal_of
from quant_fairness_plugin.model.resolve import _check_config

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
KNOWN = {name for record in ARCHITECTURES for name in record.families}


def default_config(model_type: str) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(json.dumps(CONFIG_MAPPING[model_type]().to_dict(), default=str))
    except Exception as err:  # noqa: BLE001 - a config that needs others has no default
        pytest.skip(f"{model_type} has no default config ({type(err).__name__})")
    return config | {"architectures": [f"{model_type}ForCausalLM"]}


@pytest.mark.parametrize("model_type", TYPES)
def test_only_what_has_experts_is_called_a_mixture_of_experts(model_type: str) -> None:
    config = default_config(model_type)
    reason = ""
    try:
        _check_config(Path("model"), config)
    except UnsupportedModelError as err:
        reason = str(err)
    assert ("mixture of experts" in reason) <= any(True for _ in expert_counts(config))
    assert model_type not in KNOWN or not reason


@pytest.mark.parametrize("model_type", sorted(KNOWN))
def test_no_known_family_is_refused_by_its_type(model_type: str) -> None:
    assert refusal_of(model_type, {}) is None


def test_keys_that_are_no_text_are_no_counts() -> None:
    assert list(expert_counts({"id2label": {0: "a"}, "num_experts": 4})) == [("num_experts", 4)]  # type: ignore[dict-item]
