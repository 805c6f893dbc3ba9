"""scan.py section 3: from the continuous system to the kernel, with values from an independent program."""
import functools
import math

import pytest
import torch

from conftest import Operations, all_close, close
from scan import (dense_kernel, discretize, dplr_legs, fft_conv, hippo_legs, s4, s4_kernel, s4d,
                  s4d_kernel, scan)
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
    """The spring three ways (S4, section 2.4): step by step; as a convolution with K; and by its
    modes, A's eigenvectors: in their basis A is diagonal, so h is two recurrences, as scan has."""
    A, B, C = spring()
    Abar, Bbar = discretize_dense(0.1, A, B, "zoh")
    x, h, ys = torch.randn(2, 31, 1, dtype=F64), torch.zeros(2, 2, dtype=F64), []
    for x_t in x.unbind(1):
        h = h @ Abar.T + x_t * Bbar
        ys.append(h @ C)
    want = torch.stack(ys, dim=1)
    close(fft_conv(x, dense_kernel(Abar, Bbar, C, 31)[None])[..., 0], want)
    lam, V = torch.linalg.eig(A)  # safe here, but not of LegS: see dplr_legs
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
    """S4 theorem 1, and in numbers the imaginary parts and |P|; phases are the solver's own."""
    for n in (2, 4, 8, 64, 256):
        A, B = hippo_legs(n)
        Lambda, P, Bt, V = dplr_legs(n)
        close(V.mH @ V, torch.eye(n, dtype=C128), 1e-12)
        error = V @ (torch.diag(Lambda) - P[:, None] * P.conj()) @ V.mH - A
        assert error.abs().max() < 1e-14 * A.abs().max() * n
        close(V @ Bt, B.to(C128), 1e-11)
        close(Lambda.real, torch.full((n,), -0.5, dtype=F64), 1e-12)
    Lambda, P, _, _ = dplr_legs(4)
    close(Lambda.imag, t64(-4.6032930071, -0.5565011151, 0.5565011151, 4.6032930071), 1e-9)
    close(P.abs(), t64(1.8795004805, 0.6837235872, 0.6837235872, 1.8795004805), 1e-9)


# S4


def test_s4_kernel_of_size_four():
    """dt = 1/8, C = (1, 1, 1, 1)."""
    Lambda, P, B, V = (t[None] for t in dplr_legs(4))
    C = torch.ones(1, 1, 4, dtype=C128) @ V
    close(s4_kernel(t64(0.125), Lambda, P, B, C[0], 8)[0],
          t64(0.6362868869, 0.1897456125, 0.0152316231, -0.0336323982,
              -0.0309243656, -0.0121140307, 0.0073258594, 0.0218283951), 1e-9)


@pytest.mark.parametrize("n, l", [(2, 1), (4, 2), (6, 3), (8, 7), (64, 100), (64, 1024), (256, 257), (256, 4096)])
def test_s4_kernel_is_the_definition(n, l):
    """Against C Abar^j Bbar of the dense matrices, for any length, odd ones too."""
    torch.manual_seed(0)
    Lambda, P, B, V = dplr_legs(n)
    dt, C = t64(0.001, 0.03, 0.1), torch.randn(3, n, dtype=F64)
    arguments = [dt, *(t.expand(3, n) for t in (Lambda, P, B)), C.to(C128) @ V]
    K = s4_kernel(*arguments, l)
    close(cauchy_kernel(*arguments, l), K, 1e-12)  # S4's own algorithm
    for i in range(3):
        Abar, Bbar = discretize_dense(dt[i].item(), *hippo_legs(n), "bilinear")
        close(K[i], dense_kernel(Abar, Bbar, C[i], l), 1e-12)


# S4D


def test_s4d_initialisations():
    """Four modes of a system of size eight."""
    lin = c128(-0.5, -0.5 + 1j * math.pi, -0.5 + 2j * math.pi, -0.5 + 3j * math.pi)
    close(s4d_init("lin", 8)[0], lin)
    for rule, imag in (("inv", [17.8253536263, 4.2441318158, 1.5278874537, 0.3637827271]),
                       ("legs", [0.4274887123, 1.9577941509, 5.3542085150, 19.8574103710])):
        close(s4d_init(rule, 8)[0], torch.complex(lin.real, t64(*imag)), 1e-9)
    close(s4d_init("real", 8)[0], c128(-1, -2, -3, -4))


@pytest.mark.parametrize("l", [1, 2, 3, 7, 8, 31, 64, 100, 257, 1000])
def test_s4d_kernel_is_the_definition(l):
    """Re C Abar^j Bbar, values and gradients."""
    torch.manual_seed(l)
    A, B, C = (torch.randn(3, 5, dtype=C128) for _ in range(3))
    A = torch.complex(-A.real.abs(), 20 * A.imag)
    leaves = [t.requires_grad_() for t in (torch.rand(3, dtype=F64) / 10, A, B, C)]
    Abar, Bbar = discretize(leaves[0][:, None], A, B, "zoh")
    want = torch.stack([(C * Bbar * Abar**j).sum(-1).real for j in range(l)], dim=-1)
    got, dK = s4d_kernel(*leaves, l), torch.randn(3, l, dtype=F64)
    close(got, want, name="K")
    gradients = [torch.autograd.grad(K, leaves, dK) for K in (got, want)]
    all_close(*gradients, "ddt dA dB dC", 1e-9)


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


def random_system(layer, n=6, d=3):
    """dt, A's parts, B, C, D."""
    torch.manual_seed(0)
    C, D, dt = torch.randn(d, n, dtype=C128), torch.randn(d, dtype=F64), torch.rand(d, dtype=F64) / 10
    if layer is s4d:
        A = torch.complex(-torch.rand(d, n, dtype=F64), 30 * torch.randn(d, n, dtype=F64))
        return [dt, A, torch.randn_like(C), C, D]
    return [dt, *(t.expand(d, n) + 0.1 * torch.randn_like(C) for t in dplr_legs(n)[:3]), C, D]


def stepped(layer, x, *system, h0=None):
    """One call for each input."""
    ys = []
    for x_t in x.split(1, dim=1):
        y, h0 = layer(x_t, *system, h0=h0)
        ys.append(y)
    return torch.cat(ys, dim=1), h0


@pytest.mark.parametrize("way", ["training", "from zero", "from a state"])
@pytest.mark.parametrize("l", [1, 2, 3, 7, 8, 31, 64, 100, 257])
@pytest.mark.parametrize("layer, dA", [(s4, "dLambda dP"), (s4d, "dA")])
def test_one_call_is_many_steps(layer, dA, l, way):
    """Values, last state, and gradients to everything, also through the last state. In training
    there is no state, in or out: y is a convolution."""
    system = random_system(layer)
    torch.manual_seed(l)
    tensors = [torch.randn(2, l, 3, dtype=F64), *system]
    if way == "from a state":
        tensors.append(torch.randn(2, 3, 6, dtype=C128))
    called = functools.partial(layer, upto=0 if way == "training" else None)
    results = []
    for f in (called, functools.partial(stepped, layer)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = f(*leaves[:len(system) + 1], h0=leaves[-1] if way == "from a state" else None)
        out = out[:1] if way == "training" else out
        gen = torch.Generator().manual_seed(1)
        douts = [torch.randn(t.shape, generator=gen, dtype=t.dtype) for t in out]
        results.append([*out, *torch.autograd.grad(out, leaves, douts)])
    h = "" if way == "training" else "h"
    all_close(*results, f"y {h} dx ddt {dA} dB dC dD dh0", 1e-9)


@pytest.mark.parametrize("layer", [s4, s4d])
def test_misshapen_inputs_are_named(layer):
    for x, h0, message in (((2, 0, 3), (2, 3, 6), "at least one step"),
                           ((2, 5, 4), (2, 4, 6), r"dt has shape \(3,\), expected \(d = 4\)"),
                           ((5, 3), (2, 3, 6), r"x has shape \(5, 3\), expected \(b, l, d\)"),
                           ((2, 5, 3), (2, 3, 1), r"h0 has shape \(2, 3, 1\)")):
        with pytest.raises(ValueError, match=message):
            layer(torch.randn(x), *random_system(layer), h0=torch.zeros(h0))


@pytest.mark.parametrize("layer, tolerance", [(s4, 2e-5), (s4d, 1.5e-5)])
def test_float32_convolution_stays_near_float32_steps(layer, tolerance):
    """n = 64, l = 1024, relative to the largest output."""
    torch.manual_seed(0)
    dt, C = torch.exp(torch.rand(4) * math.log(100) + math.log(0.001)), torch.randn(4, 64, dtype=torch.complex64)
    system = [t.to(torch.complex64).expand(4, -1) for t in (dplr_legs(64)[:3] if layer is s4 else s4d_init("lin", 128))]
    x = torch.randn(1, 1024, 4)
    steps, conv = stepped(layer, x, dt, *system, C)[0], layer(x, dt, *system, C, upto=0)[0]
    assert (steps - conv).abs().max() < tolerance * steps.abs().max()
