"""A source of sentences in, a checked `TextSet` out. Nothing here imports torch.

`load.py` is the entry; `sources.py` and `hub.py` read one kind of source each, `sentences.py` checks one sentence,
`languages.py` brings language tags to one spelling, `parts.py` splits a set into calibrate / search / confirm.
"""

from quant_fairness_plugin.texts.languages import normalise_language
from quant_fairness_plugin.texts.load import load_texts
from quant_fairness_plugin.texts.parts import split_parts

__all__ = ["load_texts", "normalise_language", "split_parts"]
