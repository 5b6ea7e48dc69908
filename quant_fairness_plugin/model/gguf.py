"""A GGUF file as an ordinary model folder, written once into a cache. Transformers dequantizes; see `convert_gguf`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quant_fairness_plugin.errors import MissingExtraError, ResourceError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["bfloat16", "float32"]
FORMAT = "gguf"
"""What `--format` calls such a file."""
BLOCK = 32
"""Input channels that share a scale in the types that are written."""
TYPES = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}
"""Bits of a symmetric grid → the type that holds its values."""
Embedding = Literal["q8_0", "16bit"]
"""What the embedding, and a head of its own, are stored as in a file that is written."""
_logger = logging.getLogger(__name__)

SOURCE = "gguf_source.json"
"""What the folder was made from: name and sha256 of the GGUF file."""
_NEEDED = ("gguf", "accelerate")
_INSTALL = 'pip install torch==2.13.0 && pip install torch==2.13.0 "quant-fairness[gguf]"'


def gguf_folder(path: Path, *, dtype: Dtype = "bfloat16") -> Path:
    """Return the cached model folder of a GGUF file, converting it first where there is none.

    The cache is `$XDG_CACHE_HOME/quant-fairness/gguf` (`~/.cache/…`), a folder per content of the file and dtype.

    Args:
        path: the file.
        dtype: what the weights become: bfloat16 as a model to be quantized, float32, which is exact, to be judged.

    Raises:
        MissingExtraError: the packages of the extra `gguf` are not installed.
        UnsupportedModelError: Transformers does not read this GGUF.
        ResourceError: the cache cannot be written.
    """
    # Here, as it loads pydantic, which resolving a name does without.
    from quant_fairness_plugin.artifacts import temporary_folder

    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quant-fairness" / "gguf"
    folder = cache / f"{path.stem}-{checksum[:16]}{'' if dtype == 'bfloat16' else f'-{dtype}'}"
    if (folder / SOURCE).is_file():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with temporary_folder(cache, f"{folder.name}.partial-") as beside:
            (beside / "model").mkdir()
            convert_gguf(path, beside / "model", checksum=checksum, dtype=dtype)
            if not folder.exists():  # another process may have been quicker
                (beside / "model").rename(folder)
    except OSError as err:
        raise ResourceError(
            f"{cache}: cannot be written ({err.strerror}); a GGUF file is converted there. Free space, or set "
            "XDG_CACHE_HOME to another folder."
        ) from err
    return folder


def convert_gguf(path: Path, folder: Path, *, checksum: str, dtype: Dtype = "bfloat16") -> None:
    """Write a GGUF file's model as a plain Hugging Face folder, its weights dequantized, and in bfloat16 its tokenizer.

    Nothing is regained: weights that had 4 bits once have the values of that 4-bit grid. Figures measured on them say
    what a second quantization costs.

    Args:
        path: the GGUF file.
        folder: an existing, empty folder.
        checksum: the file's sha256, for the record in `gguf_source.json`.
        dtype: of the weights that are written.

    Raises:
        MissingExtraError: the packages of the extra `gguf` are not installed.
        UnsupportedModelError: Transformers does not read this GGUF.
    """
    check_installed(path)
    from quant_fairness_plugin.model.quiet import quiet_transformers  # which loads Transformers

    with quiet_transformers():
        model = _read(path, dtype)
        model.save_pretrained(folder)
    if dtype == "bfloat16":  # else it is compared with a 16-bit model, on the tokens of that
        _logger.warning("%s: dequantizing GGUF weights; what follows is measured on dequantized weights", path.name)
        _read_tokenizer(path, model).save_pretrained(folder)
    _rewrite_config(folder)
    source = {"file": path.name, "sha256": checksum, "weights": f"dequantized to {dtype}"}
    (folder / SOURCE).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")


def check_installed(path: Path) -> None:
    """Refuse to go on where the packages of the extra `gguf` are not installed.

    Args:
        path: the file that is to be read or written, for the message.

    Raises:
        MissingExtraError: names what is missing, and the command.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"{path}: a GGUF file needs {' and '.join(missing)}. Install them: {_INSTALL}")


def check_readable(path: Path) -> None:
    """Refuse a GGUF file of a model that Transformers does not read, by its metadata alone.

    Raises:
        UnsupportedModelError: says what is missing.
    """
    from transformers import AutoConfig

    with _reading(path):
        AutoConfig.from_pretrained(path.parent, gguf_file=path.name)


def _read(path: Path, dtype: Dtype) -> PreTrainedModel:
    import torch  # only here: resolving a model must not load torch
    from transformers import AutoModelForCausalLM

    with _reading(path):
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=getattr(torch, dtype))
    del model.hf_quantizer  # or save_pretrained would call the dequantized weights GGUF
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _read_tokenizer(path: Path, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _reading(path):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # Transformers gives the tokenizer of a chat model other end tokens than the file's own ids (SmolLM2: <|im_start|>).
    for name in ("bos", "eos", "pad"):
        index = getattr(model.config, f"{name}_token_id", None)
        if isinstance(index, int) and 0 <= index < len(tokenizer):
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(index))
    return tokenizer


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say what Transformers says of a file that it does not read."""
    try:
        yield
    except (ValueError, KeyError, RuntimeError, OSError, NotImplementedError, ImportError) as err:
        reason = " ".join(str(err).split())[:200]
        raise UnsupportedModelError(
            f"{path}: Transformers does not read this GGUF ({reason}). Use the model's safetensors folder."
        ) from err


def _rewrite_config(folder: Path) -> None:
    """Drop the free-text name that GGUF files carry where a Hub id is expected."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_model_name_or_path", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
