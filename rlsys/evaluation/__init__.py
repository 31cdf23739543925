"""How good a policy is, with its uncertainty and the floor beside it."""
