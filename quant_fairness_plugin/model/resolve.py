"""Resolving: a model's name in, its checked files out. Everything that can be refused before torch is imported.

A wrong name, a quantized or unsupported model, missing, malformed or unsafe files: all fail here, within a second.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnsupportedModelError
from quant_fairness_plugin.model.architectures.architecture import LAYER_KEYS
from quant_fairness_plugin.model.architectures.experts import expert_counts, find_mixture, mixture_advice
from quant_fairness_plugin.model.architectures.refused import refusal_of
from quant_fairness_plugin.model.gguf import gguf_folder
from quant_fairness_plugin.model.headers import TensorShapes
from quant_fairness_plugin.model.hub import download, is_commit, is_repository_id
from quant_fairness_plugin.model.native import CODE_KEYS, is_native, is_wrapper
from quant_fairness_plugin.model.source_format import SourceFormat, quantization_of, read_as, source_format
from quant_fairness_plugin.model.weights import check_inside, find_weights, read_json, read_shapes

BUNDLED = ("demo", "demo-gpt2")

HEAD_ADVICE = "Where the head is the embedding, set tie_word_embeddings to true in config.json."
_logger = logging.getLogger(__name__)
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")
_QUANTIZED_ENDINGS = (".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".SCB", ".absmax")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where a model is on disk, and what its config says."""

    name: str
    """The bundled name, the folder's name, or the Hub id."""
    folder: Path
    """Not an existing path where the model is only in memory (`weights` is then empty)."""
    config: dict[str, Any]
    weights: tuple[Path, ...]
    layers: int
    revision: str | None
    """The commit of a Hub snapshot; None for local files."""
    memory_sha256: str | None = None
    """The checksum of the parameters, where there are no files."""
    runs_code: bool = False
    """Whether the model or its tokenizer is loaded with code of its folder, which the user allowed to be run."""

    @property
    def source(self) -> SourceFormat | None:
        """How the weights are stored where the 16-bit model has to be computed from them; None for plain ones."""
        return source_format(self.config)


def resolve_model(
    name: str, *, revision: str | None = None, allow_pickle: bool = False, trust_remote_code: bool = False
) -> ModelFiles:
    """Find a model and check its files, without importing torch or reading a weight.

    Args:
        name: a bundled name, a folder, a `.safetensors` file (its folder is the model), a `.gguf` file or a Hub id.
        revision: branch, tag or commit of a Hub id.
        allow_pickle: accept `pytorch_model.bin` where there is no safetensors file.
        trust_remote_code: accept a config that names code to be run.

    Raises:
        ConfigError: nothing of that name, or a revision that does not apply or does not pin the code to be run.
        UnsupportedModelError: quantized, GGUF, adapter, encoder or encoder-decoder models, and untrusted code.
        ArtifactError: missing, malformed, stale or unsafe files.
        ExternalServiceError: the Hub failed.
    """
    folder, label, commit = _locate(name, revision, allow_pickle, trust_remote_code)
    _refuse_adapter(folder)
    if not (folder / "config.json").is_file():
        raise _no_config(folder)
    check_inside(folder, folder / "config.json")
    config = read_json(folder / "config.json")
    _check_config(folder, config)
    runs_code = _check_custom_code(folder, config, trust_remote_code)
    if not runs_code:
        config = {key: value for key, value in config.items() if key not in CODE_KEYS}
    weights = find_weights(folder, allow_pickle=allow_pickle)
    if weights[0].suffix == ".safetensors":
        _refuse_quantized_tensors(folder, read_as(read_shapes(weights), source_format(config)))
    return ModelFiles(label, folder, config, weights, layer_count(folder, config), commit, runs_code=runs_code)


def resolved(
    name: str | ModelFiles, *, revision: str | None, allow_pickle: bool, trust_remote_code: bool
) -> ModelFiles:
    """Return the files of a model: those that are given, or what `resolve_model` finds for a name."""
    if isinstance(name, ModelFiles):
        return name
    return resolve_model(name, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)


def tensor_shapes(files: ModelFiles) -> TensorShapes:
    """Return name → (dtype as safetensors writes it, shape) of every tensor, from the headers of the files alone.

    Weights of 8 or 4 bits are listed as the bfloat16 tensors that they are read as.

    Raises:
        ArtifactError: pickle weights, or files that are malformed or do not fit their index.
    """
    return read_as(read_shapes(files.weights), files.source)


def model_sha256(files: ModelFiles) -> str:
    """Return the checksum of config.json and the weights.

    It is the sha256 of what `sha256sum config.json model….safetensors` prints.

    For a model that was in memory, that of its parameters at the time it was wrapped.

    Raises:
        ArtifactError: a file cannot be read.
    """
    if files.memory_sha256 is not None:
        return files.memory_sha256
    lines = [f"{_file_sha256(path)}  {path.name}\n" for path in (files.folder / "config.json", *files.weights)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    try:
        status = path.stat()
        return _cached_sha256(path, status.st_size, status.st_mtime_ns)
    except OSError as err:
        raise ArtifactError(f"{path}: cannot be read ({err.strerror}). Get the file again.") from err


@lru_cache(maxsize=256)
def _cached_sha256(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _locate(
    name: str, revision: str | None, allow_pickle: bool, trust_remote_code: bool
) -> tuple[Path, str, str | None]:
    """Return the model's folder, its label, and the commit where it comes from the Hub."""
    hint = f"Accepted are a bundled model ({', '.join(BUNDLED)}), a folder or .safetensors file on disk, or a Hub id."
    local = _local_folder(name, hint)
    if local is not None:
        if revision is not None:
            raise ConfigError(f"revision {revision!r} applies to Hub ids only, and {name!r} is on disk. Leave it out.")
        own = local.resolve().name
        if name in BUNDLED and os.path.isfile(os.path.join(name, "config.json")):
            _logger.warning("%s is the bundled model; the folder of that name here is ./%s", name, name)
        # A folder is not to be taken for the bundled model of its name.
        return local, name if name in BUNDLED else f"./{own}" if own in BUNDLED else own, None
    if not is_repository_id(name):
        raise ConfigError(f"there is no model {name!r}. {hint}")
    if trust_remote_code and not is_commit(revision):
        raise ConfigError(
            f"revision {revision!r} does not pin the code that {name!r} would run; expected a full commit hash. "
            "Pass --revision with the commit that you have read."
        )
    folder = download(
        name, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code, hint=hint
    )
    return folder, name, folder.name


def bundled_folder(name: str) -> Path:
    """Return the folder of a model that comes with this package, a plain Hugging Face folder.

    Raises:
        ConfigError: no bundled model has this name.
        ArtifactError: the installation lacks it.
    """
    if name not in BUNDLED:
        raise ConfigError(f"there is no bundled model {name!r}; use one of {', '.join(BUNDLED)}")
    folder = Path(__file__).parent / "bundled" / name
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: the bundled model is missing from this installation. Install it again.")
    return folder


def _local_folder(name: str, hint: str) -> Path | None:
    """Return the folder that the name stands for, or None where only the Hub can know it."""
    if name in BUNDLED:
        return bundled_folder(name)
    if not name.strip():
        raise ConfigError(f"the model's name is empty. {hint}")
    path = Path(name).expanduser()
    if os.path.isdir(path):  # not Path.is_dir, which raises on a name that is too long
        return path
    if path.suffix == ".gguf" and os.path.isfile(path):
        return gguf_folder(path)
    if os.path.isfile(path):
        return _folder_of_file(path, hint)
    if path.suffix in {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".json"}:
        raise ArtifactError(f"{name}: no such file. {hint}")
    return None


def _folder_of_file(path: Path, hint: str) -> Path:
    if path.suffix == ".safetensors":
        folder = path.parent
        if (folder / "config.json").is_file() and path not in find_weights(folder, allow_pickle=False):
            raise ArtifactError(
                f"{path}: not the weights of the model in its folder; expected model.safetensors or a file of "
                "its index. Name the folder instead."
            )
        return folder
    if path.suffix in {".bin", ".pt", ".pth"}:
        return path.parent
    raise ConfigError(f"{path}: a file that is not a model. {hint}")


def _refuse_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise UnsupportedModelError(
            f"{folder}: a LoRA adapter (adapter_config.json), not a whole model. Merge it into its base model "
            "(peft's merge_and_unload) and use the merged folder."
        )


def _no_config(folder: Path) -> ArtifactError | UnsupportedModelError:
    if any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors")):
        first = min(folder.glob("*.gguf")).name
        return UnsupportedModelError(
            f"{folder}: holds GGUF files and no model folder's config.json. Name one of the files, such as {first}."
        )
    return ArtifactError(
        f"{folder}: no config.json; a model folder holds config.json, its weights and its tokenizer. Complete it."
    )


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    """Refuse what the config already shows to be unsupported."""
    path = folder / "config.json"
    method, source = quantization_of(config), source_format(config)
    if method and source is None:
        raise UnsupportedModelError(
            f"{path}: the model is already quantized ({method}); expected a 16- or 32-bit model, or one that is "
            "published in FP8 or MXFP4. Use the original."
        )
    if source is not None:
        _logger.warning("%s: the 16-bit model is %s", path, source.summary)
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ArtifactError(f"{path}: 'architectures' is {architectures!r}, expected a list of names. Restore it.")
    causal = not architectures or any(name.endswith(_CAUSAL_ENDINGS) for name in architectures) or is_wrapper(config)
    if config.get("is_encoder_decoder") or not causal:
        what = ", ".join(architectures) or config.get("model_type", "the model")
        raise UnsupportedModelError(
            f"{path}: {what} is not a decoder-only language model; expected a causal one (…ForCausalLM), or one that "
            "wraps such a decoder (…ForConditionalGeneration with a text_config). Use one."
        )
    reason = refusal_of(str(config.get("model_type", "")), config)
    if reason is not None:
        raise UnsupportedModelError(f"{path}: {reason}")
    model_type = str(config.get("model_type", ""))
    for key, count in expert_counts(config) if find_mixture(model_type) is None else ():
        raise UnsupportedModelError(
            f"{path}: the model holds a mixture of experts ({key} {count}), {mixture_advice(model_type)}"
        )


def _check_custom_code(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> bool:
    """Return whether code of the folder is to be run: it brings some, and the user allowed it.

    Where Transformers has the family itself, its class is used and nothing of the folder is run.

    Raises:
        UnsupportedModelError: code that was not allowed, and that Transformers cannot do without; or code of another
            repository.
    """
    settings = folder / "tokenizer_config.json"
    tokenizer = read_json(settings) if settings.is_file() else {}
    path, content = next(
        ((path, content) for path, content in ((folder / "config.json", config), (settings, tokenizer))
         if any(key in content for key in CODE_KEYS)),
        (folder, {}),
    )  # fmt: skip
    if not content:
        return False
    if not trust_remote_code:
        if is_native(folder, config, tokenizer):
            _logger.warning("%s: names code (%s), which is not run: Transformers has this family", path, _code(content))
            return False
        raise UnsupportedModelError(
            f"{path}: names code to be run ({_code(content)}), which is refused. Use a model that Transformers has, or "
            "pass --trust-remote-code (trust_remote_code=True) after reading that code."
        )
    if any("--" in str(source.get("auto_map")) for source in (config, tokenizer)):  # `other/repository--file.Class`
        raise UnsupportedModelError(
            f"{path}: takes its code from another repository, which no revision pins. Copy that code here."
        )
    return True


def _code(content: Mapping[str, Any]) -> str:
    return next(key for key in CODE_KEYS if key in content)


def _refuse_quantized_tensors(folder: Path, shapes: TensorShapes) -> None:
    for name, (dtype, _) in shapes.items():
        if name.endswith(_QUANTIZED_ENDINGS) or dtype.startswith(("F4", "F6_", "F8_")):
            raise UnsupportedModelError(
                f"{folder}: the model is already quantized ({name}, {dtype}); expected a 16- or 32-bit model. "
                "Use the original."
            )


def layer_count(folder: Path, config: dict[str, Any]) -> int:
    """Return how many layers the text model has, by its own part of the config where there is one.

    Raises:
        ArtifactError: it says none, or more than one number.
    """
    text = config.get("text_config")
    text = text if isinstance(text, dict) and is_wrapper(config) else config
    given = {key: text[key] for key in LAYER_KEYS if key in text}
    counts = {value for value in given.values() if type(value) is int and value > 0}
    if len(counts) != 1 or any(value not in counts for value in given.values()):
        raise ArtifactError(
            f"{folder / 'config.json'}: does not say how many layers the model has ({given or 'no such key'}); "
            f"expected a whole number in one of {', '.join(LAYER_KEYS)}. Restore the model's file."
        )
    return counts.pop()
