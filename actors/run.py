"""One training run from its configuration to its summary.

    evaluate (before) -> SFT -> evaluate (after_sft) -> GRPO -> evaluate (after_grpo) -> final policy, summary

A phase may be absent, and every point between two steps may be where a resumed run begins; `RunState` says which.
Invariant: whatever happens, the run directory can be resumed, and no process outlives the run.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from actors.checkpoint import Checkpoints, RunState
from actors.cluster import Cluster
from actors.episodes import Episodes
from actors.grpo_phase import run_grpo
from actors.models import encoder_factory, policy_directory, quieten_libraries
from actors.progress import Progress
from actors.roles import Placement, demands, members
from actors.session import Prepared, Session
from actors.sft_phase import run_sft
from actors.summarise import summarise
from actors.totals import Totals
from actors.trackers import Trackers
from rlsys.config import Config
from rlsys.data.prompts import PromptRenderer
from rlsys.errors import ConfigError
from rlsys.evaluation.accuracy import EvaluationResult
from rlsys.pipeline.buffer import TrajectoryBuffer
from rlsys.pipeline.staleness import make_policy
from rlsys.pipeline.waits import WaitClock
from rlsys.report.records import Phase, RunDirectory
from rlsys.report.summary import RunStatus, Summary
from rlsys.rewards.scoring import load_parts
from rlsys.tasks.loading import LearnerRoom, fit_task, load_task


def prepare(config: Config, models: Path, *, trains: bool = True) -> Prepared:
    """Load data and models, and check that they fit each other. `models` is where tiny models are made.

    Everything that a user can have got wrong and that this process can see is found here, before anything is started.
    `trains` is False for an evaluation, which needs neither rewards nor room in the learner.
    """
    from rlsys.models.policy import load_tokenizer

    quieten_libraries()
    if trains:
        load_parts(config.rewards)
    task = load_task(config.task, config.seed)
    factory = encoder_factory(config, models)
    encoder = factory()
    texts = (text for problem in task.splits["train"] for text in (problem.question, problem.demonstration))
    model_dir = policy_directory(config, models, factory, texts)
    _check_length(config, model_dir)
    tokenizer = load_tokenizer(model_dir)
    renderer = PromptRenderer(tokenizer, encoder, config.rollout.max_model_tokens - config.rollout.max_new_tokens)
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    room = (
        LearnerRoom(config.learner.micro_batch_tokens, config.rollout.max_new_tokens, config.sft is not None)
        if trains
        else None
    )
    return Prepared(fit_task(task, renderer, room), renderer, model_dir, factory, int(pad))


def _check_length(config: Config, model_dir: Path) -> None:
    from rlsys.models.policy import max_positions, policy_config

    positions = max_positions(policy_config(model_dir))
    if config.rollout.max_model_tokens > positions:
        raise ConfigError(
            f"rollout.max_model_tokens={config.rollout.max_model_tokens} is more than the {positions} "
            f"positions of the policy in {model_dir}; lower it"
        )


def _check_resumable(config: Config, state: RunState) -> None:
    """Refuse before anything is started what could only be refused in the midst of the run."""
    if state.grpo is not None:
        policy = make_policy(config.grpo.order, config.grpo.max_staleness, config.grpo.groups_per_step)
        TrajectoryBuffer.restore(policy, state.grpo.buffer, state.version)


class Training:
    """A run, or its continuation. `prepare`, then `execute` are called once; `summary` may be asked for at any time."""

    def __init__(self, config: Config, directory: RunDirectory, progress: Progress) -> None:
        self._config = config
        self._directory = directory
        self._progress = progress
        self._session: Session | None = None

    def prepare(self) -> None:
        """Do all that needs no other process. Raises RlsysError for what a user can mend; the records are untouched."""
        config, directory = self._config, self._directory
        self._progress.say(f"Preparing data and models in {directory.path} ...")
        self._checkpoints = Checkpoints(directory.checkpoints, config.checkpoint.keep)
        self._found = self._checkpoints.latest()
        if self._found is not None:
            _check_resumable(config, self._found[1])
        self._prepared = prepare(config, directory.path / "models")

    async def execute(self, address: str | None, last_phase: Phase) -> None:
        """Go from where the newest checkpoint is to the end of `last_phase`."""
        config, directory, progress = self._config, self._directory, self._progress
        prepared, checkpoints, found = self._prepared, self._checkpoints, self._found
        # Records and checkpoint tell the same story; without a checkpoint there is none yet.
        directory.rewind(*((found[1].phase, found[1].version) if found else (Phase.SFT, 0)))
        clock = WaitClock(time.monotonic, members(config))
        needed = demands(config)
        async with Cluster(
            config.cluster,
            sum(one.processes * one.each.cpus for one in needed),
            sum(one.processes * one.each.gpus for one in needed),
            address,
        ) as cluster:
            dashboard = f", dashboard at {cluster.dashboard_url}" if cluster.dashboard_url else ""
            progress.say(
                f"Ray is up{dashboard}, logs in {cluster.log_directory}\n"
                "Starting learner, rollout workers, embedding service and reward scorers ..."
            )
            with Placement(cluster, config, prepared.model_dir, prepared.encoder, progress.say) as placement:
                roles = await placement.all_roles(clock, prepared.pad_token_id)
                trackers = Trackers(config, directory, cluster)
                try:
                    episodes = Episodes(prepared.renderer, roles.embedders, roles.pool)
                    self._session = Session(
                        config, directory, prepared, progress, clock, roles, episodes, trackers, checkpoints
                    )
                    await _go(self._session, found, last_phase)
                finally:
                    trackers.close()
                    await roles.pool.stop()

    def summary(self, status: RunStatus) -> Summary | None:
        """What the run did; None where it ended before its roles were up."""
        return summarise(self._session, status) if self._session is not None else None


async def _go(session: Session, found: tuple[Path, RunState] | None, last_phase: Phase) -> None:
    """From a checkpoint, or from the start, to the end of `last_phase`."""
    if found is not None:
        await _take_up(session, *found)
    await _phases(session, found[1] if found is not None else None, last_phase)


async def _take_up(session: Session, place: Path, state: RunState) -> None:
    """Bring the learner to a checkpoint; the engines follow when there is something to generate."""
    session.progress.say(f"Resuming after {state.phase} step {state.version} ({place.name}).")
    session.evaluations = {name: EvaluationResult.from_dict(value) for name, value in state.evaluations.items()}
    session.totals = Totals(**state.totals)  # pyright: ignore[reportArgumentType] (written by Totals.to_dict)
    await session.roles.learner.restore(place, session.objective(state.phase), state.version)


async def _phases(session: Session, state: RunState | None, last_phase: Phase) -> None:
    config, learner = session.config, session.roles.learner
    if state is None and config.evaluation.before:
        await session.evaluate("before")
    if config.sft is not None and (state is None or state.phase is Phase.SFT):
        if state is None:
            await learner.enter(session.objective(Phase.SFT))
        await run_sft(session)
        state = None
    if state is None:
        if config.sft is not None:
            await session.evaluate("after_sft")
        await learner.enter(session.objective(Phase.GRPO))
        await session.save(Phase.GRPO)
    if last_phase is Phase.GRPO:
        await run_grpo(session, state.grpo if state is not None else None)
        await session.evaluate("after_grpo")
    await learner.save_policy(session.directory.path / "policy")
