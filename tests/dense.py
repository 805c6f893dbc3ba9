"""Oracles of scan.py's section 3: discretization of a full matrix, and the kernel by S4's own algorithm."""
import math

import torch
import torch.nn.functional as F

from scan import dplr_discretize


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
