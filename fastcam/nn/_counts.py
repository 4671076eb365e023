"""Arguments that count something."""

from __future__ import annotations

import operator
from typing import Any

__all__ = ["check_counts"]


def check_counts(**counts: Any) -> None:
    """Raises TypeError for what is no integer, ValueError for one below 1, by the argument's name."""
    for name, value in counts.items():
        try:
            number = operator.index(value)
        except TypeError:
            number = None
        if number is None or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer; got {value!r}")
        if number < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
