"""The configured task -> its problems: the one place that knows which tasks there are.

Runs once, before any role starts, so that every complaint about data comes within seconds. The one invariant: every
split that leaves here has at least one problem, and what was left out of it is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rlsys.config import KeggTask, Task, VariantConsequenceTask
from rlsys.data.prompts import OverLongPromptError, PromptRenderer
from rlsys.errors import DataError
from rlsys.tasks import kegg, variant_consequence
from rlsys.types import Problem, Prompt


@dataclass(frozen=True)
class LearnerRoom:
    """The learner's room, which must hold each training prompt together with what follows it."""

    micro_batch_tokens: int
    max_new_tokens: int
    """Longest completion."""
    has_demonstrations: bool
    """Whether a demonstration may follow instead: the run has a warm start."""


@dataclass(frozen=True)
class TaskData:
    """The problems of a run."""

    splits: Mapping[str, tuple[Problem, ...]]
    """By name: `train`, `validation`, `test`."""
    floor: Callable[[Sequence[Problem]], float]
    """Accuracy that needs no DNA on the given problems: printed beside every score."""
    over_long: Literal["error", "drop"]
    """What `fit_task` does with a problem whose prompt does not fit."""
    counts: Mapping[str, int]
    """What a person should know about the data, by name; empty where there is nothing to say."""


def load_task(task: Task, seed: int) -> TaskData:
    """Make or read the problems of a task. Raises DataError or ConfigError."""
    match task:
        case VariantConsequenceTask():
            splits = variant_consequence.problems(
                train=task.train_problems,
                validation=task.validation_problems,
                test=task.test_problems,
                seed=seed,
                window_codons=task.window_codons,
                misread_rate=task.misread_rate,
            )
            return TaskData(splits._asdict(), variant_consequence.floor, over_long="error", counts={})
        case KeggTask():
            sources = {"train": task.train, "validation": task.validation, "test": task.test}
            read = {split: kegg.read_problems(source, split, task.window_bp) for split, source in sources.items()}
            return TaskData(read, kegg.fit_floor(read["train"]), task.over_long, _seen_in_training(read))


def fit_task(data: TaskData, renderer: PromptRenderer, room: LearnerRoom | None = None) -> TaskData:
    """Return the data without the problems whose prompts do not fit, with `<split>_over_long` counted.

    Every split must fit the engine, and the training split the learner's `room` too; None: nothing will be trained.
    Raises DataError for the first problem that does not fit where that is an error, for a demonstration that cannot be
    imitated, and where none of a split would be left.
    """
    splits: dict[str, tuple[Problem, ...]] = {}
    counts = dict(data.counts)
    for split, problems in data.splits.items():
        needed = room if split == "train" else None
        kept = [problem for problem in problems if _fits(problem, renderer, needed, data.over_long)]
        if not kept:
            raise DataError(
                f"task.over_long=drop leaves none of the {len(problems)} {split} problems: every prompt is too long; "
                "raise rollout.max_model_tokens and learner.micro_batch_tokens, or lower task.window_bp."
            )
        splits[split] = tuple(kept)
        if len(kept) < len(problems):
            counts[f"{split}_over_long"] = len(problems) - len(kept)
    return replace(data, splits=splits, counts=counts)


def _fits(
    problem: Problem, renderer: PromptRenderer, room: LearnerRoom | None, over_long: Literal["error", "drop"]
) -> bool:
    try:
        prompt = renderer.render(problem)
        if room is not None:
            _check_room(prompt, len(renderer.demonstration_ids(problem)) if room.has_demonstrations else 0, room)
    except OverLongPromptError:
        if over_long == "error":
            raise
        return False
    return True


def _check_room(prompt: Prompt, demonstration_tokens: int, room: LearnerRoom) -> None:
    prompt_tokens = len(prompt.token_ids)
    for what, tokens in (("rollout.max_new_tokens", room.max_new_tokens), ("its demonstration", demonstration_tokens)):
        if prompt_tokens + tokens > room.micro_batch_tokens:
            raise OverLongPromptError(
                f"problem {prompt.problem_id}: its prompt has {prompt_tokens} tokens and {what} {tokens}, together "
                f"more than learner.micro_batch_tokens={room.micro_batch_tokens}.\n"
                f"Raise learner.micro_batch_tokens to at least {prompt_tokens + tokens}, or shorten the input (KEGG: "
                "task.window_bp, or task.over_long=drop)."
            )


def _seen_in_training(splits: Mapping[str, tuple[Problem, ...]]) -> dict[str, int]:
    """How many held-out problems repeat sequences or a question of the training split (KEGG's own split does)."""
    sequences = {problem.dna for problem in splits["train"]}
    questions = {problem.question for problem in splits["train"]}
    counts: dict[str, int] = {}
    for split in ("validation", "test"):
        counts[f"{split}_sequences_in_train"] = sum(problem.dna in sequences for problem in splits[split])
        counts[f"{split}_questions_in_train"] = sum(problem.question in questions for problem in splits[split])
    return counts
