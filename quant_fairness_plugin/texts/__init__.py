"""quant-fairness."""
