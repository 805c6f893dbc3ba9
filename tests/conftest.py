"""Tests are made of tiny tensors: a second thread costs more to wake than it brings. And where there is no GPU that
Triton compiles for, it interprets its kernels, if it is told so before scan.py imports it."""
import os
import signal

import pytest
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it, and train.py then does
for name in {"SIGTERM", "SIGHUP"} & {*dir(signal)}:
    signal.signal(getattr(signal, name), signal.SIG_DFL)
GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)  # Triton compiles for it
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")


@pytest.fixture
def corpus(tmp_path):
    """A file of 1,000 bytes; its last 100 validate."""
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"".join(b"%d squared is %d\n" % (i, i * i) for i in range(100))[:1000])
    return path


class Code:
    """Pickles as a call of open: what a malicious checkpoint would do, with something worse than open."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
