"""The recurrence h_t = a_t h_{t-1} + b_t, from the continuous system up to fast scans.

Read it top to bottom. Section 1 turns a differential equation into a recurrence; section 2 solves the recurrence by
a loop, by a tree and in chunks; section 3 is S4, where it is a convolution; section 4 is the selective scan of Mamba,
section 5 the matrix form of Mamba-2.
Every fast path computes what the naive one defines, and tests/ hold it to that, values and gradients.

Glossary. Capitals are the papers' state-space quantities, lower-case letters sizes of axes, words everything else.

    here       shape                      Mamba (2312.00752)   S4 (2111.00396)
    x          (b, l, d)                  x                    u           input
    h          (b, d, n)                  h                    x           state
    y          (b, l, d)                  y                    y           output
    dt         (b, l, d), positive        Delta                Delta       step size; S4 has one a channel
    A          (d, n), Re A < 0           A                    A           h' = A h + B x, A diagonal
    B, C       (b, l, n)                  B, C                 B, C        into and out of the state; S4's do not move with t
    D          (d,)                       (code only)          D           skip: y += D x
    Abar Bbar  as dt A and dt B           A-bar, B-bar         A-bar, B-bar  discretized: h_t = Abar h_{t-1} + Bbar x_t
    b l d n    batch, length, channels, state size; Mamba-2: nh heads of size p, g groups that share B and C

The state and everything that decays it are float32 or wider, whatever the caller's dtype and autocast say: bfloat16 has
8 bits of mantissa and rounds a decay of 0.999 to 1, so a slowly forgetting state would never forget.
"""
import contextlib
import functools
import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# ---------------------------------------------------------------------------------------------------------------------
# 1. Discretization: from h'(t) = A h(t) + B x(t) to h_t = Abar h_{t-1} + Bbar x_t
#
# All rules agree as dt -> 0; they differ in what they assume about x between two samples and in how stable they are.


def discretize(dt, A, B, rule="mamba"):
    """Abar, Bbar of one step of length dt, for a diagonal A: everything is elementwise and broadcasts.

    zoh       Abar = exp(dt A),               Bbar = (exp(dt A) - 1) / A * B         exact if x is held; Mamba eq. 4
    bilinear  Abar = (1 + dt A/2)/(1 - dt A/2),  Bbar = dt / (1 - dt A/2) * B        trapezoid; S4 eq. 3
    euler     Abar = 1 + dt A,                Bbar = dt B                            first order; unstable for large dt
    mamba     Abar = exp(dt A),               Bbar = dt B                            zoh for A, Euler for B

    The Mamba paper prints zoh for both, its code computes the rule named mamba here, and so do all its checkpoints: B is
    learned, so a factor (exp(z) - 1)/z close to 1 (z = dt A) costs time and buys nothing. Real or complex.
    """
    z = dt * A
    if rule == "mamba":
        return torch.exp(z), dt * B
    if rule == "euler":
        return 1 + z, dt * B
    if rule == "bilinear":
        return (1 + z / 2) / (1 - z / 2), dt / (1 - z / 2) * B
    if rule == "zoh":  # expm1 keeps the digits that exp(z) - 1 loses; the series keeps value and gradient at z = 0
        safe = torch.where(z == 0, torch.ones_like(z), z)
        return torch.exp(z), dt * torch.where(z == 0, 1 + z / 2, torch.expm1(safe) / safe) * B
    raise ValueError(f'rule "{rule}" is not one of zoh, bilinear, euler, mamba')


def discretize_dense(dt, A, B, rule="zoh"):
    """The same rules for a full matrix A (n, n) and B (n,), dt a number: Abar (n, n), Bbar (n,).

    zoh needs no inverse of A, which may be singular: exp(dt [[A, B], [0, 0]]) = [[Abar, Bbar], [0, 1]] (Van Loan 1978).
    """
    n = len(A)
    eye = torch.eye(n, dtype=A.dtype, device=A.device)
    if rule == "mamba":
        return torch.linalg.matrix_exp(dt * A), dt * B
    if rule == "euler":
        return eye + dt * A, dt * B
    if rule == "bilinear":
        both = torch.linalg.solve(eye - dt / 2 * A, torch.cat([eye + dt / 2 * A, dt * B[:, None]], dim=1))
        return both[:, :n], both[:, n]
    if rule == "zoh":
        both = torch.linalg.matrix_exp(dt * F.pad(torch.cat([A, B[:, None]], dim=1), (0, 0, 0, 1)))
        return both[:n, :n], both[:n, n]
    raise ValueError(f'rule "{rule}" is not one of zoh, bilinear, euler, mamba')


# ---------------------------------------------------------------------------------------------------------------------
# 2. The scan: h_t = a_t h_{t-1} + b_t, elementwise, every h_t wanted
#
#               work      depth       extra memory
#    naive      l         l           autograd keeps every product
#    parallel   2 l       2 log2 l    a and b again at every level of the tree
#    chunked    2 l       2 sqrt(l)   a running product of a; gradients by a second scan, backwards


def scan(a, b, h0=None, impl="auto"):
    """h_t = a_t h_{t-1} + b_t along axis 1, for any length >= 1, real or complex; h0 stands before the first step.

    a broadcasts to b (b, l, ...); h0 (b, ...) has b's shape without axis 1; h (b, l, ...) is float32 or wider.
    impl: naive, parallel, chunked, or auto, which takes chunked: it is the fastest on a CPU and needs few launches on a GPU.
    """
    a, b, h0 = _wide(a, b, h0)
    if b.shape[1] == 0:
        raise ValueError(f"scan needs at least one step; b has shape {tuple(b.shape)}")
    if h0 is None:
        h0 = torch.zeros_like(b[:, 0])
    return _pick(impl, SCANS, "chunked")(a.expand_as(b), b, h0)


def _wide(*tensors):
    """All tensors (None stays None) in the one dtype that holds them all and is at least float32."""
    dtypes = {t.dtype for t in tensors if t is not None}
    if dtypes == {torch.float32}:
        return tensors
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    return [t if t is None else t.to(dtype) for t in tensors]


def _no_autocast(device):
    """A context in which nothing is narrowed; entering one costs as much as a small layer's step, so only where needed."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else contextlib.nullcontext()


def _pick(impl, table, auto):
    """The function that impl names."""
    name = auto if impl == "auto" else impl
    if name not in table:
        raise ValueError(f'impl "{impl}" is not one of {", ".join(table)}, auto')
    return table[name]


def _scan_naive(a, b, h):
    """The definition. unbind, not a[:, t]: the backward of an index writes a zero tensor as large as a, at every step."""
    hs = []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1)):
        h = a_t * h + b_t
        hs.append(h)
    return torch.stack(hs, dim=1)


def _scan_parallel(a, b, h0):
    """Blelloch's associative scan (1990): two steps are one, (a2, b2) after (a1, b1) = (a2 a1, a2 b1 + b2).

    Pair the steps, scan the pairs (half as long), and the even positions follow from the odd ones by one step each.
    """
    b = torch.cat([b[:, :1] + a[:, :1] * h0[:, None], b[:, 1:]], dim=1)  # the first step carries h0
    return _associative(a, b)


def _associative(a, b):
    l = b.shape[1]
    if l == 1:
        return b
    a1, a2, b1, b2 = a[:, 0:l - 1:2], a[:, 1::2], b[:, 0:l - 1:2], b[:, 1::2]  # l odd: the last step has no partner
    odd = _associative(a2 * a1, a2 * b1 + b2)  # h_1, h_3, ...
    even = torch.cat([b[:, :1], a[:, 2::2] * odd[:, :(l - 1) // 2] + b[:, 2::2]], dim=1)  # h_0, h_2, ...
    h = torch.stack([even[:, :l // 2], odd], dim=2).flatten(1, 2)
    return h if l % 2 == 0 else torch.cat([h, even[:, -1:]], dim=1)


class _ScanChunked(torch.autograd.Function):
    """sqrt(l) chunks of sqrt(l) steps: all chunks step together from h = 0, then the carries run through them.

    Inside a chunk h_t = (h_t from zero) + (a_t ... a_first) h_in, since the recurrence is linear in its initial state.
    The gradient of a scan is a scan backwards (Martin and Cundy 2018, section 2.2): with g_t = dL/dh_t in total,
        g_t = dh_t + conj(a_{t+1}) g_{t+1},   db_t = g_t,   da_t = g_t conj(h_{t-1}),   dh0 = conj(a_0) g_0.
    """

    @staticmethod
    def forward(ctx, a, b, h0):
        h = _chunks_then_carries(a, b, h0)
        ctx.save_for_backward(a, h, h0)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        a, h, h0 = ctx.saved_tensors
        a_next = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], dim=1).conj()  # nothing comes after the last step
        g = _chunks_then_carries(a_next.flip(1), dh.flip(1), torch.zeros_like(h0)).flip(1)
        before = torch.cat([h0[:, None], h[:, :-1]], dim=1)
        return g * before.conj(), g, a[:, 0].conj() * g[:, 0]


def _chunks_then_carries(a, b, h):
    size = max(1, math.isqrt(b.shape[1]))
    whole = b.shape[1] // size * size
    out = torch.empty_like(b)
    chunks = out[:, :whole].unflatten(1, (-1, size))  # (b, chunks, size, ...)
    step, decay = torch.zeros_like(chunks[:, :, 0]), torch.ones_like(chunks[:, :, 0])
    decays = torch.empty_like(chunks)
    for t in range(size):
        a_t = a[:, t:whole:size]
        step = chunks[:, :, t] = a_t * step + b[:, t:whole:size]
        decay = decays[:, :, t] = a_t * decay
    for k in range(chunks.shape[1]):
        h = torch.addcmul(chunks[:, k], decays[:, k], h[:, None], out=chunks[:, k])[:, -1]
    for t in range(whole, b.shape[1]):  # fewer than sqrt(l) steps are left over
        h = out[:, t] = a[:, t] * h + b[:, t]
    return out


SCANS = {"naive": _scan_naive, "parallel": _scan_parallel, "chunked": _ScanChunked.apply}

# ---------------------------------------------------------------------------------------------------------------------
# 3. Time-invariant systems (S4): one A, B, C for all time, so the recurrence is a convolution
#
# A mass on a spring: position q, velocity v = q', and q'' = -k q - r v + x when a force x pushes it. With h = (q, v)
# this is h' = A h + B x, y = C h, where A = [[0, 1], [-k, -r]], B = (0, 1), C = (1, 0): two numbers remember all that
# was ever done to the spring, and A's eigenvalues, -r/2 +- i sqrt(k - r^2/4), say how that memory fades and swings.
# Section 1 makes it a recurrence. Unrolled from h = 0 that reads
#     y_t = sum_j K_j x_{t-j},      K_j = C Abar^j Bbar, the answer to one push, j steps later        (S4 eq. 5)
# so a whole sequence is one convolution, by FFT in l log l, and needs no state at all. A layer is d such systems of n
# numbers each, and each has a step size dt of its own. Two questions are left: which A remembers well (HiPPO), and how
# to get K without l products of matrices (S4: A is diagonal plus rank one in a complex basis; S4D: leave that one out).


def dense_kernel(Abar, Bbar, C, l):
    """K_j = C Abar^j Bbar for j < l, by the definition: Abar (n, n), Bbar and C (n,) -> K (l,)."""
    K, h = [], Bbar
    for _ in range(l):
        K.append(C @ h)
        h = Abar @ h
    return torch.stack(K)


def fft_conv(x, K, D=None):
    """y_t = sum_{j <= t} K_j x_{t-j} + D x_t: x (b, l, d), K (d, l) or (1, l), D (d,) -> y (b, l, d) in x's dtype.

    The product of two transforms is a circular convolution; padded to 2l - 1 or more, nothing comes round.
    """
    l, dtype = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    size = 1 << (2 * l - 2).bit_length()  # a power of two, the fastest
    with _no_autocast(x.device):  # there is no FFT in bfloat16
        wide = x.to(dtype)
        y = torch.fft.irfft(torch.fft.rfft(wide, size, dim=1) * torch.fft.rfft(K.to(dtype), size).T, size, dim=1)[:, :l]
        return (y if D is None else torch.addcmul(y, wide, D.to(dtype))).to(x.dtype)


# HiPPO: an A whose state is the whole past, written in Legendre polynomials


def hippo_legs(n):
    """A (n, n), B (n,) of HiPPO-LegS, float64: h' = A h + B x keeps x's past as n coefficients (2008.07669, theorem 2).

    A_ij = -sqrt((2i+1)(2j+1)) for i > j, -(i+1) for i = j, 0 above; B_i = sqrt(2i+1). HiPPO divides both by t, which
    spreads the memory evenly over the past; S4 leaves that out, and the memory fades as exp(-age).
    """
    i = torch.arange(n, dtype=torch.float64)
    B = torch.sqrt(2 * i + 1)
    return -torch.tril(B[:, None] * B, -1) - torch.diag(i + 1), B


def legs_basis(age, n):
    """sqrt(2i+1) P_i(2 exp(-age) - 1), with P_i the Legendre polynomials: age (...) -> (..., n).

    exp(tA) B = exp(-t) legs_basis(t, n), so h = int exp(-age) legs_basis(age) x(now - age) d age: the coefficients of
    the past in an orthonormal basis, hence x(now - age) = legs_basis(age, n) @ h, the closer the larger n.
    """
    z = 2 * torch.exp(-age) - 1
    P = [torch.ones_like(z), z]
    for i in range(1, n - 1):
        P.append(((2 * i + 1) * z * P[i] - i * P[i - 1]) / (i + 1))
    return torch.stack(P[:n], dim=-1) * torch.sqrt(2 * torch.arange(n, dtype=z.dtype, device=z.device) + 1)


def dplr_legs(n):
    """Lambda, P, B (n,), V (n, n), complex128: LegS is A = V (diag(Lambda) - P P^*) V^*, V unitary (S4 theorem 1).

    A cannot be diagonalized: its eigenvectors are so nearly parallel that n = 16 already costs 11 digits. But with
    p_i = sqrt(i + 1/2), S = A + p p^T is -1/2 plus a skew-symmetric matrix, which a Hermitian solver takes apart
    exactly. P and B are p and LegS's B in the new basis, up to a phase a mode; a C becomes C V. For even n modes come in
    conjugate pairs, in ascending order of Im Lambda: the first is the conjugate of the last.
    """
    A, B = hippo_legs(n)
    p = torch.sqrt(torch.arange(n, dtype=A.dtype) + 0.5)
    S = A + p[:, None] * p
    real = S.diagonal().mean()  # -1/2
    imag, V = torch.linalg.eigh(-1j * (S - real * torch.eye(n, dtype=A.dtype)))
    return torch.complex(real.expand(n), imag), V.mH @ p.to(V.dtype), V.mH @ B.to(V.dtype), V


# S4: A = diag(Lambda) - P P^*, every mode beside its conjugate, bilinear rule


def dplr_step(x, dt, Lambda, P, B, h):
    """h_t = Abar h_{t-1} + Bbar x_t in O(n): x (b, d) · dt (d,) · Lambda, P, B (d, n) · h (b, d, n) -> h_t.

    The bilinear rule is (1 - dt/2 A) h_t = (1 + dt/2 A) h_{t-1} + dt B x_t. On the left stands a diagonal matrix plus
    dt/2 P P^*, whose inverse is again diagonal plus rank one (Woodbury; S4 appendix C.2).
    """
    half = dt[:, None] / 2
    right = h + half * (Lambda * h - P * (P.conj() * h).sum(-1, keepdim=True)) + 2 * half * B * x[..., None]
    inverse = 1 / (1 - half * Lambda)
    g, u = inverse * right, inverse * P
    return g - u * (P.conj() * g).sum(-1, keepdim=True) / (1 / half + (P.conj() * u).sum(-1, keepdim=True))


def dplr_matrix(dt, Lambda, P):
    """Abar (d, n, n) of dplr_step, column by column: what it does to each unit vector."""
    eye = torch.eye(Lambda.shape[1], dtype=Lambda.dtype, device=Lambda.device)[:, None]  # (n, 1, n)
    return dplr_step(dt.new_zeros(1, 1), dt, Lambda, P, torch.zeros_like(P), eye).permute(1, 2, 0)


def s4_kernel(dt, Lambda, P, B, C, l):
    """K_j = Re C Abar^j Bbar by the bilinear rule: dt (d,), Lambda, P, B, C (d, n) -> K (d, l).

    S4 section 3.2, without l powers: evaluate the polynomial sum_j K_j z^j at the l-th roots of unity, transform back.
        sum_{j < l} C Abar^j Bbar z^j = C' (1 - Abar z)^-1 Bbar,    C' = C (1 - Abar^l)            a geometric series
                                      = 2 dt C' [2 (1 - z) - dt (1 + z) A]^-1 B                    the rule put in
                                      = q(C', B) - g q(C', P) q(P^*, B)                            Woodbury
    with g = (1 + z) / (2 + (1 + z) q(P^*, P)) and Cauchy sums q(u, v) = sum_n u_n v_n 2 dt / (2 (1 - z) - dt (1 + z) Lambda_n).
    The paper divides by 1 + z, which is zero where z = -1; this form has no pole. A parameter holds C, not C', so l may
    change at will; the price is Abar^l, n^3 log l.
    """
    return _s4_read(_circle(dt, Lambda, P, l), P, B, C)


def s4(x, dt, Lambda, P, B, C, D=None, h0=None, impl="auto"):
    """h_t = Abar h_{t-1} + Bbar x_t,   y_t = Re C h_t + D x_t,   bilinear rule, A = diag(Lambda) - P P^*

    x (b, l, d) · dt (d,) · Lambda, P, B, C (d, n) complex · D (d,) · h0 (b, d, n) complex, zero if None
    -> y (b, l, d) in x's dtype, h_last (b, d, n). impl: recurrence, convolution, auto. In the convolution h0 is one more
    push: B' = h0/dt + A h0/2 has Bbar' = Abar h0.
    """
    l, wide = x.shape[1], x.to(dt.dtype)
    if _pick(impl, {"recurrence": True, "convolution": False}, "recurrence" if l == 1 else "convolution"):
        h = torch.zeros_like(wide[:, 0, :, None] * B) if h0 is None else h0
        hs = []
        for x_t in wide.unbind(1):
            h = dplr_step(x_t, dt, Lambda, P, B, h)
            hs.append(h)
        y = (torch.stack(hs, dim=1) * C).sum(-1).real
        return (y if D is None else torch.addcmul(y, wide, D)).to(x.dtype), h
    circle = _circle(dt, Lambda, P, l)
    y, h = fft_conv(wide, _s4_read(circle, P, B, C), D), _s4_write(circle, P, B, wide)
    if h0 is not None:
        push = h0 / dt[:, None] + (Lambda * h0 - P * (P.conj() * h0).sum(-1, keepdim=True)) / 2
        y, h = y + _s4_read(circle, P, push, C).mT, h + torch.einsum("dnm,bdm->bdn", circle[-1], h0)
    return y.to(x.dtype), h


def _circle(dt, Lambda, P, l):
    """z (l,), the Cauchy matrix (d, l, n) and g (d, l) of s4_kernel, and Abar^l (d, n, n)."""
    z = torch.exp(-2j * math.pi / l * torch.arange(l, dtype=dt.dtype, device=dt.device))
    dt_ = dt[:, None, None]
    cauchy = 2 * dt_ / (2 * (1 - z)[:, None] - dt_ * (1 + z)[:, None] * Lambda[:, None])
    g = (1 + z) / (2 + (1 + z) * (cauchy @ (P.conj() * P)[..., None]).squeeze(-1))
    return z, cauchy, g, torch.linalg.matrix_power(dplr_matrix(dt, Lambda, P), l)


def _s4_read(circle, P, B, C):
    """The kernel (..., d, l) for B (..., d, n)."""
    _, cauchy, g, power = circle
    C = C - (C[:, None] @ power).squeeze(1)
    CB, CP, PB = (cauchy @ torch.stack(torch.broadcast_tensors(C * B, C * P, P.conj() * B), dim=-1)).unbind(-1)
    return torch.fft.ifft(CB - g * CP * PB).real


def _s4_write(circle, P, B, x):
    """sum_j Abar^(l-1-j) Bbar x_j (b, d, n): the kernel's formula with every mode for C, at position l - 1, where z^-j = z."""
    z, cauchy, g, power = circle
    X = (torch.fft.fft(x, dim=1) * z[:, None] / len(z)).permute(2, 0, 1)  # (d, b, l)
    PB = (cauchy @ (P.conj() * B)[..., None]).squeeze(-1)
    h = B[:, None] * (X @ cauchy) - P[:, None] * (X * (g * PB)[:, None] @ cauchy)  # (d, b, n)
    return (h - h @ power.mT).transpose(0, 1)


# S4D: A diagonal, zero-order hold; everything is n separate complex numbers


def s4d_init(rule, n):
    """A, B (n/2,), complex128: one of each conjugate pair of modes of a real system of size n (S4D, 2206.11893).

    lin   -1/2 + i pi j                             frequencies one after the other
    inv   -1/2 + i n/pi (n/(2j+1) - 1)              as LegS has them when n is large: few high ones, many low ones
    legs  Lambda and B of dplr_legs                 LegS without its rank one
    real  -(j+1)                                    no swing, only decay, hence no conjugates; Mamba's
    """
    if n % 2:
        raise ValueError(f"a system of size {n} has no conjugate pairs; n must be even")
    j = torch.arange(n // 2, dtype=torch.float64)
    if rule == "legs":
        Lambda, _, B, _ = dplr_legs(n)
        return Lambda[n // 2:], B[n // 2:]
    imag = {"lin": math.pi * j, "inv": n / math.pi * (n / (2 * j + 1) - 1), "real": 0 * j}
    if rule not in imag:
        raise ValueError(f'rule "{rule}" is not one of lin, inv, legs, real')
    A = torch.complex(-j - 1 if rule == "real" else torch.full_like(j, -0.5), imag[rule])
    return A, torch.ones_like(A)


def s4d_kernel(dt, A, B, C, l):
    """K_j = Re sum_n C_n Bbar_n Abar_n^j, zero-order hold: dt (d,), A, B, C (d, n) complex -> K (d, l)    (S4D eq. 6)

    The plain real part. Where only one mode of each conjugate pair is kept, C has to come doubled, for a mode and its
    conjugate add up to twice the real part.
    """
    Bbar = discretize(dt[:, None], A, B, "zoh")[1]
    return _read(_powers(dt[:, None] * A, l), C * Bbar)[..., :l]


def s4d(x, dt, A, B, C, D=None, h0=None, impl="auto"):
    """h_t = Abar h_{t-1} + Bbar x_t,   y_t = Re sum_n C h_t + D x_t,   by zero-order hold

    x (b, l, d) · dt (d,) · A, B, C (d, n) complex, B may be a number · D (d,) · h0 (b, d, n) complex, zero if None
    -> y (b, l, d) in x's dtype, h_last (b, d, n). impl: recurrence, convolution, auto. The convolution is exact with
    states too: h0 answers with C Abar^(j+1) h0 whatever x does, and h_last is a sum over x with the same powers.
    """
    l = x.shape[1]
    wide, z = x.to(dt.dtype), dt[:, None] * A
    Abar, Bbar = discretize(dt[:, None], A, B, "zoh")
    if _pick(impl, {"recurrence": True, "convolution": False}, "recurrence" if l == 1 else "convolution"):
        h = scan(Abar[None, None], Bbar * wide[..., None], h0, "naive")  # (b, l, d, n)
        y = (C * h).sum(-1).real
        return (y if D is None else torch.addcmul(y, wide, D)).to(x.dtype), h[:, -1]
    powers = _powers(z, l)
    y, h = fft_conv(wide, _read(powers, C * Bbar)[..., :l], D), Bbar * _write(powers, wide)
    if h0 is not None:
        y, h = y + _read(powers, C * Abar * h0)[..., :l].mT, h + torch.exp(l * z) * h0
    return y.to(x.dtype), h


def _powers(z, l):
    """exp(i z) (d, n, size) and exp(size k z) (d, n, k), for every j = i + size k < l; size is about sqrt(l).

    Written out, exp(j z) are n l d numbers; so they are never written out.
    """
    size = math.isqrt(l - 1) + 1
    i = torch.arange(size, dtype=z.real.dtype, device=z.device)
    return torch.exp(z[..., None] * i), torch.exp(z[..., None] * size * i[:-(-l // size)])


def _read(powers, w):
    """Re sum_n w_n exp(j z_n) at every j: w (..., d, n) -> (..., d, l or a little more).

    A product of two small matrices, w exp(size k z) and exp(i z); the real part of a complex product is one real product.
    """
    early, late = powers[0], w[..., None] * powers[1]
    with _no_autocast(w.device):
        return (torch.cat([late.real, -late.imag], -2).mT @ torch.cat([early.real, early.imag], -2)).flatten(-2)


def _write(powers, x):
    """sum_j exp(j z) x_{l-1-j}, what an input leaves in the state: x (b, l, d), real -> (b, d, n)."""
    early, late = powers
    x = F.pad(x.flip(1), (0, 0, 0, early.shape[2] * late.shape[2] - x.shape[1]))
    x = x.unflatten(1, (late.shape[2], -1)).permute(3, 0, 1, 2)  # (d, b, k, i)
    with _no_autocast(x.device):
        h = x.flatten(1, 2) @ torch.cat([early.real, early.imag], dim=1).mT  # (d, b k, 2n)
    h = torch.complex(*h.chunk(2, dim=-1)).unflatten(1, x.shape[1:3])
    return torch.einsum("dbkn,dnk->bdn", h, late)


# ---------------------------------------------------------------------------------------------------------------------
# 4. The selective scan (Mamba, section 3): dt, B and C move with the input, so the model chooses what to keep
#
# It is the scan above with a_t = exp(dt_t A) and b_t = dt_t B_t x_t, read out by C_t. What makes it hard is memory: the
# inputs have b l d numbers, the states b l d n. The fast path therefore never holds all of them at once.


def selective_scan(x, dt, A, B, C, D=None, h0=None, impl="auto"):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,   y_t = C_t h_t + D x_t        (Mamba algorithm 2; rule "mamba")

    x, dt (b, l, d) · A (d, n) · B, C (b, l, n) · D (d,) · h0 (b, d, n), zero if None -> y (b, l, d), h_last (b, d, n).
    dt is positive already: softplus is the caller's. y has x's dtype; h_last is float32, or float64 for float64 inputs.
    Gradients reach every input, also through h_last. impl: naive, parallel, chunked, auto.
    """
    (b, l, d), n = x.shape, A.shape[1]
    for name, t, shape in (("x", x, (b, l, d)), ("dt", dt, (b, l, d)), ("A", A, (d, n)), ("B", B, (b, l, n)),
                           ("C", C, (b, l, n)), ("D", D, (d,)), ("h0", h0, (b, d, n))):
        if t is not None and t.shape != shape or l == 0:
            raise ValueError(f"selective_scan: {name} has shape {tuple(t.shape)}, expected {shape} with l >= 1")
    wide, dt, A, B, C, D, h0 = _wide(x, dt, A, B, C, D, h0)
    if h0 is None:
        h0 = wide.new_zeros(b, d, n)
    path = _pick(impl, SELECTIVE_SCANS, "naive" if l == 1 else "chunked")  # one step needs no machinery
    with _no_autocast(x.device):
        y, h = path(wide, dt, A, B, C, h0)
    return (y if D is None else torch.addcmul(y, wide, D)).to(x.dtype), h


def _selective_naive(x, dt, A, B, C, h):
    """The definition, one step at a time."""
    ys = []
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1)):
        Abar, Bbar = discretize(dt_t[:, :, None], A, B_t[:, None], "mamba")  # (b, d, n)
        h = Abar * h + Bbar * x_t[:, :, None]
        ys.append((h * C_t[:, None]).sum(-1))  # (b, d)
    return torch.stack(ys, dim=1), h


def _selective_parallel(x, dt, A, B, C, h0):
    """All states at once through the associative scan: log depth, but several tensors of b l d n numbers."""
    Abar, Bbar = discretize(dt[..., None], A, B[:, :, None], "mamba")  # (b, l, d, n)
    h = scan(Abar, Bbar * x[..., None], h0, "parallel")
    return torch.einsum("bldn,bln->bld", h, C), h[:, -1]


class _SelectiveChunked(torch.autograd.Function):
    """Chunk after chunk, each small enough that its states stay in the processor's cache.

    Forward keeps the state at every chunk's start and forgets the rest; backward computes a chunk's states again and walks
    it in reverse. With g_t = dL/dh_t in total (section 2) and w_t = g_t a_t h_{t-1} = dL/d(dt_t A):
        g_t = C_t dy_t + a_{t+1} g_{t+1}
        dC_t = sum_d h_t dy_t       dB_t = sum_d g_t dt_t x_t      dx_t = dt_t sum_n g_t B_t
        ddt_t = sum_n w_t A + x_t sum_n g_t B_t                    dA = sum_{b,t} w_t dt_t
    Channels lie last in memory, (b, t, n, d): a step is one in-place multiply-add over whole rows, and sums over n or d
    are matrix products of a single row. On two cores the floor is the exponential, once in each direction.
    """

    @staticmethod
    def forward(ctx, x, dt, A, B, C, h0):
        (b, l, d), n = x.shape, A.shape[1]
        A = A.T.contiguous()  # (n, d)
        u = dt * x
        chunks = _chunk_slices(b, l, d * n)
        starts = x.new_empty(len(chunks), b, n, d)
        buffers = x.new_empty(2, b, chunks[0].stop, n, d)
        y, h = torch.empty_like(x), h0.transpose(1, 2)
        for start, s in zip(starts, chunks):
            start.copy_(h)
            _, hs, h = _states(dt[:, s], A, u[:, s], B[:, s], start, buffers)
            y[:, s] = (C[:, s, None] @ hs).squeeze(2)
        ctx.save_for_backward(x, dt, A, B, C, starts)
        return y, h.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh):
        x, dt, A, B, C, starts = ctx.saved_tensors
        b, l, d = x.shape
        dx, ddt, dB, dC = torch.empty_like(x), torch.empty_like(x), torch.empty_like(B), torch.empty_like(C)
        dA = torch.zeros_like(starts[0])  # (b, n, d), summed over b at the end
        chunks = _chunk_slices(b, l, A.numel())
        buffers = x.new_empty(3, b, chunks[0].stop, *A.shape)
        carry = dh.transpose(1, 2)  # a_{t+1} g_{t+1}, from the step after the chunk
        for start, s in zip(reversed(starts.unbind(0)), reversed(chunks)):
            x_s, dt_s, dy_s = x[:, s], dt[:, s], dy[:, s]
            u = dt_s * x_s
            a, h, _ = _states(dt_s, A, u, B[:, s], start, buffers)
            g = torch.mul(C[:, s, :, None], dy_s[:, :, None], out=buffers[2, :, :x_s.shape[1]])
            a_t, g_t = a.unbind(1), g.unbind(1)
            g_t[-1].add_(carry)
            for t in range(len(g_t) - 2, -1, -1):
                g_t[t].addcmul_(a_t[t + 1], g_t[t + 1])
            carry = a_t[0] * g_t[0]
            du = (B[:, s, None] @ g).squeeze(2)  # (b, t, d)
            dx[:, s] = du * dt_s
            dB[:, s] = (u[:, :, None] @ g.transpose(2, 3)).squeeze(2)
            dC[:, s] = (dy_s[:, :, None] @ h.transpose(2, 3)).squeeze(2)
            w = a.mul_(g)
            w[:, 1:].mul_(h[:, :-1])
            w[:, 0].mul_(start)
            for w_t, dt_t in zip(w.unbind(1), dt_s[:, :, None].unbind(1)):
                dA.addcmul_(w_t, dt_t)
            ddt[:, s] = w.mul_(A).sum(2).addcmul_(du, x_s)
        return dx, ddt, dA.sum(0).T, dB, dC, carry.transpose(1, 2)


def _chunk_slices(b, l, state):
    """Slices of the length axis: 16 to 64 steps, as many as keep a buffer of states near 2 MB."""
    size = min(l, max(16, min(64, 2**19 // (b * state))))
    return [slice(i, min(i + size, l)) for i in range(0, l, size)]


def _states(dt, A, u, B, h, buffers):
    """Decays a (b, t, n, d) and states h of one chunk, written into two reused buffers, and the last state."""
    a = torch.mul(dt[:, :, None], A, out=buffers[0, :, :dt.shape[1]]).exp_()
    hs = torch.mul(u[:, :, None], B[..., None], out=buffers[1, :, :dt.shape[1]])
    for a_t, h_t in zip(a.unbind(1), hs.unbind(1)):
        h = h_t.addcmul_(a_t, h)
    return a, hs, h


SELECTIVE_SCANS = {"naive": _selective_naive, "parallel": _selective_parallel, "chunked": _SelectiveChunked.apply}

# ---------------------------------------------------------------------------------------------------------------------
# 5. SSD (Mamba-2): one decay a head instead of one a channel and state, so that the scan becomes matrix products
#
# Unroll h_t = a_t h_{t-1} + dt_t B_t x_t with a scalar a_t = exp(dt_t A), read it out by C_t, and attention appears:
#     y_i = sum_{j <= i} L_ij (C_i . B_j) dt_j x_j,      L_ij = a_i a_{i-1} ... a_{j+1} = exp(c_i - c_j),  c = cumsum(dt A)
# with C as queries, B as keys, dt x as values and a decay where softmax was. Dao and Gu call it state-space duality.
#
#                work         memory beside the inputs      what it is
#    naive       l p n        autograd keeps every state    the recurrence
#    quadratic   l^2 (n + p)  l^2 a head                    masked attention
#    chunked     l q (n + p)  l q a head                    quadratic inside chunks of q, the scan of section 2 between


def ssd(x, dt, A, B, C, D=None, h0=None, impl="auto"):
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,   y_t = h_t C_t + D x_t        (Mamba-2, sections 5 and 6)

    x (b, l, nh, p) · dt (b, l, nh), positive · A (nh,), negative · B, C (b, l, g, n): head i reads group i // (nh // g)
    D (nh,) · h0 (b, nh, p, n), zero if None -> y (b, l, nh, p) in x's dtype, h_last (b, nh, p, n) float32 or float64.
    Gradients reach every input, also through h_last. impl: naive, quadratic, chunked, auto.
    """
    (b, l, nh, p), (g, n) = x.shape, B.shape[2:]
    for name, t, shape in (("dt", dt, (b, l, nh)), ("A", A, (nh,)), ("B", B, (b, l, g, n)), ("C", C, (b, l, g, n)),
                           ("D", D, (nh,)), ("h0", h0, (b, nh, p, n))):
        if t is not None and t.shape != shape or l == 0 or nh % g:
            raise ValueError(f"ssd: {name} has shape {tuple(t.shape)}, expected {shape} with l >= 1 and g dividing nh")
    wide, dt, A, B, C, D, h0 = _wide(x, dt, A, B, C, D, h0)
    if h0 is None:
        h0 = wide.new_zeros(b, nh, p, n)
    path = _pick(impl, SSDS, "naive" if l == 1 else "chunked")
    with _no_autocast(x.device):
        y, h = path(wide, dt, A, B, C, h0)
        y = y if D is None else torch.addcmul(y, wide, D[:, None])
    return y.to(x.dtype), h


def _ssd_naive(x, dt, A, B, C, h):
    """The definition, one step at a time."""
    heads = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(heads, dim=2), C.repeat_interleave(heads, dim=2)  # (b, l, nh, n)
    ys = []
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1)):
        h = torch.exp(dt_t * A)[..., None, None] * h + (dt_t[..., None] * x_t)[..., None] * B_t[:, :, None]
        ys.append((h @ C_t[..., None]).squeeze(-1))  # (b, nh, p)
    return torch.stack(ys, dim=1), h


def _log_decays(dt, A):
    """c = cumsum(dt A) along axis 1, in float64 where the device has it: exp(c_i - c_j) of a float32 sum over 8,192 steps
    is 0.3 % wrong, because the difference of two large numbers keeps only their absolute precision."""
    wide = dt.dtype if dt.device.type == "mps" else torch.float64
    return torch.cumsum(dt.to(wide) * A, dim=1)


def _ssd_quadratic(x, dt, A, B, C, h0):
    """Masked attention over the whole length."""
    c = _log_decays(dt, A)
    return _ssd_attend(x, dt, c, B, C, h0), _ssd_last_state(x, dt, c, B, h0)


def _ssd_chunked(x, dt, A, B, C, h0, size=32):
    """Three steps: every chunk's last state as if it began from zero, a scan that carries states from chunk to chunk, and
    attention inside the chunks, each from its true initial state. A last chunk that is shorter goes by itself."""
    b, l = x.shape[:2]
    if l <= size:
        return _ssd_quadratic(x, dt, A, B, C, h0)
    whole = l // size * size
    chunks = [t[:, :whole].unflatten(1, (-1, size)).flatten(0, 1) for t in (x, dt, B, C)]  # (b chunks, size, ...)
    c = _log_decays(chunks[1], A)
    ends = _ssd_last_state(chunks[0], chunks[1], c, chunks[2], None)
    decay = c[:, -1].to(x.dtype).exp()  # (b chunks, nh), over a whole chunk
    h = scan(decay.unflatten(0, (b, -1))[..., None, None], ends.unflatten(0, (b, -1)), h0, "naive")
    starts = torch.cat([h0[:, None], h[:, :-1]], dim=1).flatten(0, 1)
    y = _ssd_attend(chunks[0], chunks[1], c, chunks[2], chunks[3], starts).unflatten(0, (b, -1)).flatten(1, 2)
    if whole == l:
        return y, h[:, -1]
    y_tail, h_last = _ssd_quadratic(x[:, whole:], dt[:, whole:], A, B[:, whole:], C[:, whole:], h[:, -1])
    return torch.cat([y, y_tail], dim=1), h_last


def _ssd_attend(x, dt, c, B, C, h0):
    """y_i = exp(c_i) h0 C_i + sum_{j <= i} exp(c_i - c_j) (C_i . B_j) dt_j x_j for every position i."""
    g, c = B.shape[2], c.transpose(1, 2)  # c (b, nh, l)
    C = C.transpose(1, 2)
    scores = (C @ B.permute(0, 2, 3, 1)).tril()  # (b, g, l, l), zero where j > i
    L = _Decays.apply(c, x.dtype).unflatten(1, (g, -1)) * scores[:, :, None]  # (b, g, nh/g, l, l)
    inside = L.flatten(1, 2) @ (dt[..., None] * x).transpose(1, 2)  # (b, nh, l, p)
    from_h0 = C[:, :, None] @ h0.unflatten(1, (g, -1)).transpose(3, 4)  # (b, g, nh/g, l, p)
    return torch.addcmul(inside, c.to(x.dtype).exp()[..., None], from_h0.flatten(1, 2)).transpose(1, 2)


class _Decays(torch.autograd.Function):
    """L_ij = exp(c_i - c_j) for j <= i, from c (b, nh, l) that never increases; above the diagonal 1, for tril to remove.

    The difference is taken in c's dtype and kept in the narrower one. No positive number meets exp: it might become inf,
    and inf times the zero of a mask is NaN. dL/dc_i adds up row i of W = dL L and takes off column i; autograd would go
    through the same numbers four times, in float64.
    """

    @staticmethod
    def forward(ctx, c, dtype):
        L = torch.empty(*c.shape, c.shape[-1], dtype=dtype, device=c.device)
        torch.sub(c[..., :, None], c[..., None, :], out=L).clamp_(max=0).exp_()
        ctx.save_for_backward(L)
        ctx.dtype = c.dtype
        return L

    @staticmethod
    @once_differentiable
    def backward(ctx, dL):
        W = dL * ctx.saved_tensors[0]
        return W.sum(-1, dtype=ctx.dtype) - W.sum(-2, dtype=ctx.dtype), None  # rows and columns all but cancel


def _ssd_last_state(x, dt, c, B, h0):
    """h_last = exp(c_l) h0 + sum_j exp(c_l - c_j) dt_j x_j B_j^T; an h0 of None is zero."""
    decay = (c[:, -1:] - c).to(x.dtype).exp()  # (b, l, nh)
    u = ((dt * decay)[..., None] * x).unflatten(2, (B.shape[2], -1))  # (b, l, g, nh/g, p)
    h = (u.permute(0, 2, 3, 4, 1) @ B.transpose(1, 2)[:, :, None]).flatten(1, 2)  # (b, nh, p, n)
    return h if h0 is None else torch.addcmul(h, c[:, -1, :, None, None].to(x.dtype).exp(), h0)


SSDS = {"naive": _ssd_naive, "quadratic": _ssd_quadratic, "chunked": _ssd_chunked}
