"""Triton reads TRITON_INTERPRET when a kernel is decorated, so this folder needs a process of its own:

TRITON_INTERPRET=1 python -P -m pytest tests/triton
"""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header():
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "tests/triton is left out: run it by itself, TRITON_INTERPRET=1 python -P -m pytest tests/triton"
    return "tests/triton: Triton kernels interpreted on the CPU"


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Uninitialised memory is NaN, so that a value no kernel wrote cannot pass."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
