"""Run directories that cannot be begun or gone on with; whatever is refused, the directory is left as it was."""

from __future__ import annotations

import asyncio
import itertools
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.checkpoint import Checkpoints, GrpoState, RunState
from actors.cli import main
from rlsys.config_file import load_config
from rlsys.pipeline.buffer import TrajectoryBuffer
from rlsys.pipeline.staleness import StrictStaleness
from rlsys.report.records import Phase, RunDirectory
from tests.bad_input.conftest import Refused
from tests.fakes import problem

CHECKPOINT = Path("checkpoints/grpo-000002")


async def save_learner(directory: Path) -> None:
    (directory / "deepspeed").mkdir()
    (directory / "deepspeed" / "rank_0.pt").write_bytes(b"weights")


async def write_checkpoint(directory: Path) -> None:
    """What a run of four groups a step leaves at step 2: eight groups in flight, which is all that S = 1 admits."""
    buffer = TrajectoryBuffer(StrictStaleness(bound=1, groups_per_step=4))
    numbers = itertools.count()
    for _ in range(8):
        await buffer.admit(lambda: problem(next(numbers)))
    state = RunState(Phase.GRPO, 2, GrpoState(buffer.snapshot(), {}, {}, {}), {}, {})
    await Checkpoints(directory, keep=2).save(state, save_learner)


@pytest.fixture
def run(workplace: Path) -> Path:
    """The directory of a run that was interrupted after GRPO step 2."""
    directory = RunDirectory.create(workplace / "runs" / "test", load_config(workplace / "run.yaml"))
    directory.append_metrics(Phase.GRPO, 2, {"train/loss": 0.5})
    asyncio.run(write_checkpoint(directory.checkpoints))
    return directory.path


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def replace(name: Path | str, old: str, new: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_text((run / name).read_text().replace(old, new))


def overwrite_state(run: Path) -> None:
    state = run / CHECKPOINT / "state.pkl"
    state.write_bytes(bytes(state.stat().st_size))


def other_version(run: Path) -> None:
    """A state whose class is gone, with its checksum."""
    shutil.rmtree(run / CHECKPOINT)
    state = RunState(Phase.GRPO, 2, None, {}, {})
    genuine = pickle.dumps
    try:
        pickle.dumps = lambda value: genuine(value).replace(b"RunState", b"OldState")  # type: ignore[assignment]
        asyncio.run(Checkpoints(run / "checkpoints", keep=2).save(state, save_learner))
    finally:
        pickle.dumps = genuine


# What is done to the run directory -> overrides -> what the message must say.
RESUMES: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    # the directory
    "a directory that is missing": (shutil.rmtree, [], ["runs/test: no such run directory", "nothing to resume"]),
    "a directory of something else": (lambda run: (run / "config.yaml").unlink(), [],
                                      ["runs/test has no config.yaml", "not the directory of a run"]),
    "a configuration that is no YAML": (lambda run: (run / "config.yaml").write_text("name: x\ntask: [\n"), [],
                                        ["runs/test/config.yaml:3: not YAML"]),
    "a configuration with an unknown key": (replace("config.yaml", "grpo:", "gropo:"), [],
                                            ["runs/test/config.yaml", "gropo: no such key; did you mean grpo?"]),
    "damaged records": (replace("metrics.jsonl", "{", "["), [], ["metrics.jsonl:1: not a line that a run wrote",
                                                                 "restore"]),
    # the checkpoint
    "a state that is cut off": (lambda run: (run / CHECKPOINT / "state.pkl").write_bytes(b"x"), [],
                                [f"{CHECKPOINT}: the checkpoint is damaged", "state.pkl has 1 bytes",
                                 "remove this directory"]),
    "a state that was overwritten": (
        overwrite_state, [],
        [f"{CHECKPOINT}: the checkpoint is damaged", "checksum", "to go on from the one before"]),
    "a state that is missing": (lambda run: (run / CHECKPOINT / "state.pkl").unlink(), [],
                                [f"{CHECKPOINT}: the checkpoint is damaged", "No such file", "state.pkl"]),
    "a learner's file that is missing": (lambda run: (run / CHECKPOINT / "deepspeed/rank_0.pt").unlink(), [],
                                         [f"{CHECKPOINT}: the checkpoint is damaged", "rank_0.pt"]),
    "a learner's file that is cut off": (lambda run: (run / CHECKPOINT / "deepspeed/rank_0.pt").write_bytes(b"we"), [],
                                         ["the checkpoint is damaged", "rank_0.pt has 2 bytes and was written with 7"]),
    "a marker that is no JSON": (lambda run: (run / CHECKPOINT / "complete.json").write_text("{"), [],
                                 [f"{CHECKPOINT}: the checkpoint is damaged"]),
    "a marker of something else": (lambda run: (run / CHECKPOINT / "complete.json").write_text("[]"), [],
                                   [f"{CHECKPOINT}: the checkpoint is damaged"]),
    "a state of another version of rlsys": (other_version, [], ["the checkpoint is damaged",
                                                                "another version of rlsys"]),
    # what a run cannot change
    "fewer groups per step": (lambda run: None, ["grpo.groups_per_step=1"],
                              ["the checkpoint holds group 2", "at staleness 2; its bound is 1 with 1 groups per step",
                               "Resume with"]),
    "a stricter bound": (lambda run: None, ["grpo.max_staleness=0"],
                         ["at staleness 1; its bound is 0 with 4 groups per step"]),
    "another seed": (lambda run: None, ["seed=1"], ["cannot change", "seed=1: the run was begun with seed=0",
                                                    "a new run"]),
    "another shape": (lambda run: None, ["policy.layers=2"],
                      ["policy.layers=2: the run was begun with policy.layers=1"]),
    "other ranks": (lambda run: None, ["learner.ranks=2"], ["learner.ranks=2: the run was begun with learner.ranks=1"]),
    "no warm start": (lambda run: None, ["sft=null"], ["sft=null: the run was begun with sft=given"]),
    "a configuration beside it": (lambda run: None, ["run.yaml"], ["override 'run.yaml': write it as a.b=value"]),
    "a mistyped override": (lambda run: None, ["grpo.stepz=3"], ["grpo.stepz: no such key; did you mean grpo.steps?"]),
}  # fmt: skip


@pytest.mark.parametrize("case", RESUMES)
def test_a_run_that_cannot_go_on_is_refused_and_left_as_it_is(
    case: str, run: Path, workplace: Path, refused: Refused
) -> None:
    damage, overrides, expected = RESUMES[case]
    damage(run)
    before = contents(run)
    message = refused("train", "--resume", "runs/test", *overrides)
    assert [fragment for fragment in expected if fragment not in message] == [], message
    after = contents(run)
    assert {name: after.get(name) for name in before} == before


def test_a_copy_of_a_checkpoint_in_its_directory_is_no_checkpoint(run: Path) -> None:
    shutil.copytree(run / CHECKPOINT, run / "checkpoints" / "copy-of-grpo")
    found = Checkpoints(run / "checkpoints", keep=2).latest()
    assert found is not None
    assert found[0].name == "grpo-000002"


def test_a_damaged_checkpoint_can_be_removed_and_the_one_before_is_taken(run: Path) -> None:
    older = run / "checkpoints" / "sft-000002"
    shutil.copytree(run / CHECKPOINT, older)
    shutil.rmtree(run / CHECKPOINT)
    found = Checkpoints(run / "checkpoints", keep=2).latest()
    assert found is not None
    assert found[0] == older


@pytest.mark.parametrize("arguments", [["train", "run.yaml"], ["sft", "run.yaml", "grpo.steps=7"]])
def test_a_run_never_begins_in_the_directory_of_another(
    arguments: list[str], run: Path, workplace: Path, refused: Refused
) -> None:
    before = contents(run)
    message = refused(*arguments)
    assert "runs/test exists already" in message
    assert "rlsys train --resume runs/test" in message
    assert "another name (name=...)" in message
    assert contents(run) == before


def test_a_run_without_a_checkpoint_begins_its_records_anew(workplace: Path) -> None:
    directory = RunDirectory.create(workplace / "runs" / "test", load_config(workplace / "run.yaml"))
    directory.append_metrics(Phase.SFT, 1, {"train/loss": 0.5})
    with pytest.raises(AssertionError, match="a cluster was started"):
        main(["train", "--resume", "runs/test"])
    assert (directory.path / "metrics.jsonl").read_text() == ""


def test_a_place_for_runs_that_is_a_file_is_refused(workplace: Path, refused: Refused) -> None:
    (workplace / "place").write_text("")
    message = refused("train", "run.yaml", "--runs", "place")
    assert "place/test: the run directory cannot be made: Not a directory" in message


def test_a_mistake_that_is_found_while_preparing_leaves_the_name_free(workplace: Path, refused: Refused) -> None:
    refused("train", "run.yaml", "policy.kind=pretrained", "policy.path=nowhere")
    assert json.dumps(sorted(path.name for path in (workplace / "runs").iterdir())) == "[]"
