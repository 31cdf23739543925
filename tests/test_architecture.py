"""The house rules that a machine can hold: import arrows, the environment, docstrings, sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    path.relative_to(ROOT).as_posix() for top in ("rlsys", "actors") for path in (ROOT / top).rglob("*.py")
)

# What may be imported only in some places, and where.
ONLY_IN = {
    "actors": ["actors/*"],
    "ray": ["actors/cluster.py"],
    "deepspeed": ["actors/learner*.py"],
    "vllm": ["rlsys/models/vllm_plugin/*", "rlsys/models/vllm_plugin.py"],
    "torch": ["rlsys/models/*", "rlsys/algorithms/*", "actors/*"],
    "transformers": ["rlsys/models/*", "actors/*"],
    "peft": ["rlsys/models/*"],
}
# Where environment variables are read or written, and why there.
ENVIRONMENT_IN = {
    "actors/cluster.py": "The one place that reads them: what Ray and the engines are started with.",
    "actors/learner_rank.py": "Writes only: DeepSpeed takes the address of its process group from them.",
}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# A visible list of debts: what is larger than the limit, by how much it may be, and why.
LARGER_FILES: dict[str, tuple[int, str]] = {}
LARGER_FUNCTIONS: dict[str, tuple[int, str]] = {}

PURE = ["rlsys", *(f"rlsys.{name}" for name in (
    "types", "errors", "config", "config_file", "tasks.loading", "report.records", "report.summary",
    "evaluation.accuracy", "data.prompts", "data.problems", "pipeline.buffer", "pipeline.staleness",
    "rewards.scoring",
))]  # fmt: skip


def tree_of(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"), module)


def imports_of(module: str) -> Iterator[str]:
    """Names of all imported modules, at the top or inside functions, `import_module("name")` included."""
    for node in ast.walk(tree_of(module)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(name), level=0):
                yield name
            case ast.ImportFrom():
                pytest.fail(f"{module}:{node.lineno}: relative import; write the whole name")
            case ast.Call(
                func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name
            case _:
                pass


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_is_imported_only_where_it_belongs(package: str) -> None:
    offenders = [
        module for module in MODULES
        if not any(fnmatch(module, pattern) for pattern in ONLY_IN[package])
        and any(name.partition(".")[0] == package for name in imports_of(module))
    ]  # fmt: skip
    assert offenders == [], f"{package} is imported outside {ONLY_IN[package]}"


def test_the_pure_core_comes_without_the_heavy_packages() -> None:
    # In a process of its own, and through everything that these modules import in turn.
    program = (
        f"import importlib, sys\nfor name in {PURE!r}: importlib.import_module(name)\n"
        "print(sorted({'ray', 'torch', 'vllm', 'deepspeed', 'transformers', 'datasets', 'actors'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (ran.stdout, ran.stderr) == ("[]\n", "")


def test_the_environment_is_touched_in_one_module() -> None:
    offenders = [
        f"{module}: {ast.unparse(node)}" for module in MODULES if module not in ENVIRONMENT_IN
        for node in ast.walk(tree_of(module)) if _is_environment(node)
    ]  # fmt: skip
    assert offenders == []


def _is_environment(node: ast.AST) -> bool:
    names = ("environ", "environb", "getenv", "putenv", "unsetenv")
    match node:
        case ast.Attribute(value=ast.Name(id="os"), attr=attribute):
            return attribute in names
        case ast.ImportFrom(module="os", names=imported):
            return any(alias.name in names for alias in imported)
        case _:
            return False


def test_every_module_says_what_it_is() -> None:
    assert [module for module in MODULES if not ast.get_docstring(tree_of(module))] == []


def test_no_file_is_longer_than_its_limit() -> None:
    lengths = {module: len((ROOT / module).read_text(encoding="utf-8").splitlines()) for module in MODULES}
    limits = {module: LARGER_FILES.get(module, (MAX_FILE_LINES, ""))[0] for module in MODULES}
    assert {module: length for module, length in lengths.items() if length > limits[module]} == {}


def test_no_function_is_longer_than_its_limit() -> None:
    too_long: dict[str, int] = {}
    for module in MODULES:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name, length = f"{module}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1
                if length > LARGER_FUNCTIONS.get(name, (MAX_FUNCTION_LINES, ""))[0]:
                    too_long[name] = length
    assert too_long == {}


@pytest.mark.parametrize("debts", [LARGER_FILES, LARGER_FUNCTIONS], ids=["files", "functions"])
def test_every_debt_is_still_there_and_has_its_reason(debts: dict[str, tuple[int, str]]) -> None:
    for name, (_, reason) in debts.items():
        module, _, function = name.partition(":")
        assert module in MODULES, f"{module} is gone: take its debt out"
        assert not function or f"def {function}(" in (ROOT / module).read_text(encoding="utf-8"), name
        assert len(reason.split()) >= 5, f"{name}: a sentence of reason"


def test_the_rules_see_what_is_there() -> None:
    # A rule that looks at nothing holds always.
    assert "actors/cluster.py" in MODULES
    assert "ray" in {name.partition(".")[0] for name in imports_of("actors/cluster.py")}
    assert any(_is_environment(node) for node in ast.walk(ast.parse("import os\nos.environ['X']")))
