"""Every backend whose CPU results can be tested in this process, forced for the test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fastcam
from fastcam._testing.ops import usable_backends


@pytest.fixture(params=usable_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastcam.backend(request.param):
        yield request.param
