"""The rules between sections of a configuration: what each section allows and the sections together do not.

Stands behind `rlsys.config.Config`, which asks for all broken rules at once when every section is valid by itself. A
rule is a function whose name is the sentence that must hold; it returns what is wrong, with both paths and both
values, or None. The one invariant: a rule reads the configuration and nothing else (no files, no hardware).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rlsys.config_grpo_rules import GRPO_RULES
from rlsys.errors import ConfigError

if TYPE_CHECKING:
    from rlsys.config import Config


def there_is_a_reward(config: Config) -> str | None:
    """A run without a reward part has nothing to learn from."""
    if config.rewards:
        return None
    return (
        "rewards: no part is named, so every reward would be 0; name at least one, "
        "for example rewards.answer.kind=answer"
    )


def a_reward_part_has_weight(config: Config) -> str | None:
    """With all weights 0 every reward is the same."""
    if not config.rewards or any(part.weight for part in config.rewards.values()):
        return None
    return f"rewards: every weight is 0 ({', '.join(config.rewards)}), so nothing can be learned"


def reward_parts_find_their_facts(config: Config) -> str | None:
    """The part `amino_acid` compares with facts that one task has."""
    wanting = [name for name, part in config.rewards.items() if part.kind == "amino_acid"]
    if not wanting or config.task.kind == "variant_consequence":
        return None
    return (
        f"rewards.{wanting[0]}.kind=amino_acid needs the amino acids of task.kind=variant_consequence, which "
        f"task.kind={config.task.kind} does not know; leave the part out"
    )


def a_completion_fits_into_the_engine(config: Config) -> str | None:
    """The engine's length holds prompt and completion."""
    new, room = config.rollout.max_new_tokens, config.rollout.max_model_tokens
    if new < room:
        return None
    return (
        f"rollout.max_new_tokens={new} leaves no room for a prompt in rollout.max_model_tokens={room}; "
        "raise the second or lower the first"
    )


def a_completion_fits_into_a_micro_batch(config: Config) -> str | None:
    """The learner runs prompt and completion at once."""
    new, room = config.rollout.max_new_tokens, config.learner.micro_batch_tokens
    if new < room:
        return None
    return (
        f"rollout.max_new_tokens={new} leaves no room for a prompt in learner.micro_batch_tokens={room}; "
        "raise the second or lower the first"
    )


def heads_suit_the_engine(config: Config) -> str | None:
    """The engine's CPU kernels take heads of 32, 64, 96, ... only."""
    policy = config.policy
    if policy.kind != "tiny":
        return None
    width, rest = divmod(policy.hidden_size, policy.attention_heads)
    if not rest and not width % 32:
        return None
    return (
        f"policy.hidden_size={policy.hidden_size} over policy.attention_heads={policy.attention_heads} is not a "
        "multiple of 32 for each head, which the engine's CPU kernels need; use for example 128 and 4"
    )


def the_tokenizer_knows_the_task(config: Config) -> str | None:
    """The tokenizer of whole words was made for one task."""
    policy, task = config.policy, config.task
    if policy.kind != "tiny" or policy.tokenizer != "words" or task.kind == "variant_consequence":
        return None
    return (
        f"policy.tokenizer=words knows only the words of task.kind=variant_consequence, not of "
        f"task.kind={task.kind}; use policy.tokenizer=bpe"
    )


def a_learner_rank_drives_one_gpu_or_none(config: Config) -> str | None:
    """DeepSpeed puts one process on one GPU."""
    if config.learner.gpus in (0, 1):
        return None
    return f"learner.gpus={config.learner.gpus:g}: a rank drives 0 or 1 GPU; for more GPUs raise learner.ranks"


def a_rollout_worker_shares_a_gpu_or_has_whole_ones(config: Config) -> str | None:
    """Tensor parallelism counts in whole GPUs."""
    gpus = config.rollout.gpus
    if gpus <= 1 or gpus == int(gpus):
        return None
    return f"rollout.gpus={gpus:g}: above 1 it must be a whole number; use {int(gpus)} or {int(gpus) + 1}"


def enough_test_problems_are_made(config: Config) -> str | None:
    """The evaluation reads the test split, which one task makes to measure."""
    task, wanted = config.task, config.evaluation.problems
    if task.kind != "variant_consequence" or wanted <= task.test_problems:
        return None
    return (
        f"evaluation.problems={wanted} is more than task.test_problems={task.test_problems}; "
        "lower the first or raise the second"
    )


RULES: tuple[Callable[[Config], str | None], ...] = (
    there_is_a_reward,
    a_reward_part_has_weight,
    reward_parts_find_their_facts,
    a_completion_fits_into_the_engine,
    a_completion_fits_into_a_micro_batch,
    heads_suit_the_engine,
    the_tokenizer_knows_the_task,
    a_learner_rank_drives_one_gpu_or_none,
    a_rollout_worker_shares_a_gpu_or_has_whole_ones,
    enough_test_problems_are_made,
    *GRPO_RULES,
)


def broken_rules(config: Config) -> list[str]:
    """A line for each rule that does not hold."""
    return [message for rule in RULES if (message := rule(config)) is not None]


def refuse_changes(old: Config, new: Config) -> None:
    """Raise ConfigError where a resumed run would not be the run that was begun, but pretend to be.

    Its order of problems, models and optimizer state follow from what is compared here and are on disk already.
    """
    before, after = (_what_a_run_is_made_of(config) for config in (old, new))
    changed = [
        f"  {path}={after[path]}: the run was begun with {path}={before[path]}"
        for path in before
        if path in after and before[path] != after[path]
    ]
    if old.grpo.kl is None and new.grpo.kl is not None:
        changed.append("  grpo.kl=given: the run was begun with grpo.kl=null, and kept no copy of its warm start")
    if changed:
        why = "a resumed run cannot change these; begin a new run for them (name=...):"
        raise ConfigError("\n".join([why, *changed]))


def _what_a_run_is_made_of(config: Config) -> dict[str, object]:
    policy, encoder = config.policy.model_dump(exclude={"path"}), config.encoder.model_dump(exclude={"path"})
    return {
        "seed": config.seed,
        "task.kind": config.task.kind,
        **{f"policy.{key}": policy.get(key) for key in sorted(policy)},
        **{f"encoder.{key}": encoder.get(key) for key in sorted(encoder)},
        "sft": "null" if config.sft is None else "given",
        "grpo.curriculum": "null" if config.grpo.curriculum is None else "given",
        "learner.ranks": config.learner.ranks,
        "learner.zero_stage": config.learner.zero_stage,
    }
