"""A printed number: its value, its unit, where it stands and how far rounding may have moved it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: `published` is printed in the paper; `derived` was computed from printed numbers; `public` is from a model's published configuration.
Standing = Literal["published", "derived", "public"]


@dataclass(frozen=True)
class Quantity:
    """`value` in `unit`, read at `where`; the true number lies within `precision` of it: half of the last digit, or what "about" allows."""

    value: float
    unit: str
    where: str
    precision: float
    standing: Standing = "published"

    @property
    def interval(self) -> tuple[float, float]:
        """Everything that rounds to the printed value."""
        return self.value - self.precision, self.value + self.precision


def printed(text: str, unit: str, where: str, standing: Standing = "published") -> Quantity:
    """A number as printed: half a unit of its last digit is its precision ("2.10" is closer to 2.1 than "2.1" is)."""
    mantissa = text.replace(",", "")
    decimals = len(mantissa.split(".")[1]) if "." in mantissa else 0
    return Quantity(float(mantissa), unit, where, 0.5 * 10.0**-decimals, standing)


def about(value: float, unit: str, where: str, precision: float, standing: Standing = "published") -> Quantity:
    """A number that the paper gives in round terms."""
    return Quantity(value, unit, where, precision, standing)
