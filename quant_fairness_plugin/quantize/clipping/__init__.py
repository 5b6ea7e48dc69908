"""How far the range of a quantization group reaches.

- `theory`: the best range for a known distribution (no torch)
- `rules`: every clipping rule on the groups of a weight
- `exact`: the best scale for the very values of a group
"""
