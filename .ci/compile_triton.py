"""Compile every Triton kernel for real GPUs on a machine without one, and fail where a kernel spills registers.

    PYTHON .ci/compile_triton.py [sm ...] [op ...]        # default: 90, all ops

The launchers run on CPU tensors with each launch replaced by a compilation, so signatures, specialisations and
configurations are those of real calls. Values are the interpreter suite's business. Cost: about a second a kernel.
"""

import contextlib
import importlib
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia

# ptxas at times keeps a few loop invariants in local memory to fit one more block on a multiprocessor; a tile that is
# too large for the register file spills hundreds of bytes.
SPILL_LIMIT = 64  # bytes a thread
ROOT = Path(__file__).resolve().parent.parent
PTXAS = Path(nvidia.__file__).parent / "bin" / "ptxas"


class Device:
    """The few questions Triton's compiler asks a driver."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, _device):
        return 0


class Compiling:
    """Stands in for a kernel: `kernel[grid](...)` compiles, reports and launches nothing."""

    seen: ClassVar[set[str]] = set()
    worst: ClassVar[dict[str, int]] = {}
    spills: ClassVar[dict[str, int]] = {}

    def __init__(self, kernel, capability):
        self.kernel, self.capability = kernel, capability

    def __getitem__(self, grid):
        def compile(*args, **kwargs):
            self.call = {**kwargs, "dtype": args[0].dtype}
            compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
            ptx = compiled.asm["ptx"]
            key = f"{self.capability}{compiled.hash}"
            if key not in self.seen:
                self.seen.add(key)
                self.report(ptx)

        return compile

    def report(self, ptx):
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
            source.write(ptx)
            source.flush()
            architecture = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
            command = [PTXAS, "-v", f"--gpu-name={architecture}", source.name, "-o", "/dev/null"]
            log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        name = f"{self.kernel.__module__.rsplit('.', 1)[1]}.{self.kernel.__name__} sm_{self.capability}"
        registers = int(re.search(r"Used (\d+) registers", log)[1])
        self.worst[name] = max(self.worst.get(name, 0), registers)
        spilled = max(int(n) for n in re.findall(r"(\d+) bytes spill", log))
        self.spills[name] = max(self.spills.get(name, 0), spilled)
        if spilled > SPILL_LIMIT:
            sys.exit(f"{name} spills registers in {self.call}:\n{log}")


def cam_map_calls():
    """Every row of the config table in every dtype, with and without each option that changes the code."""
    shapes = ((2, 256, 7, 7), (2, 64, 28, 28))
    for dtype, shape, last in itertools.product(DTYPES, shapes, (False, True)):
        b, k = shape[:2]
        f = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last if last else torch.contiguous_format)
        yield (f, torch.empty(b, k, dtype=acc(dtype)), None, True, True, [32, 48]), {}
        yield (f, torch.empty(b, 5, k, dtype=acc(dtype)), f[:1], False, True, None), {}
        yield (f, f, None, True, False, [5, 5]), {}


def channel_weights_calls():
    shapes = ((2, 256, 7, 7), (2, 64, 14, 14), (2, 64, 28, 28), (1, 16, 96, 96))
    for dtype, shape, last, mode in itertools.product(DTYPES, shapes, (False, True), MODES):
        f = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last if last else torch.contiguous_format)
        yield (f, f, f[:1] if mode == "sum" else None, mode), {}


def impute_linear_calls():
    for dtype, channels in itertools.product(DTYPES, (1, 3)):
        yield (torch.empty(2, channels, 224, 224, dtype=dtype), torch.empty(2, 224, 224, dtype=torch.bool)), {}


def mask_by_features_calls():
    """Every option that changes the code, for images of one channel and of more."""
    for dtype, channels, last, first in itertools.product(DTYPES, (1, 3), (False, True), (False, True)):
        memory_format = torch.channels_last if last else torch.contiguous_format
        x = torch.empty((2, channels, 224, 224), dtype=dtype, memory_format=memory_format)
        f = torch.empty((2, 64, 14, 14), dtype=dtype, memory_format=memory_format)
        order = "minmax_then_resize" if first else "resize_then_minmax"
        noise = torch.empty(5, 224, 224, dtype=dtype)
        yield (x, f, 3, 5), {"noise": noise.to(acc(dtype)) if first else None, "order": order}
        yield (x, f.to(acc(dtype)), 3, 5), {"noise": None if first else noise, "order": order}


def rescale_multipliers_calls():
    for dtype, slope in itertools.product(DTYPES, (0.0, 0.01)):
        u = torch.empty(4, 64, 14, 14, dtype=dtype)
        for g in (u, u.to(acc(dtype))):
            yield (g, u, u, slope), {}
            yield (g, u, u[:1], slope), {}


def relevance_tensors():
    """Long runs and short ones, as images and as pixels."""
    for dtype, shape, last in itertools.product(DTYPES, ((4, 64, 28, 28), (4, 16, 3, 3)), (False, True)):
        x = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last if last else torch.contiguous_format)
        yield x, torch.cat([x, x, x]), torch.empty(shape[0], 2, dtype=acc(dtype))


def relevance_divide_calls():
    for x, _, _ in relevance_tensors():
        yield (x, x), {}
        yield (x, x, x, 0.0), {}


def relevance_add_calls():
    for x, _, _ in relevance_tensors():
        yield (x, x, x), {}
        yield (x, x, x, x, 0.0), {}


def relevance_split_calls():
    for (x, _, _), rule in itertools.product(relevance_tensors(), ("alpha_beta", "gamma", "rap")):
        yield (x, x, x), {"rule": rule}
        yield (x, x, x, x), {"rule": rule}


def relevance_budgets_calls():
    for x, _, _ in relevance_tensors():
        yield (x,), {}


def overlay_calls():
    for dtype, last, wide, signed in itertools.product(DTYPES, *[(False, True)] * 3):
        memory_format = torch.channels_last if last else torch.contiguous_format
        x = torch.empty(2, 3, 224, 224, dtype=dtype, memory_format=memory_format)
        maps = torch.empty(2, 5, 224, 224, dtype=acc(dtype) if wide else dtype)
        yield (x, maps, torch.empty(256, 3, dtype=acc(dtype)), 0.8, signed), {"mean": [0.5], "std": [0.5]}


def perturb_by_rank_calls():
    for dtype, last, plain, keep in itertools.product(DTYPES[:2] + DTYPES[3:], *[(False, True)] * 3):
        memory_format = torch.channels_last if last else torch.contiguous_format
        x = torch.empty(2, 3, 224, 224, dtype=dtype, memory_format=memory_format)
        for ranks in (torch.int32, torch.int64):
            order, counts = torch.empty(2, 224, 224, dtype=ranks), torch.empty(50, dtype=torch.int64)
            yield (x, x[:1, :, :1, :1] if plain else x, order, counts), {"keep": keep}


def relevance_equilibrium_calls():
    for x, thrice, budgets in relevance_tensors():
        yield (x, budgets, thrice), {}


def relevance_combine_calls():
    for (x, thrice, budgets), shift in itertools.product(relevance_tensors(), (True, False)):
        yield (x, thrice, budgets, shift), {}


def similarity_weights_calls():
    """Long rows and short ones, whole packs and partial ones."""
    for dtype, channels, term in itertools.product(DTYPES, (64, 2048, 2051), TERMS):
        x = torch.empty(4, channels, dtype=dtype)
        for weighting in ("minmax", "ratio", "raw"):
            yield (x[:1], x, term, weighting), {}


def lfi_tensors():
    """Every tile, with importances and grey of either dtype."""
    shapes = ((2, 64, 7, 7), (2, 64, 14, 14), (2, 64, 28, 28))
    for dtype, shape, last, wide in itertools.product(DTYPES, shapes, (False, True), (False, True)):
        b, k, h, w = shape
        f = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last if last else torch.contiguous_format)
        kind = acc(dtype) if wide else dtype
        yield (
            f,
            torch.empty(b, 1, h, w, dtype=kind),
            torch.empty(b, k, dtype=kind),
            torch.empty(b, 1, h, w, dtype=acc(dtype)),
        )


def lfi_mask_calls():
    for f, grey, _, _ in lfi_tensors():
        yield (f, grey), {}


def lfi_mask_backward_calls():
    for f, grey, _, _ in lfi_tensors():
        yield (f, f, grey), {}


def lfi_attend_calls():
    for (f, _, s, _), constant_map in itertools.product(lfi_tensors(), ("raw", "zeros")):
        yield (f, s, constant_map), {}


def lfi_attend_backward_calls():
    for (f, _, s, m), constant_map, given in itertools.product(lfi_tensors(), ("raw", "zeros"), (False, True)):
        yield (f, m if given else None, None if given else m, f, s, m, m, constant_map), {}


LAUNCHED = (
    "_reduce", "_collect", "_write", "_finish", "_measure", "_multiply", "_rescale", "_divide", "_divide_among",
    "_split", "_add_chunk", "_equilibrium", "_count", "_combine", "_mask", "_mask_gradient", "_scale", "_raise",
    "_map_gradient", "_share_out", "_weigh_similarity", "_perturb", "_overlay", "_impute",
)  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MODES = ("mean", "sum", "xgrad", "grad_cam_pp")
TERMS = ("cosine", "dot", "neg_sq", "cross", "inverse")
CALLS = {
    "cam_map": cam_map_calls,
    "channel_weights": channel_weights_calls,
    "impute_linear": impute_linear_calls,
    "mask_by_features": mask_by_features_calls,
    "overlay": overlay_calls,
    "perturb_by_rank": perturb_by_rank_calls,
    "rescale_multipliers": rescale_multipliers_calls,
    "relevance_divide": relevance_divide_calls,
    "relevance_add": relevance_add_calls,
    "relevance_split": relevance_split_calls,
    "relevance_budgets": relevance_budgets_calls,
    "relevance_equilibrium": relevance_equilibrium_calls,
    "relevance_combine": relevance_combine_calls,
    "similarity_weights": similarity_weights_calls,
    "lfi_mask": lfi_mask_calls,
    "lfi_mask_backward": lfi_mask_backward_calls,
    "lfi_attend": lfi_attend_calls,
    "lfi_attend_backward": lfi_attend_backward_calls,
}


def acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def main():
    capabilities = [int(a) for a in sys.argv[1:] if a.isdigit()] or [90]
    wanted = [a for a in sys.argv[1:] if not a.isdigit()] or list(CALLS)
    sys.path.insert(0, str(ROOT))
    kernels = {name: importlib.import_module(f"fastcam.kernels.{name}") for name in CALLS}
    launch = importlib.import_module("fastcam.kernels._launch")
    launch.on_device = lambda *_: contextlib.nullcontext()
    real = {
        (module, name): kernel
        for module in kernels.values()
        for name, kernel in vars(module).items()
        if isinstance(kernel, triton.runtime.JITFunction)
    }
    for capability in capabilities:
        triton.runtime.driver.set_active(Device(capability))
        for (module, name), kernel in real.items():
            if name in LAUNCHED:
                setattr(module, name, Compiling(kernel, capability))
        for name in wanted:
            for arguments, options in CALLS[name]():
                kernels[name].launch(*arguments, **options)
    for name, registers in sorted(Compiling.worst.items()):
        print(f"{name:40} at most {registers:3} registers, {Compiling.spills[name]:2} bytes spilled")
    print(f"{len(Compiling.seen)} kernel variants compiled")


if __name__ == "__main__":
    main()
