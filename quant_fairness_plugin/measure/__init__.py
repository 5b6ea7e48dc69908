"""Step 3 of 8: scores of model states on a text set, and what quantization did to each language.

Takes model states and a `TextSet`; returns `StateScores` (`scoring`, the only module here that needs torch) and, from
the numbers alone, `LanguageDamage`, summaries and ranking objectives (`damage`). `metrics` holds the formulas,
`intervals` the bootstrap and the tests, `guards` what may not be ranked, `legacy` the seeds' own figures.
"""
