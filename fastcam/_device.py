"""Devices as commands name them."""

from __future__ import annotations

import os

import torch

__all__ = ["device_of"]


def device_of(text: str) -> torch.device:
    """The device, tried; "auto" is the process's own GPU (LOCAL_RANK), or else the CPU. Raises ValueError."""
    if text == "auto":
        local = os.environ.get("LOCAL_RANK", "0")
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device(f"cuda:{int(local) % torch.cuda.device_count()}")
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {text!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device
