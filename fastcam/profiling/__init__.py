"""What attribution costs on a model and a machine: `profile` measures, compares and writes a report.

    report = fastcam.profiling.profile(model, ["lift_cam", "grad_cam"], batch=[1, 8], out="profile")

The same from the command line: `fastcam profile --help`. The tools it measures with (`measure`, `results`) are those of
the project's own benchmarks.
"""

from fastcam.profiling.run import Report, profile

__all__ = ["Report", "profile"]
