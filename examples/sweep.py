"""Which layers cost which language how much, and is protecting the worst of them better than protecting any others?

python examples/sweep.py [MODEL] [TEXTS]
"""

from __future__ import annotations

import sys

from quant_fairness import FairQuantizer


def main(model: str = "demo", texts: str = "bundled") -> None:
    quantizer = FairQuantizer.from_pretrained(model, texts=texts, languages=["en", "he"], top=1)
    report = quantizer.sweep()  # every layer alone in 16 bit, all others rounded to INT4
    for row in report.rows:
        print(f"{row.plan:12}", *(f"{d.language} {1000 * d.kl_bits_per_byte.estimate:.2f}" for d in row.damage))

    plan = quantizer.recommend(report)
    print("protect:", plan.protected_layers, "stable" if plan.stable else "unstable: " + "; ".join(plan.reasons))
    print(quantizer.evidence(plan).verdict)  # against 20 random sets of equal bytes, on sentences nothing was chosen on


if __name__ == "__main__":
    main(*sys.argv[1:])
