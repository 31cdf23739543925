"""Which losses and corrections go together, and why: read by the rules of the configuration, so free of torch.

A weight and a loss must not both contain the step from the behavior policy μ. So the corrections
(`rlsys.algorithms.corrections`) are of two sorts. *Weights* contain π_prox/μ: the objective then gives the loss π_prox
in the place of μ, and the product of the two is again π/μ. *Masks* are 0 or 1: they choose among completions and leave
the loss's ratio to μ as it is.
"""

from __future__ import annotations

WEIGHTS = ("tis", "icepop")
"""The kinds of correction that are weights; all others are masks."""


def incompatible(loss_kind: str, correction_kind: str) -> str | None:
    """Return why a loss and a correction (their `kind` in the configuration) make no sense together; None if they do.

    The reason is a clause that goes on after "grpo.correction cannot be used with grpo.loss <kind>:".
    """
    if correction_kind not in WEIGHTS:
        return None
    match loss_kind:
        case "dppo" | "m2po":
            return "its mask and its ratio are taken to the behavior policy, which a weight would take out of them"
        case "decoupled_ppo":
            return "it has this weight already (weight_cap); use ppo_clip with a correction, or decoupled_ppo without"
        case _:
            return None
