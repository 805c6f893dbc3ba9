"""Beside scan.py's section 3: discretization of a full matrix, the kernel by S4's own algorithm, what a state of LegS
remembers, and four ways to choose S4D's A."""
import math

import torch
import torch.nn.functional as F

from scan import dplr_discretize, dplr_legs


def discretize_dense(dt, A, B, rule="zoh"):
    """The same for a full matrix: dt a number, A (n, n), B (n,) -> Abar (n, n), Bbar (n,); zoh and bilinear.

    zoh needs no inverse of A, which may be singular: exp(dt [[A, B], [0, 0]]) = [[Abar, Bbar], [0, 1]] (Van Loan 1978).
    """
    n = len(A)
    eye = torch.eye(n, dtype=A.dtype, device=A.device)
    if rule == "zoh":
        AB = F.pad(torch.cat([A, B[:, None]], dim=1), (0, 0, 0, 1))  # a row of zeros below
        both = torch.linalg.matrix_exp(dt * AB)
        return both[:n, :n], both[:n, n]
    if rule == "bilinear":
        left = eye - dt / 2 * A
        return torch.linalg.solve(left, eye + dt / 2 * A), torch.linalg.solve(left, dt * B)
    raise ValueError(f'rule "{rule}" is not one of zoh, bilinear')


def cauchy_kernel(dt, Lambda, P, B, C, l):
    """K_j = Re C Abar^j Bbar as S4 has it (appendix C.3), without steps but for C': shapes as in scan.s4_kernel.

    Evaluate the polynomial sum_j K_j z^j at the l-th roots of unity, and transform back.
        sum_{j < l} C Abar^j Bbar z^j = C' (1 - Abar z)^-1 Bbar,    C' = C (1 - Abar^l)        a geometric series
                                      = 2 dt C' [2 (1 - z) - dt (1 + z) A]^-1 B                Abar, Bbar inserted
                                      = q(C', B) - g q(C', P) q(P^*, B)                        Woodbury
    with g = (1 + z) / (2 + (1 + z) q(P^*, P)) and q(u, v) = sum_n u_n v_n 2 dt / (2 (1 - z) - dt (1 + z) Lambda_n), a
    Cauchy matrix times a vector. The paper divides by 1 + z, which is zero at z = -1; this form has no pole.
    """
    C_power = C
    times, _ = dplr_discretize(dt, Lambda, P.conj(), B)  # multiplies by Abar from the right
    for _ in range(l):
        C_power = times(C_power)
    C = C - C_power
    z = torch.exp(-2j * math.pi / l * torch.arange(l, dtype=dt.dtype))
    dt = dt[:, None, None]
    cauchy = 2 * dt / (2 * (1 - z)[:, None] - dt * (1 + z)[:, None] * Lambda[:, None])  # (d, l, n)
    products = torch.stack([C * B, C * P, P.conj() * B, P.conj() * P], dim=-1)
    CB, CP, PB, PP = (cauchy @ products).unbind(-1)  # (d, l)
    g = (1 + z) / (2 + (1 + z) * PP)
    return torch.fft.ifft(CB - g * CP * PB).real


def legs_basis(age, n):
    """sqrt(2i+1) P_i(2 exp(-age) - 1), P_i the Legendre polynomials: age (...) -> (..., n), n >= 1.

    P_0 = 1, P_1(s) = s, (i+1) P_{i+1} = (2i+1) s P_i - i P_{i-1}.
    h(now) is the integral of exp(age A) B x(now - age) over all ages, and exp(age A) B = exp(-age) legs_basis(age, n).
    So h holds the coefficients of the past in a basis that is orthonormal under the weight exp(-age). The error is
    small where the weight is large, so the recent past is kept best: x(now - age) is nearly legs_basis(age, n) @ h, and
    the larger n, the nearer.
    """
    s = 2 * torch.exp(-age) - 1
    legendre = [torch.ones_like(s), s]
    for i in range(1, n - 1):
        legendre.append(((2 * i + 1) * s * legendre[i] - i * legendre[i - 1]) / (i + 1))
    degree = torch.arange(n, dtype=s.dtype, device=s.device)
    return torch.stack(legendre[:n], dim=-1) * torch.sqrt(2 * degree + 1)


def s4d_init(rule, n):
    """A, B (n/2,), complex128: one of each conjugate pair of modes of a real system of even size n (S4D, 2206.11893).

    lin   -1/2 + i pi j                             frequencies one after the other
    inv   -1/2 + i n/pi (n/(2j+1) - 1)              as LegS has them when n is large: few high ones, many low ones
    legs  Lambda and B of dplr_legs                 LegS without its rank one
    real  -(j+1)                                    no swing, only decay, hence no conjugates: not to be doubled
    """
    if n % 2:
        raise ValueError(f"a system of size {n} has no conjugate pairs; n must be even")
    if rule == "legs":
        Lambda, _, B, _ = dplr_legs(n)
        return Lambda[n // 2:], B[n // 2:]
    j = torch.arange(n // 2, dtype=torch.float64)
    imag = {"lin": math.pi * j, "inv": n / math.pi * (n / (2 * j + 1) - 1), "real": 0 * j}
    if rule not in imag:
        raise ValueError(f'rule "{rule}" is not one of lin, inv, legs, real')
    real = -(j + 1) if rule == "real" else -0.5 + 0 * j
    A = torch.complex(real, imag[rule])
    return A, torch.ones_like(A)
