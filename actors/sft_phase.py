"""The warm start of a run, from its resumed or first step to its last."""

from __future__ import annotations

from actors.ports import StepReport
from actors.progress import count
from actors.session import Session
from actors.warm_start import WarmStart
from rlsys.report.records import Phase


async def run_sft(session: Session) -> None:
    """Train from the learner's version on."""
    config, learner = session.config.sft, session.roles.learner
    assert config is not None, "there is a warm start"
    steps = config.steps
    session.progress.begin(f"SFT warm start: {steps} steps of {config.batch_size} demonstrations", learner.version)

    async def after_step(report: StepReport) -> None:
        session.trackers.log(Phase.SFT, report.version, {**report.metrics, "time/step_seconds": report.seconds})
        session.progress.step(
            "step",
            report.version,
            steps,
            {"loss": f"{report.metrics['train/loss']:.3f}", "tokens/s": count(report.tokens / report.seconds)},
        )
        if report.version % session.config.checkpoint.every_steps == 0 and report.version < steps:
            await session.save(Phase.SFT)

    problems = session.prepared.task.splits["train"]
    await WarmStart(config, learner, session.episodes, problems, session.config.seed).run(steps, after_step)
