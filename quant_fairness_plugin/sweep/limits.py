"""How much of a sweep is run at once. Step 4 (sweep). Plain numbers, so that a forecast needs no torch to read them."""

BATCH_TOKENS = 512
"""Tokens of a batch, padding included. Its hidden states are held for every prefix at once."""
CONTEXT = 2048
"""Longest window of a sentence, where the model allows it."""
STACK_TOKENS = {"cpu": 1024, "cuda": 1 << 15}
"""Most tokens that a block is given at once, all stacked states together. On a CPU, so few that the widest activations
still fit its cache."""
