"""Tests are made of tiny tensors: a second thread costs more to wake than it brings."""
import torch

torch.set_num_threads(1)
