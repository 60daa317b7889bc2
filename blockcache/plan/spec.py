"""Specs: the frozen, validated values a recipe is made of, and their JSON form.

A spec is a pydantic dataclass, so its fields are checked at construction. In JSON it is
`{"kind": "<class name>", <fields>}`. Only classes decorated with `spec` can come out of a file:
reading looks the name up in one table and never imports, evaluates or unpickles anything.
"""

import dataclasses
import functools
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as _validated
from typing_extensions import dataclass_transform

from blockcache.errors import PlanError

T = TypeVar("T", bound=type)

_CONFIG = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
_KNOWN: dict[str, type] = {}

Count = Annotated[int, Field(ge=0, le=10**12)]
"""A number of steps."""


@dataclass_transform(frozen_default=True)
def spec(cls: T) -> T:
    """Make `cls` a frozen, validated dataclass that may be read from a plan file.

    Constructing it with impossible values raises `PlanError` with one line that says which.
    """
    made: Any = _validated(cls, frozen=True, config=_CONFIG)
    validated_init = made.__init__

    @functools.wraps(validated_init)
    def init(self: Any, /, *args: Any, **kwargs: Any) -> None:
        _check_names(made, kwargs)
        try:
            validated_init(self, *args, **kwargs)
        except ValidationError as error:
            raise PlanError(f"{cls.__name__}: {_one_line(made, error)}") from None

    made.__init__ = init
    _KNOWN[cls.__name__] = made
    return made  # type: ignore[no-any-return]


def to_json(value: Any) -> Any:
    """Plain dictionaries, lists and numbers for `value`; the inverse of `from_json`."""
    if type(value).__name__ in _KNOWN:
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    return value


def from_json(value: Any) -> Any:
    """Rebuild what `to_json` wrote.

    Raises:
        PlanError: unknown kind, unknown or missing field, or a value out of range.
    """
    if isinstance(value, list):
        return tuple(from_json(item) for item in value)
    if isinstance(value, int) and not -(2**53) <= value <= 2**53:
        raise PlanError("a whole number beyond 2**53 is no value of any field")
    if not isinstance(value, dict):
        return value
    if not all(isinstance(key, str) for key in value):
        raise PlanError("keys must be strings")
    fields = {key: from_json(item) for key, item in value.items() if key != "kind"}
    if "kind" not in value:
        return fields
    kind = value["kind"]
    if not isinstance(kind, str) or kind not in _KNOWN:
        raise PlanError(f"unknown kind {shown(kind)} (known: {', '.join(sorted(_KNOWN))})")
    return _KNOWN[kind](**fields)


def _check_names(cls: type, given: dict[str, Any]) -> None:
    """Refuse unknown fields here: pydantic's own way passes names on as Python arguments."""
    known = [f.name for f in dataclasses.fields(cls)]
    for name in given:
        if name not in known:
            raise PlanError(f"{cls.__name__}: unknown field {name!r} (known: {', '.join(known)})")


def _one_line(cls: type, error: ValidationError) -> str:
    """The first complaint of a validation error, as `field: message, got value`."""
    first = error.errors()[0]
    names = [f.name for f in dataclasses.fields(cls)]
    where = ".".join(
        names[part] if i == 0 and isinstance(part, int) and part < len(names) else str(part)
        for i, part in enumerate(first["loc"])
    )
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message
    return f"{where}: {message}, got {shown(first.get('input'))}"


def shown(value: Any) -> str:
    """A value in at most 80 characters, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else text[:77] + "..."
