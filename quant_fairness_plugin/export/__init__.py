"""Step 7 of 8: write a quantized model as a checkpoint that other people's loaders read, and prove that they do.

`formats.check_exportable` says at plan time what can be written for whom. `writer.export` builds the folder beside its
final name (`staging`), with packed tensors (`contents`, `formats/`), the source's other files, a model card (`card`)
and `quant_fairness.json`; `verify` then checks files (`check_files`), metadata (`check_metadata`), tensors
(`check_tensors`) and the logits of a real loader (`check_reader`) against `dequantize`, which reads the files with code
of its own. Only then does the folder get its name.
"""
