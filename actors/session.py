"""What the phases of one run share: its roles, its records, and the two things that every phase does with them:
evaluate, and write a checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from actors.checkpoint import Checkpoints, GrpoState, RunState
from actors.episodes import Episodes
from actors.evaluator import Evaluated, evaluate
from actors.models import EncoderFactory
from actors.ports import Objective, Sampling
from actors.progress import Progress
from actors.roles import Roles
from actors.totals import Totals
from actors.trackers import Trackers
from rlsys.algorithms.objective import PolicyObjective
from rlsys.config import Config
from rlsys.data.prompts import PromptRenderer
from rlsys.evaluation.accuracy import EvaluationResult
from rlsys.pipeline.buffer import TrajectoryBuffer
from rlsys.pipeline.waits import Role, WaitClock
from rlsys.report.records import Phase, RunDirectory
from rlsys.tasks.loading import TaskData
from rlsys.types import Problem


@dataclass(frozen=True)
class Prepared:
    """What is known before anything is started: data that fit the models, and where the models are."""

    task: TaskData
    renderer: PromptRenderer
    model_dir: Path
    encoder: EncoderFactory
    pad_token_id: int


@dataclass
class Session:
    """A run whose roles are up."""

    config: Config
    directory: RunDirectory
    prepared: Prepared
    progress: Progress
    clock: WaitClock
    roles: Roles
    episodes: Episodes
    trackers: Trackers
    checkpoints: Checkpoints
    totals: Totals = field(default_factory=Totals)
    evaluations: dict[str, EvaluationResult] = field(default_factory=dict[str, EvaluationResult])
    alarms: Mapping[str, Sequence[int]] = field(default_factory=dict[str, Sequence[int]])
    """Steps at which each alarm rang."""
    bottleneck: str = "GRPO has not begun"
    """Who waited longest for whom, over the GRPO steps of this sitting."""

    buffer: TrajectoryBuffer | None = None
    """Of the GRPO phase, once it has begun."""
    started: float = field(default_factory=time.monotonic)

    @property
    def wall_seconds(self) -> float:
        """Of the whole run so far, earlier sittings included."""
        return self.totals.wall_seconds + time.monotonic() - self.started

    def objective(self, phase: Phase) -> Objective:
        """What the learner's optimizer is for in a phase."""
        if phase is Phase.SFT:
            assert self.config.sft is not None, "there is a warm start"
            return Objective(None, self.config.sft.learning_rate, self.config.sft.warmup_steps, temperature=1.0)
        grpo = self.config.grpo
        policy = PolicyObjective.from_config(grpo)
        return Objective(policy, grpo.learning_rate, grpo.warmup_steps, self.config.rollout.temperature)

    def sampling(self, completions: int) -> Sampling:
        """Training rollouts."""
        return Sampling(completions, self.config.rollout.temperature, self.config.rollout.max_new_tokens)

    async def evaluate(self, name: str) -> None:
        """Let the engines take the learner's weights and evaluate them; the result is kept under `name`."""
        await self.roles.pool.load(await self.roles.learner.publish())
        config = self.config.evaluation
        problems = self.prepared.task.splits["test"][: config.problems]
        self.progress.begin(f"Evaluating {name.replace('_', ' ')}: {len(problems)} held-out problems")
        done = 0

        def advance(number: int) -> None:
            nonlocal done
            done += number
            self.progress.step("problem", done, len(problems), {})

        result = (await self._evaluate(problems, config.samples, advance)).result
        self.evaluations[name] = result
        low, high = result.interval
        self.progress.say(
            f"  accuracy {result.accuracy:.3f} (95 % interval {low:.3f} to {high:.3f}), "
            f"greedy {result.greedy_accuracy:.3f}, text-only floor {result.floor:.3f}"
        )

    async def evaluate_interleaved(self) -> Evaluated:
        """Evaluate what the engines hold on a few validation problems, while they go on with training rollouts."""
        problems = self.prepared.task.splits["validation"][: self.config.evaluation.interleaved_problems]
        return await self._evaluate(problems, 1, lambda number: None)

    async def _evaluate(self, problems: Sequence[Problem], samples: int, advance: Callable[[int], None]) -> Evaluated:
        return await evaluate(
            self.episodes,
            problems,
            samples=samples,
            temperature=self.config.rollout.temperature,
            max_new_tokens=self.config.rollout.max_new_tokens,
            floor=self.prepared.task.floor(problems),
            progress=advance,
        )

    async def save(self, phase: Phase, grpo: GrpoState | None = None) -> None:
        """Write a checkpoint. Everything but the learner's state is taken at this very moment, before any wait."""
        state = RunState(
            phase=phase,
            version=self.roles.learner.version,
            grpo=grpo,
            evaluations={name: result.to_dict() for name, result in self.evaluations.items()},
            totals={**self.totals.to_dict(), "wall_seconds": self.wall_seconds},
        )
        with self.clock.busy(Role.LEARNER):
            await self.checkpoints.save(state, self.roles.learner.save)
