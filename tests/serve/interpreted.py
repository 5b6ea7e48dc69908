"""Run by `test_interpreted.py` in a process of its own, because triton decides at import whether it interprets.

    TRITON_INTERPRET=1 python tests/serve/interpreted.py DIR

Writes as JSON the largest difference of logits over the largest logit: the Triton kernels against the reference, and
with launches of their own for modules that otherwise share one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from quant_fairness_plugin.serve.linear import QuantizedLinear
from quant_fairness_plugin.serve.load import load_quantized


@torch.no_grad()
def main(folder: Path) -> None:
    torch.set_num_threads(1)
    row = torch.arange(1, 4).unsqueeze(0)
    model: Any = load_quantized(folder, kernel="triton")
    reference: Any = load_quantized(folder, kernel="reference")
    expected, found = reference(input_ids=row).logits, model(input_ids=row).logits.float()
    apart: Any = load_quantized(folder, kernel="triton", fuse=False)
    modules = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    result = {
        "difference": float((found - expected).abs().max() / expected.abs().max()),
        "dtype": str(model.dtype),
        "modules": len(modules),
        "apart": float((found - apart(input_ids=row).logits.float()).abs().max() / expected.abs().max()),
        "kernels": sorted({module.extra_repr().rpartition("=")[2] for module in modules}),
    }
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
