"""`rlsys train` and `rlsys sft`: open the run directory, run, and leave a summary whatever happens."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from pathlib import Path

from actors.plan import render_plan
from actors.progress import Progress
from actors.run import Training, prepare
from rlsys.config import Config
from rlsys.config_file import load_config
from rlsys.config_rules import refuse_changes
from rlsys.errors import ConfigError, RlsysError
from rlsys.report.records import Phase, RunDirectory
from rlsys.report.summary import RunStatus, Summary, render_summary


async def train_command(arguments: argparse.Namespace) -> int:
    """Returns the exit code; raises RlsysError for what a user can mend."""
    progress = Progress(sys.stdout)
    if arguments.dry_run:
        config, _ = _configuration(arguments)
        with tempfile.TemporaryDirectory() as models:
            progress.say(render_plan(config, prepare(config, Path(models))))
        return 0
    config, resumed = _configuration(arguments)
    directory = resumed if resumed is not None else RunDirectory.create(arguments.runs / config.name, config)
    training = Training(config, directory, progress)
    try:
        training.prepare()
    except BaseException:
        if resumed is None:
            shutil.rmtree(directory.path)  # nothing was begun, so the name is free again
        raise
    try:
        await training.execute(arguments.address, Phase(arguments.last_phase))
    except BaseException as error:  # noqa: BLE001 (whatever ended the run is told after its summary is written)
        is_stop = isinstance(error, asyncio.CancelledError | KeyboardInterrupt)
        _write(directory, training.summary(RunStatus.INTERRUPTED if is_stop else RunStatus.FAILED))
        progress.say(f"\nThe run stopped; what it wrote is kept. Go on with\n  rlsys train --resume {directory.path}")
        raise _first_cause(error) from None
    summary = training.summary(RunStatus.FINISHED)
    assert summary is not None, "a finished run had a session"
    _write(directory, summary)
    progress.say("\n" + render_summary(summary, directory.path))
    return 0


def _write(directory: RunDirectory, summary: Summary | None) -> None:
    if summary is not None:
        directory.write_summary(summary.to_dict())


def _configuration(arguments: argparse.Namespace) -> tuple[Config, RunDirectory | None]:
    """The configuration, and the directory of a resumed run."""
    if arguments.resume is None:
        if arguments.config is None:
            raise ConfigError("name a configuration, for example configs/quickstart.yaml, or a run with --resume RUN")
        if "=" in arguments.config and not Path(arguments.config).exists():
            raise ConfigError(
                f"{arguments.config}: no such configuration file; name one before the values to change, "
                f"for example rlsys train configs/quickstart.yaml {arguments.config}"
            )
        config, directory = load_config(Path(arguments.config), arguments.overrides), None
    else:
        overrides = [*([arguments.config] if arguments.config else []), *arguments.overrides]
        directory = RunDirectory.open(arguments.resume)
        config = load_config(directory.path / "config.yaml", overrides)
        refuse_changes(directory.config(), config)
    if arguments.last_phase == Phase.SFT and config.sft is None:
        raise ConfigError(
            "`rlsys sft` runs the warm start, and the configuration has no sft: section; "
            "give one (sft.steps=100), or use `rlsys train`"
        )
    return config, directory


def _first_cause(error: BaseException) -> BaseException:
    """The error that ended the run, out of the groups in which concurrent tasks report theirs."""
    while isinstance(error, BaseExceptionGroup):
        known = [one for one in error.exceptions if isinstance(one, RlsysError)]
        error = (known or list(error.exceptions))[0]
    return error
