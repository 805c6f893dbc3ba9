"""Tests are made of tiny tensors: a second thread costs more to wake than it brings. And where there is no GPU Triton
interprets its kernels, if it is told so before scan.py imports it."""
import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
