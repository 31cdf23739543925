"""Policy directories: made from a text-only checkpoint, loaded, saved.

A directory holds a Hugging Face model (`DnaLlm`: language model, projector and markers together) with its tokenizer.
Whatever starts from a policy (learner, engine, evaluation) reads the same directory. Invariant: a policy comes back as
it was saved, projector included, or loading raises; nothing is ever re-initialised silently.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from rlsys.data.prompts import DNA_PAD, add_dna_support
from rlsys.errors import CheckpointError
from rlsys.models.dna_llm import MODEL_TYPE, DnaLlm, DnaLlmConfig
from rlsys.models.lora import Gather, merged_state_dict, no_gather
from rlsys.models.projector import initialise_projector
from rlsys.models.weight_files import check_weight_files

# What transformers raises on missing, damaged or foreign files.
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, SafetensorError)
# Loading then reports what did not fit, instead of pointing to the log, and `_refuse_partial` raises.
_REPORT: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
# Rows of an enlarged embedding come in multiples of this, which tensor cores and tensor parallelism like.
_EMBEDDING_MULTIPLE = 64


def new_policy(
    text_model_dir: Path | str,
    *,
    encoder_width: int,
    encoder: Mapping[str, Any] | None = None,
    projector_kind: str = "mlp",
    seed: int = 0,
    feature_rms: float = 1.0,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
) -> tuple[DnaLlm, PreTrainedTokenizerBase]:
    """Make a DNA-LLM of a text-only checkpoint: its language model, and a new projector.

    The tokenizer learns `<|dna_pad|>` and a chat template with DNA slots; the embedding grows only where it has no
    spare row (Qwen3 has some). Slot rows start with the mean norm of the token embeddings, for features whose root
    mean square is `feature_rms`. `encoder` is recorded in the configuration. Raises CheckpointError when the
    directory is no causal language model.
    """
    tokenizer = load_tokenizer(text_model_dir)
    try:
        add_dna_support(tokenizer)
    except CheckpointError as error:
        raise CheckpointError(f"{text_model_dir}: {error}") from error
    language_model = _load_text_model(Path(text_model_dir), dtype, attn_implementation)
    embedding = cast(torch.nn.Embedding, language_model.get_input_embeddings())
    if len(tokenizer) > embedding.num_embeddings:
        language_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=_EMBEDDING_MULTIPLE)
    config = DnaLlmConfig(
        text_config=language_model.config,
        projector_kind=projector_kind,
        dna_hidden_size=encoder_width,
        dna_pad_token_id=cast(int, tokenizer.convert_tokens_to_ids(DNA_PAD)),
        encoder=dict(encoder or {}),
    )
    config._attn_implementation = attn_implementation  # pyright: ignore[reportPrivateUsage]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DnaLlm(config)
    cast(torch.nn.Module, model).to(dtype=dtype)
    model.language_model.load_state_dict(language_model.state_dict())
    token_embeddings_VH = embedding.weight.detach()[: len(tokenizer)].float()
    row_norm = float(torch.linalg.vector_norm(token_embeddings_VH, dim=-1).mean())
    generator = torch.Generator().manual_seed(seed)
    initialise_projector(model.projector, row_norm=row_norm, feature_rms=feature_rms, generator=generator)
    return model.eval(), tokenizer


def _load_text_model(directory: Path, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation=attn_implementation, **_REPORT
        )
    except _LOAD_ERRORS as error:
        raise CheckpointError(
            f"{directory}: no causal language model can be loaded from here ({_first_line(error)})"
        ) from error
    model, info = loaded
    _refuse_partial(directory, info)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None and generation.eos_token_id is not None:
        model.config.eos_token_id = generation.eos_token_id  # the end tokens of a chat, which config.json may not name
    return model


def is_policy(path: Path | str) -> bool:
    """Whether a directory holds a DNA-LLM, and not (for example) a text-only checkpoint. Raises as `_read_config`."""
    return _read_config(Path(path)).get("model_type") == MODEL_TYPE


def policy_config(path: Path | str) -> DnaLlmConfig:
    """The configuration of the policy in a directory, without its weights. Raises CheckpointError."""
    directory = Path(path)
    if not is_policy(directory):
        model_type = _read_config(directory).get("model_type")
        raise CheckpointError(
            f"{directory}: holds a {model_type!r} model and no DNA-LLM ({MODEL_TYPE!r}); a run makes one of a "
            "text-only checkpoint (policy.kind=pretrained, policy.path=...) and leaves it in its directory as `policy`"
        )
    try:
        return DnaLlmConfig.from_pretrained(directory)
    except _LOAD_ERRORS as error:
        raise CheckpointError(f"{directory}/config.json: cannot be used ({_first_line(error)})") from error


def check_policy(path: Path | str) -> DnaLlmConfig:
    """The policy's configuration, when its weights are there and whole too, without loading them.

    Raises CheckpointError when the directory is missing or damaged, or holds another kind of model.
    """
    directory = Path(path)
    config = policy_config(directory)
    if not any(directory.glob("*.safetensors")):
        raise CheckpointError(f"{directory}: holds no weights (*.safetensors); restore it from a copy")
    check_weight_files(directory)
    return config


def max_positions(config: DnaLlmConfig) -> int:
    """The longest sequence that the policy was made for."""
    return int(getattr(config.text_config, "max_position_embeddings", 2**31))


def load_policy(path: Path | str, *, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa") -> DnaLlm:
    """Load a policy, in evaluation mode, with every weight from the directory.

    Raises CheckpointError when the directory is missing or damaged, holds another kind of model, or lacks a weight.
    """
    directory = Path(path)
    config = policy_config(directory)
    try:
        loaded: Any = DnaLlm.from_pretrained(
            directory, config=config, dtype=dtype, attn_implementation=attn_implementation, **_REPORT
        )
    except _LOAD_ERRORS as error:
        raise CheckpointError(
            f"{directory}: the policy cannot be loaded ({_first_line(error)}); restore it from a copy"
        ) from error
    model, info = loaded
    _refuse_partial(directory, info)
    return cast(DnaLlm, model).eval()


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory. Raises CheckpointError when there is none."""
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    try:
        return AutoTokenizer.from_pretrained(directory)
    except _LOAD_ERRORS as error:
        raise CheckpointError(f"{directory}: no tokenizer can be loaded from here ({_first_line(error)})") from error


def stop_token_ids(path: Path | str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a completion of the policy in a directory: the tokenizer's end token, and all that the text model's
    own generation settings named (Qwen3 has two).
    """
    ids: Any = [tokenizer.eos_token_id, getattr(policy_config(path).text_config, "eos_token_id", None)]
    flat = [one for entry in ids for one in (entry if isinstance(entry, list) else [entry])]
    return tuple(sorted({int(one) for one in flat if one is not None}))


def save_policy(
    path: Path | str,
    model: DnaLlm,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype | None = None,
    gather: Gather = no_gather,
    write: bool = True,
) -> None:
    """Write a policy directory, adapters merged, in one rename; an older one at `path` is replaced.

    `dtype` is that of the file (None: the parameters' own). Under ZeRO-3 all ranks call with `gather`, and those that
    pass `write=False` take part in the gathers without writing.
    """
    state = {name: tensor for name, tensor in merged_state_dict(model, dtype=dtype, gather=gather) if write}
    if not write:
        return
    directory = Path(path)
    draft = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    model.save_pretrained(draft, state_dict=state)
    tokenizer.save_pretrained(draft)
    if directory.exists():
        shutil.rmtree(directory)
    draft.rename(directory)


def _read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a model directory. Raises CheckpointError when it is missing or damaged."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}/config.json: cannot be read ({error}); is this a model?") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{directory}/config.json: is no JSON object; is this a model?")
    return cast("dict[str, Any]", config)


def _refuse_partial(directory: Path, info: Mapping[str, Any]) -> None:
    """Raise when loading left weights at random values or ignored some of the file."""
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        # A mismatch is reported as (name, shape found, shape expected).
        if names := sorted(key if isinstance(key, str) else key[0] for key in info[kind]):
            raise CheckpointError(
                f"{directory}: {len(names)} weights are {kind.removesuffix('_keys')} (the first: {names[0]}); "
                "the directory belongs to another model, or was not written completely"
            )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
