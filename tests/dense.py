"""Discretization of a full matrix, the oracle that the diagonal and low-rank forms of scan.py are held against."""
import torch
import torch.nn.functional as F


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
