"""How far the range of a quantization group reaches: theory, closed-form rules, and the exact optimum."""
