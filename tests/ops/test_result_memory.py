"""Memory of large results: reused when nothing refers to it any more, never before, and within its limit."""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fastcam import _extension, ops

pytestmark = pytest.mark.skipif(_extension.why_not() is not None, reason="extension not built")
MIB = 2**20
SIDE = 1024  # 4 MiB a map


def maps(count: int, value: float = 1.0, normalize: bool = False) -> torch.Tensor:
    """`count` maps of 4 MiB, all `value`."""
    features = torch.full((1, 1, 2, 2), value)
    return ops.cam_map(features, torch.ones(1, count, 1), normalize=normalize, size=(SIDE, SIDE))


def pool() -> dict[str, int]:
    return _extension.load().result_pool()


PREPARED = f"import torch, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
PREPARED += "from test_result_memory import maps, pool, MIB\n"
#: Forks for each line it reads: torch is imported once; fastcam, which reads the setting once, in every child.
FORKING = """
import json, os, sys, traceback, torch
torch.set_num_threads(1)
for line in sys.stdin:
    code, environment, place = json.loads(line)
    child = os.fork()
    if not child:
        for number in (1, 2):
            os.dup2(os.open(f"{place}.{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(environment)
        status = 0
        try:
            exec(code, {})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Runs code where fastcam was not imported before: (exit status, output, errors)."""
    place = tmp_path_factory.mktemp("fresh") / "output"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

    def run(code: str, **environment: str) -> tuple[int, str, str]:
        print(json.dumps([PREPARED + code, environment, str(place)]), file=process.stdin, flush=True)
        status = int(process.stdout.readline())
        return status, *(Path(f"{place}.{number}").read_text() for number in (1, 2))

    with subprocess.Popen([sys.executable, "-c", FORKING], env=unset(), **pipes) as process:
        yield run


@pytest.fixture
def output(fresh):
    """What code prints that ends well."""

    def run(code: str, **environment: str) -> str:
        status, text, errors = fresh(code, **environment)
        assert status == 0, errors
        return text.strip()

    return run


def unset() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "FASTCAM_RESULT_POOL"}


def test_memory_of_a_dead_result_is_used_again():
    first = maps(3)
    where = first.data_ptr()
    del first
    idle = pool()["idle"]
    assert idle >= 12 * MIB
    second = maps(3, 2.0)
    assert second.data_ptr() == where
    assert pool()["idle"] <= idle - 12 * MIB  # what other tests left may have been given back meanwhile
    assert (second == 2).all()


def test_memory_is_used_by_nothing_else_while_any_view_of_it_lives():
    first = maps(3)
    where = first.data_ptr()
    views = [first[0, 1, 5:7], first.numpy()[0, 2], first.detach().flatten(), first.untyped_storage()]
    del first
    while views:
        other = maps(3, 7.0)
        assert other.data_ptr() != where
        view = views.pop()
        values = torch.empty(0).set_(view) if isinstance(view, torch.UntypedStorage) else view
        assert float(values.max()) == 1.0
        del other, view, values
        gc.collect()
    assert where in [result.data_ptr() for result in [maps(3) for _ in range(3)]]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 3, 2, 0)])
def test_results_in_any_order_of_dimensions_are_served(order):
    back = sorted(range(4), key=order.__getitem__)
    x = torch.ones(2, 16, 300, 301).permute(order).contiguous().permute(back)
    for like in (x, x[:, :14]):
        first = ops.relevance_divide(like, like, None, 0.0)
        where = first.data_ptr()
        assert first.stride() == torch.empty_like(like).stride()
        assert (first == 1).all()
        del first
        assert ops.relevance_divide(like, like).data_ptr() == where


def test_small_results_and_poor_fits_are_not_served():
    before = pool()
    small = maps(1)
    del small
    assert pool() == before
    large = maps(6)
    where = large.data_ptr()
    del large
    assert maps(2).data_ptr() != where  # less than half of it
    assert maps(3).data_ptr() == where or before["blocks"] > 0  # half of it, unless an older block fits better


def test_results_of_different_size_are_best_fits(output):
    code = (
        "kept = [maps(n) for n in (4, 3, 5)]; places = [m.data_ptr() for m in kept]; del kept\n"
        "print([maps(n).data_ptr() == place for n, place in zip((4, 3, 5), places)])\n"
        "print(pool()['blocks'], pool()['idle'] // MIB)\n"
        "a = maps(2); print(a.data_ptr() == places[1], pool()['blocks'])"
    )
    assert output(code).splitlines() == ["[True, True, True]", "3 48", "True 2"]


def test_the_limit_holds_and_the_oldest_goes_first(output):
    code = (
        "kept = [maps(2) for _ in range(6)]; places = [m.data_ptr() for m in kept]\n"
        "while kept: kept.pop(0)\n"
        "print(pool()['blocks'], pool()['idle'] // MIB, pool()['limit'] // MIB)\n"
        "again = [maps(2) for _ in range(2)]\n"
        "print([m.data_ptr() for m in again] == places[:3:-1])\n"
        "del again; big = maps(7); del big; print(pool()['blocks'])"
    )
    assert output(code, FASTCAM_RESULT_POOL="20").splitlines() == ["2 16 20", "True", "2"]


def test_it_can_be_switched_off_and_has_a_default(output):
    code = "m = maps(5); del m; print(*(v // MIB for v in pool().values()), torch.isfinite(maps(2)).all().item())"
    assert output(code, FASTCAM_RESULT_POOL="0") == "0 0 0 True"
    assert sorted(output(code).split()) == sorted(["512", "20", "0", "True"])
    assert sorted(output(code, FASTCAM_RESULT_POOL="").split()) == sorted(["512", "20", "0", "True"])


@pytest.mark.parametrize("value", ["-1", "many", "99999999999"])
def test_wrong_settings_are_refused(fresh, value):
    status, _, errors = fresh("pool()", FASTCAM_RESULT_POOL=value)
    assert status != 0
    assert f"FASTCAM_RESULT_POOL must be a whole number of MiB, got '{value}'" in errors


def test_the_setting_is_reported(output):
    code = "import fastcam; print(fastcam.backends()['environment'].get('FASTCAM_RESULT_POOL'))"
    assert output(code, FASTCAM_RESULT_POOL="64") == "64"
    assert _extension.load().build_config()["result_pool"]["limit"] == pool()["limit"]


def test_uninitialised_memory_is_poisoned_where_torch_poisons():
    """Else tests could not tell that an element of a pooled result was left unwritten (tests/conftest.py)."""
    features, weights = torch.ones(1, 1, 2, 2), torch.ones(1, 3, 1)
    for poisoning, expected in ((True, 3), (False, 0)):  # maps, raw and the flags
        torch.use_deterministic_algorithms(poisoning, warn_only=True)
        for size in ((SIDE, SIDE), (8, 8)):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                torch.ops.fastcam.cam_map.with_raw(features, weights, None, True, False, size)
            assert [event.name for event in profile.events()].count("aten::fill_") == expected


def test_results_are_ordinary_tensors():
    made = maps(3, 4.0)
    assert made.is_contiguous()
    assert not made.is_pinned()
    assert made.untyped_storage().nbytes() == 12 * MIB
    clone = made.clone()
    assert clone.data_ptr() != made.data_ptr()
    assert torch.equal(pickle.loads(pickle.dumps(made)), clone)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    assert torch.equal(torch.load(file), clone)
    array = made.numpy()
    made[0, 0, 0, 0] = 5
    assert array[0, 0, 0, 0] == 5
    grown = maps(3, 4.0).resize_(4, SIDE, SIDE)
    assert (grown[:3] == 4).all()
    grown.set_()
    swapped = maps(3, 6.0)
    swapped.data = clone
    assert torch.equal(torch.from_dlpack(made), made)


def test_results_move_to_shared_memory():
    made = maps(3, 4.0)
    where, idle = made.data_ptr(), pool()["idle"]
    made.share_memory_()
    assert made.is_shared()
    assert made.data_ptr() != where
    assert (made == 4).all()
    assert pool()["idle"] >= min(idle + 12 * MIB, pool()["limit"] - 12 * MIB)


def test_results_survive_threads():
    """Each thread sees its own values however results and their deaths interleave."""
    wrong = []

    def work(seed: int) -> None:
        kept: list[tuple[float, torch.Tensor]] = []
        for step in range(20):
            value = float(seed * 100 + step)
            kept.append((value, maps(2 + step % 3, value)))
            if len(kept) > 3:
                kept.pop(step % 3)
            wrong.extend(v for v, result in kept if not (result == v).all())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool()["idle"] <= pool()["limit"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_results_survive_fork_and_exit():
    """A child uses and drops its parent's results; the last ones die after the interpreter has."""
    code = (
        "import os\n"
        "torch.set_num_threads(1)\n"
        "kept = maps(3, 2.0); dead = maps(3); del dead\n"
        "child = os.fork()\n"
        "ok = (maps(3, 5.0) == 5).all() and (kept == 2).all()\n"
        "if child == 0:\n"
        "    del kept; os._exit(0 if ok else 1)\n"
        "print(os.waitpid(child, 0)[1], ok.item())\n"
        "torch.kept_to_the_end = kept; sys.kept_too = maps(3)"
    )
    command = [sys.executable, "-c", PREPARED + code]  # its own process: one that ends as processes do
    done = subprocess.run(command, env=unset(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0 True"
