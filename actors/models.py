"""The model directories that a run starts from: made by the project (tiny), or found on disk and checked.

Everything that loads a policy afterwards (learner ranks, engines, the prompt renderer) reads the same directory, whose
config.json names the encoder that its features come from.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlsys.config import Config, EsmEncoder, PretrainedPolicy, TinyEncoder, TinyPolicy
from rlsys.errors import CheckpointError
from rlsys.models.encoders import DnaEncoder
from rlsys.models.encoders import EsmEncoder as EsmEncoderModel

if TYPE_CHECKING:
    from rlsys.models.dna_llm import DnaLlmConfig


def quieten_libraries() -> None:
    """Keep progress bars and start-up remarks of libraries off the terminal that shows our own progress."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


@dataclass(frozen=True)
class EncoderFactory:
    """Makes the encoder where it is needed: its description and sizes in the driver, its weights in the service."""

    path: str
    layer: int
    device: str

    def __call__(self) -> DnaEncoder:
        """Open the encoder's directory."""
        return EsmEncoderModel(self.path, layer=self.layer, device=self.device)


def encoder_factory(config: Config, models: Path) -> EncoderFactory:
    """The configured encoder; a tiny one is made below `models` where it is not there yet."""
    device = "cuda" if config.embedding.gpus else "cpu"
    match config.encoder:
        case TinyEncoder():
            from rlsys.models.tiny import make_tiny_encoder

            path = _made(models / "encoder", lambda draft: make_tiny_encoder(draft, seed=config.seed))
            return EncoderFactory(str(path), layer=-1, device=device)
        case EsmEncoder(path=path, layer=layer):
            return EncoderFactory(path, layer, device)


def policy_directory(config: Config, models: Path, factory: EncoderFactory, texts: Iterable[str]) -> Path:
    """The directory of the policy that the run starts from. `texts` are what a `bpe` tokenizer is trained on.

    Raises CheckpointError when a directory is no policy, is damaged, or was trained on features of another encoder.
    """
    from rlsys.models.policy import check_policy, is_policy, new_policy, save_policy
    from rlsys.models.tiny import make_tiny_policy

    encoder = factory()
    match config.policy:
        case TinyPolicy():
            policy = config.policy
            source = _made(
                models / "text", lambda draft: make_tiny_policy(draft, policy, seed=config.seed, texts=texts)
            )
        case PretrainedPolicy(path=path):
            source = Path(path)
    if is_policy(source):
        check_encoder(check_policy(source), source, encoder)
        return source

    # The path is for people who use the policy later; what must agree is the id.
    described = {**encoder.describe(), "path": str(Path(factory.path).resolve())}

    def make(draft: Path) -> None:
        model, tokenizer = new_policy(
            source,
            encoder_width=encoder.width,
            encoder=described,
            projector_kind=config.policy.projector,
            seed=config.seed,
        )
        save_policy(draft, model, tokenizer)

    return _made(models / "policy", make)


def check_encoder(policy: DnaLlmConfig, source: Path, encoder: DnaEncoder) -> None:
    """Raise CheckpointError when a policy was trained on features of another encoder than the one given."""
    width, encoder_id = policy.dna_hidden_size, (policy.encoder or {}).get("id")
    if (width, encoder_id or encoder.encoder_id) != (encoder.width, encoder.encoder_id):
        raise CheckpointError(
            f"{source}: the policy was trained on features of encoder {encoder_id or 'unknown'} (width {width}), and "
            f"the encoder given is {encoder.encoder_id} (width {encoder.width}).\n"
            "Name the encoder that it was trained with: encoder.kind and encoder.path of a configuration, --encoder of "
            "`rlsys generate`."
        )


def _made(place: Path, make: Callable[[Path], object]) -> Path:
    """`place`, made where it is not there yet; a kill in between leaves no half of it."""
    if not place.exists():
        draft = place.with_name(f".making-{place.name}")
        shutil.rmtree(draft, ignore_errors=True)
        draft.parent.mkdir(parents=True, exist_ok=True)
        make(draft)
        draft.rename(place)
    return place
