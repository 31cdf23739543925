"""Benchmarks: what rlsys costs, beside what it could cost at best and what others cost. Run by hand; see README.md."""
