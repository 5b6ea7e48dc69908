"""Run by `test_interpreted.py` in a process of its own, because triton decides at import whether it interprets.

    TRITON_INTERPRET=1 python tests/kernels/interpreted.py small

Writes one JSON line per case of `verify.grid`, then one per planted defect: is the broken kernel seen?
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from quant_fairness_kernels import launch, verify
from quant_fairness_kernels.int4_matmul import int4_matmul
from quant_fairness_kernels.kernel_config import KernelConfig
from quant_fairness_kernels.nibble_planes import NibblePlanes, pack_planes

SPLIT = KernelConfig(16, 128, 3, 4, 4, transposed=False, scale_after=True)
CASE = verify.Case(5, 130, 512, 4, symmetric=False, config=SPLIT)


def planted() -> Iterator[tuple[str, bool]]:
    """Each defect, and whether `run_case` sees it."""
    yield "nothing is wrong", not verify.run_case(CASE).passed
    for name, tamper in DEFECTS.items():
        yield name, not defective(tamper).passed


def defective(tamper: Callable[[NibblePlanes], None]) -> verify.Outcome:
    """The outcome of CASE with tampered planes; they are packed anew for every call."""

    def pack(*arguments: Any, **options: Any) -> NibblePlanes:
        planes = pack_planes(*arguments, **options)
        tamper(planes)
        return planes

    original, verify.pack_planes = verify.pack_planes, pack
    try:
        return verify.run_case(CASE)
    finally:
        verify.pack_planes = original


def one_bit(planes: NibblePlanes) -> None:
    planes.words[3, 7] ^= 8


def stale_counter(planes: NibblePlanes) -> None:
    planes.counters[0] = 1


def swapped_planes(planes: NibblePlanes) -> None:
    wide = planes.words.to(torch.int32) & 0xFFFF
    planes.words.copy_((wide >> 4 | (wide & 15) << 12).to(torch.int16))


DEFECTS: dict[str, Callable[[NibblePlanes], None]] = {
    "one bit of one weight": one_bit,
    "a counter that was not reset": stale_counter,
    "planes in another order": swapped_planes,
}


def compiled_is_the_same() -> bool:
    """Whether `torch.compile` of the operator over the interpreted kernel changes nothing."""
    planes = pack_planes(
        torch.full((20, 64), 9, dtype=torch.uint8), torch.ones(20, 1).half(), torch.full((20, 1), 8).byte()
    )
    x = torch.randn(3, 64).half()
    compiled = torch.compile(lambda x: int4_matmul(x, planes, kernel="triton"), fullgraph=True, backend="aot_eager")
    same = torch.equal(compiled(x), int4_matmul(x, planes, kernel="triton"))
    return same and torch.allclose(compiled(x).float(), x.float().sum(1, keepdim=True).expand(3, 20), atol=2e-2)


def main(size: str) -> None:
    assert launch.interpreted(), "set TRITON_INTERPRET=1"
    torch.set_num_threads(1)
    for case in verify.grid("full" if size == "full" else "small"):
        sys.stdout.write(json.dumps(verify.row(case, verify.run_case(case))) + "\n")
    sys.stdout.write(json.dumps({"name": "planted", "seen": dict(planted())}) + "\n")
    sys.stdout.write(json.dumps({"name": "compiled", "same": compiled_is_the_same()}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
