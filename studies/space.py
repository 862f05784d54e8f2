"""A search space: its parameters, the conditions under which each is searched, and a sampler's way through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Value = Any  # a number, a text or a truth value, as YAML holds them


@dataclass(frozen=True)
class Parameter:
    """One dimension of a search space: a range of floats or whole numbers, or choices; with `when`, only under a condition.

    `when: {training.loss: [sampled]}` searches it where the named parameters, which stand before it, have one of the values.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    integer: bool = False
    choices: tuple[Value, ...] | None = None
    when: dict[str, tuple[Value, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranged = self.low is not None and self.high is not None
        if ranged == (self.choices is not None):
            raise ValueError("needs either low and high, or choices.")
        if ranged and not (self.low < self.high and (self.low > 0 or not self.log)):  # type: ignore[operator]
            raise ValueError(f"runs from {self.low} to {self.high}; it must rise, and start above 0 where log is on.")
        if self.integer and not (ranged and float(self.low).is_integer() and float(self.high).is_integer()):  # type: ignore[arg-type]
            raise ValueError("is integer; its low and high must be whole numbers.")
        if self.choices is not None and len(set(map(repr, self.choices))) < max(1, len(self.choices)):
            raise ValueError(f"has the choices {list(self.choices)}; they must differ, and there must be one.")

    def ends(self) -> tuple[Value, ...]:
        """Values that must all be allowed: the bounds, or every choice."""
        if self.choices is not None:
            return self.choices
        return (int(self.low), int(self.high)) if self.integer else (self.low, self.high)  # type: ignore[arg-type]

    def holds(self, value: Value) -> bool:
        """Whether the value lies in the range, or among the choices."""
        if self.choices is not None:
            return value in self.choices
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high and (not self.integer or float(value).is_integer())


Space = Mapping[str, Parameter]


def broken_condition(space: Space) -> str | None:
    """The first `when` that can never be decided or never holds, in words; None when all are well."""
    before: dict[str, Parameter] = {}
    for name, parameter in space.items():
        for other, values in parameter.when.items():
            if other not in before:
                return f"'{name}' depends on '{other}', which is not searched before it."
            if wrong := [value for value in values if not before[other].holds(value)]:
                return f"'{name}' depends on '{other}' being {wrong[0]!r}, which it never is."
        before[name] = parameter
    return None


def walk(space: Space, value_of: Callable[[str, Parameter], Value]) -> dict[str, Value]:
    """A config: each parameter in order, where what was drawn before meets its condition."""
    config: dict[str, Value] = {}
    for name, parameter in space.items():
        if all(other in config and config[other] in values for other, values in parameter.when.items()):
            config[name] = value_of(name, parameter)
    return config


def within(space: Space, config: Mapping[str, Value]) -> dict[str, Value]:
    """The part of a config from elsewhere that this space could have drawn."""
    return {name: value for name, value in config.items() if name in space and space[name].holds(value)}
