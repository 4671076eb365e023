"""Triton kernels, one module an op, imported as `fastcam.kernels.<op>` by the first call that needs one.

Each module has one entry, `launch(...)`, with the positional arguments and the outputs of the op's schema. It takes
CUDA tensors; CPU tensors only in a process started with `TRITON_INTERPRET=1`. Importing this package imports nothing.
"""

if __name__ == "kernels":
    # On the path of a checkout this folder hides Hugging Face's package. Importing it must work all the same:
    # transformers does so for the version, finds none and goes on without.
    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError("fastcam's kernel sources: import fastcam.kernels ('kernels' is Hugging Face's package)")
