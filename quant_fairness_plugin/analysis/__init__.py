"""Questions about models and the method itself, answered with the steps of the line. Takes a model and texts.

Every result is a frozen dataclass. `kinds` lists the questions that `analyze` asks, one module each:

- `weights`: distributions by tensor; `predictors`: whether such figures predict a sweep
- `tokens`: fertility by language; `segmentation`: token boundaries against morphemes
- `collect`: one pass with hooks over two models; on it `representations` and `clipping`; `quantized`: the second model
- `interventions`: plans of `changes`, made of `variants` of the weights; `causes`: what follows from their damage
- `configurations`: the seeds' plans, which `named_plans` makes at any depth, with their bytes and labels
- `choices`: right answers before and after; `questions`, `lm_eval`: where they come from
- `hypotheses`: the seeds' claims of what goes with damage; `correlations`: of few items

Behind `compare`:

- `calibration`: what the choice of calibration text and weights does, with and without protection
- `outcomes`: quantized models scored under common resamples
- `effects`: two choices crossed, and whether they add up (no torch)
- `matrix`: calibration language by evaluation language
"""
