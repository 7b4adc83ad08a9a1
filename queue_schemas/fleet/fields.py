"""How fields of the control plane's messages are checked, and when they are left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pydantic import AfterValidator

from ..errors import BadMessage

_Value = TypeVar("_Value")


def checked(check: Callable[[_Value], _Value]) -> AfterValidator:
    """A validator that refuses what ``check`` refuses with ``BadMessage``, in its words."""

    def validate(value: _Value) -> _Value:
        try:
            return check(value)
        except BadMessage as error:
            raise ValueError(error.message) from error

    return AfterValidator(validate)


def is_empty(value: object) -> bool:
    """Whether a field says nothing: it need not be sent."""
    return not value
