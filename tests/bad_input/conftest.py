"""What the tables of bad input share: the command line in this process, a complete configuration, models to damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from actors.cli import main
from actors.cluster import Cluster
from actors.run import prepare
from rlsys.config_file import load_config
from rlsys.models.tiny import make_tiny_encoder

CONFIGURATION = """\
name: test
task: {kind: variant_consequence, train_problems: 8, validation_problems: 3, test_problems: 3}
policy: {kind: tiny, hidden_size: 32, layers: 1, attention_heads: 1}
encoder: {kind: tiny}
sft: {steps: 2, batch_size: 4}
grpo: {steps: 2, groups_per_step: 4}
rewards:
  answer: {kind: answer}
evaluation: {problems: 3}
rollout: {max_new_tokens: 48, max_model_tokens: 128}
"""

KEGG_CONFIGURATION = """\
name: test
task: {kind: kegg, train: train.jsonl, validation: validation.jsonl, test: test.jsonl}
policy: {kind: tiny, tokenizer: bpe, vocabulary: 300, hidden_size: 32, layers: 1, attention_heads: 1}
encoder: {kind: tiny}
sft: {steps: 2, batch_size: 2}
grpo: {steps: 2, groups_per_step: 2}
rewards:
  answer: {kind: answer}
rollout: {max_new_tokens: 32, max_model_tokens: 160}
learner: {micro_batch_tokens: 256}
"""

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def _nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad input is found before a cluster is: no case here may come as far as Ray."""

    def start(_: Cluster) -> None:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(Cluster, "_start", start)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the command line; it must end with exit code 2 and a short message, which is returned."""

    def run(*arguments: object, lines: int = 3) -> str:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        message = capsys.readouterr().err
        assert caught.value.code == 2, message
        assert message.startswith("rlsys: "), message
        assert "Traceback" not in message
        assert len(message.splitlines()) <= lines, message
        return message

    return run


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a configuration that can be used: run.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIGURATION)
    return tmp_path


def kegg_row(**changes: object) -> dict[str, object]:
    """A row that can be used; None takes a column out."""
    row: dict[str, object] = {
        "question": "Which disease?", "answer": "melanoma", "reasoning": "It is known.",
        "reference_sequence": "ACGTACGTACGT", "variant_sequence": "ACGTACTTACGT", **changes,
    }  # fmt: skip
    return {name: value for name, value in row.items() if value is not None}


@pytest.fixture
def kegg(workplace: Path) -> Path:
    """The current directory, with a configuration of files, kegg.yaml, and the files: two rows each."""
    (workplace / "kegg.yaml").write_text(KEGG_CONFIGURATION)
    for split in ("train", "validation", "test"):
        (workplace / f"{split}.jsonl").write_text(f"{json.dumps(kegg_row())}\n" * 2)
    return workplace


class Models(NamedTuple):
    """Directories that can be used, made once; `copy` before you damage one."""

    encoder: Path
    other_encoder: Path
    """Of the same width, with other weights."""
    narrow_encoder: Path
    text: Path
    """A language model that knows no DNA."""
    policy: Path
    """Trained on features of `encoder`."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    place = tmp_path_factory.mktemp("models")
    (place / "run.yaml").write_text(CONFIGURATION)
    prepare(load_config(place / "run.yaml"), place)
    return Models(
        encoder=place / "encoder", other_encoder=make_tiny_encoder(place / "other", seed=1),
        narrow_encoder=make_tiny_encoder(place / "narrow", width=32), text=place / "text", policy=place / "policy",
    )  # fmt: skip


def copy(source: Path, place: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(source, place))
