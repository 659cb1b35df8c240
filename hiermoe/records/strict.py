"""What every part of a configuration is, and values checked against it: a line for everything that breaks a rule."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from hiermoe.records.choices import or_else

Schema = TypeVar("Schema", bound=BaseModel)


class Strict(BaseModel):
    """Values that were checked once and never change; an unknown key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BrokenRules(ValueError):
    """Values that break rules.

    Attributes:
        lines: one for each, with name, value and rule; the error's text has them all in one line.
        origin: file that they come from; empty where there is none.
    """

    def __init__(self, lines: Sequence[str], origin: object = None) -> None:
        """Take the lines, and where the values are from."""
        self.lines, self.origin = tuple(lines), "" if origin is None else str(origin)
        super().__init__((f"{self.origin}: " if self.origin else "") + "; ".join(self.lines))


def checked(values: Any, schema: type[Schema], origin: object = None) -> Schema:
    """The values as the schema has them.

    Args:
        values: plain ones, a mapping.
        schema: what they must be.
        origin: file that they come from, to be named in the error.

    Raises:
        BrokenRules: all keys that break a rule.
    """
    if not isinstance(values, Mapping):
        raise BrokenRules([f"holds {type(values).__name__}, not a mapping"], origin)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        found = error.errors()
    # a list that is too short without its broken items is not too short
    inside = {one["loc"][:depth] for one in found for depth in range(len(one["loc"]))}
    lines = [_line(one, schema) for one in found if one["type"] != "too_short" or one["loc"] not in inside]
    raise BrokenRules(list(dict.fromkeys(lines)), origin)


def is_valid(values: Any, schema: type[BaseModel]) -> bool:
    """Whether values break no rule of a schema; for validators that leave it to the field's own to say which."""
    try:
        schema.model_validate(values)
    except ValidationError:
        return False
    return True


def _line(error: ErrorDetails, schema: type[BaseModel]) -> str:
    """Name, value and rule of one error."""
    where = ".".join(str(part) for part in error["loc"] if part not in ("gqa", "mla"))
    given = "" if isinstance(error["input"], dict | list | BaseModel) else f"={error['input']}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{where}: is missing"
    if error["type"] == "extra_forbidden":
        return f"{where}{given}: no such key; {or_else(str(error['loc'][-1]), _siblings(schema, error['loc'][:-1]))}"
    return f"{where}{given}: {message}" if where else message


def _siblings(schema: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """Keys that the mapping at a place may have."""
    at = [schema]
    for part in loc:
        fields = [model.model_fields[part] for model in at if part in model.model_fields]
        at = [model for field in fields for model in _models(field.annotation)] or at  # a position, or a union's tag
    return list(dict.fromkeys(name for model in at for name in model.model_fields))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Schemas that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)
