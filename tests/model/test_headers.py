from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.model.headers import MAX_HEADER_BYTES, read_header

GOOD: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F16", "shape": [1], "data_offsets": [24, 26]},
}


def write(path: Path, header: bytes | dict[str, Any], *, data: int = 26, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + bytes(data))
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def library_accepts(path: Path) -> bool:
    try:
        with safe_open(path, framework="numpy") as file:
            return file.keys() is not None
    except SafetensorError:
        return False


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return GOOD | {name: GOOD[name] | fields}


MALFORMED: dict[str, Callable[[Path], Path]] = {
    "an empty file": lambda p: written(p, b""),
    "seven bytes": lambda p: written(p, bytes(7)),
    "a header longer than the file": lambda p: write(p, GOOD, length=10_000),
    "a header longer than any": lambda p: write(p, GOOD, length=2**63),
    "truncated data": lambda p: write(p, GOOD, data=25),
    "surplus data": lambda p: write(p, GOOD, data=27),
    "no JSON": lambda p: write(p, b"weights!"),
    "a JSON list": lambda p: write(p, b"[]", data=0),
    "bad UTF-8": lambda p: write(p, b'{"\xff": {}}', data=0),
    "deep nesting": lambda p: write(p, b'{"a":' + b"[" * 100_000, data=0),
    "a pickle": lambda p: written(p, pickle.dumps({"weights": list(range(99))})),
    "an unknown dtype": lambda p: write(p, changed("b", dtype="F17")),
    "a dtype that is a list": lambda p: write(p, changed("b", dtype=[])),
    "a negative size": lambda p: write(p, changed("b", shape=[-1])),
    "a fractional size": lambda p: write(p, changed("b", shape=[1.0])),
    "a shape that overflows": lambda p: write(p, changed("b", shape=[2**62, 2**62])),
    "offsets that do not fit the shape": lambda p: write(p, changed("b", shape=[2])),
    "an overlap": lambda p: write(p, changed("b", data_offsets=[22, 24]), data=24),
    "a hole": lambda p: write(p, changed("b", data_offsets=[26, 28]), data=28),
    "offsets that run backwards": lambda p: write(p, changed("b", data_offsets=[26, 24])),
    "three offsets": lambda p: write(p, changed("b", data_offsets=[24, 26, 26])),
    "no offsets": lambda p: write(p, GOOD | {"b": {"dtype": "F16", "shape": [1]}}),
    "a tensor that is a number": lambda p: write(p, GOOD | {"b": 1}),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_file_is_refused_and_named_as_the_library_does(what: str, tmp_path: Path) -> None:
    path = MALFORMED[what](tmp_path / "bad.safetensors")
    assert not library_accepts(path)
    with pytest.raises(ArtifactError, match=r"bad\.safetensors: not a well-formed safetensors file \(") as caught:
        read_header(path)
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)


def test_a_name_that_is_listed_twice_is_refused_where_the_library_takes_the_last(tmp_path: Path) -> None:
    entry = b'{"dtype":"F16","shape":[1],"data_offsets":[0,2]}'
    path = write(tmp_path / "twice.safetensors", b'{"a":' + entry + b',"a":' + entry + b"}", data=2)
    assert library_accepts(path)
    with pytest.raises(ArtifactError, match="'a' is there twice"):
        read_header(path)


def test_a_header_at_the_bound_is_not_read_into_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "big.safetensors", b"{}", length=MAX_HEADER_BYTES + 1)
    with path.open("r+b") as file:
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse: takes no space
    with pytest.raises(ArtifactError, match=f"a header of {MAX_HEADER_BYTES + 1} bytes"):
        read_header(path)


def test_a_missing_file_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"absent\.safetensors: cannot be read \(No such file"):
        read_header(tmp_path / "absent.safetensors")


def test_every_dtype_reads_as_the_library_reads_it(tmp_path: Path) -> None:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool)
    tensors = {f"t{i}": torch.zeros(i + 1, 3, dtype=dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"scalar": torch.zeros(()), "empty": torch.zeros(0, 5)}
    save_file(tensors, tmp_path / "all.safetensors", metadata={"format": "pt"})
    with safe_open(tmp_path / "all.safetensors", framework="pt") as file:
        expected = {k: (file.get_slice(k).get_dtype(), tuple(file.get_slice(k).get_shape())) for k in file.keys()}
    assert read_header(tmp_path / "all.safetensors") == expected


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 150), value=st.integers(0, 255))
def test_no_changed_byte_is_accepted_where_the_library_refuses(tmp_path: Path, position: int, value: int) -> None:
    path = write(tmp_path / "mutated.safetensors", GOOD)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    try:
        read_header(path)
    except ArtifactError:
        return
    assert library_accepts(path)
