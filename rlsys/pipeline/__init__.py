"""The asynchronous core: which group may start, which is trained next, and where every token went."""
