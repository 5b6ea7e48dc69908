"""What was measured, as one HTML page that opens offline. Made from artifacts alone: no model is loaded, no torch.

`sources` reads the artifacts, `answers` says what they mean in words, the modules of `sections` turn each question into
a chart with its table, `drawing` makes a chart an SVG, and `page` puts all in one file.
"""
