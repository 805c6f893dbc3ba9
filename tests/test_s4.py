"""scan.py section 3: from the continuous system to the kernel, with values from an independent program."""
import functools
import math

import pytest
import torch

from conftest import Operations, all_close, close
from scan import (dense_kernel, discretize, dplr_legs, dplr_discretize, fft_conv, hippo_legs, s4,
                  s4_kernel, s4d, s4d_kernel, scan)
from tests.dense import cauchy_kernel, discretize_dense, legs_basis, s4d_init

F64, C128 = torch.float64, torch.complex128


def t64(*values):
    return torch.tensor(values, dtype=F64)


def c128(*values):
    return torch.tensor(values, dtype=C128)


# From the differential equation to the convolution


def spring(k=4.0, r=0.5):
    """A, B, C of q'' = -k q - r q' + x."""
    return t64([0, 1], [-k, -r]), t64(0, 1), t64(1, 0)


def test_a_spring_answers_a_push_as_physics_says():
    """q(t) = exp(-rt/2) sin(wt) / w with w^2 = k - r^2/4, at the middle of a step of 0.01."""
    A, B, C = spring()
    w, time = math.sqrt(4 - 0.25**2), 0.01 * (torch.arange(300, dtype=F64) + 0.5)
    want = 0.01 * torch.exp(-time / 4) * torch.sin(w * time) / w
    assert want.max() > 4e-3
    for rule in ("zoh", "bilinear"):
        got = dense_kernel(*discretize_dense(0.01, A, B, rule), C, 300)
        assert (got - want).abs().max() < 1e-6


def test_convolution_is_recurrence_is_scan():
    """The spring three ways (S4, section 2.4): step by step; as a convolution with K; and by its modes, A's eigenvectors: in
    their basis A is diagonal, so h is two separate recurrences h_t = a h_{t-1} + b_t, which scan solves. (Its eigenvectors
    are far from parallel, so the change of basis costs no digits. HiPPO's are not: see dplr_legs.)"""
    A, B, C = spring()
    Abar, Bbar = discretize_dense(0.1, A, B, "zoh")
    x, h, ys = torch.randn(2, 31, 1, dtype=F64), torch.zeros(2, 2, dtype=F64), []
    for x_t in x[..., 0].unbind(1):
        h = h @ Abar.T + x_t[:, None] * Bbar
        ys.append(h @ C)
    want = torch.stack(ys, dim=1)
    close(fft_conv(x, dense_kernel(Abar, Bbar, C, 31)[None])[..., 0], want)
    lam, V = torch.linalg.eig(A)  # of a spring it is safe
    Abar, Bbar = discretize(t64(0.1), lam, torch.linalg.solve(V, B.to(C128)), "zoh")
    close((scan(Abar[None, None], Bbar * x) @ (C.to(C128) @ V)).real, want)


@pytest.mark.parametrize("l", [1, 2, 3, 7, 8, 31, 64, 100, 257])
def test_fft_convolution_is_the_sum_it_stands_for(l):
    """A kernel of its own for every channel, or one for all (BiGS); the FFT is long enough that nothing wraps round."""
    torch.manual_seed(l)
    x, K, D = torch.randn(2, l, 3, dtype=F64), torch.randn(3, l, dtype=F64), torch.randn(3, dtype=F64)
    for kernel in (K, K[:1]):
        want = torch.stack([(kernel.T[:t + 1].flip(0) * x[:, :t + 1]).sum(1) for t in range(l)], 1) + D * x
        close(fft_conv(x, kernel, D), want, name="y")


def test_an_empty_batch_is_convolved_too():
    """FFTs refuse it; every other path gives an empty y."""
    x, K = torch.zeros(0, 5, 3, dtype=F64, requires_grad=True), torch.randn(3, 5, dtype=F64, requires_grad=True)
    y = fft_conv(x, K, K[:, 0])
    assert y.shape == x.shape and torch.autograd.grad(y.sum(), K)[0].eq(0).all()


def test_fft_convolution_takes_l_log_l_operations():
    """An FFT of n numbers is one call here; the sum as it is written has l^2 terms, also inside a call of conv1d."""
    for l in (256, 4096):
        x, K = torch.randn(1, l, 1), torch.randn(1, l)
        with Operations() as seen:
            fft_conv(x, K)
        numbers = sum(size for _, size in seen.calls)
        assert numbers <= 30 * l, f"l = {l}: {numbers} numbers"
        assert "convolution" not in {name for name, _ in seen.calls}


def test_fft_convolution_of_bfloat16_is_done_in_float32():
    """bfloat16 has no FFT, and its sums would lose most of their digits."""
    torch.manual_seed(0)
    x, K = torch.randn(2, 40, 3).bfloat16(), torch.randn(3, 40)
    close(fft_conv(x, K), fft_conv(x.float(), K).bfloat16(), 0, "y")


# HiPPO


def test_legs_of_size_four():
    A, B = hippo_legs(4)
    close(A, t64([-1, 0, 0, 0], [-1.7320508076, -2, 0, 0], [-2.2360679775, -3.8729833462, -3, 0],
                 [-2.6457513111, -4.5825756950, -5.9160797831, -4]), 1e-9)
    close(B, t64(1, 1.7320508076, 2.2360679775, 2.6457513111), 1e-9)


@pytest.mark.parametrize("rule, diagonal, low, Bbar", [
    ("bilinear", [0.9047619048, 0.8181818182, 0.7391304348, 0.6666666667], [-0.1499611089, -0.4287014336],
     [0.0952380952, 0.1499611089, 0.1599295749, 0.1419234187]),
    ("zoh", [0.9048374180, 0.8187307531, 0.7408182207, 0.6703200460], [-0.1491411186, -0.4170728258],
     [0.0951625820, 0.1491411186, 0.1558950813, 0.1297340880])])
def test_legs_discretized(rule, diagonal, low, Bbar):
    """dt = 0.1. A e_0 = -B, so every rule keeps a constant input's state at e_0, the constant polynomial."""
    Abar, got = discretize_dense(0.1, *hippo_legs(4), rule)
    close(Abar.diagonal(), t64(*diagonal), 1e-9)
    close(torch.stack([Abar[1, 0], Abar[3, 2]]), t64(*low), 1e-9)
    close(got, t64(*Bbar), 1e-9)
    h = torch.zeros(4, dtype=F64)
    for _ in range(400):
        h = Abar @ h + got
    close(h, t64(1, 0, 0, 0))


def test_the_modes_of_legs_are_legendre_polynomials():
    """exp(tA) B = exp(-t) sqrt(2i+1) P_i(2 exp(-t) - 1), in numbers too."""
    A, B = hippo_legs(4)
    for t, want in ((0.3, t64(0.7408182207, 0.6180044776, -0.2518564699, -0.8685581978)),
                    (1.0, t64(0.3678794412, -0.1683707099, -0.3251463048, 0.3408909927))):
        close(torch.linalg.matrix_exp(t * A) @ B, want, 1e-9)
        close(math.exp(-t) * legs_basis(t64(t), 4)[0], want, 1e-9)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_first_modes_of_legs_by_hand(n):
    """P_0 = 1, P_1 = s, P_2 = (3 s^2 - 1)/2, with s = 2 exp(-age) - 1; also a single one, and ages of any shape."""
    age = torch.rand(2, 5, dtype=F64)
    s = 2 * torch.exp(-age) - 1
    modes = [torch.ones_like(s), math.sqrt(3) * s, math.sqrt(5) * (3 * s**2 - 1) / 2]
    close(legs_basis(age, n), torch.stack(modes[:n], dim=-1), name="basis")


def test_legs_rebuilds_a_signal_from_its_state():
    """n numbers hold the past: they are its Legendre coefficients, and give it back the better the larger n."""
    dt, steps, errors = 2e-3, 5000, []
    time = dt * (torch.arange(steps, dtype=F64) + 0.5)
    x, age = torch.exp(-4 * (time - 8.5)**2), time  # a bump, 1.5 ago
    for n in (8, 16, 32):
        Abar, Bbar = discretize_dense(dt, *hippo_legs(n), "bilinear")
        h, basis, weight = torch.zeros(n, dtype=F64), legs_basis(age, n), torch.exp(-age) * dt
        for x_t in x:
            h = Abar @ h + Bbar * x_t
        close(h, (weight * x.flip(0)) @ basis, 1e-5)
        errors.append((weight @ (basis @ h - x.flip(0))**2).sqrt().item())
    assert errors[0] > 0.05 > 0.005 > errors[1] > 5e-5 > errors[2], errors


def test_legs_is_normal_plus_rank_one():
    """S4 theorem 1, and in numbers |P|, |B| and the imaginary parts; phases are the solver's own."""
    for n in (2, 4, 8, 64, 256):
        A, B = hippo_legs(n)
        Lambda, P, Bt, V = dplr_legs(n)
        eye = torch.eye(n, dtype=C128)
        close(V.mH @ V, eye, 1e-12)
        error = V @ (torch.diag(Lambda) - P[:, None] * P.conj()) @ V.mH - A
        assert error.abs().max() < 1e-14 * A.abs().max() * n
        close(V @ Bt, B.to(C128), 1e-11)
        close(Lambda.real, torch.full((n,), -0.5, dtype=F64), 1e-12)
    Lambda, P, B, _ = dplr_legs(4)
    close(Lambda.imag, t64(-4.6032930071, -0.5565011151, 0.5565011151, 4.6032930071), 1e-9)
    close(P.abs(), t64(1.8795004805, 0.6837235872, 0.6837235872, 1.8795004805), 1e-9)
    close(B.abs(), t64(2.6580150701, 0.9669311699, 0.9669311699, 2.6580150701), 1e-9)
    close(dplr_legs(2)[0].imag, t64(-math.sqrt(3) / 2, math.sqrt(3) / 2))
    close(dplr_legs(8)[0].imag[4:], t64(0.4274887123, 1.9577941509, 5.3542085150, 19.8574103710), 1e-9)
    close(dplr_legs(64)[0].imag[[32, 63]], t64(0.2638569311, 1303.2738429812), 1e-9)


# S4


def legs_layer(n, dt, seed=0):
    """dt, Lambda, P, B, C of one channel a dt, and C in LegS's own basis (d, n)."""
    torch.manual_seed(seed)
    d, dt = len(dt), t64(*dt)
    Lambda, P, B, V = dplr_legs(n)
    C = torch.randn(d, n, dtype=F64)
    return [dt, *(t.expand(d, n) for t in (Lambda, P, B)), C.to(C128) @ V], C


def test_the_low_rank_step_is_the_dense_step():
    """O(n) instead of O(n^2), the same Abar and Bbar (S4, appendix C.2)."""
    (dt, Lambda, P, B, _), _ = legs_layer(8, [0.01, 0.1, 1.0])
    V, h, x = dplr_legs(8)[3], torch.randn(2, 3, 8, dtype=C128), torch.randn(2, 3, dtype=F64)
    times, Bbar = dplr_discretize(dt, Lambda, P, B)
    got = times(h) + Bbar * x[..., None]
    from_the_right = dplr_discretize(dt, Lambda, P.conj(), B)[0](h)
    for i, step in enumerate(dt.tolist()):
        Abar, Bbar = (t.to(C128) for t in discretize_dense(step, *hippo_legs(8), "bilinear"))
        close(got[:, i], h[:, i] @ (V.mH @ Abar @ V).T + x[:, i, None] * (V.mH @ Bbar))
        close(from_the_right[:, i], h[:, i] @ (V.mH @ Abar @ V))


def test_s4_kernel_of_size_four():
    """dt = 1/8, C = (1, 1, 1, 1), l = 8, and the longer kernel begins alike; C = e_0 gives a geometric series."""
    Lambda, P, B, V = (t[None] for t in dplr_legs(4))
    dt, C = t64(0.125), torch.ones(1, 1, 4, dtype=C128) @ V
    want = t64(0.6362868869, 0.1897456125, 0.0152316231, -0.0336323982,
               -0.0309243656, -0.0121140307, 0.0073258594, 0.0218283951)
    close(s4_kernel(dt, Lambda, P, B, C[0], 8)[0], want, 1e-9)
    close(s4_kernel(dt, Lambda, P, B, C[0], 16)[0, :8], want, 1e-9)
    e0 = V[:, 0]
    close(s4_kernel(dt, Lambda, P, B, e0, 3)[0], t64(0.1176470588, 0.1038062284, 0.0915937309), 1e-9)


def test_truncated_read_out_of_size_four():
    """C' = C (1 - Abar^l) for l = 8 and 16, twice as long by C'_16 = C'_8 (1 + Abar^8)."""
    Abar, Bbar = discretize_dense(0.125, *hippo_legs(4), "bilinear")
    C, power, eye = torch.ones(4, dtype=F64), torch.linalg.matrix_power(Abar, 8), torch.eye(4, dtype=F64)
    short = C @ (eye - power)
    close(short, t64(0.79374758, 0.84094374, 1.13675484, 0.98320384), 1e-8)
    close(short @ (eye + power), t64(1.00564485, 0.92719880, 1.00967210, 0.99971789), 1e-8)
    z = torch.exp(-2j * math.pi * torch.arange(5, dtype=F64) / 8)
    values = torch.stack([short.to(C128) @ torch.linalg.solve(eye - Abar * v, Bbar.to(C128)) for v in z])
    close(values, c128(0.7937475825, 0.8491642782 - 0.1114253833j, 0.5828050388 - 0.1894355850j,
                       0.4852582270 - 0.0956138559j, 0.4620924252), 1e-9)
    close(torch.fft.irfft(values, 8), dense_kernel(Abar, Bbar, C, 8))


@pytest.mark.parametrize("n, l", [(2, 1), (4, 2), (6, 3), (8, 7), (64, 100), (64, 1024), (256, 257), (256, 4096)])
def test_s4_kernel_is_the_definition(n, l):
    """Against C Abar^j Bbar of the dense matrices, for any length, odd ones too."""
    arguments, C = legs_layer(n, [0.001, 0.03, 0.1])
    K = s4_kernel(*arguments, l)
    close(cauchy_kernel(*arguments, l), K, 1e-12)  # S4's own algorithm
    for i, dt in enumerate(arguments[0].tolist()):
        want = dense_kernel(*discretize_dense(dt, *hippo_legs(n), "bilinear"), C[i], l)
        close(K[i], want, 1e-12)


# S4D


def test_s4d_initialisations():
    """Four modes of a system of size eight."""
    close(s4d_init("lin", 8)[0], c128(-0.5, -0.5 + 1j * math.pi, -0.5 + 2j * math.pi, -0.5 + 3j * math.pi))
    close(s4d_init("inv", 8)[0].imag, t64(17.8253536263, 4.2441318158, 1.5278874537, 0.3637827271), 1e-9)
    close(s4d_init("legs", 8)[0].imag, t64(0.4274887123, 1.9577941509, 5.3542085150, 19.8574103710), 1e-9)
    close(s4d_init("real", 8)[0], c128(-1, -2, -3, -4))
    for rule, want in (("lin", [0.73746163, 0.48668945, 0.18167389, -0.01257834, -0.03488270]),
                       ("inv", [0.68675938, 0.37016096, 0.38503453, 0.47177470, 0.20634534]),
                       ("legs", [0.66601235, 0.33594412, 0.40748186, 0.35880887, 0.02282218]),
                       ("real", [0.70922224, 0.55912396, 0.44622884, 0.36037816, 0.29435162])):
        A = s4d_init(rule, 8)[0]
        close(s4d_kernel(t64(0.1), A[None], torch.ones_like(A), 2 * torch.ones_like(A), 5)[0], t64(*want), 2e-8)
    with pytest.raises(ValueError, match="lin, inv, legs, real"):
        s4d_init("line", 8)
    with pytest.raises(ValueError, match="n must be even"):
        s4d_init("lin", 7)


def test_s4d_kernel_in_closed_form():
    """dt = 1, modes -1/2 and -1/2 + i pi, e = exp(-1/2): K_l = e^l [2 (1-e) + (-1)^l (1+e) / (2 (1/4 + pi^2))]."""
    A, one, e, l = s4d_init("lin", 4)[0], torch.ones(2, dtype=C128), math.exp(-0.5), torch.arange(6, dtype=F64)
    got = s4d_kernel(t64(1.0), A[None], one, one, 6)[0]
    close(got, e**l * (2 * (1 - e) + (-1)**l * (1 + e) / (2 * (0.25 + math.pi**2))))
    close(got, t64(0.866315827943, 0.429157763523, 0.318699782662, 0.157878318219, 0.117243097947, 0.058080187480),
          1e-11)
    close(s4d_kernel(t64(0.1), A[None], one, one, 4)[0],
          t64(0.193505604317, 0.175170593899, 0.150492476341, 0.122010081128), 1e-11)


@pytest.mark.parametrize("l", [1, 2, 3, 7, 8, 31, 64, 100, 257, 1000])
def test_s4d_kernel_is_the_definition(l):
    """Re C Abar^j Bbar, values and gradients, with a kernel for every channel or one for all."""
    torch.manual_seed(l)
    dt = (torch.rand(3, dtype=F64) / 10).requires_grad_()
    A, B, C = (torch.randn(3, 5, dtype=C128) for _ in range(3))
    A = torch.complex(-A.real.abs(), 20 * A.imag).requires_grad_()
    B.requires_grad_(), C.requires_grad_()
    Abar, Bbar = discretize(dt[:, None], A, B, "zoh")
    want = torch.stack([(C * Bbar * Abar**j).sum(-1).real for j in range(l)], dim=-1)
    got, dy = s4d_kernel(dt, A, B, C, l), torch.randn(3, l, dtype=F64)
    close(got, want)
    for g, w in zip(torch.autograd.grad(got, (dt, A, B, C), dy), torch.autograd.grad(want, (dt, A, B, C), dy)):
        close(g, w, 1e-9)


def test_the_response_to_a_constant_does_not_depend_on_dt():
    """Bbar / (1 - Abar) = -B / A for both rules, so any kernel's sum is -C A^-1 B."""
    A, _ = s4d_init("lin", 4)
    for dt in (0.01, 0.1, 1.0):
        for rule in ("zoh", "bilinear"):
            Abar, Bbar = discretize(t64(dt), A, torch.ones_like(A), rule)
            close(Bbar / (1 - Abar), -1 / A)
    one = torch.ones(1, 2, dtype=C128)
    close(s4d_kernel(t64(0.1), A[None], one, one, 600).sum(), t64(2.0494090460637).sum())
    arguments, C = legs_layer(8, [0.05, 0.1, 0.3])
    close(s4_kernel(*arguments, 1000).sum(-1), -C @ torch.linalg.solve(*hippo_legs(8)))


def test_convolution_in_numbers():
    """Two modes, one of each pair, dt = 0.1, D = 0.25, six inputs."""
    A, C = c128(-0.5, -0.5 + 1j * math.pi)[None], c128(1 + 0.5j, -0.3 + 0.2j)[None]
    K = s4d_kernel(t64(0.1), A, torch.ones_like(A), 2 * C, 6)
    close(K[0], t64(0.131475498940, 0.119399241114, 0.114349363475, 0.115296741623, 0.120778596938, 0.129077442794),
          1e-11)
    y = fft_conv(t64(1, -1, 2, 0.5, 0, 3)[None, :, None], K, t64(0.25))
    close(y[0, :, 0], t64(0.381475498940, -0.262076257827, 0.757901120242, 0.430483609846, 0.293880202821,
                          1.440493507660), 1e-11, "y")


# Whole layers: convolution and recurrence, with states


def random_system(name, n=6, d=3, dtype=C128):
    torch.manual_seed(0)
    C, D, dt = torch.randn(d, n, dtype=C128), torch.randn(d, dtype=F64), torch.rand(d, dtype=F64) / 10
    if name == "s4d":
        system = [torch.complex(-torch.rand(d, n, dtype=F64), 30 * torch.randn(d, n, dtype=F64)), torch.randn_like(C)]
    else:
        Lambda, P, B, _ = dplr_legs(n)
        system = [t.expand(d, n) + 0.1 * torch.randn_like(C) for t in (Lambda, P, B)]
    return [dt, *system, C, D]


def stepped(layer, x, *system, h0=None):
    """One call for each input."""
    ys = []
    for x_t in x.split(1, dim=1):
        y, h0 = layer(x_t, *system, h0=h0)
        ys.append(y)
    return torch.cat(ys, dim=1), h0


@pytest.mark.parametrize("with_h0", [False, True])
@pytest.mark.parametrize("l", [1, 2, 3, 7, 8, 31, 64, 100, 257])
@pytest.mark.parametrize("layer", [s4, s4d])
def test_one_call_is_many_steps_with_states_in_and_out(layer, l, with_h0):
    """Values, last state, and gradients to everything, also through the last state."""
    system = random_system(layer.__name__)
    torch.manual_seed(l)
    tensors = [torch.randn(2, l, 3, dtype=F64), *system] + [torch.randn(2, 3, 6, dtype=C128)] * with_h0
    results = []
    for f in (layer, functools.partial(stepped, layer)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y, h = f(*leaves[:len(system) + 1], h0=leaves[-1] if with_h0 else None)
        gen = torch.Generator().manual_seed(1)
        dy, dh = torch.randn(y.shape, generator=gen, dtype=F64), torch.randn(h.shape, generator=gen, dtype=F64).to(C128)
        results.append([y, h, *torch.autograd.grad((y, h), leaves, (dy, dh))])
    names = "y h dx ddt dA dB" if layer is s4d else "y h dx ddt dLambda dP dB"
    all_close(*results, f"{names} dC dD dh0", 1e-9)


@pytest.mark.parametrize("l", [1, 2, 3, 7, 8, 31, 64, 100, 257])
@pytest.mark.parametrize("layer", [s4, s4d])
def test_the_convolution_of_training_is_the_recurrence(layer, l):
    """Without a state, in or out: values and gradients to everything."""
    torch.manual_seed(l)
    tensors = [torch.randn(2, l, 3, dtype=F64), *random_system(layer.__name__)]
    dy = torch.randn(2, l, 3, dtype=F64)
    results = []
    for f in (lambda *t: layer(*t, upto=0)[0], lambda *t: stepped(layer, *t)[0]):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = f(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    all_close(*results, "y dx ddt dA dB dC dD" if layer is s4d else "y dx ddt dLambda dP dB dC dD", 1e-9)


@pytest.mark.parametrize("layer", [s4, s4d])
def test_misshapen_inputs_are_named(layer):
    dt, *system = random_system(layer.__name__)
    for x, message in ((torch.randn(2, 0, 3), "at least one step"),
                       (torch.randn(2, 5, 4), r"dt has shape \(3,\), expected \(d = 4\)"),
                       (torch.randn(5, 3), r"x has shape \(5, 3\), expected \(b, l, d\)")):
        with pytest.raises(ValueError, match=message):
            layer(x, dt, *system)
    for shape in ((2, 3, 1), (3, system[0].shape[1]), (2, 3)):
        with pytest.raises(ValueError, match="h0 has shape"):
            layer(torch.randn(2, 5, 3), dt, *system, h0=torch.zeros(shape))


@pytest.mark.parametrize("layer, tolerance", [(s4, 2e-5), (s4d, 1.5e-5)])
def test_float32_convolution_stays_near_float32_steps(layer, tolerance):
    """n = 64, l = 1024, relative to the largest output."""
    torch.manual_seed(0)
    dt, C = torch.exp(torch.rand(4) * math.log(100) + math.log(0.001)), torch.randn(4, 64, dtype=torch.complex64)
    system = [t.to(torch.complex64).expand(4, -1) for t in (dplr_legs(64)[:3] if layer is s4 else s4d_init("lin", 128))]
    x = torch.randn(1, 1024, 4)
    steps, conv = stepped(layer, x, dt, *system, C)[0], layer(x, dt, *system, C, upto=0)[0]
    assert (steps - conv).abs().max() < tolerance * steps.abs().max()
