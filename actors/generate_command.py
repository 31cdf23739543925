"""`rlsys generate`: a policy answers problems given as JSON. One engine in this process, no cluster."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rlsys.data.dna import validate_sequence
from rlsys.data.prompts import PromptRenderer
from rlsys.errors import CheckpointError, ConfigError, DataError
from rlsys.models.encoders import EsmEncoder
from rlsys.types import Problem, Prompt

EXAMPLE = '{"question": "...", "dna": ["ACGT...", "ACGA..."]}'


async def generate_command(arguments: argparse.Namespace) -> int:
    """Prints each completion as a line of JSON; returns the exit code."""
    from actors.cluster import prepare_engine_process
    from actors.models import check_encoder, quieten_libraries
    from actors.ports import Sampling
    from actors.rollout_worker import RolloutWorker
    from rlsys.models.policy import check_policy, load_tokenizer, max_positions
    from rlsys.models.vllm_plugin.options import EngineOptions

    quieten_libraries()
    _check_numbers(arguments)
    problems = read_problems(arguments.problem)
    policy = check_policy(arguments.policy)
    encoder = _open_encoder(arguments.encoder, policy.encoder or {}, arguments.policy)
    check_encoder(policy, arguments.policy, encoder)
    renderer = PromptRenderer(load_tokenizer(arguments.policy), encoder, max_prompt_tokens=2**20)
    prompts = [renderer.render(problem) for problem in problems]
    longest = _longest(prompts, arguments.max_new_tokens, max_positions(policy))
    worker = RolloutWorker(
        EngineOptions(
            model_dir=str(arguments.policy),
            max_model_len=longest,
            max_num_seqs=max(8, arguments.samples),
            max_dna_per_prompt=max(len(problem.dna) for problem in problems),
            kv_cache_bytes=2**29,
        )
    )
    prepare_engine_process()
    await worker.start()
    try:
        for problem, prompt in zip(problems, prompts, strict=True):
            encoded = encoder.encode(problem.dna)
            features = {slot.key: one for slot, one in zip(prompt.slots, encoded, strict=True)}
            sampling = Sampling(arguments.samples, arguments.temperature, arguments.max_new_tokens)
            for completion in await worker.generate(prompt, sampling, features):
                print(
                    json.dumps(
                        {
                            "problem_id": problem.problem_id,
                            "completion": completion.text,
                            "finish_reason": str(completion.finish_reason),
                        },
                        ensure_ascii=False,
                    ),
                    flush=True,
                )
    finally:
        await worker.stop()
    return 0


def _check_numbers(arguments: argparse.Namespace) -> None:
    for flag, value, smallest in (
        ("--samples", arguments.samples, 1),
        ("--temperature", arguments.temperature, 0),
        ("--max-new-tokens", arguments.max_new_tokens, 1),
    ):
        if not smallest <= value < float("inf"):
            raise ConfigError(f"{flag} {value}: must be a number from {smallest} on")


def _open_encoder(given: Path | None, described: Mapping[str, Any], policy: Path) -> EsmEncoder:
    path = given or described.get("path")
    if path is None:
        raise CheckpointError(
            f"{policy}: does not say where the encoder is that it was trained with; name its directory with --encoder"
        )
    if not Path(path).is_dir():
        raise CheckpointError(
            f"{path}: no such directory, and the encoder of {policy} should be there; name its directory with --encoder"
        )
    return EsmEncoder(path, layer=int(described.get("layer", -1)), dtype=str(described.get("dtype", "float32")))


def _longest(prompts: Sequence[Prompt], max_new_tokens: int, positions: int) -> int:
    """Tokens of the longest prompt with its completion. Raises DataError where the policy has not so many positions."""
    prompt = max(prompts, key=lambda one: len(one.token_ids))
    if len(prompt.token_ids) + max_new_tokens > positions:
        raise DataError(
            f"problem {prompt.problem_id}: its prompt of {len(prompt.token_ids)} tokens and "
            f"--max-new-tokens {max_new_tokens} are more than the {positions} positions of the policy; "
            "shorten one of them"
        )
    return len(prompt.token_ids) + max_new_tokens


def read_problems(source: str) -> list[Problem]:
    """Problems from a JSON file, or from standard input for `-`. Raises DataError."""
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        loaded: object = json.loads(text)
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: not JSON: {error}; a problem is {EXAMPLE}") from error
    rows = cast(Sequence[object], loaded) if isinstance(loaded, list) else [loaded]
    if not rows:
        raise DataError(f"{source}: holds no problem; a problem is {EXAMPLE}")
    return [_problem(row, f"{source}[{number}]") for number, row in enumerate(rows)]


def _problem(row: object, where: str) -> Problem:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a problem is an object with question and dna, not {type(row).__name__}")
    fields = cast(dict[str, object], row)
    question, dna = fields.get("question"), fields.get("dna")
    if not isinstance(question, str):
        present = ", ".join(fields) or "none"
        raise DataError(f"{where}: question is missing or is no text; the keys present are {present}")
    if not isinstance(dna, list) or not all(isinstance(one, str) for one in cast(list[object], dna)):
        raise DataError(f'{where}: dna must be a list of sequences, for example ["ACGT", "ACGA"]')
    sequences = tuple(cast(list[str], dna))
    name = str(fields.get("problem_id", where))
    for index, sequence in enumerate(sequences):
        validate_sequence(sequence, problem_id=name, index=index)
    return Problem(problem_id=name, question=question, dna=sequences, answer="", demonstration="")
