"""Step 4 of 8: evaluates model states that differ in which layers, or units of layers, are quantized.

Takes a `LoadedModel` and a `TextSet`, returns a `SweepReport`. `engine` is the whole step: `plans` says which plans,
`score` runs them (`tree` merges plans into prefixes, `walk` runs the prefixes, `bank` gives the weights of `units`),
`search` looks for sets of units, `ranking` orders units and `sets` judges sets from the report alone, `sizes` counts
the bytes that protection costs. `plans`, `search`, `tree`, `ranking`, `sets` and `sizes` do without torch.
"""
