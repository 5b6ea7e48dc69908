"""Scores of model states on a text set, and what quantization did to each language.

Takes model states and a `TextSet`; returns `StateScores` (`scoring`, with `rows` and `streamed` the only modules here
that need torch) and, from the numbers alone, `LanguageDamage` and summaries (`damage`). `objectives` holds what states
are ranked by, `metrics` the formulas, `intervals` the bootstrap and the tests, `guards` what may not be ranked.
"""
