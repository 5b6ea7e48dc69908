"""Questions about the method itself, answered with the steps of the line. Takes a model and texts, returns figures.

- `calibration`: what the choice of calibration text and weights does, with and without protection
- `outcomes`: quantized models scored under common resamples
- `effects`: two choices crossed, and whether they add up (no torch)
- `matrix`: calibration language by evaluation language
- `clipping`: thresholds by formula, the seeds' and the optimal ones
"""
