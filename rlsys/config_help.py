"""The configuration explained: every key with its type, default and meaning, as `rlsys config KEY` prints it."""

from __future__ import annotations

import inspect
import types
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from rlsys.config import Config
from rlsys.errors import ConfigError


def explain(key: str) -> str:
    """The section or value at a dotted key; all sections for the empty key. Raises ConfigError for an unknown one."""
    sections: list[type[BaseModel]] = [Config]
    about = ""
    path: list[str] = []
    for part in key.split(".") if key else []:
        holder = next((section for section in sections if part in section.model_fields), None)
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
        about = f"{key}: {_type_name(field.annotation)}, {_default(field)}\n  {field.description or ''}"
        sections = _sections(field.annotation)
    blocks = [_section(section, key) for section in sections]
    return "\n\n".join([*([about] if about else []), *blocks])


def _section(section: type[BaseModel], key: str) -> str:
    kind = section.model_fields.get("kind")
    title = f"{key or 'the configuration'}" + (
        f" (kind: {get_args(kind.annotation)[0]})" if kind and _is_tag(kind.annotation) else ""
    )
    lines = [f"{title} -- {inspect.getdoc(section)}"]
    for name, field in section.model_fields.items():
        if not _is_tag(field.annotation):
            lines.append(f"  {name}: {_type_name(field.annotation)}, {_default(field)}")
            if field.description:
                lines.append(f"      {' '.join(field.description.split())}")
    return "\n".join(lines)


def _is_tag(annotation: Any) -> bool:
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, BaseModel):
        return "has defaults"
    return f"default {'null' if field.default is None else field.default}"


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is dict:
        return "a mapping of names to sections"
    arms = get_args(annotation)
    if isinstance(annotation, types.UnionType) or (arms and get_origin(annotation) not in (tuple, list)):
        return " or ".join(
            "null" if arm is type(None) else _type_name(arm) for arm in arms if isinstance(arm, type) or get_args(arm)
        )
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section"
    return getattr(annotation, "__name__", str(annotation))


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for arm in get_args(annotation) for section in _sections(arm)]
