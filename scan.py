"""The recurrence h_t = a_t h_{t-1} + b_t, from the continuous system up to fast scans.

Read it top to bottom. Section 1 turns a differential equation into a recurrence; section 2 solves the recurrence by
a loop, by a tree and in chunks; section 3 is S4, where it is a convolution; section 4 is the selective scan of Mamba,
section 5 the matrix form of Mamba-2, section 6 the selective scan as it runs fast on a GPU.
Every fast path computes what the naive one defines, and tests/ hold it to that, values and gradients.

Glossary. Capitals are the papers' state-space quantities, lower-case letters sizes of axes, words everything else.

    here       shape                      Mamba (2312.00752)   S4 (2111.00396)
    x          (b, l, d)                  x                    u           input
    h          (b, d, n)                  h                    x           state
    y          (b, l, d)                  y                    y           output
    dt         (b, l, d), positive        Delta                Delta       step size; S4 has one a channel
    A          (d, n), Re A < 0           A                    A           h' = A h + B x, A diagonal
    B, C       (b, l, n)                  B, C                 B, C        into and out of h; S4's do not move with t
    D          (d,)                       (code only)          D           skip: y += D x
    Abar Bbar  as dt A and dt B           A-bar, B-bar         A-bar, B-bar  discretized: h_t = Abar h_{t-1} + Bbar x_t
    K          (d, l)                                          K-bar       kernel: y = K * x where nothing moves with t
    Lambda P   (d, n), complex                                 Lambda, P   S4: A = diag(Lambda) - P P^*
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

try:
    import triton
    import triton.language as tl
except ImportError as error:  # everything but section 6 runs without
    triton, no_triton = None, str(error)

    class tl:  # all that the definitions there ask for
        constexpr = int

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

    The Mamba paper prints zoh for both, its code computes the rule named mamba here, and so do all its checkpoints: B
    is learned, so a factor (exp(z) - 1)/z close to 1 (z = dt A) costs time and buys nothing. Real or complex.
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
    impl: naive, parallel, chunked, triton (real numbers, section 6), or auto: triton on a CUDA GPU, else chunked.
    """
    a, b, h0 = _wide(a, b, h0)
    if b.shape[1] == 0:
        raise ValueError(f"scan needs at least one step; b has shape {tuple(b.shape)}")
    if h0 is None:
        h0 = torch.zeros_like(b[:, 0])
    path = _scan_triton if takes_triton(impl, b) else _pick(impl, SCANS, "chunked")
    return path(a.expand_as(b), b, h0)


def _wide_dtype(*tensors):
    """The dtype that holds them all and is at least float32; None is no tensor."""
    return functools.reduce(torch.promote_types, {t.dtype for t in tensors if t is not None}, torch.float32)


def _wide(*tensors):
    """All tensors (None stays None) in the one dtype that holds them all and is at least float32."""
    dtype = _wide_dtype(*tensors)
    if all(t is None or t.dtype == dtype for t in tensors):
        return tensors
    return [t if t is None else t.to(dtype) for t in tensors]


def _no_autocast(device):
    """A context that narrows nothing; entering one costs as much as a small layer's step, so only where needed."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else contextlib.nullcontext()


def _pick(impl, table, auto):
    """The function that impl names."""
    name = auto if impl == "auto" else impl
    if name not in table:
        names = [*table, "auto"] if table is SSDS else [*table, "triton", "auto"]
        raise ValueError(f'impl "{impl}" is not one of {", ".join(names)}')
    return table[name]


def takes_triton(impl, x):
    """Whether the kernels of section 6 run: asked for by name, or by auto on a GPU that Triton compiles for."""
    if impl != "auto" or triton is None or not x.is_cuda or torch.version.hip or x.is_complex():
        return impl == "triton"
    return torch.cuda.get_device_properties(x.device).major >= 8


def _scan_naive(a, b, h):
    """The definition. unbind, not a[:, t]: an index's backward writes a zero tensor as large as a, at every step."""
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


class _Scan(torch.autograd.Function):
    """A scan by a function run that need not be differentiable, and its gradients by the same function.

    The gradient of a scan is a scan backwards (Martin and Cundy 2018, section 2.2): with g_t = dL/dh_t in total,
        g_t = dh_t + conj(a_{t+1}) g_{t+1},   db_t = g_t,   da_t = g_t conj(h_{t-1}),   dh0 = conj(a_0) g_0.
    """

    @staticmethod
    def forward(ctx, run, a, b, h0):
        h = run(a, b, h0)
        ctx.run = run
        ctx.save_for_backward(a, h, h0)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        a, h, h0 = ctx.saved_tensors
        a_next = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], dim=1).conj()  # nothing comes after the last step
        g = ctx.run(a_next.flip(1), dh.flip(1), torch.zeros_like(h0)).flip(1)
        before = torch.cat([h0[:, None], h[:, :-1]], dim=1)
        return None, g * before.conj(), g, a[:, 0].conj() * g[:, 0]


def _chunks_then_carries(a, b, h):
    """sqrt(l) chunks of sqrt(l) steps: all chunks step together from h = 0, then the carries run through them.

    Inside a chunk h_t = (h_t from zero) + (a_t ... a_first) h_in, since the recurrence is linear in its initial state.
    """
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


SCANS = {"naive": _scan_naive, "parallel": _scan_parallel,
         "chunked": functools.partial(_Scan.apply, _chunks_then_carries)}

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
    """y_t = sum_{j <= t} K_j x_{t-j} + D x_t: x (b, l, d), K (d, l) or (1, l), D (d,) or (1,) -> y (b, l, d).

    y has x's dtype. A product of transforms is a circular convolution; padded to 2l - 1 or more, nothing comes round.
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
    exactly. P and B are p and LegS's B in the new basis, up to a phase a mode; C becomes C V. For even n modes come in
    conjugate pairs, in ascending order of Im Lambda, so that the first is the conjugate of the last.
    """
    A, B = hippo_legs(n)
    p = torch.sqrt(torch.arange(n, dtype=A.dtype) + 0.5)
    S = A + p[:, None] * p
    real = S.diagonal().mean()  # -1/2
    imag, V = torch.linalg.eigh(-1j * (S - real * torch.eye(n, dtype=A.dtype)))
    return torch.complex(real.expand(n), imag), V.mH @ p.to(V.dtype), V.mH @ B.to(V.dtype), V


# S4: A = diag(Lambda) - P P^*, bilinear rule. P P^* ties all modes together: each needs its conjugate beside it


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

    S4 appendix C.3, without l powers: evaluate the polynomial sum_j K_j z^j at the l-th roots of unity, transform back.
        sum_{j < l} C Abar^j Bbar z^j = C' (1 - Abar z)^-1 Bbar,    C' = C (1 - Abar^l)            a geometric series
                                      = 2 dt C' [2 (1 - z) - dt (1 + z) A]^-1 B                    the rule put in
                                      = q(C', B) - g q(C', P) q(P^*, B)                            Woodbury
    with g = (1 + z) / (2 + (1 + z) q(P^*, P)) and q(u, v) = sum_n u_n v_n 2 dt / (2 (1 - z) - dt (1 + z) Lambda_n), a
    Cauchy matrix times a vector. The paper divides by 1 + z, which is zero where z = -1; this form has no pole. A
    parameter holds C, not C', so l may change at will; the price is Abar^l, n^3 log l a channel, and d n^2 numbers.
    """
    return _s4_read(_circle(dt, Lambda, P, l), P, B, C)


def s4(x, dt, Lambda, P, B, C, D=None, h0=None, impl="auto"):
    """h_t = Abar h_{t-1} + Bbar x_t,   y_t = Re C h_t + D x_t,   bilinear rule, A = diag(Lambda) - P P^*

    x (b, l, d) · dt (d,) · Lambda, P, B, C (d, n) complex · D (d,) · h0 (b, d, n) complex, zero if None
    -> y (b, l, d) in x's dtype, h_last (b, d, n). impl: recurrence, convolution, auto. To the convolution h0 is one
    more push: B' = h0/dt + A h0/2 has Bbar' = Abar h0.
    """
    l, wide, steps = _checked("s4", x, dt, impl)
    if steps:
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


def _checked(name, x, dt, impl):
    """The length of x (b, l, d), x in the dtype of dt (d,), and whether to step through it."""
    if x.ndim != 3 or x.shape[1] == 0 or dt.shape != x.shape[2:]:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)} and dt {tuple(dt.shape)}, expected (b, l, d) and (d,) "
                         "with l >= 1")
    if impl not in ("recurrence", "convolution", "auto"):
        raise ValueError(f'impl "{impl}" is not one of recurrence, convolution, auto')
    return x.shape[1], x.to(dt.dtype), impl == "recurrence" or impl == "auto" and x.shape[1] == 1


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
    """sum_j Abar^(l-1-j) Bbar x_j (b, d, n): the kernel's formula, each mode for C, at l - 1, where z^-(l-1) = z."""
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
    """K_j = Re sum_n C_n Bbar_n Abar_n^j, zero-order hold: dt (d,), A, B, C (d, n) or (1, n) complex -> K (d, l)

    B may be a number. A Vandermonde matrix times a vector (S4D, section 3). The plain real part: where one mode of each
    conjugate pair is kept, C has to come doubled, for a mode and its conjugate add up to twice the real part.
    """
    Bbar = discretize(dt[:, None], A, B, "zoh")[1]
    return _read(_powers(dt[:, None] * A, l), C * Bbar)[..., :l]


def s4d(x, dt, A, B, C, D=None, h0=None, impl="auto"):
    """h_t = Abar h_{t-1} + Bbar x_t,   y_t = Re sum_n C h_t + D x_t,   by zero-order hold

    x (b, l, d) · dt (d,) · A, B, C (d, n) complex, B may be a number · D (d,) · h0 (b, d, n) complex, zero if None
    -> y (b, l, d) in x's dtype, h_last (b, d, n). impl: recurrence, convolution, auto. The convolution is exact with
    states too: h0 answers with C Abar^(j+1) h0 whatever x does, and h_last is a sum over x with the same powers.
    """
    l, wide, steps = _checked("s4d", x, dt, impl)
    z = dt[:, None] * A
    Abar, Bbar = discretize(dt[:, None], A, B, "zoh")
    if steps:
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

    A product of two small matrices, w exp(size k z) and exp(i z), and its real part is one product of real matrices.
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


def selective_scan(x, dt, A, B, C, D=None, h0=None, impl="auto", keep=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,   y_t = C_t h_t + D x_t        (Mamba algorithm 2; rule "mamba")

    x, dt (b, l, d) · A (d, n) · B, C (b, l, n) · D (d,) · h0 (b, d, n), zero if None -> y (b, l, d), h_last (b, d, n).
    dt is positive already: softplus is the caller's. y has x's dtype; h_last is float32, or float64 for float64 inputs.
    Gradients reach every input, also through h_last. impl: naive, parallel, chunked, triton (section 6), or auto: naive
    for one step, else triton on a CUDA GPU up to n = 256, else chunked. keep, a number from 1 or one a row (b,): h_last
    is the state after so many steps; without triton by the loop, for what reads ahead is short, and the loop holds two
    states and no more.
    """
    (b, l, d), n = x.shape, A.shape[1]
    for name, t, shape in (("x", x, (b, l, d)), ("dt", dt, (b, l, d)), ("A", A, (d, n)), ("B", B, (b, l, n)),
                           ("C", C, (b, l, n)), ("D", D, (d,)), ("h0", h0, (b, d, n))):
        if t is not None and t.shape != shape or l == 0:
            raise ValueError(f"selective_scan: {name} has shape {tuple(t.shape)}, expected {shape} with l >= 1")
    if takes_triton(impl, x) and (impl == "triton" or l > 1 and n <= 256):
        y, h = _selective_triton(x, dt, A, B, C, D, h0)
        if isinstance(keep, int):
            h = _selective_triton(*(t[:, :keep] for t in (x, dt)), A, B[:, :keep], C[:, :keep], None, h0)[1]
        elif keep is not None:
            h = _selective_triton(x, _cut(dt, keep), A, B, C, None, h0)[1]
        return y, h
    wide, dt, A, B, C, D, h0 = _wide(x, dt, A, B, C, D, h0)
    if h0 is None:
        h0 = wide.new_zeros(b, d, n)
    path = _pick(impl, SELECTIVE_SCANS, "naive" if l == 1 else "chunked")  # one step needs no machinery
    if keep is not None:
        path = functools.partial(_selective_naive, keep=keep)
    with _no_autocast(x.device):
        y, h = path(wide, dt, A, B, C, h0)
    return (y if D is None else torch.addcmul(y, wide, D)).to(x.dtype), h


def _cut(dt, keep):
    """dt (b, l, ...) with zeros from step keep (b,) on: a step of no length leaves the state, exp(0) h + 0 B x = h."""
    return dt * (torch.arange(dt.shape[1], device=dt.device) < keep[:, None])[..., None]


def _selective_naive(x, dt, A, B, C, h, keep=None):
    """The definition, one step at a time."""
    ys, kept = [], h
    for t, (x_t, dt_t, B_t, C_t) in enumerate(zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1))):
        Abar, Bbar = discretize(dt_t[:, :, None], A, B_t[:, None], "mamba")  # (b, d, n)
        h = Abar * h + Bbar * x_t[:, :, None]
        ys.append((h * C_t[:, None]).sum(-1))  # (b, d)
        if isinstance(keep, int):
            kept = h if t < keep else kept
        elif keep is not None:
            kept = torch.where((t < keep)[:, None, None], h, kept)
    return torch.stack(ys, dim=1), h if keep is None else kept


def _selective_parallel(x, dt, A, B, C, h0):
    """All states at once through the associative scan: log depth, but several tensors of b l d n numbers."""
    Abar, Bbar = discretize(dt[..., None], A, B[:, :, None], "mamba")  # (b, l, d, n)
    h = scan(Abar, Bbar * x[..., None], h0, "parallel")
    return torch.einsum("bldn,bln->bld", h, C), h[:, -1]


class _SelectiveChunked(torch.autograd.Function):
    """Chunk after chunk, each small enough that its states stay in the processor's cache.

    Forward keeps the state at every chunk's start and forgets the rest; backward computes a chunk's states again and
    walks it in reverse. With g_t = dL/dh_t in total (section 2) and w_t = g_t a_t h_{t-1} = dL/d(dt_t A):
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
        return y, h.transpose(1, 2).clone(memory_format=torch.contiguous_format)

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
    size = min(l, max(16, min(64, 2**19 // max(1, b * state))))
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
#     y_i = sum_{j <= i} L_ij (C_i . B_j) dt_j x_j,  L_ij = a_i a_{i-1} ... a_{j+1} = exp(c_i - c_j),  c = cumsum(dt A)
# with C as queries, B as keys, dt x as values and a decay where softmax was. Dao and Gu call it state-space duality.
#
#                work a head            memory beside the inputs    what it is
#    naive       2 l n p                autograd keeps every state  the recurrence
#    quadratic   l^2 (n + p)            l^2 a head                  masked attention
#    chunked     l (q (n + p) + 2 n p)  l q a head                  quadratic in chunks of q, section 2's scan between


def ssd(x, dt, A, B, C, D=None, h0=None, impl="auto", keep=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,   y_t = h_t C_t + D x_t        (Mamba-2, sections 5 and 6)

    x (b, l, nh, p) · dt (b, l, nh), positive · A (nh,), negative · B, C (b, l, g, n): head i reads group i // (nh // g)
    D (nh,) · h0 (b, nh, p, n), zero if None -> y (b, l, nh, p) in x's dtype, h_last (b, nh, p, n) float32 or float64.
    Gradients reach every input, also through h_last. impl: naive, quadratic, chunked, auto. keep, a number from 1 or
    one a row (b,): h_last is the state after so many steps; always by the quadratic form, as what reads ahead is short.
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
    if keep is not None:
        path = functools.partial(_ssd_quadratic, keep=keep)
    with _no_autocast(x.device):
        y, h = path(wide, dt, A, B, C, h0)
        y = y if D is None else torch.addcmul(y, wide, D[:, None])
    return y.to(x.dtype), h


def _ssd_naive(x, dt, A, B, C, h):
    """The definition, one step at a time."""
    B, C, ys = _per_head(B, x.shape[2], 2), _per_head(C, x.shape[2], 2), []
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1)):
        h = torch.exp(dt_t * A)[..., None, None] * h + (dt_t[..., None] * x_t)[..., None] * B_t[:, :, None]
        ys.append((h @ C_t[..., None]).squeeze(-1))  # (b, nh, p)
    return torch.stack(ys, dim=1), h


def _per_head(t, heads, dim):
    """What groups of heads share along dim, for each head; one group broadcasts as it is."""
    g = t.shape[dim]
    return t if g in (1, heads) else t.repeat_interleave(heads // g, dim=dim)


def _log_decays(dt, A):
    """c (b, nh, l), the sum of dt A up to each step, in float64 where the device has it: exp(c_i - c_j) of a float32
    sum over 8,192 steps is 0.3 % wrong, because the difference of two large numbers keeps only their absolute
    precision."""
    wide = dt.dtype if dt.device.type == "mps" else torch.float64
    return torch.cumsum(dt.to(wide) * A, dim=1).transpose(1, 2)


def _ssd_quadratic(x, dt, A, B, C, h0, keep=None):
    """Masked attention over the whole length."""
    u, c, L, e, B, C = _heads_first(x, dt, A, B, C)
    y = _ssd_attend(u, L, e, B, C, h0).transpose(1, 2)
    if isinstance(keep, torch.Tensor):
        dt = _cut(dt, keep)
        c, u = _log_decays(dt, A), (dt[..., None] * x).transpose(1, 2)
        return y, _ssd_last_state(u, _decays_to_end(c, x.dtype), c[..., -1].to(x.dtype).exp(), B, h0)
    end = x.shape[1] if keep is None else keep
    return y, _ssd_last_state(u[:, :, :end], L[:, :, end - 1, :end], e[:, :, end - 1], B[:, :, :end], h0)


def _ssd_chunked(x, dt, A, B, C, h0, size=32):
    """Three steps: every chunk's last state as if it began from zero, a scan that carries states from chunk to chunk,
    and attention inside the chunks, each from its true initial state. A last chunk that is shorter goes by itself."""
    b, l = x.shape[:2]
    if l <= size:
        return _ssd_quadratic(x, dt, A, B, C, h0)
    whole = l // size * size
    x_tail, dt_tail, B_tail, C_tail = (t[:, whole:] for t in (x, dt, B, C))
    x, dt, B, C = (t[:, :whole].unflatten(1, (-1, size)).flatten(0, 1) for t in (x, dt, B, C))  # (b chunks, size, ...)
    u, c, L, e, B, C = _heads_first(x, dt, A, B, C)
    ends = _ssd_last_state(u, _decays_to_end(c, x.dtype), None, B, None)
    h = scan(e[..., -1].unflatten(0, (b, -1))[..., None, None], ends.unflatten(0, (b, -1)), h0, "naive")
    starts = torch.cat([h0[:, None], h[:, :-1]], dim=1).flatten(0, 1)
    y = _ssd_attend(u, L, e, B, C, starts).transpose(1, 2).unflatten(0, (b, -1)).flatten(1, 2)
    if whole == l:
        return y, h[:, -1].clone()  # a view would keep the states of all chunks
    y_tail, h_last = _ssd_quadratic(x_tail, dt_tail, A, B_tail, C_tail, h[:, -1])
    return torch.cat([y, y_tail], dim=1), h_last


def _heads_first(x, dt, A, B, C):
    """What attention and last states are made of: u = dt x (b, nh, l, p) · c (b, nh, l) · L (b, nh, l, l) · e = exp(c)
    (b, nh, l) · B, C (b, g, l, n)."""
    c = _log_decays(dt, A)
    return ((dt[..., None] * x).transpose(1, 2), c, _decays(c, x.dtype), c.to(x.dtype).exp(), B.transpose(1, 2),
            C.transpose(1, 2))


def _decays_to_end(c, dtype):
    """exp(c_l - c_j) for every j: L's last row, for where a gradient into all of L would cost more than these l."""
    return (c[..., -1:] - c).to(dtype).exp()


def _ssd_attend(u, L, e, B, C, h0):
    """y_i = e_i h0 C_i + sum_{j <= i} L_ij (C_i . B_j) u_j for every position i: (b, nh, l, p)."""
    g, heads = B.shape[1], u.shape[1]
    scores = _per_head((C @ B.mT).tril(), heads, 1)  # (b, 1 or nh, l, l), zero where j > i
    from_h0 = h0.unflatten(1, (g, -1)).flatten(2, 3) @ C.mT  # (b, g, nh/g p, l), one product a group
    from_h0 = from_h0.flatten(1, 2).unflatten(1, (heads, -1)).mT  # (b, nh, l, p)
    return torch.addcmul(L * scores @ u, e[..., None], from_h0)


def _decays(c, dtype):
    """L_ij = exp(c_i - c_j) for j <= i, from c that never increases; above the diagonal 1, for tril to cut.

    The difference is taken in c's dtype and kept in the narrower one. No positive number meets exp: it might become
    inf, and inf times the zero of a mask is NaN.
    """
    if torch.is_grad_enabled():
        return _Decays.apply(c, dtype)
    L = torch.empty(*c.shape, c.shape[-1], dtype=dtype, device=c.device)
    return torch.sub(c[..., :, None], c[..., None, :], out=L).clamp_(max=0).exp_()


class _Decays(torch.autograd.Function):
    """_decays with a backward of its own: dL/dc_i adds up row i of W = dL L and takes off column i. Autograd would go
    through the same numbers four times, in float64."""

    @staticmethod
    def forward(ctx, c, dtype):
        L = _decays(c, dtype)  # grad is disabled in here
        ctx.save_for_backward(L)
        ctx.dtype = c.dtype
        return L

    @staticmethod
    @once_differentiable
    def backward(ctx, dL):
        W = dL * ctx.saved_tensors[0]
        return W.sum(-1, dtype=ctx.dtype) - W.sum(-2, dtype=ctx.dtype), None  # rows and columns all but cancel


def _ssd_last_state(u, decay, e, B, h0):
    """h_last = e h0 + sum_j decay_j u_j B_j^T: (b, nh, p, n); decay (b, nh, l) and e (b, nh) are to the last step, and
    an h0 of None is zero."""
    left = (u * decay[..., None]).mT.unflatten(1, (B.shape[1], -1)).flatten(2, 3)  # (b, g, nh/g p, l), as above
    h = (left @ B).flatten(1, 2).unflatten(1, (u.shape[1], -1))
    return h if h0 is None else torch.addcmul(h, e[..., None, None], h0)


SSDS = {"naive": _ssd_naive, "quadratic": _ssd_quadratic, "chunked": _ssd_chunked}

# ---------------------------------------------------------------------------------------------------------------------
# 6. The selective scan as GPU kernels, in Triton
#
# A GPU computes far faster than its memory delivers, so no state may leave the chip. A program below is one warp, 32
# threads in step; it walks through time as the naive loop does, with A and the states of a few channels in registers.
# What moves is a row a step: x, dt, B and C in, y out.
#
# Forward takes the three steps of section 2. (1) Walk every chunk from zero: what it adds to the state that enters it.
# (2) Carry: a chunk's decay, the product of its exp(dt_t A), is exp(A sum dt), so a plain scan over the chunks gives
# the states that truly enter. (3) Walk every chunk from its own. So one long sequence fills the GPU as many short ones
# do; where batch and channels alone fill it, (1) and (2) are left out.
#
# Backward, with g_t = dL/dh_t in total and w_t = dL/d(dt_t A) as in section 4. What travels is q_t = a_t g_t: it obeys
# a recurrence of the same kind, from the last step to the first, so (1) and (2) find the q that enters from behind.
#     g_t = C_t dy_t + q_{t+1}        q_t = a_t (C_t dy_t + q_{t+1})        w_t = q_t h_{t-1}        dh0 = q_0
# (3) needs the last h_{t-1} first. Forward kept a state a chunk; a walk through the chunk puts every fourth state into
# a store of the program's own, small enough for the cache; and the four steps from there are a recursion four deep,
# whose call stack, h and a, the compiler lays into registers: forward on the way in, backward on the way out.
#
#     the floor      b l d n exponentials, of which a multiprocessor of compute capability 8.0 or 9.0 does 16 a clock
#                    beside 128 other instructions; and 3 b l d numbers through memory forward, 8 forward and backward.
#                    We take an exponential once or twice forward and three times backward, recomputing what would
#                    cost more to keep. In the loops stand 9 instructions an exponential forward, 6 in (1), 7 and 35
#                    in the two of backward: it is bound by instructions, the others nearly by exponentials.
#     registers      Triton lays a tile (states, dim) over the threads along d first. Forward a thread has one channel
#                    with up to 16 states: y is a sum inside it. Backward also sums over d, for dB and dC, so there a
#                    thread has 4 neighbouring channels and 2 states, and both sums cross few threads. Alignment decides
#                    it: of a tile known to be aligned a thread loads 16 bytes at once.
#     what is kept   A state a chunk, and dB and dC in parts, one a group of channels. Chunks and groups grow with n, so
#                    that at any n neither takes more than half of x's memory in float32.
#     deterministic  No atomics: parts are added up in a fixed order.
#     edges          Rows past a sequence's end read as zero: dt = x = 0 leaves h as it is, and dy = C = 0 q. Rows are
#                    counted in int64, as d times a row may pass 2^31. d and n are compiled in: addresses then differ by
#                    constants, which take no registers. A model's first step waits some seconds for the compiler.
#
# exp(z) is exp2(z log2 e), the instruction there is: A comes times log2 e, and gradients to exponents times ln 2.

LOG2E = math.log2(math.e)


def _kernel(*unaligned):
    """triton.jit, which without Triton is nothing; of the tiles named here a thread loads single numbers."""
    if triton is None:
        return lambda f: f
    return triton.jit(do_not_specialize=["b", "l", "size", "width", "rows", "first"],
                      do_not_specialize_on_alignment=list(unaligned))


@_kernel()
def _tile(block, d: tl.constexpr, n: tl.constexpr, states: tl.constexpr, dim: tl.constexpr):
    """Channels (dim,) and states (states,) of a block; its tile in a matrix (n, d), with a mask."""
    at_d, at_n = block * dim + tl.arange(0, dim), tl.arange(0, states)
    return at_d, at_n, at_n[:, None] * d + at_d[None, :], (at_n[:, None] < n) & (at_d[None, :] < d)


@_kernel()
def _row(p, row, left, at, columns: tl.constexpr):
    """Numbers of a row, zero past its end and where no rows are left."""
    return tl.load(p + row * columns + at, mask=at < tl.where(left > 0, columns, 0), other=0.0)


@_kernel()
def _put(p, numbers, row, left, at, columns: tl.constexpr):
    """The same for writing."""
    tl.store(p + row * columns + at, numbers, mask=at < tl.where(left > 0, columns, 0))


@_kernel()
def _step(h, A, x, dt, B, row, left, at_d, at_n, d: tl.constexpr, n: tl.constexpr):
    """h_t, and what it was made of."""
    x_t, dt_t = _row(x, row, left, at_d, d).to(h.dtype), _row(dt, row, left, at_d, d).to(h.dtype)  # (dim,)
    B_t = _row(B, row, left, at_n, n).to(h.dtype)  # (states,)
    a = tl.exp2(dt_t[None, :] * A)  # (states, dim)
    return a * h + B_t[:, None] * (dt_t * x_t)[None, :], a, x_t, dt_t, B_t


@_kernel("A", "ends")
def _ends_kernel(x, dt, A, B, ends, total, l, d: tl.constexpr, n: tl.constexpr, states: tl.constexpr, dim: tl.constexpr,
                 CHUNK: tl.constexpr, STEPS: tl.constexpr, BACK: tl.constexpr):
    """(1) What a chunk adds to the h that enters it, and its sum of dt; BACK, to the q: then x is dy, and B is C.

    Rows of ends and total are in the order of the walk; row 0 is left to what enters the first chunk.
    """
    blocks, chunks = tl.cdiv(d, dim), tl.cdiv(l, CHUNK)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    batch, k = chunk // chunks, chunk % chunks
    at_d, at_n, tile, on = _tile(tl.program_id(0) % blocks, d, n, states, dim)
    A_t = tl.load(A + tile, mask=on, other=0.0)
    h, sum_dt = tl.zeros_like(A_t), tl.sum(tl.zeros_like(A_t), 0)
    first, left = batch * l + k * CHUNK, tl.minimum(CHUNK, l - k * CHUNK).to(tl.int32)
    for t in range(0, CHUNK, STEPS):
        for i in tl.static_range(STEPS):
            s = CHUNK - 1 - t - i if BACK else t + i
            h_t, a, x_t, dt_t, B_t = _step(h, A_t, x, dt, B, first + s, left - s, at_d, at_n, d, n)
            h = a * (h + B_t[:, None] * x_t[None, :]) if BACK else h_t
            sum_dt += dt_t
    to = batch * (chunks + 1) + 1 + (chunks - 1 - k if BACK else k)
    tl.store(ends + to * n * d + tile, h, mask=on)
    tl.store(total + to * d + at_d, sum_dt, mask=at_d < d)


@_kernel()
def _forward_steps(h, A, D, x, dt, B, C, y, row, left, at_d, at_n, d: tl.constexpr, n: tl.constexpr,
                   STEPS: tl.constexpr):
    """A recursion over steps: loads on the way in, stores on the way out, for no load may overtake a store."""
    h, a, x_t, dt_t, B_t = _step(h, A, x, dt, B, row, left, at_d, at_n, d, n)
    C_t = _row(C, row, left, at_n, n).to(h.dtype)
    y_t = tl.sum(C_t[:, None] * h, 0) + D * x_t
    if STEPS > 1:
        h = _forward_steps(h, A, D, x, dt, B, C, y, row + 1, left - 1, at_d, at_n, d, n, STEPS - 1)
    _put(y, y_t, row, left, at_d, d)
    return h


@_kernel("A", "kept")
def _forward_kernel(x, dt, A, B, C, D, kept, y, l, size, d: tl.constexpr, n: tl.constexpr, states: tl.constexpr,
                    dim: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr):
    """(3) y over size steps, a chunk or the whole length, from the state in kept, where those before chunks go."""
    blocks, pieces, rows = tl.cdiv(d, dim), tl.cdiv(l, size), tl.cdiv(l, CHUNK).to(tl.int64) + 1
    piece = (tl.program_id(0) // blocks).to(tl.int64)
    batch, first = piece // pieces, piece % pieces * size
    at_d, at_n, tile, on = _tile(tl.program_id(0) % blocks, d, n, states, dim)
    A_t, D_t = tl.load(A + tile, mask=on, other=0.0), tl.load(D + at_d, mask=at_d < d, other=0.0)
    kept += batch * rows * n * d
    h = tl.load(kept + first // CHUNK * n * d + tile, mask=on, other=0.0)
    for t in range(first, tl.minimum(first + size, l), STEPS):
        if t % CHUNK == 0:
            tl.store(kept + t // CHUNK * n * d + tile, h, mask=on)
        left = tl.minimum(STEPS, l - t).to(tl.int32)
        h = _forward_steps(h, A_t, D_t, x, dt, B, C, y, batch * l + t, left, at_d, at_n, d, n, STEPS)
    if first + size >= l:
        tl.store(kept + (rows - 1) * n * d + tile, h, mask=on)


@_kernel()
def _there_and_back(h, q, dA, dD, A, D, x, dt, B, C, dy, dx, ddt, dB, dC, row, left, at_d, at_n, d: tl.constexpr,
                    n: tl.constexpr, STEPS: tl.constexpr):
    """STEPS steps forward from h_{t-1}, then back from q_{t+STEPS}: writes dx and ddt, adds to dB and dC.

    h and a wait in registers for the way out. There is no room for rows: they come from the cache a second time.
    """
    h_t, a, x_t, dt_t, B_t = _step(h, A, x, dt, B, row, left, at_d, at_n, d, n)
    if STEPS > 1:
        q, dA, dD = _there_and_back(h_t, q, dA, dD, A, D, x, dt, B, C, dy, dx, ddt, dB, dC, row + 1, left - 1, at_d,
                                    at_n, d, n, STEPS - 1)
    x_t, dt_t = _row(x, row, left, at_d, d).to(h.dtype), _row(dt, row, left, at_d, d).to(h.dtype)
    B_t, C_t = _row(B, row, left, at_n, n).to(h.dtype), _row(C, row, left, at_n, n).to(h.dtype)
    dB_t, dC_t = _row(dB, row, left, at_n, n), _row(dC, row, left, at_n, n)
    dy_t, D_t = _row(dy, row, left, at_d, d).to(h.dtype), _row(D, 0, 1, at_d, d)
    g = C_t[:, None] * dy_t[None, :] + q
    q = a * g
    w = q * h
    gB = tl.sum(g * B_t[:, None], 0)
    _put(dx, dt_t * gB + D_t * dy_t, row, left, at_d, d)
    _put(ddt, x_t * gB + 0.6931471805599453 * tl.sum(w * A, 0), row, left, at_d, d)
    _put(dB, dB_t + tl.sum(g * (dt_t * x_t)[None, :], 1), row, left, at_n, n)
    _put(dC, dC_t + tl.sum(h_t * dy_t[None, :], 1), row, left, at_n, n)
    return q, dA + w * dt_t[None, :], dD + x_t * dy_t


@_kernel()
def _backward_kernel(x, dt, A, B, C, D, starts, behind, store, dy, dx, ddt, dB, dC, dD, b, l, d: tl.constexpr,
                     n: tl.constexpr, states: tl.constexpr, dim: tl.constexpr, BLOCKS: tl.constexpr,
                     CHUNK: tl.constexpr, STEPS: tl.constexpr):
    """(3) All gradients of a chunk and a group of BLOCKS blocks of channels, block after block.

    A program takes several chunks and groups in turn, so that there are no more stores than programs; each turn of its
    one loop is a block, and finds its place anew, as no register is free to remember it. starts holds the h before each
    chunk, behind the q after it, which dA replaces. dB and dC add up over the group's blocks here, from zero, and over
    groups outside.
    """
    chunks, groups = tl.cdiv(l, CHUNK), tl.cdiv(d, dim * BLOCKS)
    store += tl.program_id(0).to(tl.int64) * (CHUNK // STEPS * states * dim)
    store += tl.arange(0, states)[:, None] * dim + tl.arange(0, dim)[None, :]
    for turn in range(0, tl.cdiv(b * chunks * groups - tl.program_id(0), tl.num_programs(0)) * BLOCKS):
        item = tl.program_id(0) + turn // BLOCKS * tl.num_programs(0)
        chunk, group = (item // groups).to(tl.int64), item % groups
        batch, k, part = chunk // chunks, chunk % chunks, group.to(tl.int64) * b * l * n
        first, left = batch * l + k * CHUNK, tl.minimum(CHUNK, l - k * CHUNK).to(tl.int32)
        runs = tl.cdiv(left, STEPS).to(tl.int64)
        at_d, at_n, tile, on = _tile(group * BLOCKS + turn % BLOCKS, d, n, states, dim)
        A_t = tl.load(A + tile, mask=on, other=0.0)
        h = tl.load(starts + (batch * (chunks + 1) + k) * n * d + tile, mask=on, other=0.0)
        entry = behind + (batch * (chunks + 1) + chunks - 1 - k) * n * d + tile
        q = tl.load(entry, mask=on, other=0.0)
        dA, dD_t = tl.zeros_like(q), tl.sum(tl.zeros_like(q), 0)
        for s in range(0, runs):
            tl.store(store + s * (states * dim), h)
            t = s * STEPS
            for i in tl.static_range(STEPS):
                h, a, x_t, dt_t, B_t = _step(h, A_t, x, dt, B, first + t + i, left - t.to(tl.int32) - i, at_d, at_n,
                                             d, n)
        tl.debug_barrier()  # the store is complete
        for s in range(runs - 1, -1, -1):
            h = tl.load(store + s * (states * dim))
            t = s * STEPS
            q, dA, dD_t = _there_and_back(h, q, dA, dD_t, A_t, D, x, dt, B, C, dy, dx, ddt, dB + part, dC + part,
                                          first + t, left - t.to(tl.int32), at_d, at_n, d, n, STEPS)
        tl.store(entry, dA, mask=on)
        tl.store(dD + chunk * d + at_d, dD_t, mask=at_d < d)
        tl.debug_barrier()  # the next block's threads add to dB and dC that others wrote


@_kernel()
def _scan_kernel(a, b, enter, out, decay, l, size, width, BLOCK: tl.constexpr, ENDS: tl.constexpr):
    """The plain scan: a chunk's h from the state that enters it; ENDS: its last h from zero, and its decay."""
    blocks, chunks = tl.cdiv(width, BLOCK), tl.cdiv(l, size)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    on = at < width
    first = chunk // chunks * l + chunk % chunks * size
    h = tl.load(enter + chunk * width + at, mask=at < (0 if ENDS else width), other=0.0)
    product = tl.zeros_like(h) + 1
    for row in range(first, tl.minimum(first + size, (chunk // chunks + 1) * l)):
        a_t = tl.load(a + row * width + at, mask=on, other=0.0)
        h = a_t * h + tl.load(b + row * width + at, mask=on, other=0.0)
        if ENDS:
            product *= a_t
        else:
            tl.store(out + row * width + at, h, mask=on)
    if ENDS:
        tl.store(out + chunk * width + at, h, mask=on)
        tl.store(decay + chunk * width + at, product, mask=on)


@_kernel()
def _conv_kernel(x, taps, bias, y, rows, l, first, d: tl.constexpr, k: tl.constexpr, BLOCK: tl.constexpr,
                 ROWS: tl.constexpr):
    """The convolution beside the scan, y_t = bias + sum_j taps_j x_{first+t+j}, zeros where x (b, rows, d) has no row.

    A program's rows overlap k times, in the cache: memory sees x once and y once, where a product a tap sees 3 k.
    """
    blocks, pieces = tl.cdiv(d, BLOCK), tl.cdiv(l, ROWS)
    piece = (tl.program_id(0) // blocks).to(tl.int64)
    batch, t = piece // pieces, piece % pieces * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    bias_t = tl.load(bias + at, mask=at < d, other=0.0)
    y_t = tl.zeros((ROWS, BLOCK), bias_t.dtype) + bias_t
    for j in tl.static_range(k):
        row, tap = first + t + j, tl.load(taps + j * d + at, mask=at < d, other=0.0)
        on = (row >= 0) & (row < rows) & (at < d)
        y_t += tap * tl.load(x + (batch * rows + row) * d + at, mask=on, other=0.0).to(tap.dtype)
    tl.store(y + (batch * l + t) * d + at, y_t, mask=(t < l) & (at < d))


@_kernel()
def _conv_taps_kernel(x, dy, parts, l, size, d: tl.constexpr, k: tl.constexpr, BLOCK: tl.constexpr,
                      ROWS: tl.constexpr):
    """dL/dtaps_j = sum_t dy_t x_{t+j} over size steps of a sequence; x (b, l+k-1, d), a program for every tap."""
    blocks, pieces = tl.cdiv(d, BLOCK), tl.cdiv(l, size)
    j, piece = tl.program_id(0) % k, (tl.program_id(0) // k // blocks).to(tl.int64)
    batch, first = piece // pieces, piece % pieces * size
    at = tl.program_id(0) // k % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    dtap = tl.zeros((ROWS, BLOCK), parts.dtype.element_ty)
    for start in range(first, tl.minimum(first + size, l), ROWS):
        t = start + tl.arange(0, ROWS)[:, None]
        on = (t < l) & (at < d)
        dy_t = tl.load(dy + (batch * l + t) * d + at, mask=on, other=0.0).to(dtap.dtype)
        dtap += dy_t * tl.load(x + (batch * (l + k - 1) + t + j) * d + at, mask=on, other=0.0).to(dtap.dtype)
    tl.store(parts + (piece * k + j) * d + at, tl.sum(dtap, 0)[None, :], mask=at < d)


# From here on Python: how many programs of which size, and each direction as one operator for torch.compile


def _fill(device):
    """How many programs fill the device: 16 warps a multiprocessor, so that some compute while others wait."""
    return 16 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _launch(kernel, programs, *args, **sizes):
    """One warp a program, so that what its threads tell each other stays among them."""
    if programs:
        with torch.cuda.device_of(args[0]):
            kernel[(programs,)](*args, num_warps=1, **sizes)


def _operator(schema):
    """f as an operator that torch.compile does not look into; register_fake says what it gives for shapes alone."""
    return lambda f: torch.library.custom_op("bytestate::" + f.__name__[1:], f, mutates_args=(), schema=schema)


@_operator("(Tensor a, Tensor b, Tensor h0) -> Tensor")
def _triton_scan(a, b, h0):
    """All contiguous. Chunks only where batch and columns do not fill the GPU; their carries are a shorter scan."""
    (batch, l), width = b.shape[:2], math.prod(b.shape[2:])
    blocks, out = -(-width // 32), torch.empty_like(b)
    size = max(64, -(-l // max(1, _fill(b.device) // max(1, batch * blocks))))
    chunks, enter = -(-l // size), h0
    run = functools.partial(_launch, _scan_kernel, batch * chunks * blocks, a, b, BLOCK=32)
    if chunks > 1:
        ends, decay = b.new_empty(2, batch, chunks, *b.shape[2:])
        run(h0, ends, decay, l, size, width, ENDS=True)
        enter = torch.cat([h0[:, None], _triton_scan(decay, ends, h0)[:, :-1]], dim=1)
    run(enter, out, out, l, size, width, ENDS=False)
    return out


@_triton_scan.register_fake
def _(a, b, h0):
    return torch.empty_like(b)


def _sizes(d, n, numbers):
    """What is compiled in: tiles of so many numbers, and chunks of 64 steps, or 2 n if that is more."""
    states = 1 << (n - 1).bit_length()
    dim, chunk = max(1, numbers // states), max(64, 2 * states)
    return {"d": d, "n": n, "states": states, "dim": dim, "CHUNK": chunk, "STEPS": 4}


def _carries(x, dt, A, B, h0, back):
    """(1) and (2): the state before every chunk and after the last, (b, chunks + 1, n, d); back, the q behind them."""
    (b, l, d), n, sizes = x.shape, len(A), _sizes(x.shape[2], len(A), 512)
    chunks = -(-l // sizes["CHUNK"])
    ends, total = A.new_empty(b, chunks + 1, n, d), A.new_empty(b, chunks + 1, d)
    ends[:, 0], total[:, 0] = h0, 0
    _launch(_ends_kernel, b * chunks * -(-d // sizes["dim"]), x, dt, A, B, ends, total, l, BACK=back, **sizes)
    return _triton_scan((total[:, :, None] * A).exp2_(), ends, torch.zeros_like(h0))


@_operator("(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor h0) -> (Tensor, Tensor)")
def _selective_forward(x, dt, A, B, C, D, h0):
    """y (b, l, d), and the states before every chunk and after the last; A (n, d), h0 (b, n, d)."""
    (b, l, d), n, sizes = x.shape, len(A), _sizes(x.shape[2], len(A), 512)
    blocks, y = -(-d // sizes["dim"]), torch.empty_like(x)
    if b * blocks >= _fill(x.device):
        size, kept = l, A.new_empty(b, -(-l // sizes["CHUNK"]) + 1, n, d)
        kept[:, 0] = h0
    else:
        size, kept = sizes["CHUNK"], _carries(x, dt, A, B, h0, False)
    _launch(_forward_kernel, b * -(-l // size) * blocks, x, dt, A, B, C, D, kept, y, l, size, **sizes)
    return y, kept


@_selective_forward.register_fake
def _(x, dt, A, B, C, D, h0):
    chunks = -(-x.shape[1] // _sizes(1, len(A), 1)["CHUNK"])
    return torch.empty_like(x), A.new_empty(x.shape[0], chunks + 1, *A.shape)


@_operator("(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor kept, Tensor dy, Tensor dh) -> "
           "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
def _selective_backward(x, dt, A, B, C, D, kept, dy, dh):
    """Gradients to x, dt, A before it was scaled, B, C, D, h0. A group has 128 channels, or 4 n if that is more."""
    (b, l, d), n, chunks, sizes = x.shape, len(A), kept.shape[1] - 1, _sizes(x.shape[2], len(A), 256)
    blocks = max(1, min(max(128, 4 * n), d) // sizes["dim"])
    groups = -(-d // (blocks * sizes["dim"]))
    programs = min(b * chunks * groups, max(2, _fill(x.device) // 2))  # there are registers for half as many
    behind = _carries(dy, dt, A, C, dh, True)
    dh0 = behind[:, -1].clone()
    store = A.new_empty(programs, sizes["CHUNK"] // sizes["STEPS"], sizes["states"] * sizes["dim"])
    dx, ddt, dD = torch.empty_like(x), torch.empty_like(dt), A.new_empty(b * chunks, d)
    dB, dC = A.new_zeros(2, groups, b, l, n)
    _launch(_backward_kernel, programs, x, dt, A, B, C, D, kept, behind, store, dy, dx, ddt, dB, dC, dD, b, l,
            BLOCKS=blocks, **sizes)
    return dx, ddt, behind[:, :-1].sum((0, 1)), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dD.sum(0), dh0


@_selective_backward.register_fake
def _(x, dt, A, B, C, D, kept, dy, dh):
    return tuple(torch.empty_like(t) for t in (x, dt, A, B, C, D, dh))


class _SelectiveTriton(torch.autograd.Function):
    """Both directions. What is not contiguous is copied: a strided row would fetch 32 bytes for each number in use."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, h0):
        inputs = [t.contiguous() for t in (x, dt, A.mT * LOG2E, B, C, D)]
        y, kept = _selective_forward(*inputs, h0.mT.contiguous())
        ctx.save_for_backward(*inputs, kept)
        return y, kept[:, -1].mT.clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh):
        dx, ddt, dA, dB, dC, dD, dh0 = _selective_backward(*ctx.saved_tensors, dy.contiguous(), dh.mT.contiguous())
        return dx, ddt, dA.mT, dB, dC, dD, dh0.mT


@_operator("(Tensor x, Tensor taps, Tensor bias, int l, int first, ScalarType dtype) -> Tensor")
def _conv(x, taps, bias, l, first, dtype):
    """All contiguous; y (b, l, d) in dtype, computed in that of taps and bias."""
    (b, rows, d), y = x.shape, x.new_empty(x.shape[0], l, x.shape[2], dtype=dtype)
    _launch(_conv_kernel, b * -(-l // 8) * -(-d // 128), x, taps, bias, y, rows, l, first, d=d, k=len(taps), BLOCK=128,
            ROWS=8)
    return y


@_conv.register_fake
def _(x, taps, bias, l, first, dtype):
    return x.new_empty(x.shape[0], l, x.shape[2], dtype=dtype)


@_operator("(Tensor x, Tensor dy, Tensor taps) -> Tensor")
def _conv_taps(x, dy, taps):
    """The gradient to taps (k, d), its parts added up in a fixed order."""
    (b, l, d), k = dy.shape, len(taps)
    blocks = -(-d // 128)
    size = max(64, 8 * -(-l * b * blocks * k // (8 * _fill(x.device))))
    pieces = -(-l // size)
    parts = taps.new_empty(b * pieces, k, d)
    _launch(_conv_taps_kernel, b * pieces * blocks * k, x, dy, parts, l, size, d=d, k=k, BLOCK=128, ROWS=8)
    return parts.sum(0)


@_conv_taps.register_fake
def _(x, dy, taps):
    return torch.empty_like(taps)


class _Conv(torch.autograd.Function):
    """To x goes the same convolution with the taps turned round, over dy with k - 1 zeros before and after it."""

    @staticmethod
    def forward(ctx, x, taps, bias):
        ctx.dtypes, dtype = (taps.dtype, bias.dtype), torch.promote_types(x.dtype, taps.dtype)
        wide = _wide_dtype(x, taps, bias)
        x, taps, bias = x.contiguous(), taps.to(wide).contiguous(), bias.to(wide).contiguous()
        ctx.save_for_backward(x, taps)
        return _conv(x, taps, bias, x.shape[1] - len(taps) + 1, 0, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, taps), dy = ctx.saved_tensors, dy.contiguous()
        dx = _conv(dy, taps.flip(0), torch.zeros_like(taps[0]), x.shape[1], 1 - len(taps), x.dtype)
        return dx, _conv_taps(x, dy, taps).to(ctx.dtypes[0]), dy.sum((0, 1), dtype=taps.dtype).to(ctx.dtypes[1])


def triton_conv(x, taps, bias):
    """y_t = bias + sum_j taps_j x_{t+j}: x (b, l+k-1, d), taps (k, d), bias (d,) -> y (b, l, d), the widest dtype."""
    _check_triton("triton_conv", x)
    return _Conv.apply(x, taps, bias)


def _scan_triton(a, b, h0):
    _check_triton("scan", b)
    return _Scan.apply(lambda *t: _triton_scan(*(s.contiguous() for s in t)), a, b, h0)


def _selective_triton(x, dt, A, B, C, D, h0):
    """x, dt, B and C go in as they are, and are widened in registers; A, D and the states are wide."""
    _check_triton("selective_scan", x)
    b, (d, n) = x.shape[0], A.shape
    if not 1 <= n <= 256:
        raise ValueError(f'selective_scan: impl="triton" takes 1 to 256 states a channel, not {n}; use impl="chunked"')
    dtype, out = _wide_dtype(x, dt, A, B, C, D, h0), x.dtype
    if dtype == torch.float64:
        x, dt, B, C = x.to(dtype), dt.to(dtype), B.to(dtype), C.to(dtype)
    D = x.new_zeros(d, dtype=dtype) if D is None else D.to(dtype)
    h0 = x.new_zeros(b, d, n, dtype=dtype) if h0 is None else h0.to(dtype)
    y, h = _SelectiveTriton.apply(x, dt, A.to(dtype), B, C, D, h0)
    return y.to(out), h


def _check_triton(name, x):
    """One line on why impl="triton" cannot run, and what can."""
    if triton is None:
        why = f"Triton does not import ({no_triton})"
    elif x.is_complex():
        why = "its kernels are for real numbers"
    elif not x.is_cuda and isinstance(_forward_kernel, triton.JITFunction):
        why = f"the tensors are on {x.device}, where it needs TRITON_INTERPRET=1 in the environment from the start"
    else:
        return
    raise RuntimeError(f'{name}: impl="triton" cannot run: {why}; use impl="chunked"')
