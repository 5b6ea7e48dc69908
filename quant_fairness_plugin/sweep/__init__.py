"""Run a sweep: evaluate model states that differ in which layers, or units of layers, are quantized.

`engine` is the whole step: it takes a `LoadedModel` and a `TextSet` and returns a `SweepReport`. `plans` (the package)
says which states there are, `walk` runs them batch after batch and `streaming` layer after layer, `bank` and
`checkpoint_bank` give the quantized weights, `trials` and `executors` make a sweep resumable and parallel.
"""
