"""The whole line in code: sweep, recommend, quantize, export, verify, and the damage of each language.

python examples/quickstart.py [MODEL] [OUT]
"""

from __future__ import annotations

import sys

from quant_fairness import FairQuantizer


def main(model: str = "demo", out: str = "quickstart-int4-fair") -> None:
    quantizer = FairQuantizer.from_pretrained(model, protect_layers="auto", top=2, languages=["en", "fr", "he", "zh"])
    ranking = quantizer.sweep().rankings["protect-one worst"]
    print("layers, most worth protecting first:", ranking)
    print("plan:", quantizer.recommend().protected_layers)

    result = quantizer.run(out, overwrite=True)
    for before, after in zip(result.unprotected.languages, result.protected.languages, strict=True):
        print(f"{before.language}: KL {before.kl_bits_per_byte.estimate:.5f} → {after.kl_bits_per_byte.estimate:.5f}")
    print(result.verdict)


if __name__ == "__main__":
    main(*sys.argv[1:])
