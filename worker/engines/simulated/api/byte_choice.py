"""Pick the next byte of a text whose grammar allows several: pure, drawn by a ``random.Random`` that is given.

:mod:`.instances` asks a grammar which bytes may follow and one of these classes which of them it takes. ``END`` stands
for the end of the text, where the grammar accepts it as complete.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

END = 256
SHALLOW = 4
"""Values nested deeper than this are kept short, so that recursive schemas end."""
_LOWER = frozenset(b"abcdefghijklmnopqrstuvwxyz")
_UPPER = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_DIGITS = frozenset(b"0123456789")
_ALPHANUMERIC = _LOWER | _UPPER | _DIGITS
_QUOTE, _BACKSLASH, _NULL, _COMMA, _COLON, _MINUS, _DOT = (ord(char) for char in '"\\n,:-.')
_OPENERS, _CLOSERS = frozenset(b"{["), frozenset(b"}]")
_BREAKS = frozenset(b",}] ")
_FEW = 12
"""So many bytes or fewer are a choice that the grammar names, such as the first letters of an enum's values."""
_ANY = 60
"""A key that allows so many bytes is a free one, not the rest of a declared name."""


class TextChoice:
    """The bytes of a text: readable ones, and an end soon after the length that was drawn."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._left = draw.randint(3, 12)

    def choose(self, allowed: list[int], accepting: bool) -> int:
        """One of ``allowed``, or ``END`` if ``accepting``."""
        self._left -= 1
        if accepting and (self._left <= 0 or self._draw.random() < 0.1):
            return END
        return readable(self._draw, allowed, late=self._left <= 0)


@dataclass(slots=True)
class _Container:
    """An object or array that is open. ``free``: an object whose keys are free."""

    is_object: bool
    count: int = 0
    free: bool = False
    expects_key: bool = False


class JsonChoice:
    """The bytes of JSON: every declared property, few elements, and an end to any recursion of the schema.

    ``wide`` picks also what makes a duller answer: null, negative numbers, objects and arrays that end early.
    """

    def __init__(self, draw: random.Random, *, wide: bool = False) -> None:
        self._draw = draw
        self._wide = wide
        self._open: list[_Container] = []
        self._in_string = self._escaped = self._in_number = False
        self._length = self._target = 0

    def choose(self, allowed: list[int], accepting: bool) -> int:
        """One of ``allowed``, or ``END`` if ``accepting``."""
        if len(allowed) == 1 and not accepting:
            picked = allowed[0]
        elif self._in_string:
            picked = self._string_byte(allowed)
        else:
            picked = self._outer_byte(allowed, accepting)
        if picked != END:
            self._follow(picked)
        return picked

    def _string_byte(self, allowed: list[int]) -> int:
        container = self._open[-1] if self._open else None
        if container is not None and container.expects_key and len(allowed) > _ANY:
            container.free = True
        late = self._length >= self._target
        if _QUOTE in allowed and (late or len(allowed) <= _FEW):
            return _QUOTE if late else self._draw.choice(allowed)
        return readable(self._draw, [byte for byte in allowed if byte != _QUOTE] or allowed, late=late)

    def _outer_byte(self, allowed: list[int], accepting: bool) -> int:
        if self._in_number:
            return self._number_byte(allowed, accepting)
        if accepting:
            return END
        if _COMMA in allowed or any(byte in _CLOSERS for byte in allowed):
            return self._separator(allowed)
        return self._value_start(allowed)

    def _number_byte(self, allowed: list[int], accepting: bool) -> int:
        digits = [byte for byte in allowed if byte in _DIGITS]
        if digits and self._length < self._target:
            return self._draw.choice(digits)
        if self._wide and self._draw.random() < 0.3 and _DOT in allowed:
            return _DOT
        if accepting:
            return END
        ends = [byte for byte in allowed if byte in _BREAKS]
        return self._separator(ends) if ends else self._draw.choice(digits or allowed)

    def _separator(self, allowed: list[int]) -> int:
        """Go on with the object or array, or close it."""
        container = self._open[-1]
        closers = [byte for byte in allowed if byte in _CLOSERS]
        more = [byte for byte in allowed if byte not in _CLOSERS]
        if not closers or not more:
            return self._value_start(allowed)
        if len(self._open) > SHALLOW or (self._wide and self._draw.random() < 0.3):
            return closers[0]
        if _COMMA in more and (not container.is_object or container.free):
            stop = container.count >= 2 or self._draw.random() < 0.5
            return closers[0] if stop else _COMMA
        return _COMMA if _COMMA in more else self._value_start(more)

    def _value_start(self, allowed: list[int]) -> int:
        """The first byte of a value, a key or a separator: null and nesting only where nothing else is allowed, or
        nesting where it is not yet deep."""
        deep = len(self._open) > SHALLOW
        preferred = [
            [byte for byte in allowed if byte in (_QUOTE, *b"tf") or byte in _DIGITS],
            [byte for byte in allowed if byte in (_NULL, _MINUS)],
            [byte for byte in allowed if byte in _OPENERS],
        ]
        if self._wide and not deep:
            preferred = [[byte for group in preferred for byte in group]]
        elif not deep:
            preferred = [preferred[0] + preferred[2], preferred[1]]
        found = next((group for group in preferred if group), allowed)
        kinds = [[byte for byte in found if byte in _DIGITS], *([byte] for byte in found if byte not in _DIGITS)]
        return self._draw.choice(self._draw.choice([kind for kind in kinds if kind]))

    def _follow(self, byte: int) -> None:
        """Keep track of where ``byte`` leads."""
        if self._in_string:
            self._follow_string(byte)
            return
        was_number, self._in_number = self._in_number, byte in _DIGITS or (byte in b"-+.eE" and self._in_number)
        if byte == _MINUS:
            self._in_number = True
        if self._in_number:
            self._length = self._length + 1 if was_number else 1
            self._target = self._target if was_number else self._draw.randint(1, 3)
        elif byte == _QUOTE:
            self._in_string, self._length, self._target = True, 0, self._draw.randint(3, 10)
        elif byte in _OPENERS:
            self._open.append(_Container(byte == ord("{"), expects_key=byte == ord("{")))
        elif byte in _CLOSERS:
            self._open.pop()
        elif self._open and byte == _COMMA:
            self._open[-1].count += 1
            self._open[-1].expects_key = self._open[-1].is_object
        elif self._open and byte == _COLON:
            self._open[-1].expects_key = False

    def _follow_string(self, byte: int) -> None:
        if self._escaped:
            self._escaped = False
        elif byte == _BACKSLASH:
            self._escaped = True
        elif byte == _QUOTE:
            self._in_string = False
            return
        self._length += 1


def readable(draw: random.Random, allowed: list[int], *, late: bool) -> int:
    """One of ``allowed``, letters first; ``late`` prefers no class of characters, so that whatever must come may."""
    plain = [byte for byte in allowed if byte != _BACKSLASH] or allowed
    if len(plain) <= _FEW:
        return draw.choice(plain)
    classes = [[byte for byte in plain if byte in known] for known in (_LOWER, _DIGITS, _UPPER)]
    classes.append([byte for byte in plain if 32 <= byte < 127 and byte not in _ALPHANUMERIC])
    found = [one for one in classes if one]
    if not found:
        return draw.choice(plain)
    return draw.choice(draw.choice(found) if late else found[0])
