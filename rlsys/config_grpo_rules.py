"""The rules of the section `grpo`: which parts of the algorithm go together.

As in `rlsys.config_rules`, which asks for them: a rule is a function whose name is the sentence that must hold; it
returns what is wrong, with both paths and both values, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rlsys.algorithms.combinations import incompatible

if TYPE_CHECKING:
    from rlsys.config import Config


def streaming_needs_weights_known_in_advance(config: Config) -> str | None:
    """The mean over a step's tokens is known only when its last group is."""
    grpo = config.grpo
    if not grpo.streaming or grpo.aggregation != "token_mean":
        return None
    return (
        "grpo.streaming=true with grpo.aggregation=token_mean: how much a token counts is known only when the step's "
        "last group is; use grpo.aggregation=constant or sequence_mean, or grpo.streaming=false"
    )


def streaming_needs_advantages_of_single_groups(config: Config) -> str | None:
    """A standard deviation over the step is known only when its last group is."""
    grpo = config.grpo
    if not grpo.streaming or grpo.advantage.kind != "reinforce_plus_plus":
        return None
    return (
        "grpo.streaming=true with grpo.advantage.kind=reinforce_plus_plus, which divides by the standard deviation "
        "over the whole step; use another advantage, or grpo.streaming=false"
    )


def streaming_needs_a_loss_of_single_tokens(config: Config) -> str | None:
    """A threshold over the step is known only when its last group is."""
    grpo = config.grpo
    if not grpo.streaming or grpo.loss.kind != "m2po":
        return None
    return (
        "grpo.streaming=true with grpo.loss.kind=m2po, whose mask looks at the whole step; use another loss, or "
        "grpo.streaming=false"
    )


def loss_and_correction_go_together(config: Config) -> str | None:
    """The step from the sampling policy to the current one must enter the loss once."""
    grpo = config.grpo
    if grpo.correction is None:
        return None
    reason = incompatible(grpo.loss.kind, grpo.correction.kind)
    if reason is None:
        return None
    return f"grpo.correction.kind={grpo.correction.kind} cannot be used with grpo.loss.kind={grpo.loss.kind}: {reason}"


def a_window_leaves_room_for_a_batch(config: Config) -> str | None:
    """Groups that may be passed take slots from the buffer, which must still hold a step."""
    grpo = config.grpo
    if grpo.order.kind != "windowed" or grpo.order.window <= grpo.max_staleness * grpo.groups_per_step:
        return None
    return (
        f"grpo.order.window={grpo.order.window} is more than grpo.max_staleness={grpo.max_staleness} x "
        f"grpo.groups_per_step={grpo.groups_per_step}, which leaves the buffer no room for a step; lower the first or "
        "raise the second"
    )


def a_group_has_more_completions_than_k(config: Config) -> str | None:
    """The best of k is estimated from a group, with one left out."""
    grpo = config.grpo
    if grpo.advantage.kind != "pass_at_k" or grpo.advantage.k < grpo.group_size:
        return None
    return (
        f"grpo.advantage.k={grpo.advantage.k} needs groups of more than {grpo.advantage.k} completions, and "
        f"grpo.group_size={grpo.group_size}; lower the first or raise the second"
    )


def the_length_penalty_begins_within_the_limit(config: Config) -> str | None:
    """The penalty rises over the last tokens before the limit."""
    grpo, limit = config.grpo, config.rollout.max_new_tokens
    if grpo.over_long.kind != "penalise" or grpo.over_long.buffer_tokens <= limit:
        return None
    return (
        f"grpo.over_long.buffer_tokens={grpo.over_long.buffer_tokens} is more than rollout.max_new_tokens={limit}; "
        "lower it"
    )


def interleaved_evaluations_have_problems(config: Config) -> str | None:
    """They read the validation split, which one task makes to measure."""
    task, evaluation = config.task, config.evaluation
    if task.kind != "variant_consequence" or evaluation.every_steps is None:
        return None
    if evaluation.interleaved_problems <= task.validation_problems:
        return None
    return (
        f"evaluation.interleaved_problems={evaluation.interleaved_problems} is more than "
        f"task.validation_problems={task.validation_problems}; lower the first or raise the second"
    )


GRPO_RULES: tuple[Callable[[Config], str | None], ...] = (
    streaming_needs_weights_known_in_advance,
    streaming_needs_advantages_of_single_groups,
    streaming_needs_a_loss_of_single_tokens,
    loss_and_correction_go_together,
    a_window_leaves_room_for_a_batch,
    a_group_has_more_completions_than_k,
    the_length_penalty_begins_within_the_limit,
    interleaved_evaluations_have_problems,
)
