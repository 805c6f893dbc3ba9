"""The fast scans against the naive recurrence on a GPU, and the model there against the model on a CPU."""
import pytest
import torch

from model import LM, Config
from scan import SCANS, SELECTIVE_SCANS, SSDS, scan, selective_scan, ssd

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
on_gpu = pytest.mark.parametrize("device", ["cuda"])
every_length = pytest.mark.parametrize("l", [1, 2, 3, 7, 8, 31, 64, 100, 257, 1000])
F64 = torch.float64
b, d, n, nh, p, g = 2, 37, 5, 6, 7, 3


def fast(table):
    """Every path but the definition, by whatever names there are."""
    return pytest.mark.parametrize("impl", ["auto"] + [name for name in table if name != "naive"])


def scan_inputs(l):
    return [torch.rand(b, l, d), torch.randn(b, l, d), torch.randn(b, d)]


def selective_scan_inputs(l):
    return [torch.randn(b, l, d), torch.rand(b, l, d) * 0.5, -torch.rand(d, n) * 3, torch.randn(b, l, n),
            torch.randn(b, l, n), torch.randn(d), torch.randn(b, d, n)]


def ssd_inputs(l):
    return [torch.randn(b, l, nh, p), torch.rand(b, l, nh) * 0.5, -torch.rand(nh) * 3, torch.randn(b, l, g, n),
            torch.randn(b, l, g, n), torch.randn(nh), torch.randn(b, nh, p, n)]


both_models_scans = pytest.mark.parametrize("f, make, impl", [
    (f, make, impl)
    for f, make, table in ((selective_scan, selective_scan_inputs, SELECTIVE_SCANS), (ssd, ssd_inputs, SSDS))
    for impl in ["auto", *table] if impl != "naive"])


def values_and_gradients(f, tensors, impl):
    """Outputs of f and the gradients of a fixed random functional of all of them, in float64."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outs = f(*leaves, impl=impl)
    outs = outs if isinstance(outs, tuple) else (outs,)
    gen = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=gen, dtype=F64).to(o.device, o.dtype) for o in outs]
    return [t.double() for t in (*outs, *torch.autograd.grad(outs, leaves, weights))]


def agree(f, tensors, impl, tol):
    """The path against the definition in float64 on the same device: relative norm of every difference."""
    got = values_and_gradients(f, tensors, impl)
    want = values_and_gradients(f, [t.double() for t in tensors], "naive")
    for i, (a, w) in enumerate(zip(got, want, strict=True)):
        assert a.device == tensors[0].device and a.isfinite().all()
        assert (a - w).norm() <= tol * w.norm(), f"output or gradient {i}: {(a - w).norm() / w.norm():.1e}"


@on_gpu
@every_length
@fast(SCANS)
def test_scan_against_the_naive_recurrence(impl, l, device):
    """Values and gradients to a, b, h0."""
    torch.manual_seed(l)
    tensors = [t.to(device) for t in scan_inputs(l)]
    agree(scan, tensors, impl, 1e-5)


@on_gpu
@every_length
@fast(SELECTIVE_SCANS)
def test_selective_scan_against_the_naive_recurrence(impl, l, device):
    """y, last state, and gradients to x, dt, A, B, C, D, h0 through both; with D and h0 and without."""
    torch.manual_seed(l)
    tensors = [t.to(device) for t in selective_scan_inputs(l)]
    agree(selective_scan, tensors, impl, 1e-5)
    agree(selective_scan, tensors[:5], impl, 1e-5)


@on_gpu
@every_length
@fast(SSDS)
def test_ssd_against_the_naive_recurrence(impl, l, device):
    torch.manual_seed(l)
    tensors = [t.to(device) for t in ssd_inputs(l)]
    agree(ssd, tensors, impl, 1e-5)
    agree(ssd, tensors[:5], impl, 1e-5)


@on_gpu
@both_models_scans
def test_bfloat16_inputs_lose_no_more_than_their_own_digits(f, make, impl, device):
    """bfloat16 keeps 8 bits, 0.4 % a number; the state in between is float32."""
    torch.manual_seed(0)
    tensors = [t.to(device) for t in make(257)]
    tensors = [t.bfloat16() if i in (0, 1, 3, 4) else t for i, t in enumerate(tensors)]  # x, dt, B, C
    y, h = f(*tensors, impl=impl)
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
    agree(f, tensors, impl, 1e-2)


@on_gpu
@both_models_scans
def test_any_split_gives_the_whole_sequence(f, make, impl, device):
    torch.manual_seed(0)
    x, dt, A, B, C, D, h0 = (t.to(device) for t in make(100))
    y, h = f(x, dt, A, B, C, D, h0, impl)
    for cut in (1, 31, 64):
        y1, h1 = f(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D, h0, impl)
        y2, h2 = f(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D, h1, impl)
        for got, want in ((torch.cat([y1, y2], 1), y), (h2, h)):
            assert (got - want).norm() <= 1e-5 * want.norm()


@on_gpu
@pytest.mark.parametrize("layers", [("mamba",) * 2, ("mamba2",) * 2, ("attention+mlp",) * 2,
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
    assert got.device.type == torch.device(device).type and (got.cpu() - want).norm() <= 1e-4 * want.norm()
    for a, w in zip(torch.autograd.grad(got.square().mean(), list(model.parameters())), grads, strict=True):
        assert (a.cpu() - w).norm() <= 1e-3 * w.norm()
    state, parts = None, []
    for piece in tokens.tensor_split([1, 2, 40, 99], dim=1):
        logits, state = model(piece, state)
        parts.append(logits)
    assert (torch.cat(parts, 1).cpu() - want).norm() <= 1e-4 * want.norm()
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        got, _ = model(tokens)
    assert (got.float().cpu() - want).norm() <= 0.05 * want.norm()
