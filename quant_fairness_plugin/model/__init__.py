"""Find a model's files, check them before anything heavy is imported, load it, know its parts.

`resolve` turns a name (bundled, folder, `.safetensors` file, Hub id) into checked `ModelFiles`; `layers` reads layer
lists; `families` holds the map of every supported architecture. None of these imports torch. `load` returns the
`LoadedModel` that the later steps work on, `linear` hides the one difference between `nn.Linear` and GPT-2's `Conv1D`.
"""
