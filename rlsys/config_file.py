"""Configuration files: YAML with a one-line `base:`, `a.b=c` overrides, and messages that say what to write instead.

`load_config` reads a file into a `Config` and reports every mistake at once; `dump_config` writes the resolved
configuration, which read again gives an equal one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from rlsys.config import Config
from rlsys.errors import ConfigError

Tree = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """YAML with two repairs: the floats of YAML 1.2, so that `1e-6` is a number, and no key twice."""


_FLOAT = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> Tree:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue  # construct_mapping complains
        if key.value in seen:
            problem = f"the key {key.value!r} stands here twice"
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        seen.add(key.value)
    return cast(Tree, loader.construct_mapping(node, deep=True))


_untyped_loader: Any = _Loader  # types-PyYAML leaves these two methods unannotated
_untyped_loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_untyped_loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply `a.b=c` overrides, check everything.

    Raises ConfigError, with one line for each mistake, when the file cannot be read or used.
    """
    return parse_config(_merge(_read(path, depth=0), _override_tree(overrides)), source=str(path))


def parse_config(tree: Mapping[str, Any], source: str) -> Config:
    """Check a configuration tree. `source` names it in messages. Raises ConfigError."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [line for item in error.errors() for line in _explain(dict(item)).splitlines()]
        raise ConfigError("\n".join([f"{source} cannot be used:", *(f"  {line}" for line in lines)])) from error


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)


def _read(path: Path, depth: int) -> Tree:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = sorted(file.name for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; {path.parent} has {', '.join(near)}" if near else ""
        raise ConfigError(f"{path}: no such configuration file{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error})") from error
    try:
        tree: object = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise ConfigError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: holds {type(tree).__name__}, not a mapping of keys; "
            "see configs/quickstart.yaml for the shape of a configuration"
        )
    tree = cast(Tree, tree)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if depth:
        raise ConfigError(f"{path}: has a base: of its own; a base must be complete (one level only)")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: must name a file beside this one, got {_shown(base)}")
    if not (path.parent / base).is_file():
        raise ConfigError(f"{path}: base: {base}: no such configuration file beside this one")
    return _merge(_read(path.parent / base, depth + 1), tree)


def _merge(base: Tree, over: Tree) -> Tree:
    """`over` wins key by key; a section that names another `kind` replaces the base's section whole."""
    merged = dict(base)
    for key, value in over.items():
        old: object = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            old_section, section = cast(Tree, old), cast(Tree, value)
            same_kind = section.get("kind", old_section.get("kind")) == old_section.get("kind")
            merged[key] = _merge(old_section, section) if same_kind else section
        else:
            merged[key] = value
    return merged


def _override_tree(overrides: Sequence[str]) -> Tree:
    """All overrides as one tree, so that `policy.kind=...` and the keys of the new kind may come in any order."""
    tree: Tree = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        *parents, last = key.split(".")
        if not equals or not last or not all(parents):
            raise ConfigError(f"override {override!r}: write it as a.b=value, for example grpo.steps=100")
        section = tree
        for parent in parents:
            below: object = section.setdefault(parent, {})
            if not isinstance(below, dict):
                raise ConfigError(f"override {override!r}: another override gives {parent} a value, so it has no keys")
            section = cast(Tree, below)
        section.update(_merge({last: section.get(last)}, {last: _override_value(override, text)}))
    return tree


def _override_value(override: str, text: str) -> object:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML; put quotes round it") from error


def _explain(error: Mapping[str, Any]) -> str:
    """One line for one mistake: the dotted path, what is wrong, what to do."""
    location, section = _resolve([str(part) for part in error["loc"]])
    path = ".".join(location)
    message = str(error["msg"]).removeprefix("Value error, ")
    match error["type"]:
        case "extra_forbidden":
            return f"{path}: no such key; {_known_keys(location, section)}"
        case "missing":
            return f"{path}: is required and not given"
        case "union_tag_invalid" | "union_tag_not_found":
            field = section.model_fields[location[-1]] if section else None
            kinds = [repr(_kind(arm)) for arm in _sections(field.annotation)] if field else []
            return f"{path}.kind: {error.get('ctx', {}).get('tag', 'not given')}; use one of {', '.join(kinds)}"
        case "model_type" | "model_attributes_type" | "dict_type":
            example = f"{path}.{_example_key(section, location[-1])}"
            return f"{path}: has keys of its own ({example}), got {_shown(error['input'])}"
        case "string_type":
            return f"{path}: {_shown(error['input'])} is not text; put it in quotes if it is meant"
        case "value_error":
            return f"{path}: {message}" if path and not message.startswith(path) else message
        case _:
            return f"{path}: {message}, got {_shown(error['input'])}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _example_key(section: type[BaseModel] | None, name: str) -> str:
    field = section.model_fields.get(name) if section else None
    arms = _sections(field.annotation) if field else []
    return next(iter(arms[0].model_fields)) if arms else "..."


def _known_keys(location: Sequence[str], section: type[BaseModel] | None) -> str:
    """What to write instead of the last key of `location`: the nearest key of its section, or all of them."""
    *parents, key = location
    names = list(section.model_fields) if section else []
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {'.'.join([*parents, near[0]])}?"
    return f"{'.'.join(parents) or 'the top level'} has {', '.join(names)}"


def _resolve(location: list[str]) -> tuple[list[str], type[BaseModel] | None]:
    """The path as a user writes it (pydantic puts a union's tag into it), and the section that holds its last key."""
    path: list[str] = []
    holder: type[BaseModel] | None = None
    annotation: object = Config
    for part in location:
        arms = _sections(annotation)
        tagged = [arm for arm in arms if _kind(arm) == part]
        if tagged and len(arms) > 1:
            annotation = tagged[0]
            continue
        path.append(part)
        holder = next((arm for arm in arms if part in arm.model_fields), arms[0] if arms else None)
        if holder is not None:
            field = holder.model_fields.get(part)
            annotation = field.annotation if field is not None else None
        else:
            mapped = [arm for arg in get_args(annotation) for arm in _sections(arg)]
            annotation = mapped[0] if mapped else None
    return path, holder


def _sections(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is dict:
        return []
    return [arm for arg in get_args(annotation) for arm in _sections(arg)]


def _kind(section: type[BaseModel]) -> str | None:
    field = section.model_fields.get("kind")
    return get_args(field.annotation)[0] if field is not None else None
