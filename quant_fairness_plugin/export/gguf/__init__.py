"""A checkpoint as one GGUF file for llama.cpp: the same integers and scales, the embedding in 8 bits.

Half of a small model's INT4 checkpoint is its embedding, which no server of safetensors reads in 8 bits where it is the
head as well; llama.cpp does. Integers and scales are carried over as they are, so that what was chosen for every
language stays. Metadata and tokenizer come from a GGUF file of the 16-bit model (see `template`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import temporary_folder
from quant_fairness_plugin.errors import ArtifactError, ResourceError, UnsupportedModelError
from quant_fairness_plugin.export.gguf.blocks import FLOATS, dense_values, packed_blocks, plain_values, type_of
from quant_fairness_plugin.export.gguf.sources import FolderSource, ModelSource, OriginalSource, Source
from quant_fairness_plugin.export.gguf.template import ONLY_IN_GGUF, Arrangement, Template, gguf_version
from quant_fairness_plugin.export.staging import check_file, flush
from quant_fairness_plugin.model.gguf import BLOCK, TYPES, Embedding, check_installed
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.quantized import QuantizedModel

TABLES = ("token_embd.weight", "output.weight")
"""What GGUF files call the embedding and a head of its own."""
ROUNDED = 0.6
"""Most that Q8_0 moves a value, in steps of its block: half a step, and what rounding the scale to float16 adds to the
127 th step (0.06)."""
SUBNORMAL = 2.0**-25
"""Most that float16 moves a scale that bfloat16 holds: half of its smallest step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufReport:
    """What was written, and what reading it again said."""

    path: str
    bytes_: int
    types: dict[str, int]
    """GGUF type → number of tensors."""
    packed: int
    """Quantized modules; each was found to stand for the checkpoint's own values."""
    rearranged: int
    """Of all tensors, those whose rows stand in another order than in the checkpoint."""
    exact: bool
    """Whether the values of quantized modules are equal to the last bit; else scales below 2⁻¹⁷ were rounded."""
    embedding_error: float | None
    """|rounded - 16 bit| / |16 bit| of embedding and head, the larger of both; None where they keep 16 bit."""
    checked_with: str
    """What dequantized the file for that."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of the file to be."""

    name: str
    origin: str
    """Module, or tensor, of what is written; empty where the template's is copied."""
    kind: str
    bits: int | None
    """Of a quantized module."""
    shape: tuple[int, ...]
    arrangement: Arrangement


def write_gguf(
    given: Path | QuantizedModel, like: Path, out: Path, *, embedding: Embedding = "q8_0", overwrite: bool = False
) -> GgufReport:
    """Write a quantized model as a GGUF file, read it again, and compare every value.

    Args:
        given: a checkpoint folder of ours, or of another tool whose layout is known, with INT4 and INT8 modules on
            symmetric grids, or a plain one; or a model in memory, which may have INT5 modules as well.
        like: a GGUF file of the same 16-bit model, of any type that the package gguf reads.
        out: the file to write.
        embedding: what the embedding, and a head of its own, are stored as.
        overwrite: replace a GGUF file that is there.

    Raises:
        MissingExtraError: the packages of the extra `gguf` are not installed.
        ConfigError: `out` exists, or is no name of a GGUF file.
        ArtifactError: a damaged checkpoint or GGUF file, or one of another model.
        UnsupportedModelError: what GGUF has no place for.
        ResourceError: no space or permission.
    """
    template = check_gguf(like, out, overwrite=overwrite)
    source = FolderSource(given) if isinstance(given, Path) else ModelSource(given)
    entries = list(_entries(source, template, embedding))
    _check_complete(source, entries, template)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(out.parent, f".{out.name}.partial-") as beside:
            _write(beside / out.name, source, template, entries)
            report = _compare(beside / out.name, out, source, entries)
            flush(beside / out.name)
            os.replace(beside / out.name, out)
        flush(out.parent)
    except OSError as err:
        raise ResourceError(
            f"{out}: cannot be written ({err.strerror or err}). Free space, or choose another -o"
        ) from err
    return report


def check_gguf(like: Path, out: Path, *, overwrite: bool = False) -> Template:
    """Return the opened `like` file, after refusing what is known before anything is quantized.

    Args:
        like: a GGUF file of the 16-bit model.
        out: the file to write.
        overwrite: replace a GGUF file that is there.

    Raises:
        MissingExtraError, ConfigError, ArtifactError: as `write_gguf`.
    """
    check_installed(out)
    check_file(out, suffix=".gguf", overwrite=overwrite)
    return Template(like)


def check_like(loaded: LoadedModel, template: Template, embedding: Embedding) -> None:
    """Refuse a GGUF file of another model, or one that has no place for a tensor, before anything is quantized.

    Raises:
        ArtifactError, UnsupportedModelError: as `write_gguf`.
    """
    source = OriginalSource(loaded)
    _check_complete(source, list(_entries(source, template, embedding)), template)


def _entries(source: Source, template: Template, embedding: Embedding) -> Iterator[_Entry]:
    """Yield the tensors of the template in their order, each with what stands for it in the checkpoint."""
    origins = {template.name_of(f"{module}.weight"): module for module in source.packed}
    origins |= {template.name_of(name): name for name in source.plain}
    for name in template.tensors:
        origin = origins.get(name, origins.get(TABLES[0], "") if name == TABLES[1] else "")
        if not origin and name not in ONLY_IN_GGUF:
            raise ArtifactError(
                f"{template.path}: {name} has no counterpart in the checkpoint; it is a file of another model, or of "
                "an architecture that is not carried over"
            )
        yield _entry(source, template, name, origin, embedding)


def _entry(source: Source, template: Template, name: str, origin: str, embedding: Embedding) -> _Entry:
    """Describe one tensor of the file: its type, and how its rows stand."""
    shape, kind = template.shape(name), template.tensors[name].tensor_type.name
    if not origin:
        return _Entry(name, "", kind, None, shape, Arrangement())
    dense = _dense(source, origin)
    bits = source.bits(origin) if origin in source.packed else None
    if bits is not None:
        kind = type_of(origin, bits)
    elif len(shape) > 1 and (kind != "F32" or template.all_f32):  # norms, biases and positions are F32 for llama.cpp
        eight = name in TABLES and embedding == "q8_0" and shape[1] % BLOCK == 0
        kind = "Q8_0" if eight else FLOATS[dense.dtype]
    return _Entry(name, origin, kind, bits, shape, template.arrangement(name, dense))


def _check_complete(source: Source, entries: list[_Entry], template: Template) -> None:
    """Refuse to leave out a tensor of the checkpoint."""
    left = sorted({*source.packed, *source.plain} - {entry.origin for entry in entries})
    if left:
        raise UnsupportedModelError(
            f"{template.path} has no place for {', '.join(left[:3])} ({len(left)} tensors in all); nothing may be left "
            "out. Use quant-fairness recommend --as llama.cpp, and llama-quantize"
        )


def _dense(source: Source, origin: str) -> Tensor:
    return source.dense(origin) if origin in source.packed else source.tensor(origin)


def _write(path: Path, source: Source, template: Template, entries: list[_Entry]) -> None:
    """Write a file: the template's metadata, and one tensor after another."""
    import gguf

    writer = gguf.GGUFWriter(path, template.architecture)
    bits = min((entry.bits for entry in entries if entry.bits is not None), default=0)
    kind = gguf.LlamaFileType[f"MOSTLY_{TYPES.get(bits, 'F16')}"]
    ours = {"general.file_type": int(kind)}
    writer.data_alignment = template.alignment
    for key, value, wanted, element in template.fields():
        writer.add_key_value(key, ours.get(key, value), wanted, sub_type=element)
    for entry in entries:
        stored = gguf.GGMLQuantizationType[entry.kind]
        shape = gguf.quant_shape_to_byte_shape(entry.shape, stored)
        writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), prod(shape), stored)
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:  # one of them in memory at a time
            writer.write_tensor_data(_bytes(source, template, entry))


def _bytes(source: Source, template: Template, entry: _Entry) -> np.ndarray[Any, Any]:
    if not entry.origin:
        data: np.ndarray[Any, Any] = template.tensors[entry.name].data
        return data.view(np.uint8)
    if entry.bits is None:
        values = plain_values(entry.arrangement.arranged(source.tensor(entry.origin)), entry.kind)
        return values.view(np.uint8)
    blocks = packed_blocks(entry.origin, source.quantized(entry.origin))
    ordered: np.ndarray[Any, Any] = blocks[entry.arrangement.order(len(blocks)).numpy()]
    return ordered


def _compare(path: Path, out: Path, source: Source, entries: list[_Entry]) -> GgufReport:
    """Compare what a file stands for with the checkpoint's own values, read without the code that wrote them."""
    import gguf

    reader = gguf.GGUFReader(path)
    written = {tensor.name: tensor for tensor in reader.tensors}
    exact, errors = True, [0.0]
    for entry in entries:
        if not entry.origin:
            continue
        values = dense_values(written[entry.name].data, entry.kind)
        wanted = entry.arrangement.arranged(_dense(source, entry.origin)).float()
        off = (values.view(wanted.shape) - wanted).abs()
        if entry.bits is not None:
            exact &= not bool(off.any())
            most = torch.tensor(SUBNORMAL * 2 ** (entry.bits - 1))
        elif entry.kind == "Q8_0":
            step = wanted.view(len(wanted), -1, BLOCK).abs().amax(2) / 127
            most = (ROUNDED * step).repeat_interleave(BLOCK, dim=1)
            errors.append(float(off.norm() / wanted.norm()))
        else:
            most = torch.zeros(())
        if not bool((off <= most).all()):
            raise ArtifactError(f"{out}: {entry.name} does not hold the checkpoint's values; nothing was written")
    return GgufReport(
        path=str(out),
        bytes_=path.stat().st_size,
        types=dict(Counter(entry.kind for entry in entries)),
        packed=len(source.packed),
        rearranged=sum(entry.arrangement.heads > 0 for entry in entries),
        exact=exact,
        embedding_error=max(errors) if len(errors) > 1 else None,
        checked_with=f"gguf {gguf_version()}",
    )
