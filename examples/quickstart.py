"""A model in memory, quantized: sweep, recommend, quantize, export, verify, and the damage of each language.

python examples/quickstart.py [MODEL] [OUT]
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from quant_fairness import FairQuantizer, bundled_folder


def main(name: str = "demo", out: str = "quickstart-int4-fair") -> None:
    folder = bundled_folder(name) if name in ("demo", "demo-gpt2") else name
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    # With a model that nothing else needs, its name alone does: FairQuantizer.from_pretrained("demo", …)
    quantizer = FairQuantizer.from_pretrained(model, tokenizer=tokenizer, top=2, languages=["en", "fr", "he", "zh"])
    report = quantizer.sweep()
    print("layers, most worth protecting first:", report.rankings["protect-one worst"])
    plan = quantizer.recommend(report)
    print("plan:", plan.protected_layers)

    result = quantizer.run(out, overwrite=True)
    for before, after in zip(result.unprotected.languages, result.protected.languages, strict=True):
        print(f"{before.language}: KL {before.kl_bits_per_byte.estimate:.5f} → {after.kl_bits_per_byte.estimate:.5f}")
    print(result.verdict)


if __name__ == "__main__":
    main(*sys.argv[1:])
