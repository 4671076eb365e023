"""Whether contributions add up to the difference of the scores they are said to explain."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from fastcam._tracing import tracing
from fastcam.program.forward import Reference

from ._method import Passage

__all__ = ["CheckCompleteness", "check_choice", "residual"]

CheckCompleteness = Literal["warn", "raise", "off"] | None

#: What rounding alone may leave, as a fraction of the largest of both scores and the sum of magnitudes; of float16 and
#: bfloat16, whose steps are rounded one by one, a tenth.
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3}
_ROUNDING_HALF = 0.1


def check_choice(value: Any) -> None:
    """ValueError unless `value` is a `CheckCompleteness`."""
    if value not in (None, "warn", "raise", "off"):
        raise ValueError(f"check_completeness must be 'warn', 'raise', 'off' or None; got {value!r}")


def residual(passage: Passage, contributions: Tensor, reference: Reference, choice: CheckCompleteness) -> Tensor:
    """sum_i contributions_i - (y - y'), (B,) or (B, T), for contributions (B, n) or (B, T, n); checked by `choice`.

    Not checked: what is not finite, which `on_nonfinite` is for, and features that are not all the layer gives. Raises
    RuntimeError, or warns, where the residual is more than rounding.
    """
    score, base = passage.scores(), passage.scores(reference.output)
    total = contributions.sum(-1)
    found = total - (score - base).to(total.dtype)
    if choice is None:  # deciding takes a synchronisation on accelerators
        choice = "warn" if found.device.type == "cpu" else "off"
    if choice == "off" or tracing() or not passage.whole:
        return found
    scale = torch.stack([score.abs().to(total.dtype), base.abs().to(total.dtype), contributions.abs().sum(-1)]).amax(0)
    allowed = _ROUNDING.get(passage.features.dtype, _ROUNDING_HALF)
    wrong = found.abs() > allowed * scale
    if bool(wrong.any()):
        place = tuple(int(index) for index in wrong.nonzero()[0])
        message = (
            f"contributions at layer '{passage.layer}' add up to {float(total[place]):.6g} where the scores of image "
            f"{place[0]} and its reference differ by {float((score - base)[place]):.6g} ({int(wrong.sum())} of "
            f"{wrong.numel()} sums are off by more than {allowed:g} of their terms): is a rule given to "
            "fastcam.register_rescale_rule complete? If it is rounding, precision='fp64' shows it; "
            "check_completeness='off' takes the sums as they are"
        )
        if choice == "raise":
            raise RuntimeError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return found
