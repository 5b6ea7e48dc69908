"""Write a quantized model as a checkpoint that other people's loaders read, and prove that they do.

`writer.export` builds the folder beside its final name (`staging`), with packed tensors (`contents` and
`checkpoint.formats`), the source's other files, a model card (`card`) and `quant_fairness.json`; `verify` then checks
files, metadata, tensors and the logits of a real loader against our own dequantizer. Only then does the folder get its
name. `repair` writes new metadata for folders of other tools, `foreign` reads what a backend quantized.
"""
