"""Provenance: what a number came from, assembled in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quant_fairness_plugin.artifacts import Provenance, TextSet, package_versions
from quant_fairness_plugin.model.beginnings import find_start
from quant_fairness_plugin.model.devices import describe_device
from quant_fairness_plugin.model.resolve import model_sha256

if TYPE_CHECKING:
    from quant_fairness_plugin.model.load import LoadedModel


def provenance(loaded: LoadedModel, texts: TextSet, *, seed: int, arguments: dict[str, Any]) -> Provenance:
    """Return the provenance of a result on one model and one text set, versions included.

    Args:
        loaded: the model, named and hashed, and where and in what it was computed.
        texts: the text set, named and hashed.
        seed: the seed that was used.
        arguments: the arguments as resolved; plain JSON values.
    """
    files, model = loaded.files, loaded.model
    return Provenance(
        versions=package_versions(),
        model=files.name,
        model_sha256=model_sha256(files),
        text_set=texts.name,
        text_sha256=texts.sha256,
        arguments=arguments,
        seed=seed,
        device=describe_device(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        source="" if files.source is None else files.source.summary,
        start=find_start(loaded.tokenizer, texts.start),
    )


def model_identity(loaded: LoadedModel) -> dict[str, str]:
    """Return the checksum that says which weights a model has, plain data.

    A model in memory can have changed since it was wrapped, and its config is in no file; it is hashed as it stands.
    """
    from quant_fairness_plugin.model.storage import parameters_sha256

    files = loaded.files
    if files.weights:
        return {"sha256": model_sha256(files)}
    return {"sha256": parameters_sha256(loaded.model), "config": loaded.model.config.to_json_string()}
