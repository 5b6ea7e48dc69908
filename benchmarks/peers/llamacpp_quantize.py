"""Quantizes a model folder with llama.cpp's own tools to Q4_K_M, with an importance matrix where there is text.

    .venv-peers-llamacpp/bin/python benchmarks/peers/llamacpp_quantize.py MODEL REQUEST.json OUT

REQUEST holds `full`, the model as a GGUF file of 16 bit, and `texts`, the calibration rows as text; llama-imatrix
tokenizes them again and cuts them into rows of 256.
OUT becomes a folder with `model.gguf` and `peer.json`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOOLS = Path(sys.prefix)
CONTEXT = "256"


def quantize(full: Path, texts: list[str], out: Path) -> None:
    out.mkdir(parents=True)
    matrix, text = out / "imatrix.bin", out / "calibration.txt"
    given: list[str | Path] = []
    if texts:
        text.write_text("\n".join(texts), encoding="utf-8")
        imatrix = TOOLS / "bin" / "llama-imatrix"
        run(imatrix, "-m", full, "-f", text, "-o", matrix, "-c", CONTEXT, "-t", "1", "--no-ppl")
        given = ["--imatrix", matrix]
    run(TOOLS / "bin" / "llama-quantize", *given, full, out / "model.gguf", "Q4_K_M", "1")
    matrix.unlink(missing_ok=True)
    settings = {"type": "Q4_K_M", "imatrix": bool(texts)}
    source = (TOOLS / "src").resolve().parents[1].name.rpartition("-")[2]
    versions = {"llama-cpp-python": source}
    peer = {"versions": versions, "settings": settings}
    (out / "peer.json").write_text(json.dumps(peer, indent=1) + "\n", encoding="utf-8")


def run(*command: str | Path) -> None:
    subprocess.run(list(map(str, command)), check=True)


def main() -> None:
    _, request, out = sys.argv[1:]
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    quantize(Path(asked["full"]), asked["texts"], Path(out))


if __name__ == "__main__":
    main()
