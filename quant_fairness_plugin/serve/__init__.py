"""Step 8 of 8: load an exported checkpoint with our own code and run it. `load.load_quantized` takes a folder."""
