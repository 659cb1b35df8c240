"""What every part of a configuration is, and values checked against it, with one line for what breaks a rule."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

Schema = TypeVar("Schema", bound=BaseModel)


class Strict(BaseModel):
    """Values that were checked once and never change; an unknown key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def checked(values: Mapping[Any, Any], schema: type[Schema], origin: object = None) -> Schema:
    """The values as the schema has them.

    Args:
        values: plain ones.
        schema: what they must be.
        origin: file that they come from, to be named in the error.

    Raises:
        ValueError: one line that names the first key that breaks a rule.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("gqa", "mla"))
    given = "" if isinstance(first["input"], dict | list) else f"={first['input']}"
    message = first["msg"].removeprefix("Value error, ")
    raise ValueError(("" if origin is None else f"{origin}: ") + (f"{where}{given}: {message}" if where else message))
