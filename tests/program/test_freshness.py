"""Freshness: a key changes exactly when the tensor does, whichever way it was written."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch

from fastcam import _extension
from fastcam.program.freshness import Freshness

needs_cpp = pytest.mark.skipif(_extension.why_not() is not None, reason="extension not built")

WAYS = ["hash", "copy"] if _extension.why_not() is None else ["copy"]
SHAPES = [(3,), (64, 3, 7, 7), (101, 67), (5000,), (8193,)]


@pytest.fixture(params=WAYS)
def freshness(request):
    """With the extension's hash, and by comparison with a copy as without it."""
    made = Freshness()
    made._hashing = request.param == "hash"
    return made


def tensors(dtype: torch.dtype) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {i: torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(SHAPES)}
    made[len(made)] = torch.randn(9001, generator=generator).to(dtype)[1:]  # an odd storage offset
    made[len(made)] = torch.ones(6000, dtype=dtype)
    made[len(made)] = torch.randn(90, 70, generator=generator).to(dtype).t()
    return made


def touch_last(t: torch.Tensor) -> None:
    t.data[-1] = 7.5


def double(t: torch.Tensor) -> None:
    t.data.mul_(2)


def reverse(t: torch.Tensor) -> None:
    t.data.copy_(t.data.flip(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", [touch_last, double, reverse])
def test_writes_through_data_are_seen(freshness, dtype, change):
    kept = tensors(dtype)
    before = freshness.keys(kept)
    assert freshness.keys(kept) == before
    for index, tensor in kept.items():
        if change is reverse and tensor.eq(tensor.flip(0)).all():
            continue
        change(tensor)
        after = freshness.keys(kept)
        assert after[index] != before[index], (index, tensor.shape)
        assert freshness.keys(kept) == after
        before = after


def test_a_large_tensor_does_not_make_others_new(freshness):
    kept = tensors(torch.float32)
    before = freshness.keys(kept)
    kept[3].data.mul_(2)
    after = freshness.keys(kept)
    assert [index for index in kept if after[index] != before[index]] == [3]


def test_swapped_filters_and_flipped_signs_are_seen(freshness):
    weight = torch.randn(512, 16, 1, 1, dtype=torch.float64)
    before = freshness.keys({0: weight})
    weight.data[[1, 2]] = weight.data[[2, 1]]
    after = freshness.keys({0: weight})
    assert after != before
    weight.data.neg_()
    assert freshness.keys({0: weight}) != after


def test_nan_is_not_news(freshness):
    kept = {0: torch.full((10,), torch.nan), 1: torch.full((9000,), torch.nan)}
    assert freshness.keys(kept) == freshness.keys(kept)


def changed(freshness: Freshness, tensor: torch.Tensor) -> bool:
    """Whether the tensor's key differs from that at the last call."""
    before = getattr(freshness, "before", None)
    freshness.before = freshness.keys({0: tensor})
    return freshness.before != before


@pytest.mark.parametrize("count", [1, 7, 65, 130])
def test_every_bit_is_seen(freshness, count):
    """Lengths below, at and beyond the 256 bytes that the hash reads at once, and odd remainders."""
    bits = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    tensor, writable = bits.view(torch.float32), bits.numpy()
    assert changed(freshness, tensor)
    for word in range(count):
        for bit in range(32):
            writable[word] ^= -(2**31) if bit == 31 else 1 << bit  # behind the version counter's back
            assert changed(freshness, tensor), (word, bit)
    assert not changed(freshness, tensor)


@needs_cpp
def test_single_bits_and_swaps_in_zeros_give_distinct_hashes():
    """64 KiB of zeros and a bit: 2^-64 for each of the pairs leaves no room for an accident."""
    hashes = set()
    words = torch.zeros(16384 + 100, dtype=torch.int32)
    for word in [*range(300), *range(16200, 16484)]:
        for bit in (0, 1, 15, 16, 30):
            words[word] = 1 << bit
            hashes.add(hashed(words))
            words[word] = 0
    assert len(hashes) == 584 * 5


def hashed(tensor: torch.Tensor) -> int:
    return _extension.load().fingerprints([(tensor.data_ptr(), tensor.nbytes)])[0]


@pytest.mark.parametrize(
    ("size", "distance"),
    [(1, 1), (1, 2), (2, 2), (1, 64), (2, 128), (64, 64), (16384, 16384), (16384, 32768), (5, 20000)],
    ids=lambda value: str(value),
)
def test_swaps_are_seen(freshness, size, distance):
    """Words, lanes, stretches and whole blocks of the hash, exchanged."""
    tensor = torch.randn(60000, generator=torch.Generator().manual_seed(0))
    writable = tensor.numpy()
    assert changed(freshness, tensor)
    for start in (0, 3, 4096):
        first, second = slice(start, start + size), slice(start + distance, start + distance + size)
        kept = writable[first].copy()
        writable[first] = writable[second]
        writable[second] = kept
        assert changed(freshness, tensor), start


def test_rows_swapped_in_any_type_are_seen(freshness):
    for dtype in (torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.complex128):
        tensor = torch.randn(64, 9, generator=torch.Generator().manual_seed(0)).relu().mul(3).to(dtype)
        assert changed(freshness, tensor)
        tensor.data[[3, 40]] = tensor.data[[40, 3]]
        assert changed(freshness, tensor), dtype


def test_signs_of_zero_and_payloads_of_nan_are_seen(freshness):
    for width, integers in ((torch.float32, torch.int32), (torch.float64, torch.int64), (torch.bfloat16, torch.int16)):
        tensor = torch.zeros(33, dtype=width)
        writable = tensor.view(integers).numpy()
        assert changed(freshness, tensor)
        writable[20] = torch.iinfo(integers).min  # -0.0
        assert changed(freshness, tensor), width
        writable[20] = nan = int(torch.tensor(torch.nan, dtype=width).view(integers))
        assert changed(freshness, tensor), width
        assert not changed(freshness, tensor), width
        writable[20] = nan + 1
        assert tensor.isnan()[20]
        assert changed(freshness, tensor), width


def test_empty_tensors_and_scalars(freshness):
    assert changed(freshness, torch.empty(0))
    empty = torch.empty(0, 3)
    assert freshness.keys({0: empty, 1: empty}) == freshness.keys({0: empty, 1: empty})
    scalar = torch.tensor(3)
    assert changed(freshness, scalar)
    assert not changed(freshness, scalar)
    scalar.data += 1
    assert changed(freshness, scalar)
    assert freshness.keys({}) == {}


def test_tensors_of_any_layout(freshness):
    """Every element of it is seen, and nothing beside it."""
    whole = torch.randn(6, 8, 5, 4, generator=torch.Generator().manual_seed(0))
    views = {
        "channels_last": whole.clone().to(memory_format=torch.channels_last),
        "sliced": whole.clone()[:, 1:5],
        "stepped": whole.clone()[..., ::2],
        "expanded": whole.clone()[:, :1].expand(6, 8, 5, 4),
        "expanded slice": whole.clone()[:, :1, ::2].expand(6, 8, 3, 4),
        "transposed slice": whole.clone()[2].mT[1:],
        "offset": whole.clone()[3],
    }
    for name, view in views.items():
        assert changed(freshness, view)
        memory = torch.as_strided(view, (view.untyped_storage().nbytes() // 4,), (1,), 0).numpy()
        inside = {int(offset) for offset in offsets(view).flatten()}
        for place in range(len(memory)):
            memory[place] += 1
            assert changed(freshness, view) == (place in inside), (name, place)


def offsets(view: torch.Tensor) -> torch.Tensor:
    """Where in its storage each element lies."""
    count = view.untyped_storage().nbytes() // view.element_size()
    return torch.arange(count).as_strided(view.shape, view.stride(), view.storage_offset())


@needs_cpp
def test_conjugation_is_seen():
    tensor = torch.randn(5, dtype=torch.complex64)
    freshness = Freshness()
    assert freshness.keys({0: tensor}) != freshness.keys({0: tensor.conj()})


HASHES = """
import torch
from fastcam import _extension
bytes_ = torch.randint(0, 256, (1_200_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
sizes = [0, 1, 4, 255, 256, 257, 4096, 65535, 65536, 65537, 131072, 600_001, *range(600, 60_000, 997)]
for threads in (1, 2, 4):
    torch.set_num_threads(threads)
    for offset in (0, 1, 6, 64):
        runs = [(bytes_.data_ptr() + offset, size) for size in sizes]
        print(offset, *_extension.load().fingerprints(runs))
"""


@needs_cpp
def test_hashes_depend_on_neither_threads_nor_instruction_set():
    found = []
    for isa in ("default", "avx2", "avx512"):
        environment = {**os.environ, "FASTCAM_CPU_ISA": isa}
        done = subprocess.run(
            [sys.executable, "-c", HASHES], env=environment, capture_output=True, text=True, check=True
        )
        lines = done.stdout.splitlines()
        assert lines[:4] == lines[4:8] == lines[8:]
        found.append(lines[:4])
    assert found[0] == found[1] == found[2]
    assert len(set(found[0][0].split())) == len(found[0][0].split())


@needs_cpp
def test_hashes_of_similar_contents_are_evenly_spread():
    """Each of the 64 bits changes for about half of 4000 one-word changes: 2000 with a deviation of 32."""
    generator = random.Random(0)
    tensor = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    base, counts = hashed(tensor), [0] * 64
    writable = tensor.numpy()
    for _ in range(4000):
        place = generator.randrange(3000)
        kept = writable[place]
        writable[place] = -kept
        difference = hashed(tensor) ^ base
        writable[place] = kept
        for bit in range(64):
            counts[bit] += difference >> bit & 1
    assert all(abs(count - 2000) < 6 * 32 for count in counts), counts
