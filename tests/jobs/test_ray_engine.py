"""The Ray engine on a local cluster of two workers, one of which is killed at work."""

from __future__ import annotations

import traceback

import pytest

pytest.importorskip("zarr")
ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

from fastcam import jobs  # noqa: E402
from fastcam._testing.jobs import Numbered, tiny  # noqa: E402
from fastcam._testing.kills import same_arrays  # noqa: E402
from fastcam.jobs import ray_engine  # noqa: E402


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error", object_store_memory=80 << 20
    )
    yield
    ray.shutdown()


def test_a_killed_worker_loses_and_doubles_nothing(cluster, tmp_path):
    """Equal to the bit to the local engine's store, though the process at work on item 70 is killed with SIGKILL."""
    model, broken = tiny(), (3, 150)
    jobs.run(model, Numbered(200, broken=broken), tmp_path / "local.zarr", targets="top2")
    died = tmp_path / "died"
    source = Numbered(200, broken=broken, deadly={70: died})
    summary = jobs.run(model, source, tmp_path / "ray.zarr", targets="top2", engine="ray", actors=2, batch_size=16)
    assert died.exists()
    assert (summary.done, summary.failed, summary.exit_code) == (198, 2, 3)
    same_arrays(tmp_path / "local.zarr", tmp_path / "ray.zarr")
    again = jobs.run(model, source, tmp_path / "ray.zarr", targets="top2", engine="ray", resume=True)
    assert (again.processed, again.done) == (0, 198)


def test_the_cause_is_found_in_what_ray_says():
    """Ray hands on the traceback as text, the cause somewhere in it and its own advice at the end."""
    with pytest.raises(ray_engine.WorkerError) as told, ray_engine._told():
        raise OSError(28, "No space left on device", "/a/maps\n.zarr")
    text = "".join(traceback.format_exception(told.value)) + "\nThe above exception ...\nTo see the log, run this\n"
    error = ray.exceptions.RayTaskError("ray::Map", text, told.value, "title", 1, "127.0.0.1")
    assert ray_engine.cause_of(error) == "OSError: [Errno 28] No space left on device: '/a/maps\\n.zarr'"
    other = ray.exceptions.RayError("The worker died.\n\tpid: 7\nIt was out of memory.")
    assert ray_engine.cause_of(other) == "The worker died. pid: 7 It was out of memory."


@pytest.mark.slow
def test_what_stopped_a_worker_is_said(cluster, tmp_path):
    """The list of labels ends too early, which the worker that comes to its end finds out."""
    source = Numbered(200, labels=[0] * 100)
    with pytest.raises(
        jobs.JobError, match=r"^a worker stopped: IndexError: list index out of range; go on with --res"
    ):
        jobs.run(tiny(), source, tmp_path / "a.zarr", targets="labels", engine="ray", actors=1, batch_size=16)
