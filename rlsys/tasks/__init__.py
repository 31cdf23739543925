"""One module per task: its problems, its answers and its text-only floor."""
