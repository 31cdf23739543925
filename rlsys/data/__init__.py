"""From files and sequences to what the models read: DNA, problems, prompts, samples, packing."""
