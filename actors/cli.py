"""The command line: `rlsys train`, `sft`, `evaluate`, `generate`, `config`.

What a user can cause ends with a message of at most a few lines and exit code 2, never with a traceback; Ctrl-C ends
with 130 and says how to go on.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlsys.errors import RlsysError

DESCRIPTION = """\
Ray-distributed RL training of DNA language models: SFT warm start, then asynchronous GRPO.

  rlsys train configs/quickstart.yaml                 warm start, GRPO, evaluation; a run directory with the result
  rlsys train configs/quickstart.yaml grpo.steps=50   any value of the configuration can be changed
  rlsys train --resume runs/quickstart                go on after Ctrl-C, a crash, or a kill
  rlsys config grpo                                   what can be configured, with defaults
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `rlsys` command."""
    parsed = _parse(arguments)
    _quieten()
    try:
        code = parsed.command(parsed)
    except RlsysError as error:
        print(f"rlsys: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("rlsys: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if unknown := [one for one in rest if one.startswith("-") or "overrides" not in parsed]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]  # argparse ends the list of overrides at the first option
    return parsed


def _quieten() -> None:
    """Keep libraries' start-up remarks off a user's terminal; the logs of every process are kept by Ray."""
    logging.basicConfig(level=logging.ERROR)
    warnings.filterwarnings("ignore")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlsys", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = _training_parser(commands, "train", "run the warm start (if configured), then GRPO")
    train.set_defaults(command=_train, last_phase="grpo")
    sft = _training_parser(commands, "sft", "run the warm start only")
    sft.set_defaults(command=_train, last_phase="sft")

    evaluate = commands.add_parser("evaluate", help="evaluate a policy on the held-out problems of a configuration")
    _config_arguments(evaluate)
    evaluate.add_argument("--policy", type=Path, required=True, metavar="DIR", help="the policy's directory")
    evaluate.add_argument("--address", help="join the Ray cluster at this address instead of starting one")
    evaluate.set_defaults(command=_evaluate)

    generate = commands.add_parser("generate", help="let a policy answer problems given as JSON")
    generate.add_argument("policy", type=Path, metavar="POLICY", help="a policy directory (runs/NAME/policy)")
    generate.add_argument(
        "problem",
        metavar="PROBLEM",
        help="a JSON file, or - for standard input: "
        '{"question": "...", "dna": ["ACGT...", "ACGA..."]}, or a list of such',
    )
    generate.add_argument("--encoder", type=Path, metavar="DIR", help="the DNA encoder, where it has moved")
    generate.add_argument("--samples", type=int, default=1, help="completions of each problem (default 1)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    generate.add_argument("--max-new-tokens", type=int, default=512, help="length limit (default 512)")
    generate.set_defaults(command=_generate)

    config = commands.add_parser("config", help="explain the configuration, or one part of it")
    config.add_argument("key", nargs="?", default="", metavar="KEY", help="for example grpo or grpo.loss")
    config.set_defaults(command=_config)
    return parser


def _training_parser(commands: Any, name: str, about: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=f"{about}.")
    _config_arguments(parser, optional=True)
    parser.add_argument(
        "--resume", type=Path, metavar="RUN", help="a run directory to go on with; overrides apply to it"
    )
    parser.add_argument("--address", help="join the Ray cluster at this address ('auto' finds one on this machine)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run directories are made (default runs)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    return parser


def _config_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument("config", nargs="?" if optional else None, metavar="CONFIG", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="changes to single values")


def _train(arguments: argparse.Namespace) -> int:
    from actors.train_command import train_command

    return asyncio.run(train_command(arguments))


def _evaluate(arguments: argparse.Namespace) -> int:
    from actors.evaluate_command import evaluate_command

    return asyncio.run(evaluate_command(arguments))


def _generate(arguments: argparse.Namespace) -> int:
    from actors.generate_command import generate_command

    return asyncio.run(generate_command(arguments))


def _config(arguments: argparse.Namespace) -> int:
    from rlsys.config_help import explain

    print(explain(arguments.key))
    return 0


if __name__ == "__main__":
    main()
