"""The pure library of rlsys: everything that can be understood, and tested, without Ray.

In the order in which a trajectory meets them: `types` (what is handed on), `config` and `errors` (what a user
writes and reads), `tasks` and `data` (files -> Problem -> Prompt), `models` (the DNA-LLM and the frozen encoders),
`rewards` (completion -> Score), `pipeline` (who may start, who is trained next, who waits), `algorithms`
(advantages, losses), `evaluation`. The roles that run on Ray live beside this package, in `actors`; nothing here
imports them.
"""
