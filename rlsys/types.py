"""What one role hands to the next, in order of birth: Problem -> Prompt -> Completion -> Score -> Trajectory ->
TrajectoryGroup -> TrainSample.

Each type is complete when it is made: no field means "not yet". All of them are frozen, hold numpy arrays, strings
and numbers only, and so cross process borders by pickle. Group and problem identity travel as explicit fields all
the way to the loss; nothing is ever told apart by its position in a list.

Array names end in their axes (see the README's glossary): T tokens of one sequence, S encoder positions, E encoder
width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Problem:
    """One row of data: a question about DNA sequences, with its known answer."""

    problem_id: str
    question: str
    """What the user asks. Contains no DNA: sequences are put before it, in slots."""
    dna: tuple[str, ...]
    """Sequences in slot order (letters ACGTN), each already cut to the window that the encoder reads."""
    answer: str
    """The text that must follow `Answer: `."""
    demonstration: str
    """A whole assistant turn that SFT imitates, without the end token; empty where the data have none."""
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    """Known truths for reward parts, by name (`ref_allele`, `ref_amino_acid`, ...). Never shown to the policy."""


class DnaSlot(NamedTuple):
    """Where in a prompt the features of one DNA sequence stand."""

    start: int
    """0-based position of the slot's first token in the prompt."""
    length: int
    """Tokens in the slot: S encoder positions, and one learned marker on each side (S + 2)."""
    key: str
    """Content key of the features: names sequence, encoder, layer, dtype (see `rlsys.models.encoders`)."""


@dataclass(frozen=True)
class Prompt:
    """A problem as token ids, with DNA slots: what a rollout worker and the learner both see."""

    problem_id: str
    token_ids: tuple[int, ...]
    slots: tuple[DnaSlot, ...]


class VersionSpan(NamedTuple):
    """Tokens [start, end) of one completion were sampled by policy `version`."""

    version: int
    start: int
    end: int


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """The policy wrote its end token (which is the last of `token_ids`)."""
    LENGTH = "length"
    """The configured limit of new tokens was reached: the completion is truncated."""


@dataclass(frozen=True)
class Completion:
    """Tokens that the policy wrote for a prompt."""

    token_ids_T: IntArray
    behavior_logprobs_T: FloatArray
    """Natural log-probability of each token under the policy version that sampled it, at the sampling temperature."""
    version_spans: tuple[VersionSpan, ...]
    """Cover [0, T) in order, versions not decreasing."""
    text: str
    """The decoded tokens, special tokens left out."""
    finish_reason: FinishReason

    @cached_property
    def has_finite_logprobs(self) -> bool:
        """Whether the engine knew the probability of each token; one that it did not makes the whole gradient NaN."""
        return bool(np.isfinite(self.behavior_logprobs_T).all())

    @property
    def first_version(self) -> int:
        """The policy version of the first token: staleness is counted from it."""
        return self.version_spans[0].version


class PartStatus(StrEnum):
    """How the computation of one reward part ended."""

    OK = "ok"
    FAILED = "failed"
    TIMED_OUT = "timed_out"


@dataclass(frozen=True)
class PartScore:
    """One named reward part of one completion."""

    value: float
    """In [0, 1] for the parts shipped here; NaN where the status is not ok."""
    status: PartStatus
    detail: str = ""
    """Why the part failed; empty where it is ok."""


@dataclass(frozen=True)
class Score:
    """All reward parts of one completion, and their combination."""

    parts: Mapping[str, PartScore]
    reward: float
    """The combined reward; NaN where any part is not ok: such a trajectory is masked, never counted as 0."""

    @cached_property
    def is_valid(self) -> bool:
        """Whether every part could be computed."""
        return all(part.status is PartStatus.OK for part in self.parts.values())


@dataclass(frozen=True)
class Trajectory:
    """A finished episode: one completion with its score."""

    completion: Completion
    score: Score


@dataclass(frozen=True)
class TrajectoryGroup:
    """The G trajectories of one problem; advantages are taken inside it."""

    ticket: int
    """Number of the group in order of admission: unique in a run, and the order of training."""
    problem: Problem
    prompt: Prompt
    trajectories: tuple[Trajectory, ...]

    @property
    def first_version(self) -> int:
        """The oldest policy version that wrote a first token in this group."""
        return min(trajectory.completion.first_version for trajectory in self.trajectories)

    @property
    def last_version(self) -> int:
        """The newest policy version that wrote a token in this group."""
        return max(trajectory.completion.version_spans[-1].version for trajectory in self.trajectories)

    @property
    def generated_tokens(self) -> int:
        """Tokens that the policy wrote in this group."""
        return sum(len(trajectory.completion.token_ids_T) for trajectory in self.trajectories)


@dataclass(frozen=True)
class TrainSample:
    """A prompt with one continuation, as token-aligned arrays: what the learner's loss reads.

    The continuation is a completion (GRPO) or a demonstration (SFT: advantage 1; behavior log-probabilities and
    versions 0, which its loss does not read).
    """

    group: int
    """Ticket of the group (GRPO) or the row's number in its batch (SFT)."""
    prompt: Prompt
    continuation_ids_T: IntArray
    behavior_logprobs_T: FloatArray
    versions_T: IntArray
    """The policy version that sampled each token."""
    loss_mask_T: FloatArray
    """1.0 where the token counts in the loss, 0.0 elsewhere."""
    advantage: float
    token_weight: float
    """Factor of each token's loss in the step's sum: how token losses are aggregated."""

    @property
    def num_tokens(self) -> int:
        """Prompt and continuation together."""
        return len(self.prompt.token_ids) + len(self.continuation_ids_T)
