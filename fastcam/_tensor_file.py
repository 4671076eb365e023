"""Reading what `torch.save` wrote, without running anything that stands in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["read_tensors"]


def read_tensors(path: str | Path, what: str, device: str | torch.device = "cpu") -> Any:
    """The tensors, numbers and texts of a file; never pickled code.

    Raises FileNotFoundError, or ValueError for a file that is damaged or no `what`.
    """
    try:
        return torch.load(path, weights_only=True, map_location=device)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a damaged file makes of the reader
        raise ValueError(f"{path} is damaged or no {what}: {type(error).__name__}") from error
