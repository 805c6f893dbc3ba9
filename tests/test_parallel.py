"""One long sequence on several machines (LASP-2, 2502.07563): the scan's carry is the network's only message."""
import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.nn.functional import all_gather

from conftest import all_close
from scan import scan, ssd

LENGTHS = [9, 4]  # of the two processes' parts


def whole():
    """x, dt, A, B, C of the whole sequence, and the weights of its loss."""
    gen = torch.Generator().manual_seed(0)
    shapes = (2, 13, 6, 3), (2, 13, 6), (6,), (2, 13, 2, 5), (2, 13, 2, 5), (2, 13, 6, 3)
    x, dt, A, B, C, weight = (torch.randn(s, generator=gen, dtype=torch.float64) for s in shapes)
    return [x, dt.abs(), -A.abs(), B, C, weight]


def gradients(f, leaves, weight):
    """y = f(leaves), and its weighted sum's gradients."""
    leaves = [t.clone().requires_grad_() for t in leaves]
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), leaves)]


def part_of_ssd(x, dt, A, B, C):
    """ssd of this process's part of a sequence, from the state in which the parts before it end.

    Every process tells the others where its part goes from zero, and by how much it forgets:
    b nh (p n + 1) numbers. h0 is the scan of these over the processes before this one.
    """
    _, h = ssd(x, dt, A, B, C)
    decay = torch.exp((dt * A).sum(1))[..., None, None]
    hs, decays = (torch.stack(all_gather(t), dim=1) for t in (h, decay))  # (b, processes, ...)
    states = torch.cat([torch.zeros_like(hs[:, :1]), scan(decays, hs, impl="naive")], dim=1)
    return ssd(x, dt, A, B, C, h0=states[:, dist.get_rank()])[0]


def process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                            timeout=datetime.timedelta(minutes=3))
    *leaves, weight = (t if t.ndim == 1 else t.split(LENGTHS, dim=1)[rank] for t in whole())
    torch.save(gradients(part_of_ssd, leaves, weight), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:torch.distributed.nn:FutureWarning")
def test_two_processes_are_one(tmp_path):
    """Values, and gradients that cross from the second part into the first, at 1e-10."""
    other = multiprocessing.spawn(process, (str(tmp_path),), join=False, daemon=True)  # rank 0
    process(1, tmp_path)
    other.join()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    *leaves, weight = whole()
    expected = gradients(lambda *t: ssd(*t)[0], leaves, weight)
    joined = [torch.cat(pair, dim=1) if i != 3 else sum(pair) for i, pair in enumerate(zip(first, second))]
    all_close(joined, expected, "y dx ddt dA dB dC")
