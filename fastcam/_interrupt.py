"""What Ctrl-C and SIGTERM do to the `fastcam` command: it ends with exit code 130, from its first imports on.

The package imports this module before all others, which is what makes the first seconds safe.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

__all__ = ["CODE", "raised"]

CODE = 130


def _end(*_: Any) -> NoReturn:
    """At once, as nothing is open that must be closed: what a job has done is on the disk."""
    os.write(2, b"fastcam: interrupted\n")
    os._exit(CODE)


def _from_the_start() -> None:
    """Ends this process at either signal, if it is the command; what the shell has ignored stays so."""
    if not _is_command() or threading.current_thread() is not threading.main_thread():
        return
    for number, usual in (signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL):
        if signal.getsignal(number) == usual:
            signal.signal(number, _end)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Either signal raises KeyboardInterrupt; a second one, while what is open is being closed, ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def interrupt(*_: Any) -> None:
        for number in before:
            signal.signal(number, _end)
        raise KeyboardInterrupt

    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_command() -> bool:
    """Whether the process was begun as `fastcam ...` or `python -m fastcam.cli ...`."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    if name == "-m":  # the module's own packages are being imported
        return any(word in ("fastcam.cli", "-mfastcam.cli") for word in sys.orig_argv)
    return name in ("fastcam", "fastcam.exe", "fastcam-script.py")


_from_the_start()
