"""Mean and standard error of values that come a batch at a time, from several processes if need be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Mean"]


class Mean:
    """Streaming mean, spread and count, element by element beyond the first dimension.

        found = Mean()
        for images, maps, targets in batches:
            found.update(average_drop(model, images, maps, targets))
        found.mean, found.standard_error, found.count, found.left_out

    Values that are not finite are left out and counted. Everything stays on the device of the first values until it is
    read, so an update costs no synchronisation; results are independent of how values were batched to float64
    rounding. Memory: four numbers an element.
    Source: Chan, Golub & LeVeque 1979, pairwise update.
    """

    def __init__(self) -> None:
        self._state: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def update(self, values: Tensor) -> Mean:
        """Takes in values (n, ...) and returns itself. ValueError where ... is not that of earlier values."""
        if not isinstance(values, Tensor) or values.ndim < 1:
            what = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"values must be a tensor of one value an item, (n, ...); got {what}")
        values = values.detach().double()
        fine = values.isfinite()
        count = fine.sum(0, dtype=torch.float64)
        mean = torch.where(fine, values, 0).sum(0) / count.clamp(min=1)
        square = torch.where(fine, values - mean, 0).square().sum(0)
        return self._join((count, mean, square, len(values) - count))

    def merge(self, other: Mean) -> Mean:
        """Takes in all that `other` has seen and returns itself."""
        return self if other._state is None else self._join(other._state)

    def _join(self, new: tuple[Tensor, Tensor, Tensor, Tensor]) -> Mean:
        if self._state is None:
            self._state = new
            return self
        if self._state[0].shape != new[0].shape:
            raise ValueError(
                f"values of shape (n, {tuple(new[0].shape)}) do not join those of (n, {tuple(self._state[0].shape)})"
            )
        (count, mean, square, out), (n, m, s, o) = self._state, (part.to(self._state[0].device) for part in new)
        total = (count + n).clamp(min=1)
        gap = m - mean
        self._state = count + n, mean + gap * n / total, square + s + gap.square() * count * n / total, out + o
        return self

    @property
    def count(self) -> Tensor:
        """How many values took part; 0 where there were none."""
        return self._read(0)

    @property
    def left_out(self) -> Tensor:
        """How many values were not finite."""
        return self._read(3)

    @property
    def mean(self) -> Tensor:
        """NaN where no value took part."""
        count, mean = self._read(0), self._read(1)
        return torch.where(count > 0, mean, torch.nan)

    @property
    def standard_error(self) -> Tensor:
        """Sample standard deviation over the root of the count; NaN below two values."""
        count, square = self._read(0), self._read(2)
        return torch.where(count > 1, (square / (count - 1) / count).sqrt(), torch.nan)

    @property
    def interval(self) -> tuple[Tensor, Tensor]:
        """Mean -+ 1.96 standard errors: 95 % where there are some dozens of values."""
        half = 1.96 * self.standard_error
        return self.mean - half, self.mean + half

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        if self._state is None:
            return {}
        return {
            name: part.tolist() for name, part in zip(("count", "mean", "square", "left_out"), self._state, strict=True)
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Mean:
        """The accumulator that `state_dict` describes."""
        found = cls()
        if state:
            parts = (torch.tensor(state[name], dtype=torch.float64) for name in ("count", "mean", "square", "left_out"))
            found._state = tuple(parts)
        return found

    def _read(self, part: int) -> Tensor:
        return torch.zeros((), dtype=torch.float64) if self._state is None else self._state[part]
