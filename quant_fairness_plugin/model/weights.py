"""Weight files: which files of a folder hold the weights, and whether it is safe to open them. No torch."""

from __future__ import annotations

import re
import reprlib
from pathlib import Path
from typing import Any

from quant_fairness_plugin.documents import parse_json, read_text
from quant_fairness_plugin.errors import ArtifactError, UnsupportedModelError
from quant_fairness_plugin.model.headers import TensorShapes, read_header

_SHARD = re.compile(r"(pytorch_)?model(-[0-9]+-of-[0-9]+)?\.safetensors", re.ASCII)
_PICKLES = ("*.bin", "*.pt", "*.pth")


def find_weights(folder: Path, *, allow_pickle: bool) -> tuple[Path, ...]:
    """Return the weight files of a model folder: `model.safetensors`, the shards of its index, or pickles.

    Args:
        folder: the model.
        allow_pickle: take `pytorch_model.bin` where there is no safetensors file.

    Raises:
        UnsupportedModelError: the folder holds GGUF weights only.
        ArtifactError: no weights, pickles without `allow_pickle`, an index that names an absent or unsafe file, or
            shards that do not belong to the index.
    """
    for stem in ("model.safetensors", "pytorch_model.bin") if allow_pickle else ("model.safetensors",):
        single, index = folder / stem, folder / f"{stem}.index.json"
        files = _shards(index, Path(stem).suffix) if index.is_file() else (single,) if single.is_file() else ()
        if files:
            _refuse_strays(folder, files)
            for file in files:
                check_inside(folder, file)
            return files
    raise _no_weights(folder, allow_pickle)


def read_shapes(weights: tuple[Path, ...]) -> TensorShapes:
    """Return names, dtypes and shapes of all tensors, from the headers of the files alone.

    Raises:
        ArtifactError: a pickle, a malformed file, a tensor in two files, or tensors that the index does not name or
            puts elsewhere.
    """
    shapes: TensorShapes = {}
    where: dict[str, str] = {}
    for path in weights:
        if path.suffix != ".safetensors":
            raise ArtifactError(f"{path}: a pickle does not list its tensors. Convert the model to safetensors.")
        for name, shape in read_header(path).items():
            if name in where:
                raise ArtifactError(f"{path}: tensor {name!r} is in {where[name]} too. Get the files again.")
            shapes[name], where[name] = shape, path.name
    if not shapes:
        raise ArtifactError(f"{weights[0]}: holds no tensors; expected a model's weights. Get the file again.")
    index = weights[0].parent / "model.safetensors.index.json"
    if index.is_file():
        _compare_with_index(index, where)
    return shapes


def check_inside(folder: Path, file: Path) -> None:
    """Refuse a file that a symbolic link takes out of the model's tree.

    In the Hub's cache, where a snapshot consists of links, the tree is the whole repository's.

    Raises:
        ArtifactError: the file is outside.
    """
    real = folder.resolve()
    in_cache = real.parent.name == "snapshots" and (real.parent.parent / "blobs").is_dir()
    root = real.parent.parent if in_cache else real
    if not file.resolve().is_relative_to(root):
        raise ArtifactError(
            f"{file}: a link that leaves the model's folder; expected a file inside it. Copy the file in."
        )


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a model folder.

    Raises:
        ArtifactError: missing, too large, not UTF-8, or no JSON object.
    """
    try:
        value = parse_json(read_text(path), finite=False)
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as err:
        raise ArtifactError(f"{path}: cannot be read as a JSON object ({err}). Restore the model's file.") from err
    return value


def _shards(index: Path, suffix: str) -> tuple[Path, ...]:
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if not name.endswith(suffix) or re.search(r"[/\\:\x00]", name) or name.startswith(".") or len(name) > 200:
            raise ArtifactError(
                f"{index}: names the file {reprlib.repr(name)}; expected names of {suffix} files in the same folder. "
                "Get the model again from a source that you trust."
            )
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise ArtifactError(f"{index}: {len(absent)} of its files are missing: {', '.join(absent[:5])}. Get them.")
    return tuple(index.parent / name for name in names)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ArtifactError(f"{index}: needs a 'weight_map' from tensor names to file names. Get the file again.")
    return weight_map


def _compare_with_index(index: Path, where: dict[str, str]) -> None:
    named = _weight_map(index)
    problems = {
        "in no file": sorted(named.keys() - where.keys()),
        "not in the index": sorted(where.keys() - named.keys()),
        "in another file than it says": sorted(k for k in named.keys() & where.keys() if named[k] != where[k]),
    }
    differences = [f"{len(keys)} tensors {what}: {', '.join(keys[:5])}" for what, keys in problems.items() if keys]
    if differences:
        raise ArtifactError(f"{index}: does not fit the weight files ({'; '.join(differences)}). Get matching files.")


def _refuse_strays(folder: Path, files: tuple[Path, ...]) -> None:
    """Refuse leftovers of another save: readers differ in which of the two sets they would take."""
    strays = sorted(p.name for p in folder.iterdir() if _SHARD.fullmatch(p.name) and p not in files)
    if strays and files[0].suffix == ".safetensors":
        raise ArtifactError(
            f"{folder}: holds weight files that do not belong to its model: {', '.join(strays[:5])}; expected "
            "model.safetensors alone, or the files of the index alone. Remove the ones that are stale."
        )


def _no_weights(folder: Path, allow_pickle: bool) -> ArtifactError | UnsupportedModelError:
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    if others:
        return ArtifactError(
            f"{folder}: {', '.join(others[:5])} without model.safetensors.index.json; expected model.safetensors or "
            "that index. Rename the only file, or get the index."
        )
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles and allow_pickle:
        return ArtifactError(f"{folder}: {pickles[0]} is not read; expected pytorch_model.bin. Rename or convert it.")
    if pickles:
        return ArtifactError(
            f"{folder}: only pickle weights ({', '.join(pickles[:3])}), which can run code when opened. Convert them "
            "to safetensors, or pass --allow-pickle (allow_pickle=True) if you trust their source."
        )
    if any(folder.glob("*.gguf")):
        return UnsupportedModelError(
            f"{folder}: GGUF weights, which are quantized. Name the file itself, or use the model's safetensors folder."
        )
    return ArtifactError(
        f"{folder}: no weights; expected model.safetensors or model.safetensors.index.json. Download them "
        "(a Hub model that only has pickle weights needs --allow-pickle)."
    )
