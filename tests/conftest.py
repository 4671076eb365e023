"""Shared by all tests: uninitialised memory is poisoned, so a kernel that forgets an element is found out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _nan_poison() -> Iterator[None]:
    """Deterministic mode fills `torch.empty` and C++ `at::empty` with NaN (integers with their maximum)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
