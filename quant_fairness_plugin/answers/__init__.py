"""Answers: a few prompts in each language, put to a checkpoint and to the 16-bit model, before anybody ships it.

A figure can look fine where every sentence ends in a loop. `prompts` reads what is asked, `ask` lets a model write,
`faults` says what is wrong with a text whatever it says. Only `ask` imports torch.
"""
