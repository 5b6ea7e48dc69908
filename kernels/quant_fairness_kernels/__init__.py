"""quant-fairness kernels."""
