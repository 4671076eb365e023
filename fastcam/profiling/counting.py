"""What one call does, apart from how long it takes: dispatched calls, FLOPs, bytes, kernel launches, peak memory.

None of it is timed: each count is a run of its own.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fastcam._watch import watched_by

__all__ = ["Counts", "OpCall", "count", "launches", "op_flops", "peak_bytes", "traffic"]


@dataclass(frozen=True)
class OpCall:
    """A call of a fastcam op: the bytes it has to move (each input read once, each output written once) and FLOPs."""

    name: str
    nbytes: int
    flops: int


@dataclass
class Counts:
    """Of one call.

    calls   operators that reach a backend, views left out; on a GPU about as many kernels are launched
    flops   of convolutions, matrix products, attention (two a multiply-add) and of fastcam's ops
    nbytes  read and written by all operators, each input and output once: what unfused operators move
    ops     fastcam's ops in order
    """

    calls: int = 0
    flops: int = 0
    nbytes: int = 0
    ops: list[OpCall] = field(default_factory=list)


def traffic(value: Any) -> int:
    """Bytes of the tensors in a value; a dimension of stride 0 counts once."""
    return sum(_nbytes(one) for one in tree_iter(value) if isinstance(one, Tensor))


def _nbytes(tensor: Tensor) -> int:
    if tensor.layout != torch.strided:  # oneDNN's own order
        return tensor.numel() * tensor.element_size()
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0


#: FLOPs an element of the largest tensor, counted from the formulas in the ops' docstrings; min, max and compare count
#: as one. `impute_linear` iterates until it converges: an order of magnitude. `cam_map` is counted by its shapes below.
_PER_ELEMENT = {
    "channel_weights": 2, "impute_linear": 200, "lfi_mask": 2, "lfi_mask_backward": 3, "lfi_attend": 4,
    "lfi_attend_backward": 6, "mask_by_features": 4, "overlay": 6, "perturb_by_rank": 1, "relevance_add": 5,
    "relevance_budgets": 1, "relevance_combine": 6, "relevance_divide": 3, "relevance_equilibrium": 6,
    "relevance_split": 8, "rescale_multipliers": 4, "similarity_weights": 8,
}  # fmt: skip


def op_flops(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """FLOPs of a fastcam op: exact to a small factor, from its formula and shapes."""
    tensors = [one for one in tree_iter((args, kwargs, result)) if isinstance(one, Tensor)]
    if name != "cam_map":
        return _PER_ELEMENT.get(name, 1) * max(one.numel() for one in tensors)
    features, weights = args[0], args[1]
    columns = weights.shape[1] if weights.ndim in (3, 5) else 1
    # A multiply-add an element and target; 8 operations a pixel resize and scale.
    return 2 * features.numel() * columns + 8 * result[0].numel()


def _packed_convolution(x: Tensor, weight: Tensor, result: Tensor) -> int:
    return 2 * result.numel() * math.prod(weight.shape[1:])


#: Touch no element.
_aten = torch.ops.aten
_FREE = {_aten.detach, _aten.empty, _aten.empty_strided, _aten.new_empty, _aten.empty_like, _aten._unsafe_view}
_FREE |= {_aten.as_strided_, _aten.lift_fresh, _aten._reshape_alias}


class _Counter(TorchDispatchMode):
    """Counts everything that reaches a backend; as a watcher, fastcam's ops too, whoever runs them."""

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry

        self.counts = Counts()
        self._formulas = flop_registry
        self._inside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if func.is_view or packet in _FREE:
            return result
        found = self.counts
        found.calls += 1
        found.nbytes += traffic((args, kwargs)) + traffic(result)
        if packet in self._formulas:
            found.flops += self._formulas[packet](*args, **kwargs, out_val=result)
        elif packet is torch.ops.mkldnn._convolution_pointwise:
            found.flops += _packed_convolution(args[0], args[1], result)
        elif packet is torch.ops.mkldnn._convolution_pointwise_:
            found.flops += _packed_convolution(args[1], args[2], result)
        return result

    def enter(self, stage: str) -> None: ...

    def leave(self, stage: str) -> None: ...

    def op(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = self.counts.calls, self.counts.nbytes
        result = call(*args, **kwargs)
        one = OpCall(name, traffic((args, kwargs)) + traffic(result), op_flops(name, args, kwargs, result))
        if self.counts.calls == before[0]:  # a launcher that goes past the dispatcher
            self.counts.calls, self.counts.nbytes = before[0] + 1, before[1] + one.nbytes
        self.counts.flops += one.flops
        self.counts.ops.append(one)
        return result


def count(call: Callable[[], Any]) -> Counts:
    """Run `call` once and count what it does."""
    counter = _Counter()
    with counter, watched_by(counter):
        call()
    return counter.counts


def launches(call: Callable[[], Any]) -> int:
    """CUDA kernels launched by one `call`, from torch.profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        call()
        torch.cuda.synchronize()
    events = found.profiler.kineto_results.events()
    return sum(_is_kernel(event.name()) for event in events if str(event.device_type()) == "DeviceType.CUDA")


def _is_kernel(name: str) -> bool:
    return not name.startswith(("Memcpy", "Memset", "fastcam.", "ProfilerStep"))


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """Most bytes of tensors alive at a time during `call`, above what was alive before; its result counts.

    CUDA: the caching allocator's statistics. CPU: every allocation and release torch's allocator tells the profiler.
    Memory that libraries take for themselves is not seen.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return int(torch.cuda.max_memory_allocated() - before)
    from torch.profiler import ProfilerActivity, profile

    collecting = gc.isenabled()
    gc.disable()  # what was garbage before is not freed meanwhile
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            kept = call()
            del kept
    finally:
        if collecting:
            gc.enable()
    alive = peak = 0
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
