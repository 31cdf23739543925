"""Every configuration that is shipped passes --dry-run, as a person would try it first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from actors.cli import main
from rlsys.config import TinyPolicy
from rlsys.config_file import load_config
from rlsys.models.tiny import make_tiny_encoder, make_tiny_policy
from tests.runs.test_kegg import write_rows

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Sequence[str]:
    """Overrides that put small models and generated rows where a configuration names what a person has downloaded."""
    folder = tmp_path_factory.mktemp("stand_ins")
    splits = {split: write_rows(folder / f"{split}.jsonl", 6, seed) for seed, split in enumerate(SPLITS)}
    shape = TinyPolicy(kind="tiny", tokenizer="bpe", vocabulary=400, hidden_size=64, layers=1, attention_heads=2)
    texts = splits["train"].read_text().splitlines()
    make_tiny_encoder(folder / "encoder")
    return [
        *(f"task.{split}={path}" for split, path in splits.items()),
        f"policy.path={make_tiny_policy(folder / 'policy', shape, texts=texts)}",
        f"encoder.path={folder / 'encoder'}",
        "rollout.max_new_tokens=64",
        "rollout.max_model_tokens=1024",
    ]


SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_configuration_passes_a_dry_run(
    path: Path,
    stand_ins: Sequence[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = {"kegg.yaml": list(stand_ins), "kegg_tiny.yaml": list(stand_ins[:3])}.get(path.name, [])
    with pytest.raises(SystemExit) as ended:
        main(["train", str(path), "--dry-run", *overrides])
    assert ended.value.code == 0
    told = capsys.readouterr()
    assert f"{load_config(path, overrides).name}: nothing was started (--dry-run)" in told.out + told.err
    assert not (tmp_path / "runs").exists()
