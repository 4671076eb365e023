"""Relevance on its way down: tensors, or products not yet multiplied out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcam import ops

__all__ = ["NoRule", "Relevance", "add", "divided"]


class NoRule(Exception):
    """A rule finds that it does not fit the step it is given; the walk makes an error of it that names the step."""


@dataclass(frozen=True)
class Relevance:
    """values x factor, elementwise; the product is left to the step that reads it, which is one pass less."""

    values: Tensor
    factor: Tensor | None = None

    def tensor(self) -> Tensor:
        return self.values if self.factor is None else self.values * self.factor


def add(one: Relevance, other: Relevance) -> Relevance:
    """What arrives at a value from two of its readers."""
    if one.factor is other.factor:  # none, or the value itself, which both readers have read
        return Relevance(one.values + other.values, one.factor)
    if one.factor is None:
        one, other = other, one
    assert one.factor is not None
    return Relevance(torch.addcmul(other.tensor(), one.values, one.factor))


def divided(relevance: Relevance, divisor: Tensor, epsilon: float) -> Tensor:
    """relevance / divisor, stabilised or guarded (`fastcam.ops.relevance_divide`)."""
    return ops.relevance_divide(relevance.values, divisor, relevance.factor, epsilon)
