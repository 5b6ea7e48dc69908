"""Everything that can be known before torch is imported: a wrong argument fails in the first second."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from quant_fairness_plugin.answers.check import find_prompts
from quant_fairness_plugin.artifacts import Documents, Part, Precision, TextSet, Unit
from quant_fairness_plugin.checkpoint.formats import checkpoint_format
from quant_fairness_plugin.checkpoint.readers import check_exportable, find_refusal
from quant_fairness_plugin.config import FairConfig, FairOptions, make_config
from quant_fairness_plugin.errors import ConfigError, InvalidLayerError, UnsupportedModelError
from quant_fairness_plugin.export.companions import find_companions
from quant_fairness_plugin.export.staging import check_file, check_output
from quant_fairness_plugin.model.architectures import find_architecture
from quant_fairness_plugin.model.architectures.experts import EXPERTS, find_mixture
from quant_fairness_plugin.model.beginnings import beginning, has_chat_template
from quant_fairness_plugin.model.context import check_context, longest_input
from quant_fairness_plugin.model.gguf import check_installed
from quant_fairness_plugin.model.layers import check_layers
from quant_fairness_plugin.model.limits import check_libraries
from quant_fairness_plugin.model.native import is_wrapper
from quant_fairness_plugin.model.resolve import ModelFiles, resolve_model
from quant_fairness_plugin.model.tokenizer import check_vocabulary, quick_tokenizer, stored_embedding_rows
from quant_fairness_plugin.quantize.backends import check_backend
from quant_fairness_plugin.quantize.calibration import ENGLISH, ROW_TOKENS
from quant_fairness_plugin.quantize.expert_rules import SINGLE_EXPERTS, check_experts
from quant_fairness_plugin.quantize.methods import check_method, find_method
from quant_fairness_plugin.texts.documents import check_apart, documents_of, load_documents
from quant_fairness_plugin.texts.languages import normalise_language
from quant_fairness_plugin.texts.load import choose_texts, load_texts
from quant_fairness_plugin.texts.parts import SMALLEST_SPLIT, overlap

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from and what reading it may do."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def resolve(self) -> ModelFiles:
        """Return the model's checked files; see `resolve_model` for what is refused."""
        return resolve_model(
            self.name,
            revision=self.revision,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
        )

    def check_tokenizer(self, tokenizer: object) -> None:
        """Refuse a tokenizer beside the name of a model.

        Raises:
            ConfigError: there is one.
        """
        if tokenizer is not None:
            raise ConfigError(
                f"tokenizer is accepted together with a model in memory, and {self.name!r} is a name, whose tokenizer "
                "is loaded with it. Leave it out"
            )

    def check_in_memory(self) -> None:
        """Refuse options of reading files for a model that is in memory already.

        Raises:
            ConfigError: one of them is given.
        """
        given = {
            "revision": self.revision is not None,
            "trust_remote_code": self.trust_remote_code,
            "allow_pickle": self.allow_pickle,
        }
        if any(given.values()):
            names = ", ".join(name for name, is_given in given.items() if is_given)
            raise ConfigError(f"{names}: accepted together with a model's name, not with a model in memory. Leave out")


class Checked(NamedTuple):
    """What `preflight` resolved: a model's files and a text set, which fit the configuration."""

    files: ModelFiles
    texts: TextSet


def configure(config: FairConfig | None, options: FairOptions) -> tuple[FairConfig, TextSet | None]:
    """Return the complete configuration, the given one or one made of single fields, and the text set if one is given.

    Args:
        config: a complete configuration, or None.
        options: fields of `FairConfig`, where there is none; `texts`, which can be a text set, also beside one.

    Raises:
        ConfigError: both a configuration and other options, or a field that does not fit.
    """
    fields: dict[str, Any] = dict(options)
    texts = fields.pop("texts", None)
    if config is not None and fields:
        raise ConfigError(
            f"{', '.join(fields)} together with config: one of the two is accepted. Use dataclasses.replace(config, …)"
        )
    if config is not None and not isinstance(config, FairConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}, and a FairConfig is accepted; use FairConfig.from_dict(…), or give "
            "its fields by name"
        )
    complete = config or make_config(**fields)
    if texts is not None:
        _check_given(texts)
        complete = replace(complete, texts=texts.name if isinstance(texts, TextSet) else str(texts))
    return complete, texts if isinstance(texts, TextSet) else None


def _check_given(texts: object) -> None:
    if not isinstance(texts, TextSet | str | Path):
        raise ConfigError(
            f"texts is a {type(texts).__name__}, and a text set, a path or a name is accepted; write the sentences to "
            "a JSON file {language: [sentences]} and give its path"
        )


def preflight(
    source: ModelSource,
    config: FairConfig,
    *,
    texts: TextSet | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> Checked:
    """Resolve the model's files and the texts, and check the layer list and the output against them.

    Raises:
        QuantFairnessError: one of its kinds; nothing was loaded or written.
    """
    check_libraries()
    _check_backend(config)
    if out is not None:
        _check_output(config, out, overwrite=overwrite)
        check_exportable(None, format=config.format, grid=config.grid, reader=config.reader, overrides=config.overrides)
    check_method(config.method, config.grid, sweeps=config.protect_layers == "auto")
    files = source.resolve()
    if out is not None and out.resolve() == files.folder.resolve():
        raise ConfigError(f"{out} is the model itself; the output must be another folder. Choose another name with -o")
    check_model(config, files)
    kind = str(files.config.get("model_type", ""))
    if out is not None and find_mixture(kind) is not None:
        layers = config.protect_layers if isinstance(config.protect_layers, tuple) else ()
        kept: dict[str, Precision] = {str(Unit(layer)): "fp16" for layer in layers}
        overrides = config.overrides | kept
        check_exportable(kind, format=config.format, grid=config.grid, reader=config.reader, overrides=overrides)
    if out is not None:
        _check_family_exportable(files, config)
        if not checkpoint_format(config.format).one_file:
            find_companions(files.folder, files.weights, runs_code=files.runs_code)
    sentences = open_texts(config, texts)
    _check_searched(sentences, config)
    _check_limited(sentences, config)
    if out is not None:
        _check_sentences(sentences, config)
    find_prompts(config.prompts, sentences.languages)
    _check_tokens(files, sentences)
    _check_chats(files, sentences, open_documents(config, sentences))
    return Checked(files, sentences)


def _check_output(config: FairConfig, out: Path, *, overwrite: bool) -> None:
    """Refuse a name that cannot be written, and a file whose metadata cannot be found."""
    if checkpoint_format(config.format).one_file:
        check_installed(out)
        config.gguf_template()
        check_file(out, suffix=f".{config.format}", overwrite=overwrite)
    else:
        check_output(out.resolve(), overwrite=overwrite)


def _check_family_exportable(files: ModelFiles, config: FairConfig) -> None:
    """Refuse before the weights are read what the type in config.json already says of format and reader."""
    model_type = str(files.config.get("model_type", ""))
    refusal = find_refusal(
        model_type,
        format=config.format,
        grid=config.grid,
        reader=config.reader,
        overrides=config.overrides,
        dtype=str(files.config.get("dtype") or files.config.get("torch_dtype") or ""),
    )
    if find_architecture(model_type) is not None and refusal is not None:
        raise UnsupportedModelError(str(refusal))


def _check_sentences(texts: TextSet, config: FairConfig) -> None:
    """Refuse, before the work, a text set on which a checkpoint could not be calibrated or measured after it."""
    least = {"confirm": 2, "search": 2 if config.protect_layers == "auto" else 0}
    least["calibrate"] = 1 if find_method(config.method).needs_calibration else 0
    for part, count in least.items():
        held = len(texts.part(cast(Part, part)))
        if held < count:
            raise ConfigError(
                f"text set {texts.name} has {held} sentence(s) in the part {part!r}, and {count} or more are needed "
                f"({SMALLEST_SPLIT} in all to mean something). Give more sentences, or a part to each row"
            )


def _check_searched(texts: TextSet, config: FairConfig) -> None:
    """Refuse more sentences to search for a plan on than there are."""
    held = len(texts.part("search"))
    if config.sentences is not None and config.sentences > held:
        raise ConfigError(
            f"sentences {config.sentences}: text set {texts.name} has {held} of each language to search for a plan on; "
            f"use {held} or fewer, or give more text"
        )


def _check_limited(texts: TextSet, config: FairConfig) -> None:
    """Refuse limits of languages that are not measured."""
    known = {normalise_language(name): name for name in texts.languages}
    named = [normalise_language(name) for name in config.limits or {}]
    unknown = [name for name in named if name not in known]
    if unknown or len(set(named)) < len(named):
        wrong = f"{', '.join(unknown)}: not measured" if unknown else "a language is named twice"
        raise ConfigError(
            f"limits ({wrong}); measured are {', '.join(known)}. Name each of those once, or add it to --langs"
        )


def open_texts(config: FairConfig, texts: TextSet | None = None) -> TextSet:
    """Return the configuration's languages of a text set: of the given one, or of the one that it names.

    Raises:
        UnknownLanguageError: a language that the set does not hold.
        ConfigError: the reference is not among the languages, or an unknown name.
        ArtifactError: a file that is missing or malformed.
    """
    if texts is not None:
        sentences = choose_texts(texts, languages=config.languages, reference=config.reference)
    else:
        sentences = load_texts(config.texts, languages=config.languages, reference=config.reference)
    if shared := overlap(sentences):
        _logger.warning("%s. Give %d or more sentences, each once", shared, SMALLEST_SPLIT)
    return sentences if config.start == "auto" else replace(sentences, start=config.start)


def open_documents(config: FairConfig, texts: TextSet) -> Documents:
    """Return what to calibrate on: the documents that the configuration names, else those of the texts.

    Of documents in more languages those are taken that are measured, and English where it is asked for.

    Raises:
        QuantFairnessError: as `load_documents` and `check_apart`.
    """
    if config.calibration_texts is None:
        return documents_of(texts)
    english = [ENGLISH] if config.calibration == "english" else []
    documents = load_documents(config.calibration_texts, languages=[*texts.languages, *english])
    check_apart(documents, texts)
    if lacking := [name for name in texts.languages if name not in documents.texts]:
        _logger.warning("%s has no text in %s: measured, and not calibrated on", documents.name, ", ".join(lacking))
    return documents


def _check_chats(files: ModelFiles, texts: TextSet, documents: Documents) -> None:
    """Refuse texts that begin as chats do, and conversations, where the folder holds no chat template.

    Raises:
        ConfigError: says which of the two.
    """
    if (texts.start != "chat" and not documents.chats) or has_chat_template(files):
        return
    wanted = "start 'chat'" if texts.start == "chat" else f"the conversations of {documents.name}"
    raise ConfigError(
        f"{wanted}: {files.name} has no chat template (chat_template.jinja, or in tokenizer_config.json); accepted are "
        "the other starts and plain text. Use the instruction-tuned model, or its template"
    )


def check_model(config: FairConfig, files: ModelFiles) -> None:
    """Check what the configuration says of the model against its `config.json`.

    Raises:
        ConfigError: a backend that does not know the family, or a `top` that is not a number of layers.
        UnsupportedModelError: a model that takes too few tokens at once.
        InvalidLayerError: a layer or unit that the model lacks.
    """
    model_type = str(files.config.get("model_type", ""))
    if is_wrapper(files.config):
        _check_wrapper(config, files)
    _check_backend(config, family=model_type)
    _check_context(files)
    if config.tokens_per_expert is not None and find_mixture(model_type) is None:
        raise ConfigError(
            f"tokens_per_expert {config.tokens_per_expert} has no effect on {files.name}, which is no mixture of "
            "experts; leave it out"
        )
    if find_mixture(model_type) is not None:
        check_experts(config.method, config.grid, columns=config.protect_columns, backend=config.backend)
    if isinstance(config.protect_layers, tuple):
        check_layers(config.protect_layers, files.layers)
    units = known_units(model_type)
    check_units(config, units=None if units is None else lambda layer: units, layers=files.layers)
    if config.top is not None and not 1 <= config.top < files.layers:
        raise ConfigError(
            f"top {config.top} is not a number of layers; the model has {files.layers}, use 1..{files.layers - 1}"
        )


def _check_wrapper(config: FairConfig, files: ModelFiles) -> None:
    """Refuse what cannot be done with a model whose text decoder is a part of it.

    Raises:
        ConfigError: a backend: other tools take the whole model.
        UnsupportedModelError: a format that no reader was run on with such a model.
    """
    if config.backend != "native":
        raise ConfigError(
            f"backend {config.backend!r} takes a whole model, and the text decoder of {files.name} is a part of it; "
            "accepted is native. Leave out --backend"
        )
    check_exportable(None, format=config.format, grid=config.grid, reader=config.reader, wrapped=True)


def _check_context(files: ModelFiles) -> None:
    record = find_architecture(str(files.config.get("model_type", "")))
    default = None if record is None else record.default_positions
    positions = check_context(files.name, longest_input(files.config, default))
    if positions < ROW_TOKENS:
        _logger.warning(
            "%s takes %d tokens at once: calibration rows have %d instead of %d, and longer sentences are scored in "
            "windows of that length", files.name, positions, positions, ROW_TOKENS,
        )  # fmt: skip


def _check_tokens(files: ModelFiles, texts: TextSet) -> None:
    """Check the tokenizer against the embedding; one that needs Transformers is checked once the model is loaded."""
    tokenizer, rows = quick_tokenizer(files), stored_embedding_rows(files)
    if tokenizer is None:
        return
    if texts.start != "chat":  # templates are Transformers' business
        beginning(tokenizer, texts.start)
    if rows is not None:
        check_vocabulary(tokenizer, texts, rows=rows, name=files.name)


def _check_backend(config: FairConfig, *, family: str = "") -> None:
    check_backend(
        config.backend,
        method=config.method,
        grid=config.grid,
        clip=config.grid.clip,
        weighting=config.calibration,
        family=family,
    )


def known_units(model_type: str) -> tuple[str, ...] | None:
    """Return the names of a layer's units in models of this type; None where only the model itself can tell."""
    architecture = find_architecture(model_type)
    return None if architecture is None else tuple(unit.name for unit in architecture.units)


def check_units(config: FairConfig, *, units: Callable[[int], tuple[str, ...]] | None, layers: int) -> None:
    """Check that the layers and units with a precision of their own are the model's.

    Args:
        config: the configuration.
        units: names of the units of a layer, or None where they are not known yet.
        layers: how many layers the model has.

    Raises:
        InvalidLayerError: a layer that the model lacks, or a unit that its layers lack.
    """
    for name in config.overrides:
        unit = Unit.parse(name)
        if unit.layer >= layers:
            raise InvalidLayerError(
                f"{unit.short}: layer {unit.layer} does not exist: the model has {layers} layers, "
                f"accepted are 0..{layers - 1}. Layers are counted from 0; correct the list."
            )
        names = () if units is None else units(unit.layer)
        if unit.group is not None and units is not None and unit.group not in names:
            reason = f" ({SINGLE_EXPERTS})" if unit.group.startswith(f"{EXPERTS}.") else ""
            raise InvalidLayerError(
                f"{unit.short} is not a unit of the model{reason}; its layer {unit.layer} has {', '.join(names)}. "
                f"Write for example {unit.whole.part(names[-1]).short}."
            )
