"""scan.py against its definition: every path, every length, values and gradients, in float64."""
import math
from types import SimpleNamespace

import pytest
import torch

import scan as module
from conftest import Operations, all_close, close
from scan import SCANS, SELECTIVE_SCANS, discretize, scan, selective_scan

LENGTHS = [1, 2, 3, 7, 8, 31, 64, 100, 257]
F64 = torch.float64
SCANNED = "h da db dh0"  # what values_and_gradients gives of scan
SELECTED = "y h dx ddt dA dB dC dD dh0"  # and of selective_scan
b, d, n = 2, 3, 5  # pairwise distinct primes: a transposed axis cannot pass


def inputs(l, dtype=F64, dt_max=0.5, seed=0):
    """x, dt, A, B, C, D, h0 of a selective scan."""
    torch.manual_seed(seed)
    x, B, C = torch.randn(b, l, d), torch.randn(b, l, n), torch.randn(b, l, n)
    dt, A, D, h0 = torch.rand(b, l, d) * dt_max, -torch.rand(d, n) * 3, torch.randn(d), torch.randn(b, d, n)
    return [t.to(dtype) for t in (x, dt, A, B, C, D, h0)]


def values_and_gradients(f, tensors):
    """Outputs of f and the gradients of a fixed random functional of all of them."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outs = f(*leaves)
    outs = (outs,) if isinstance(outs, torch.Tensor) else outs
    gen = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=gen, dtype=F64).to(o) for o in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, weights)]


# Discretization


def test_all_rules_agree_as_dt_goes_to_zero():
    """Each rule is a first-order approximation of the same flow: differences vanish like dt^2 or faster."""
    A, B = torch.tensor([-0.5, -3.0, 0.0], dtype=F64), torch.tensor([1.0, -2.0, 0.7], dtype=F64)
    for dt in (1e-3, 1e-4):
        exact = discretize(torch.tensor(dt, dtype=F64), A, B, "zoh")
        for rule in ("bilinear", "euler", "mamba"):
            for got, want in zip(discretize(torch.tensor(dt, dtype=F64), A, B, rule), exact):
                assert (got - want).abs().max() < 10 * dt**2


def test_zoh_and_bilinear_of_a_scalar():
    """a = -1/2, dt = 0.1: exp(-0.05), 2 (1 - exp(-0.05)); (1 - 0.025)/(1 + 0.025), 0.1/1.025."""
    dt, A, B = (torch.tensor(v, dtype=F64) for v in (0.1, -0.5, 1.0))
    for rule, *want in (("zoh", 0.951229424501, 0.097541150999), ("bilinear", 0.951219512195, 0.097560975610)):
        got = torch.stack(discretize(dt, A, B, rule))
        close(got, torch.tensor(want, dtype=F64), 1e-11, f"(Abar, Bbar) by {rule}, ")


def test_zoh_holds_at_a_pole_of_zero_with_its_gradient():
    """A = 0: Bbar = dt B, and d Bbar / dA = dt^2 B / 2."""
    A = torch.tensor([0.0, -1e-9], dtype=F64, requires_grad=True)
    Abar, Bbar = discretize(torch.tensor(0.3, dtype=F64), A, torch.tensor(2.0, dtype=F64), "zoh")
    close(Bbar.detach(), torch.full((2,), 0.6, dtype=F64), 1e-8)
    close(torch.autograd.grad(Bbar.sum(), A)[0], torch.full((2,), 0.09, dtype=F64), 1e-6)


def test_zoh_is_exact_near_zero():
    """The series and its limits where exp(z) - 1 loses its digits, on both sides of its bound."""
    z = torch.tensor([0.0, 1e-8, -1e-6, 1e-3, -0.0099, 0.0101, -0.5], dtype=F64, requires_grad=True)
    one = torch.ones_like(z)
    factor = discretize(one, z, one, "zoh")[1]
    slope, = torch.autograd.grad(factor.sum(), z)
    z = z.detach()
    close(factor.detach(), sum(z**k / math.factorial(k + 1) for k in range(18)), 1e-13)
    close(slope, sum((k + 1) * z**k / math.factorial(k + 2) for k in range(18)), 1e-10)


def test_a_trapezoid_is_second_order():
    """Half the step, and the error falls by four, where Mamba's rule only halves it: h' = -h + cos 3t, solved exactly."""
    def error(rule, dt):
        t = torch.arange(round(2 / dt) + 1, dtype=F64) * dt
        Abar, Bbar = discretize(torch.tensor(dt, dtype=F64), -1.0, 1.0, rule)
        x = torch.cos(3 * t)
        inputs = x[1:] + Abar * x[:-1] if rule == "trapezoid" else x[1:]
        h = scan(Abar.expand(1, len(inputs)), (Bbar * inputs)[None], torch.zeros(1, dtype=F64), "naive")[0, -1]
        exact = (torch.cos(3 * t[-1]) + 3 * torch.sin(3 * t[-1]) - torch.exp(-t[-1])) / 10
        return abs(h - exact)
    for rule, factor in (("mamba", 2), ("trapezoid", 4)):
        assert error(rule, 1 / 200) / error(rule, 1 / 400) == pytest.approx(factor, rel=0.02)


def test_gated_rnn_is_the_one_dimensional_case_under_zoh():
    """Mamba theorem 1: A = -1, B = 1, dt = softplus(z) gives h_t = (1 - s(z)) h_{t-1} + s(z) x_t, s the sigmoid."""
    z = torch.linspace(-4, 4, 9, dtype=F64)
    Abar, Bbar = discretize(torch.nn.functional.softplus(z), -torch.ones_like(z), torch.ones_like(z), "zoh")
    close(Abar, 1 - torch.sigmoid(z))
    close(Bbar, torch.sigmoid(z))


def test_but_not_under_the_rule_the_mamba_code_uses():
    """Bbar = dt B is softplus(z), not sigmoid(z): they part as dt grows."""
    z = torch.linspace(-4, 4, 9, dtype=F64)
    Abar, Bbar = discretize(torch.nn.functional.softplus(z), -torch.ones_like(z), torch.ones_like(z), "mamba")
    close(Abar, 1 - torch.sigmoid(z))
    assert (Bbar - torch.sigmoid(z)).abs().max() > 1


# The plain scan


@pytest.mark.parametrize("with_h0", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("l", LENGTHS)
@pytest.mark.parametrize("impl", [name for name in SCANS if name != "naive"])
def test_all_scans_agree_for_every_length(impl, l, dtype, with_h0):
    """Every path computes what the loop computes, h and its gradients to a, b and h0 (the tree: Blelloch 1990)."""
    torch.manual_seed(l)
    tensors = [torch.randn(b, l, d, dtype=dtype) * 0.7, torch.randn(b, l, d, dtype=dtype)]
    tensors += [torch.randn(b, d, dtype=dtype)] * with_h0
    got = values_and_gradients(lambda *t: scan(*t, impl=impl), tensors)
    all_close(got, values_and_gradients(lambda *t: scan(*t, impl="naive"), tensors), SCANNED)


@pytest.mark.parametrize("impl", SCANS)
def test_decay_broadcasts_to_the_input(impl):
    """One decay for a whole row of b; its gradient is the sum of theirs."""
    torch.manual_seed(0)
    a, x = torch.rand(1, 7, 1, dtype=F64), torch.randn(b, 7, d, dtype=F64)
    got = values_and_gradients(lambda a, x: scan(a, x, impl=impl), [a, x])
    want = values_and_gradients(lambda a, x: scan(a.expand(b, 7, d), x, impl="naive"), [a, x])
    assert got[1].shape == a.shape
    all_close(got, want, SCANNED)


def test_a_tree_has_the_depth_and_the_work_of_its_table():
    """The table of section 2: a tree needs 42, 52 and 62 products and sums one after the other for these l, a loop 2 l;
    and it gives a few l numbers in all, not l log l."""
    for l in (256, 1024, 4096):
        with Operations() as seen, torch.no_grad():
            scan(torch.rand(1, l, 1), torch.rand(1, l, 1), impl="parallel")
        sizes = [size for name, size in seen.calls if name.strip("_") in ("mul", "add", "addcmul")]
        assert len(sizes) <= 8 * math.log2(l), f"l = {l}: {len(sizes)} products and sums, one after the other"
        assert sum(sizes) <= 8 * l, f"l = {l}: {sum(sizes)} numbers in products and sums"


def test_gradient_of_a_scan_is_a_reversed_scan():
    """Martin and Cundy 2018, section 2.2: db is the scan of dh from the end, with the decays shifted by one."""
    torch.manual_seed(0)
    a, x, dh = (torch.randn(b, 11, d, dtype=F64) for _ in range(3))
    x.requires_grad_()
    db, = torch.autograd.grad(scan(a, x, impl="naive"), x, dh)
    shifted = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], dim=1)
    close(db, scan(shifted.flip(1), dh.flip(1)).flip(1))


# The selective scan


@pytest.mark.parametrize("impl", SELECTIVE_SCANS)
def test_three_steps_by_hand(impl):
    """A = -ln 2 halves the state in a step of 1: h = 8, then 8/2 + 2 2 = 8, then 8/4 + 2 1/2 2 = 4 by a step of 2."""
    x, dt, B, C = (torch.tensor(row, dtype=F64).view(1, 3, 1) for row in
                   ([8, 2, 2], [1, 1, 2], [1, 2, 0.5], [1, 2, -1]))
    y, h = selective_scan(x, dt, torch.full((1, 1), -math.log(2), dtype=F64), B, C, impl=impl)
    close(y.flatten(), torch.tensor([8.0, 16, -4], dtype=F64), name="y")
    close(h.flatten(), torch.tensor([4.0], dtype=F64), name="h")


@pytest.mark.parametrize("with_h0", [False, True])
@pytest.mark.parametrize("l", LENGTHS)
@pytest.mark.parametrize("impl", [name for name in SELECTIVE_SCANS if name != "naive"])
def test_all_selective_scans_agree_for_every_length(impl, l, with_h0):
    """Values, last state, and gradients to x, dt, A, B, C, D, h0 through both outputs."""
    tensors = inputs(l)[:6 + with_h0]
    got = values_and_gradients(lambda *t: selective_scan(*t, impl=impl), tensors)
    all_close(got, values_and_gradients(lambda *t: selective_scan(*t, impl="naive"), tensors), SELECTED)


@pytest.mark.parametrize("impl", SELECTIVE_SCANS)
def test_one_wide_input_makes_the_state_wide(impl):
    """A state in float64 and the rest in float32: y in x's dtype, h in float64, as if all had been float64."""
    *narrow, h0 = inputs(7)
    narrow = [t.float() for t in narrow]
    y, h = selective_scan(*narrow, h0, impl)
    want_y, want_h = selective_scan(*(t.double() for t in narrow), h0, "naive")
    assert y.dtype == torch.float32 and h.dtype == F64
    close(h, want_h, name="h")
    close(y, want_y.float(), 1e-6, name="y")


def test_selective_scan_passes_gradcheck():
    """Against finite differences, which know nothing of our derivation; the other paths agree."""
    tensors = [t.requires_grad_() for t in inputs(5)]
    assert torch.autograd.gradcheck(lambda *t: selective_scan(*t, impl="chunked"), tensors)


@pytest.mark.parametrize("cut", [1, 2, 50, 99])
@pytest.mark.parametrize("impl", SELECTIVE_SCANS)
def test_any_split_of_a_sequence_gives_the_whole_sequence(impl, cut):
    """The last state of a part, given to the next as h0, is all that it needs to know (Mamba, section 3.3.2)."""
    x, dt, A, B, C, D, h0 = inputs(100)
    y, h = selective_scan(x, dt, A, B, C, D, h0, impl)
    y1, h1 = selective_scan(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D, h0, impl)
    y2, h2 = selective_scan(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D, h1, impl)
    close(torch.cat([y1, y2], 1), y, name="y")
    close(h2, h, name="h")


@pytest.mark.parametrize("upto", [0, 1, 30, 31])
def test_the_state_after_the_first_steps_has_not_read_the_others(upto):
    """y is that of all steps, h that of the first upto alone."""
    x, dt, *rest = inputs(31)
    y, h = selective_scan(x, dt, *rest, upto=upto)
    close(y, selective_scan(x, dt, *rest)[0], name="y")
    dt[:, upto:] = 0  # steps that change nothing
    close(h, selective_scan(x, dt, *rest)[1], name="h")


@pytest.mark.parametrize("impl", SELECTIVE_SCANS)
def test_a_step_of_length_zero_changes_nothing(impl):
    """exp(0 A) = 1 and 0 B x = 0: the state passes bit for bit, which is what padding and rollback rest on."""
    x, dt, A, B, C, D, h0 = inputs(7, torch.float32)
    _, h = selective_scan(x, torch.zeros_like(dt), A, B, C, D, h0, impl)
    assert torch.equal(h, h0)


@pytest.mark.parametrize("impl", SELECTIVE_SCANS)
def test_the_future_cannot_be_seen(impl):
    """Another input from step 70 on leaves y before it as it is, to the bit, and changes y after.

    So does one that is not finite: a masked product would make 0 * nan of it.
    """
    tensors = inputs(100)
    y, _ = selective_scan(*tensors, impl=impl)
    for i in (0, 1, 3, 4):  # x, dt, B, C
        for change in (1, math.nan, math.inf):
            changed = [t.clone() for t in tensors]
            changed[i][:, 70:] += change
            y2, _ = selective_scan(*changed, impl=impl)
            assert torch.equal(y2[:, :70], y[:, :70]) and not torch.allclose(y2[:, 70:], y[:, 70:])


@pytest.mark.parametrize("dt_max, l", [(0.1, 1024), (5.0, 4001)])
@pytest.mark.parametrize("impl", ["parallel", "chunked"])
def test_float32_stays_within_2e6_of_float64(impl, dt_max, l):
    """Relative to the largest element, outputs and every gradient."""
    tensors = inputs(l, torch.float32, dt_max)
    got = values_and_gradients(lambda *t: selective_scan(*t, impl=impl), tensors)
    want = values_and_gradients(lambda *t: selective_scan(*t, impl="chunked"), [t.double() for t in tensors])
    for name, g, w in zip(SELECTED.split(), got, want, strict=True):
        assert (g - w).abs().max() <= 2e-6 * w.abs().max(), name


def test_bfloat16_inputs_keep_a_float32_state():
    """bfloat16 rounds 0.999 to 1: a state in bfloat16 would never forget; ours does."""
    assert torch.tensor(0.999).bfloat16() == 1
    l = 2000
    x = torch.zeros(1, l, 1, dtype=torch.bfloat16)
    dt, A, B = torch.full_like(x, 1.0), torch.tensor([[math.log(0.999)]]), torch.ones(1, l, 1)
    with torch.autocast("cpu", torch.bfloat16):
        y, h = selective_scan(x, dt, A, B, B, h0=torch.ones(1, 1, 1))
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
    assert abs(h.item() - 0.999**l) < 1e-4


def test_kernels_are_for_gpus_of_compute_capability_8_and_auto_knows(monkeypatch):
    """On an older GPU auto takes the path of a CPU; by name the kernels are an error that says why and the way out."""
    x = torch.rand(2, 7, 3)
    inputs = x, x, -torch.rand(3, 5), torch.rand(2, 7, 5), torch.rand(2, 7, 5)
    want = selective_scan(*inputs, impl="chunked")[0]
    monkeypatch.setattr(module, "triton", SimpleNamespace(JITFunction=object))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert torch.equal(selective_scan(*inputs)[0], want)
    with pytest.raises(RuntimeError, match='impl="triton" cannot run: .* 8.0 .*; use impl="chunked"$'):
        selective_scan(*inputs, impl="triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(module, "_selective_triton", lambda *tensors: ("kernels", None))
    assert selective_scan(*inputs)[0] == "kernels"


def test_what_does_not_fit_is_an_error_of_one_line():
    """An initial state of another shape would broadcast, in one path otherwise than in another."""
    x, dt, A, B, C, D, h0 = inputs(7)
    for f, arguments, message in (
            (scan, (x, x, None, "paralel"), "naive, parallel, auto"),
            (scan, (x[:, :0], x[:, :0]), "at least one step"),
            (scan, (x, x, x[:1, 0]), r"h0 has shape \(1, 3\), expected \(2, 3\)"),
            (selective_scan, (x, dt, A, B[:, :6], C),
             r"B has shape \(2, 6, 5\), expected \(b = 2, l = 7, n = 5\)"),
            (selective_scan, (x, dt, A, B, C, D, h0, "auto", 8), "a number from 0 to 7"),
            (selective_scan, (x, dt, A + 2j, B, C), "takes real floats, not torch.complex"),
            (selective_scan, (x, dt, A, B, C, D, h0 + 0j), "takes real floats, not torch.complex")):
        with pytest.raises(ValueError, match=message) as error:
            f(*arguments)
        assert "\n" not in str(error.value)
