"""The configuration explained: every key with its type, default and meaning, as `rlsys config KEY` prints it.

Invariant: everything shown is read from the types, bounds and docstrings of the sections; nothing is told twice.
"""

from __future__ import annotations

import inspect
import textwrap
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlsys.config import Config
from rlsys.errors import ConfigError

WIDTH = 100
"""Columns of the printed text."""


def explain(key: str) -> str:
    """The section or value at a dotted key; all sections for the empty key. Raises ConfigError for an unknown one."""
    sections: list[type[BaseModel]] = [Config]
    about: list[str] = []
    default_kind: str | None = None
    is_mapping = False
    path: list[str] = []
    for part in key.split(".") if key else []:
        holder = next((section for section in sections if part in section.model_fields), None)
        if holder is None and is_mapping:
            is_mapping, about = False, []  # a name that the user chose
            path.append(part)
            continue
        if holder is None:
            if not sections:
                raise ConfigError(f"{'.'.join(path)} is a value, it has no {part!r}")
            known = sorted({name for section in sections for name in section.model_fields})
            raise ConfigError(
                f"{'.'.join([*path, part])}: no such key; {'.'.join(path) or 'the configuration'} has "
                f"{', '.join(known)}"
            )
        path.append(part)
        field = holder.model_fields[part]
        about = ["\n".join(_field(key, field, indent=0))]
        sections = _sections(field.annotation)
        is_mapping = get_origin(field.annotation) is dict
        default_kind = getattr(field.default, "kind", None)
    title = f"{key}.NAME" if is_mapping else key
    return "\n\n".join([*about, *(_section(section, title, default_kind) for section in sections)])


def _section(section: type[BaseModel], key: str, default_kind: str | None) -> str:
    title = key or "the configuration"
    if kind := _kind(section):
        title += f", kind: {kind}{' (default)' if kind == default_kind else ''}"
    lines = _wrapped(f"{title} -- {inspect.getdoc(section)}", indent=0)
    shown = {name: field for name, field in section.model_fields.items() if not _is_tag(field.annotation)}
    for name, field in shown.items():
        lines += _field(name, field, indent=2)
    below = [f"{key}.{name}".lstrip(".") for name, field in shown.items() if _sections(field.annotation)]
    if below:
        lines += ["", *_wrapped(f"More with `rlsys config KEY` for {', '.join(below)}.", indent=0)]
    return "\n".join(lines)


def _field(name: str, field: FieldInfo, indent: int) -> list[str]:
    """The lines about one key: type, bounds and default, and under them what it means."""
    lines = _wrapped(f"{name}: {_type_name(field.annotation, field.metadata)}, {_default(field)}", indent)
    if field.description:
        text = " ".join(field.description.split())
        lines += textwrap.wrap(text, WIDTH, initial_indent=" " * (indent + 4), subsequent_indent=" " * (indent + 4))
    return lines


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 8),
        break_on_hyphens=False,
    )


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, BaseModel):
        kind = _kind(type(field.default))
        return f"default {kind}" if kind else "has defaults"
    return f"default {_yaml(field.default)}"


def _yaml(value: Any) -> str:
    """A default as it is written in a file."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value) if isinstance(value, tuple) else value)


def _type_name(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What may be written for a key, in words; `metadata` holds the bounds of a number."""
    origin, arms = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arms[0], arms[1:])
    if origin is Literal:
        return " | ".join(map(str, arms))
    if origin is dict:
        return f"a mapping of names to sections{_kinds(arms[1:])}"
    if origin is tuple:
        return f"[{', '.join(map(_type_name, arms))}]"
    if origin in (types.UnionType, Union):
        others = [_type_name(arm) for arm in arms if arm is not type(None) and not _sections(arm)]
        sections = ["a section"] if _sections(annotation) else []
        return " or ".join([*sections, *others, *(["null"] if type(None) in arms else [])]) + _kinds(arms)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section"
    return f"{getattr(annotation, '__name__', annotation)}{_bounds(metadata)}"


def _kinds(arms: Sequence[Any]) -> str:
    kinds = [kind for arm in arms for section in _sections(arm) if (kind := _kind(section))]
    return f", kind: {' | '.join(kinds)}" if kinds else ""


def _bounds(metadata: Sequence[Any]) -> str:
    """The bounds of a number: ` >= 1`, ` in [0, 1)`."""
    low = high = step = ""
    pending = list(metadata)
    while pending:
        match pending.pop(0):
            case FieldInfo(metadata=inner):
                pending += inner
            case annotated_types.Ge(ge=bound):
                low = f">= {bound}"
            case annotated_types.Gt(gt=bound):
                low = f"> {bound}"
            case annotated_types.Le(le=bound):
                high = f"<= {bound}"
            case annotated_types.Lt(lt=bound):
                high = f"< {bound}"
            case annotated_types.MultipleOf(multiple_of=factor):
                step = f", a multiple of {factor}"
            case _:
                pass  # strictness, patterns: nothing that a person needs before the error message
    if low and high:
        opening, closing = "[" if "=" in low else "(", "]" if "=" in high else ")"
        return f" in {opening}{low.split()[1]}, {high.split()[1]}{closing}{step}"
    return f" {low or high}{step}".rstrip()


def _is_tag(annotation: Any) -> bool:
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def _kind(section: type[BaseModel]) -> str | None:
    """The `kind` that chooses this section among others, where it is one of several."""
    field = section.model_fields.get("kind")
    return get_args(field.annotation)[0] if field is not None and _is_tag(field.annotation) else None


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for arm in get_args(annotation) for section in _sections(arm)]
