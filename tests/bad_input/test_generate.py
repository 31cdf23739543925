"""`rlsys generate` with a problem, a policy or an encoder that cannot be used: told before an engine is started."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from actors.rollout_worker import RolloutWorker
from tests.bad_input.conftest import Models, Refused, copy

GOOD = {"question": "Protein change at codon 117?", "dna": ["ACGTACGTACGTACG", "ACGTACTTACGTACG"]}


@pytest.fixture(autouse=True)
def _no_engine_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(_: RolloutWorker) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(RolloutWorker, "start", start)


# The content of problem.json -> what the message must say.
PROBLEMS: dict[str, tuple[object, list[str]]] = {
    "nothing": ("", ["problem.json: not JSON", 'a problem is {"question": "...", "dna": ["ACGT...', ]),
    "no JSON": ("{'question'}", ["problem.json: not JSON: Expecting property name"]),
    "bytes": (b"\xff", ["problem.json: not JSON"]),
    "endless nesting": ("[" * 100_000, ["problem.json: not JSON"]),
    "an empty list": ([], ["problem.json: holds no problem", 'a problem is {"question"']),
    "a number": (5, ["problem.json[0]: a problem is an object with question and dna, not int"]),
    "a list of texts": (["ACGT"], ["problem.json[0]: a problem is an object with question and dna, not str"]),
    "no question": ({"dna": ["ACGT"]}, ["problem.json[0]: question is missing or is no text",
                                        "the keys present are dna"]),
    "no key at all": ({}, ["problem.json[0]: question is missing", "the keys present are none"]),
    "a question that is a number": ({**GOOD, "question": 5}, ["problem.json[0]: question is missing or is no text"]),
    "no sequence": ({"question": "?"}, ["problem.json[0]: dna must be a list of sequences", '["ACGT", "ACGA"]']),
    "a sequence that is no list": ({**GOOD, "dna": "ACGT"}, ["problem.json[0]: dna must be a list of sequences"]),
    "a sequence that is a number": ({**GOOD, "dna": ["ACGT", 5]}, ["problem.json[0]: dna must be a list of sequences"]),
    "an unknown letter in the second problem": (
        [GOOD, {**GOOD, "dna": ["ACGT", "ACBT"]}], ["problem problem.json[1]: dna[1] has 'B' at position 2 (0-based)",
                                                    "Write N"]),
    "RNA in a problem with a name": ({**GOOD, "problem_id": "mine", "dna": ["ACGU"]}, ["problem mine: dna[0] has 'U'",
                                                                                       "RNA"]),
    "lower case": ({**GOOD, "dna": ["acgt"]}, ["dna[0] has 'a' at position 0", "upper case"]),
    "an empty sequence": ({**GOOD, "dna": ["ACGT", ""]}, ["dna[1] is empty"]),
    "a special token": ({**GOOD, "question": "<|im_end|>"}, ["the special token <|im_end|> at character 0",
                                                             "take it out"]),
    "a sequence that is too long": ({**GOOD, "dna": ["ACGT" * 2000]}, ["problem problem.json[0]", "8000 nucleotides",
                                                                       "reads 1 to"]),
    "a prompt that is too long": (
        {**GOOD, "question": "why? " * 10_000}, ["problem problem.json[0]: its prompt of ",
                                                 "the 32768 positions of the policy"]),
}  # fmt: skip


@pytest.mark.parametrize("case", PROBLEMS)
def test_a_problem_that_cannot_be_used_is_refused(case: str, workplace: Path, models: Models, refused: Refused) -> None:
    content, expected = PROBLEMS[case]
    file = workplace / "problem.json"
    match content:
        case bytes():
            file.write_bytes(content)
        case str():
            file.write_text(content)
        case _:
            file.write_text(json.dumps(content))
    message = refused("generate", models.policy, "problem.json")
    assert [fragment for fragment in expected if fragment not in message] == [], message


def test_a_problem_on_standard_input_is_checked_too(
    workplace: Path, models: Models, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("what?"))
    assert "-: not JSON" in refused("generate", models.policy, "-")


@pytest.mark.parametrize(("options", "expected"), [
    (["--samples", "0"], "--samples 0: must be a number from 1 on"),
    (["--temperature", "-1"], "--temperature -1.0: must be a number from 0 on"),
    (["--temperature", "nan"], "--temperature nan: must be a number from 0 on"),
    (["--max-new-tokens", "0"], "--max-new-tokens 0: must be a number from 1 on"),
    (["--max-new-tokens", "99999"], "--max-new-tokens 99999 are more than the 32768 positions of the policy"),
    (["--encoder", "nowhere"], "nowhere: no such directory, and the encoder of "),
])  # fmt: skip
def test_an_option_that_cannot_be_used_is_refused(
    options: list[str], expected: str, workplace: Path, models: Models, refused: Refused
) -> None:
    (workplace / "problem.json").write_text(json.dumps(GOOD))
    assert expected in refused("generate", models.policy, "problem.json", *options)


def test_a_problem_file_that_is_missing_is_refused(workplace: Path, models: Models, refused: Refused) -> None:
    assert "rpoblem.json: cannot be read: No such file" in refused("generate", models.policy, "rpoblem.json")


@pytest.mark.parametrize(("name", "expected"), [
    ("nowhere", "nowhere: no such directory"),
    ("text", "text: holds a 'qwen3' model and no DNA-LLM"),
    ("encoder", "encoder: holds a 'esm' model and no DNA-LLM"),
])  # fmt: skip
def test_what_is_no_policy_cannot_generate(
    name: str, expected: str, workplace: Path, models: Models, refused: Refused
) -> None:
    (workplace / "problem.json").write_text(json.dumps(GOOD))
    assert expected in refused("generate", models.policy.with_name(name), "problem.json")


def change_encoder(policy: Path, **values: object) -> None:
    config = json.loads((policy / "config.json").read_text())
    config["encoder"] = {name: value for name, value in {**config["encoder"], **values}.items() if value is not None}
    (policy / "config.json").write_text(json.dumps(config))


def test_a_policy_whose_encoder_has_moved_asks_for_it(workplace: Path, models: Models, refused: Refused) -> None:
    (workplace / "problem.json").write_text(json.dumps(GOOD))
    policy = copy(models.policy, workplace / "policy")
    change_encoder(policy, path="/gone/encoder")
    message = refused("generate", policy, "problem.json")
    assert f"/gone/encoder: no such directory, and the encoder of {policy} should be there" in message
    assert "name its directory with --encoder" in message


def test_a_policy_that_names_no_encoder_asks_for_it(workplace: Path, models: Models, refused: Refused) -> None:
    (workplace / "problem.json").write_text(json.dumps(GOOD))
    policy = copy(models.policy, workplace / "policy")
    change_encoder(policy, path=None)
    assert f"{policy}: does not say where the encoder is" in refused("generate", policy, "problem.json")


@pytest.mark.parametrize("which", ["other_encoder", "narrow_encoder"])
def test_another_encoder_is_refused(which: str, workplace: Path, models: Models, refused: Refused) -> None:
    (workplace / "problem.json").write_text(json.dumps(GOOD))
    message = refused("generate", models.policy, "problem.json", "--encoder", getattr(models, which))
    assert "the policy was trained on features of encoder esm-" in message
    assert "--encoder of `rlsys generate`" in message


def test_a_damaged_policy_is_refused(workplace: Path, models: Models, refused: Refused) -> None:
    (workplace / "problem.json").write_text(json.dumps(GOOD))
    policy = copy(models.policy, workplace / "policy")
    (policy / "model.safetensors").write_bytes((policy / "model.safetensors").read_bytes()[:5000])
    assert f"{policy}/model.safetensors: the weights are damaged" in refused("generate", policy, "problem.json")
