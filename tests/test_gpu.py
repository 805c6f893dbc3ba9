"""The fast scans against the naive recurrence on a GPU, and the model there against the model on a CPU."""
import functools

import pytest
import torch
from conftest import GPU

from model import LM, Config
from scan import SCANS, SELECTIVE_SCANS, SSDS, scan, selective_scan, ssd
from test_scan import values_and_gradients

pytestmark = pytest.mark.skipif(not GPU, reason="no CUDA GPU of compute capability 8.0 or higher")
every_length = pytest.mark.parametrize("l", [1, 2, 3, 7, 8, 31, 64, 100, 257, 1000])
b = 2
d = 37
n = 5
nh = 6
p = 7
g = 3


@pytest.fixture
def device():
    """Where there are several, not the current one."""
    return f"cuda:{torch.cuda.device_count() - 1}"


def scan_inputs(l):
    return [torch.rand(b, l, d), torch.randn(b, l, d), torch.randn(b, d)]


def selective_scan_inputs(l, b=b, d=d, n=n, dt=0.5, A=3):
    return [torch.randn(b, l, d), torch.rand(b, l, d) * dt, -torch.rand(d, n) * A,
            torch.randn(b, l, n), torch.randn(b, l, n), torch.randn(d), torch.randn(b, d, n)]


def ssd_inputs(l):
    return [torch.randn(b, l, nh, p), torch.rand(b, l, nh) * 0.5, -torch.rand(nh) * 3,
            torch.randn(b, l, g, n), torch.randn(b, l, g, n), torch.randn(nh),
            torch.randn(b, nh, p, n)]


INPUTS = {scan: scan_inputs, selective_scan: selective_scan_inputs, ssd: ssd_inputs}
PATHS = {scan: SCANS, selective_scan: ["triton", *SELECTIVE_SCANS], ssd: SSDS}


def every_path(*functions):
    """Every path of theirs but the definition, by whatever names there are."""
    return pytest.mark.parametrize("f, impl", [
        (f, impl) for f in functions for impl in ["auto", *PATHS[f]] if impl != "naive"])


def run(f, tensors, impl):
    """Outputs, and gradients to every input through all of them."""
    return values_and_gradients(lambda *t: f(*t, impl=impl), tensors)


def compare(got, want, tol):
    """Relative norm of every difference."""
    for i, (a, w) in enumerate(zip(got, want, strict=True)):
        assert a.device == w.device and a.isfinite().all()
        error = (a.double() - w).norm()
        assert error <= tol * w.norm(), f"output or gradient {i}: {error:.1e} of {w.norm():.1e}"


def agree(f, tensors, impl, tol):
    """The path against the definition in float64 on the same device."""
    want = run(f, [t.double() for t in tensors], "naive")
    compare(run(f, tensors, impl), want, tol)


@functools.cache
def defined(f, l, count, device):
    """The first inputs of f, and what the definition gives: once for all paths, as it is slow."""
    torch.manual_seed(l)
    tensors = [t.to(device) for t in INPUTS[f](l)[:count]]
    return tensors, run(f, [t.double() for t in tensors], "naive")


@every_length
@every_path(scan, selective_scan, ssd)
def test_every_path_against_the_naive_recurrence(f, impl, l, device):
    """Outputs, and gradients to every input through all of them; also without D and h0."""
    for count in (7, 5):
        tensors, want = defined(f, l, count, device)
        compare(run(f, tensors, impl), want, 1e-5)


@every_path(selective_scan, ssd)
def test_bfloat16_inputs_lose_no_more_than_their_own_digits(f, impl, device):
    """bfloat16 keeps 8 bits, 0.4 % a number; the state in between is float32."""
    torch.manual_seed(0)
    tensors = [t.to(device) for t in INPUTS[f](257)]
    narrow = (0, 1, 3, 4)  # x, dt, B, C
    tensors = [t.bfloat16() if i in narrow else t for i, t in enumerate(tensors)]
    agree(f, tensors, impl, 1e-2)


@every_path(selective_scan, ssd)
def test_any_split_gives_the_whole_sequence(f, impl, device):
    torch.manual_seed(0)
    x, dt, A, B, C, D, h0 = (t.to(device) for t in INPUTS[f](100))
    y, h = f(x, dt, A, B, C, D, h0, impl)
    for cut in (1, 31, 64):
        y1, h1 = f(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D, h0, impl)
        y2, h2 = f(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D, h1, impl)
        for got, want in ((torch.cat([y1, y2], 1), y), (h2, h)):
            assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("layers", [("mamba",) * 2, ("mamba2",) * 2, ("mamba3",) * 2, ("attention+mlp",) * 2,
                                    ("mamba2", "attention+mlp", "mamba")])
def test_a_model_gives_the_same_logits_and_gradients_as_on_a_cpu(layers, device):
    """In one pass, and with the state carried on; under bfloat16 autocast to its precision."""
    torch.manual_seed(0)
    model = LM(Config(layers, d_model=64, head_dim=32, window=50)).eval()
    tokens = torch.randint(256, (3, 100))
    want, _ = model(tokens)
    grads = torch.autograd.grad(want.square().mean(), list(model.parameters()))
    model, tokens = model.to(device), tokens.to(device)
    got, _ = model(tokens)
    assert got.device.type == torch.device(device).type
    assert (got.cpu() - want).norm() <= 1e-4 * want.norm()
    got_grads = torch.autograd.grad(got.square().mean(), list(model.parameters()))
    for a, w in zip(got_grads, grads, strict=True):
        assert (a.cpu() - w).norm() <= 1e-3 * w.norm()
    state, parts = None, []
    for piece in tokens.tensor_split([1, 2, 40, 99], dim=1):
        logits, state = model(piece, state)
        parts.append(logits)
    assert (torch.cat(parts, 1).cpu() - want).norm() <= 1e-4 * want.norm()
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        got, _ = model(tokens)
    assert (got.float().cpu() - want).norm() <= 0.05 * want.norm()


# The kernels


@pytest.mark.parametrize("l, d, n, dt, A", [
    (1, 1, 1, 0.5, 3), (2, 3, 2, 0.5, 3), (65, 1536, 16, 0.5, 3), (1000, 130, 64, 0.5, 3),
    (257, 5, 64, 0.5, 3), (130, 37, 20, 20, 3), (130, 37, 16, 20, 1e4), (130, 37, 16, 1e-3, 1e4),
    (3000, 37, 16, 20, 1e-8), (70, 37, 16, 0, 3)])
def test_kernels_at_every_size_and_decay(l, d, n, dt, A, device):
    """Ugly sizes, 64 states, decays from 0 to 1; in outputs and gradients that are full of NaN before."""
    torch.manual_seed(l)
    tensors = [t.to(device) for t in selective_scan_inputs(l, b, d, n, dt, A)]
    junk = [torch.full((size,), float("nan"), device=device) for size in [2**26] + [2**17] * 64]
    # freed, their memory is handed out next; tensors below 1 MB come from blocks of their own
    del junk
    rounded = l * 2**-23 if A < 1e-6 else 0  # the error of l exponentials that are all nearly 1
    agree(selective_scan, tensors, "triton", 1e-5 + rounded)


@pytest.mark.parametrize("l, d, n", [(65536, 32, 16), (5024, 70, 64)])
def test_one_long_sequence_is_cut_and_agrees(l, d, n, device):
    """Batch 1, in pieces, against chunks in float64, which other tests hold to the loop."""
    torch.manual_seed(0)
    tensors = [t.to(device) for t in selective_scan_inputs(l, 1, d, n, dt=0.1)]
    want = run(selective_scan, [t.double() for t in tensors], "chunked")
    compare(run(selective_scan, tensors, "triton"), want, 1e-5)


def test_gradients_are_the_same_bits_every_time(device):
    torch.manual_seed(0)
    tensors = [t.to(device) for t in selective_scan_inputs(1000)]
    first, second = (run(selective_scan, tensors, "triton") for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_more_than_two_to_the_31_numbers(device):
    """Offsets beyond int32: the last rows of x, past 2^31 numbers, and of its gradient, against the same rows alone."""
    if torch.cuda.get_device_properties(device).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    d = 1024
    l = 2**31 // d + 128
    last = 64
    x = torch.randn(1, l, d, device=device, dtype=torch.bfloat16)
    dt = torch.full_like(x, 4.0)
    A = torch.full((d, 2), -3.0, device=device)  # decays of exp(-12), so 64 steps forget all
    B = torch.randn(1, l, 2, device=device, dtype=torch.bfloat16)
    dy = torch.randn_like(x)
    tail = [t[:, -last:].float() if t.ndim == 3 else t for t in (x, dt, A, B, B)]

    def values(x, dt, *rest, dy, impl):
        y, h = selective_scan(x.requires_grad_(), dt.requires_grad_(), *rest, impl=impl)
        return h, y, *torch.autograd.grad(y, (x, dt), dy)

    h, *got = values(x, dt, A, B, B, dy=dy, impl="triton")
    want_h, *want = values(*tail, dy=dy[:, -last:].float(), impl="naive")
    assert (h - want_h).norm() <= 1e-4 * want_h.norm()
    for a, w in zip(got, want, strict=True):
        a = a[:, -32:].float()
        w = w[:, -32:]
        assert (a - w).norm() <= 1e-2 * w.norm()


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_torch_compile_goes_around_the_kernels(impl, device):
    """Inductor, forward and backward."""
    tensors = [t.to(device) for t in selective_scan_inputs(100)]
    f = torch.compile(lambda *t, impl: selective_scan(*t, impl=impl))
    agree(f, tensors, impl, 1e-5)
