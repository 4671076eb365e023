if __name__ == "kernels":
    raise ImportError("fastcam's kernel sources: import fastcam.kernels ('kernels' is Hugging Face's package)")

__doc__ = """Triton kernels, one module an op, imported as `fastcam.kernels.<op>` by the first call that needs one.

Each module has one entry, `launch(...)`, with the positional arguments and the outputs of the op's schema. It takes
CUDA tensors; CPU tensors only in a process started with `TRITON_INTERPRET=1`. Importing this package imports nothing.
"""
