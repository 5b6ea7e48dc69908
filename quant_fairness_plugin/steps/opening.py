"""Opening: a model by name or in memory, with what is checked of it and its texts, and the steps that need it whole."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quant_fairness_plugin.answers.check import check_prompts, find_prompts
from quant_fairness_plugin.answers.prompts import Prompts
from quant_fairness_plugin.artifacts import TextSet
from quant_fairness_plugin.checkpoint.readers import takes_one_group_size
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError, QuantFairnessError
from quant_fairness_plugin.measure.rows import embedding_rows
from quant_fairness_plugin.model.architectures import find_architecture
from quant_fairness_plugin.model.beginnings import beginning, has_chat_template
from quant_fairness_plugin.model.context import longest_input
from quant_fairness_plugin.model.devices import describe_device, find_device, find_dtype
from quant_fairness_plugin.model.in_memory import copy_model
from quant_fairness_plugin.model.limits import check_room
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.model.resolve import ModelFiles
from quant_fairness_plugin.model.storage import storage_dtype
from quant_fairness_plugin.model.streamed import StreamedModel, open_streamed
from quant_fairness_plugin.model.tokenizer import check_vocabulary, counting_tokenizer, is_plain
from quant_fairness_plugin.preflight import Checked, ModelSource, check_model, check_units, open_texts
from quant_fairness_plugin.texts.sources import BUNDLED

_logger = logging.getLogger(__name__)


def load_checked(
    checked: Checked,
    source: ModelSource,
    config: FairConfig,
    *,
    stream: bool = False,
    memory_budget: int | None = None,
) -> LoadedModel:
    """Load the model that `preflight` resolved, and check the tokenizer where that had to wait for Transformers.

    With a memory budget in bytes its blocks stay in their files; on a CPU with `stream` too, where they can be read so.

    Raises:
        ConfigError: a device that this machine does not have, or a prompt that the model cannot answer, before
            anything is read; or a start of texts that the tokenizer does not have.
        ResourceError: a limit of memory does not hold the model.
    """
    device = find_device(config.device)
    stored = str(storage_dtype(checked.files)).removeprefix("torch.")
    compute = getattr(torch, find_dtype(config.dtype, device, stored=stored))
    if str(device).startswith("cpu"):
        in_files = memory_budget is not None or (stream and can_stream(checked.files))
        check_room(checked.files, value_bytes=compute.itemsize, blocks=in_files, budget=memory_budget)
    sentences, trust = probe_sentences(checked.texts), source.trust_remote_code
    _check_prompts_of(checked, config, trust_remote_code=trust)
    whole = partial(
        load_model, checked.files, dtype=compute, trust_remote_code=trust, device=device, sentences=sentences
    )
    in_blocks = partial(
        open_streamed, checked.files, dtype=compute, trust_remote_code=trust, device=device, sentences=sentences
    )
    loaded: LoadedModel
    if memory_budget is not None:
        loaded = replace(in_blocks(), memory_budget=memory_budget)
    elif stream and str(device).startswith("cpu") and can_stream(checked.files):
        try:
            loaded = in_blocks()
        except QuantFairnessError as err:
            loaded = whole()  # where the model itself is wrong, this says so
            _logger.warning("%s is loaded as a whole, which takes more memory: %s", checked.files.name, err)
    else:
        loaded = whole()
    _logger.info("%s: computed in %s on %s", checked.files.name, compute, describe_device(loaded.model.device))
    beginning(loaded.tokenizer, checked.texts.start)
    if not is_plain(checked.files):
        check_tokens(loaded, checked.texts)
    return loaded


def _check_prompts_of(checked: Checked, config: FairConfig, *, trust_remote_code: bool) -> None:
    """Check the prompts by the tokenizer, before the model is read."""
    prompts, files = find_prompts(config.prompts, checked.texts.languages), checked.files
    if prompts is None:
        return
    tokenizer = counting_tokenizer(files, trust_remote_code=trust_remote_code, templates=has_chat_template(files))
    record = find_architecture(str(files.config.get("model_type", "")))
    limit = longest_input(files.config, None if record is None else record.default_positions)
    _check_prompts(prompts, checked.texts, tokenizer, limit=limit, name=files.name)


def _check_prompts(prompts: Prompts | None, texts: TextSet, tokenizer: object, *, limit: int, name: str) -> None:
    """Refuse prompts that the model cannot answer; of the bundled ones, which nobody chose, say so and go on."""
    if prompts is None:
        return
    try:
        check_prompts(prompts, texts.languages, tokenizer, limit=limit, name=name)
    except ConfigError as err:
        if prompts.source != BUNDLED:
            raise
        _logger.warning("no prompts will be asked: %s", err)


def can_stream(files: ModelFiles) -> bool:
    """Return whether blocks can be read from the files."""
    return bool(files.weights) and files.weights[0].suffix == ".safetensors"


def probe_sentences(texts: TextSet) -> list[str]:
    """Return a sentence of every language of the calibration part, on which the range of activations is looked at."""
    return [rows[0] for rows in texts.part("calibrate").sentences.values() if rows]


def check_tokens(loaded: LoadedModel, texts: TextSet) -> None:
    """Check that the model has an embedding for every token of the texts; see `check_vocabulary`."""
    check_vocabulary(loaded.tokenizer, texts, rows=embedding_rows(loaded.model), name=loaded.files.name)


def open_in_memory(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, config: FairConfig, texts: TextSet | None
) -> tuple[LoadedModel, TextSet]:
    """Copy a model that is in memory, check the configuration against it, and return it with the texts.

    The copy is computed in float32, where the model is, or on the device that the configuration names.

    Raises:
        ConfigError: another dtype, a device that is not there, or a configuration that does not fit the model.
    """
    if config.dtype == "bfloat16":
        raise ConfigError(
            "dtype bfloat16 is accepted together with a model's name or folder; a model in memory is computed in "
            "float32. Leave dtype out, or save the model and name its folder"
        )
    device = None if config.device == "auto" else find_device(config.device)
    sentences = open_texts(config, texts)
    prompts = find_prompts(config.prompts, sentences.languages)
    loaded = copy_model(model, tokenizer, sentences=probe_sentences(sentences))
    if device is not None:
        loaded.model.to(device)  # type: ignore[arg-type] # Transformers types `to` as if it were a method of the class
    check_model(config, loaded.files)
    limit = longest_input(loaded.model.config.to_dict())
    _check_prompts(prompts, sentences, loaded.tokenizer, limit=limit, name=loaded.files.name)
    beginning(loaded.tokenizer, sentences.start)
    check_tokens(loaded, sentences)
    return loaded, sentences


def check_config(config: FairConfig, loaded: LoadedModel) -> None:
    """Refuse layers or units that the model lacks; warn of a group size that its units do not fit.

    Raises:
        InvalidLayerError: says which.
        ConfigError: a stated group size that does not fit every unit, and the configuration is strict.
    """
    family = loaded.family
    check_units(config, units=lambda layer: tuple(unit.name for unit in family.units_of(layer)), layers=loaded.layers)
    config.check_group_size(loaded)


def fit_config(config: FairConfig, loaded: LoadedModel) -> FairConfig:
    """Return the configuration with the largest group size that units of the model, format and reader take."""
    return config.fitted(loaded, uniform=takes_one_group_size(config.format, config.reader))


def check_whole(loaded: LoadedModel, step: str) -> None:
    """Refuse a step that needs the whole model in memory, for one whose blocks stay in their files.

    Raises:
        ConfigError: the model was opened with a memory budget.
    """
    if isinstance(loaded, StreamedModel):
        raise ConfigError(
            f"{loaded.files.name} was opened block by block, as with a memory budget: it can be swept, quantized and "
            f"measured, and not {step}, which takes the whole model. Open it without a memory budget"
        )
