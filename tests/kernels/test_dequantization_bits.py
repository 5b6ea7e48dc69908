"""The inline PTX that takes words apart, run here by a small emulator of the instructions it uses, on every word.

The interpreter cannot run it and no GPU is needed: the text that the kernel assembles is what is executed.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

triton_kernels = pytest.importorskip("quant_fairness_kernels.triton_kernels.dequantization")

MASK = 0xFFFFFFFF


def halves(register: Tensor, dtype: torch.dtype) -> Tensor:
    """The two 16-bit floats of each 32-bit register, as float64 `[2, n]`."""
    parts = torch.stack([register & 0xFFFF, register >> 16])
    return torch.where(parts >= 2**15, parts - 2**16, parts).to(torch.int16).view(dtype).double()


def joined(values: Tensor, dtype: torch.dtype) -> Tensor:
    bits = values.to(dtype).view(torch.int16).to(torch.int64) & 0xFFFF
    return bits[0] | bits[1] << 16


def lop3(a: Tensor, b: Tensor, c: Tensor, table: int) -> Tensor:
    result = torch.zeros_like(a)
    for minterm in range(8):
        if table >> minterm & 1:
            terms = [operand if minterm >> (2 - place) & 1 else ~operand for place, operand in enumerate((a, b, c))]
            result |= terms[0] & terms[1] & terms[2]
    return result & MASK


def run_ptx(text: str, inputs: list[Tensor]) -> list[Tensor]:
    """Execute straight-line PTX; `$0` to `$3` are the outputs, the inputs follow. Floats round once."""
    registers = {f"${place + 4}": value for place, value in enumerate(inputs)}

    def operand(name: str) -> Tensor:
        return torch.full_like(inputs[0], int(name, 0)) if name.startswith("0x") or name.isdigit() else registers[name]

    for line in re.findall(r"^\s*([a-z][\w.]*)\s+(.*?);\s*$", text, re.M):
        operation, target, *names = [line[0], *re.split(r",\s*", line[1])]
        values = [operand(name) for name in names]
        dtype = torch.bfloat16 if "bf16" in operation else torch.float16
        match operation:
            case "mov.b32":
                registers[target] = values[0]
            case "shr.u32":
                registers[target] = values[0] >> int(names[1])
            case "lop3.b32":
                registers[target] = lop3(*values[:3], int(names[3], 0))
            case "sub.f16x2":
                registers[target] = joined(halves(values[0], dtype) - halves(values[1], dtype), dtype)
            case "fma.rn.f16x2" | "fma.rn.bf16x2":
                a, b, c = (halves(value, dtype) for value in values)
                registers[target] = joined(a * b + c, dtype)
            case _:
                raise AssertionError(f"the emulator does not know {operation}")
    return [registers[f"${place}"] for place in range(4)]


def biases(zero: int, dtype: torch.dtype) -> list[float]:
    """What the kernel passes for one zero point: the constants of its float16 and bfloat16 branches."""
    return [zero + 1024.0, -(zero + 64.0)] * 2 if dtype == torch.float16 else [-(zero + 128.0)] * 4


@pytest.mark.parametrize("zero", range(16))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_word_gives_its_integers_minus_the_zero_point(zero: int, dtype: torch.dtype) -> None:
    text = (triton_kernels.FLOAT16_ASM if dtype == torch.float16 else triton_kernels.BFLOAT16_ASM).value
    low, high = torch.arange(2**16), torch.arange(2**16).flip(0)
    constants = [torch.full((2, 2**16), value) for value in biases(zero, dtype)]
    assert all(torch.equal(constant.to(dtype).float(), constant) for constant in constants)
    planes = run_ptx(text, [low | high << 16, *(joined(constant, dtype) for constant in constants)])
    for place, plane in enumerate(planes):
        expected = torch.stack([(words >> 4 * place & 15) - zero for words in (low, high)])
        assert torch.equal(halves(plane, dtype), expected.double())


def test_a_wrong_constant_would_be_seen() -> None:
    text = triton_kernels.FLOAT16_ASM.value.replace("0x00f000f0", "0x00f000e0")
    words = torch.arange(2**16)
    constants = [joined(torch.full((2, 2**16), value), torch.float16) for value in biases(8, torch.float16)]
    planes = run_ptx(text, [words | words << 16, *constants])
    assert not torch.equal(halves(planes[1], torch.float16)[0], ((words >> 4 & 15) - 8).double())
