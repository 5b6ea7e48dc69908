"""One set of scores, many budgets: what each costs in bytes, and what the worst language is predicted to lose.

python examples/budgets.py [MODEL] [TEXTS]
"""

from __future__ import annotations

import sys

from quant_fairness import FairQuantizer
from quant_fairness_plugin.errors import QualityGateError


def main(model: str = "demo", texts: str = "bundled") -> None:
    scored = FairQuantizer.from_pretrained(model, texts=texts, languages=["en", "he"]).score()  # the only long step
    for budget in (
        {"max_overhead": 0.05},  # at most 5 % more bytes than INT4 everywhere
        {"max_overhead": 0.2},
        {"target_bits": 6.0},  # bits of a weight on average, scales included
        {"target": "worst=0.003"},  # the fewest bytes with which no language loses more than this
        {"target": "worst=0.003", "limits": {"he": 0.0005}},  # and Hebrew no more than that
    ):
        quantizer = FairQuantizer.from_pretrained(model, texts=texts, languages=["en", "he"], **budget)
        try:
            plan = quantizer.recommend(scored)
        except QualityGateError as err:
            print(f"{budget}: {err}")
            continue
        print(f"{budget}: {plan.overhead:+.1%} bytes, {len(plan.singled_out)} parts with more bits; {plan.reasons[0]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
