"""Plans as JSON: written, read back exactly, and described by a JSON Schema, all from the types of their fields.

Reading runs no code: it builds the classes that the fields name, out of numbers and text, and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import types
from enum import Enum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from remat.errors import RematError
from remat.plan import Plan

FORMAT = 6
_JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}


def to_json(plan: Plan) -> str:
    """A plan as text: a line for each field, and for each item of the long ones."""
    lines = [f' "format": {FORMAT}']
    for field in dataclasses.fields(plan):
        value = _encode(getattr(plan, field.name))
        is_long = isinstance(value, list) and value and isinstance(value[0], dict)
        text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]" if is_long else json.dumps(value)
        lines.append(f' "{field.name}": {text}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def from_json(text: str) -> Plan:
    """Read it back. Raises RematError that names the field in which it is not a plan."""
    try:
        data = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise RematError(f"this is not a plan: it is cut off, or no JSON ({error})") from error
    if not isinstance(data, dict) or not isinstance(data.get("format"), int):
        raise RematError("this is not a plan that Plan.to_json wrote: it has no format number")
    if data["format"] != FORMAT:
        age = "a newer" if data["format"] > FORMAT else "an older"
        raise RematError(
            f"this plan has format {data['format']}, of {age} remat; this one reads {FORMAT}. "
            + ("Update remat." if age == "a newer" else "Plan again.")
        )
    plan: Plan = _decode(Plan, {name: value for name, value in data.items() if name != "format"}, "plan")
    return plan


def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a plan file."""
    definitions: dict[str, Any] = {}
    top = _schema_of(Plan, definitions)
    plan = definitions.pop(top["$ref"].rsplit("/", 1)[-1])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A plan of remat",
        **plan,
        "required": ["format", *plan["required"]],
        "properties": {"format": {"const": FORMAT}, **plan["properties"]},
        "$defs": definitions,
    }


@cache
def _fields(kind: Any) -> dict[str, Any]:
    """Names and types of what a dataclass or named tuple is made of."""
    names = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else kind._fields
    hints = get_type_hints(kind)
    return {name: hints[name] for name in names}


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and (dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"))


def _encode(value: Any) -> Any:
    kind: Any = type(value)
    if _is_record(kind):
        return {name: _encode(getattr(value, name)) for name in _fields(kind)}
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def _decode(kind: Any, data: Any, place: str) -> Any:
    if _is_record(kind):
        return kind(**_decode_fields(kind, data, place))
    if get_origin(kind) is tuple:
        return _decode_tuple(get_args(kind), data, place)
    if get_origin(kind) in (Union, types.UnionType):
        inner = next(option for option in get_args(kind) if option is not type(None))
        return None if data is None else _decode(inner, data, place)
    if issubclass(kind, Enum):
        if data not in [member.value for member in kind]:
            raise RematError(f"this is not a plan that remat wrote: {place} is {data!r}, not one of {[m.value for m in kind]}")
        return kind(data)
    if type(data) is not kind and not (kind is float and type(data) is int):
        raise _unlike(place, _JSON_TYPES[kind], data)
    return data


def _decode_fields(kind: Any, data: Any, place: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise _unlike(place, "object", data)
    fields = _fields(kind)
    for name in fields.keys() ^ data.keys():
        raise RematError(f"this is not a plan that remat wrote: {place}.{name} is {'missing' if name in fields else 'unknown'}")
    return {name: _decode(inner, data[name], f"{place}.{name}") for name, inner in fields.items()}


def _decode_tuple(inner: tuple[Any, ...], data: Any, place: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise _unlike(place, "array", data)
    if inner[-1] is Ellipsis:
        return tuple(_decode(inner[0], item, f"{place}[{i}]") for i, item in enumerate(data))
    if len(data) != len(inner):
        raise RematError(f"this is not a plan that remat wrote: {place} has {len(data)} items, not {len(inner)}")
    return tuple(_decode(kind, item, f"{place}[{i}]") for i, (kind, item) in enumerate(zip(inner, data, strict=True)))


def _unlike(place: str, wanted: str, data: Any) -> RematError:
    return RematError(f"this is not a plan that remat wrote: {place} is {json.dumps(data)[:40]}, not of type {wanted}")


def _schema_of(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    if _is_record(kind):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}
            properties = {name: _schema_of(inner, definitions) for name, inner in _fields(kind).items()}
            definitions[kind.__name__] = {
                "type": "object",
                "description": " ".join((kind.__doc__ or "").split("\n\n")[0].split()),
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        if inner[-1] is Ellipsis:
            return {"type": "array", "items": _schema_of(inner[0], definitions)}
        items = [_schema_of(item, definitions) for item in inner]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if get_origin(kind) in (Union, types.UnionType):
        return {"anyOf": [_schema_of(option, definitions) for option in get_args(kind)]}
    if issubclass(kind, Enum):
        return {"enum": [member.value for member in kind]}
    return {"type": _JSON_TYPES[kind]}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
