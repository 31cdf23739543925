"""Reward parts (one small file each), their combination, and scoring under time limits."""
