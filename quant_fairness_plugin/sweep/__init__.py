"""Step 4 of 8: evaluates model states that differ in which layers are quantized.

Takes a `LoadedModel` and a `TextSet`, returns a `SweepReport`. `engine` runs the states (torch), `ranking` orders the
layers from the report alone (no torch), `sizes` counts the bytes that protection costs.
"""
