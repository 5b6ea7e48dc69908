"""Plans without a model: units, sets of plans, their costs, the controls they are held against. No torch.

- `units`: what a plan can give a precision to
- `plan_set`: which plans a sweep evaluates
- `costs`: bytes
- `tree`: the plans as states that share blocks
- `search`: greedy, backward and beam search over sets
- `controls`: plans that need no search
"""
