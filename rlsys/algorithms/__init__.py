"""What the learner computes from log-probabilities and rewards: advantages, losses, ratios."""
