"""A model in memory, quantized: the parts that need more bits get them, and each language's loss before and after.

python examples/protect_and_quantize.py [MODEL] [OUT] [TEXTS]
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from quant_fairness import FairQuantizer, bundled_folder


def main(name: str = "demo", out: str = "int4-fair", texts: str = "bundled") -> None:
    folder = bundled_folder(name) if name in ("demo", "demo-gpt2") else name
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    # With a model that nothing else needs, its name alone does: FairQuantizer.from_pretrained("demo", …)
    quantizer = FairQuantizer.from_pretrained(model, tokenizer=tokenizer, texts=texts, languages=["en", "he"])
    plan = quantizer.recommend()  # one pass of gradients scores every part; at most 20 % more bytes are spent
    print("more bits for:", ", ".join(f"{name} {bits}" for name, bits in plan.singled_out.items()) or "nothing")

    result = quantizer.run(out, overwrite=True)
    for before, after in zip(result.unprotected.languages, result.protected.languages, strict=True):
        print(f"{before.language}: KL {before.kl_bits_per_byte.estimate:.5f} → {after.kl_bits_per_byte.estimate:.5f}")
    print(result.verdict)


if __name__ == "__main__":
    main(*sys.argv[1:])
