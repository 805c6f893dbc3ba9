"""The recurrence h_t = a_t h_{t-1} + b_t, from a differential equation to fast scans.

    >>> scan(torch.full((1, 4), 0.5), torch.ones(1, 4))      # a = 1/2, b = 1
    tensor([[1.0000, 1.5000, 1.7500, 1.8750]])

    1  discretization: a differential equation becomes a recurrence
    2  the scan: the recurrence solved by a loop and by a tree
    3  S4: where nothing depends on t, the recurrence is a convolution
    4  the selective scan of Mamba
    5  the matrix form of Mamba-2
    6  the selective scan as GPU kernels

A state-space model is h' = A h + B x, y = C h + D x: the input x pushes a hidden state h, and y is a view of it. In
Mamba every channel of x has a state of its own, n numbers that do not mix: A is diagonal. The inputs are bytes, each
made a vector of d channels by a network (model.py).

To understand Mamba, read 1, 2, 4 and 5. Section 3 is a story of its own (model.py's S4, S4D and encoder need it), and
section 6 is for GPUs. Every fast path computes what a naive one defines; tests/ hold it to that, in values and
gradients. An argument `upto` asks for the state after the first upto steps (sample.py needs it).
This file needs torch alone (and Triton for section 6), so you may copy it as it is. Or copy ChunkedSelectiveScan, the
two functions below it, _differentiable_once and _no_autocast: 110 lines that need nothing else but the imports.

Glossary. Capitals are the papers' state-space quantities. Steps are t = 0 .. l-1; h0 is the state before step 0, h_0
that after it. In a gradient dv is the loss's derivative by v, for every v. dt alone is the step size, its gradient ddt.

    here       shape               Mamba (2312.00752)   S4 (2111.00396)
    x          (b, l, d)           x                    u              input
    h          (b, d, n)           h                    x              state
    y          (b, l, d)           y                    y              output
    dt         (b, l, d), > 0      Delta                Delta          step size; in S4 (d,)
    A          (d, n), Re A <= 0   A                    A              h' = A h + B x; row i is channel i's diagonal
    B, C       (b, l, n)           B, C                 B, C           into h and out of h; in S4 (d, n)
    D          (d,)                only in its code     D              skip: y += D x
    Abar Bbar  (b, l, d, n)        A-bar, B-bar         A-bar, B-bar   discretized: h_t = Abar h_{t-1} + Bbar x_t
    K          (d, l)              K-bar                K-bar          kernel: y is K convolved with x
    Lambda P   (d, n), complex                          Lambda, P      S4: A = diag(Lambda) - P P^*, not diagonal;
                                                                       ^* is the conjugate transpose
    u          shape of x                               (not its u)    dt x, the input times its step size
    a, b       (batch, l, ...)                                         one step of any scan: h_t = a_t h_{t-1} + b_t
    log_a      (b, l, nh)                                              dt A, where a = exp(dt A)

    b l d n    batch, length, channels, state size
    nh p g     Mamba-2 (section 5): heads, channels per head, groups of heads that share B and C.
               There x, y (b, l, nh, p), h (b, nh, p, n), dt (b, l, nh), A (nh,), B, C (b, l, g, n)

In all scans the state and its decays are float32 or wider, whatever the caller's dtype and autocast say. bfloat16 has 8
significant bits and rounds a decay of 0.999 to 1, so a state that forgets slowly would never forget.
"""
import contextlib
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:  # everything but section 6 runs without
    triton = None
    no_triton = str(error)

    class tl:  # all that the definitions of section 6 ask for
        constexpr = int

# ---------------------------------------------------------------------------------------------------------------------
# Plumbing that all sections share: shapes, dtypes, the choice of a path. Skip it at first.


def _check(function, **tensors):
    """{letter: size} of the axes, from name=(tensor, "b l d"); ValueError names what does not fit."""
    sizes = {}
    for name, (tensor, letters) in tensors.items():
        if not isinstance(tensor, Tensor):
            continue
        axes = letters.split()
        shape = tuple(tensor.shape)
        fits = len(shape) == len(axes)
        # setdefault notes the size of an axis where it is met first
        if not fits or any(sizes.setdefault(a, s) != s for a, s in zip(axes, shape)):
            known = ", ".join(f"{a} = {sizes[a]}" if a in sizes else a for a in axes)
            raise ValueError(f"{function}: {name} has shape {shape}, expected ({known})")
    if sizes.get("l") == 0:
        raise ValueError(f"{function} needs at least one step, but the length l is 0")
    return sizes


def _steps(upto, l):
    """How many of l steps a state has seen: upto, or all if that is None."""
    if upto is None:
        return l
    if not isinstance(upto, int) or not 0 <= upto <= l:
        raise ValueError(f"upto {upto} is not a number from 0 to {l}, the number of steps")
    return upto


def _differentiable_once(backward):
    """A backward that refuses to be differentiated again (torch's own once_differentiable misses some ways to ask), and
    computes in the dtypes that it is given, whatever autocast says."""
    @functools.wraps(backward)
    def first(ctx, *gradients):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError('this path has first derivatives only; use impl="naive", in a model '
                               'Config(impl="naive")')
        with _no_autocast(gradients[0].device):
            return backward(ctx, *gradients)
    return first


def _wide_dtype(*tensors):
    """The dtype that holds them all and is at least float32. None is skipped."""
    dtypes = {t.dtype for t in tensors if t is not None}
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def _widen(*tensors):
    """All tensors in the dtype that holds them all and is at least float32. None stays None."""
    dtype = _wide_dtype(*tensors)
    return [t if t is None else t.to(dtype) for t in tensors]


def _no_autocast(device):
    """A context that turns autocast off, if it is on."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _choose(impl, auto, paths):
    """The function that impl names in the table paths; impl "auto" stands for the name auto."""
    name = auto if impl == "auto" else impl
    if name not in paths:
        raise ValueError(f'impl "{impl}" is not one of {", ".join([*paths, "auto"])}')
    return paths[name]


def _add_skip(y, x, D):
    """y + D x, or y where there is no D."""
    return y if D is None else torch.addcmul(y, x, D)


# ---------------------------------------------------------------------------------------------------------------------
# 1. Discretization: from h'(t) = A h(t) + B x(t) to h_t = Abar h_{t-1} + Bbar x_t
#
# Bytes have no time between them, so why a differential equation? With A < 0 it gives decays exp(dt A) below 1 for
# every step size dt > 0, and dt says how much one byte counts. A step leads from h_{t-1} to h_t in the time dt, and x_t
# acts during it. All rules agree as dt -> 0, and differ in what they take for x or h' on the way:
#     zoh        x = x_t all the time (zero-order hold). h(s) = exp(s A) h_{t-1} + B x_t (exp(s A) - 1)/A then solves
#                the equation: differentiate it. h_t is h(dt).
#     euler      h' = A h_{t-1} + B x_t all the time, so h_t = h_{t-1} + dt h'
#     bilinear   h' = A (h_{t-1} + h_t)/2 + B x_t, the mean of both ends, solved for h_t
# The derivative of exp(-s A) h(s) is exp(-s A) B x(s). Integrate that, and for any x
#     h_t = exp(dt A) h_{t-1} + the integral of exp((dt - s) A) B x(s) over s from 0 to dt.
# Two rules keep the first term, and estimate the second from the ends of the step, where x is x_{t-1} and x_t:
#     mamba      dt times the integrand at the later end, s = dt: dt B x_t
#     trapezoid  dt times the mean of both ends: dt/2 (B x_t + exp(dt A) B x_{t-1}), second order in dt for smooth x


def discretize(dt, A, B, rule="mamba"):
    """Abar, Bbar of one step h_t = Abar h_{t-1} + Bbar x_t of length dt for a diagonal A, real or complex. All is
    elementwise and broadcasts: in the glossary's shapes discretize(dt[..., None], A, B[:, :, None]).

    zoh       Abar = exp(dt A)                    Bbar = B (exp(dt A) - 1)/A       exact if x is held; Mamba eq. 4
    bilinear  Abar = (1 + dt A/2)/(1 - dt A/2)    Bbar = dt/(1 - dt A/2) B         S4 eq. 3
    euler     Abar = 1 + dt A                     Bbar = dt B                      first order, unstable for large dt
    mamba     Abar = exp(dt A)                    Bbar = dt B                      zoh for A, euler for B
    trapezoid Abar = exp(dt A)                    Bbar = dt/2 B                    and Abar dt/2 B_{t-1} x_{t-1} is
                                                                                   added, with the dt of this step
    The Mamba paper prints zoh, but its code, and so every checkpoint, computes the rule named mamba. zoh's Bbar is
    mamba's times (exp(z) - 1)/z, z = dt A: a factor from 1.00 down to 0.50 at Mamba's initialization (A from -1 to -16,
    dt from 0.001 to 0.1; median 0.97). Mamba-3 (2603.15569) learns the weights of the trapezoid's two ends. (What
    numerics calls the trapezoidal rule, with x held, is bilinear.)

    A may be 0: zoh's Bbar is dt B there, and its derivative by A is dt^2 B / 2. For |z| < 1e-2 we take the series
    (exp(z) - 1)/z = 1 + z/2 + z^2/6 + .. + z^5/720, since the quotient's derivative loses its digits there. torch.where
    differentiates both its branches, so the one that is not taken has to be finite too.
    """
    z = dt * A
    if rule == "mamba":
        return torch.exp(z), dt * B
    if rule == "trapezoid":
        return torch.exp(z), dt / 2 * B
    if rule == "euler":
        return 1 + z, dt * B
    if rule == "bilinear":
        return (1 + z / 2) / (1 - z / 2), dt / (1 - z / 2) * B
    if rule == "zoh":
        small = z.abs() < 1e-2
        safe = torch.where(small, torch.ones_like(z), z)  # 1 where the series is taken
        s = torch.where(small, z, torch.zeros_like(z))  # 0 where the quotient is
        series = 1 + s / 2 * (1 + s / 3 * (1 + s / 4 * (1 + s / 5 * (1 + s / 6))))
        return torch.exp(z), dt * torch.where(small, series, torch.expm1(safe) / safe) * B
    raise ValueError(f'rule "{rule}" is not one of zoh, bilinear, euler, mamba, trapezoid')

# ---------------------------------------------------------------------------------------------------------------------
# 2. The scan: h_t = a_t h_{t-1} + b_t, elementwise, every h_t wanted
#
#               combinations   depth       extra memory
#    naive      l              l           none but autograd's
#    parallel   2 l            2 log2 l    a and b of all pairs, and of pairs of pairs, ..
#
# (One combination is the a h + b of one step, or two steps made one; depth counts those that must wait for each other.)
# A GPU has thousands of processors and cares for depth. A CPU is busy with a single step of a wide state, and there the
# loop is several times as fast as the tree. auto chooses by that.


def scan(a, b, h0=None, impl="auto"):
    """h_t = a_t h_{t-1} + b_t along axis 1, for any length l >= 1, real or complex; h0 stands before the first step.

    b (batch, l, ...); a broadcasts to b; h0 (batch, ...), zero if None. Returns h of b's shape, float32 or wider. impl:
    naive, parallel, or auto, which is parallel on a GPU.
    """
    a, b, h0 = _widen(a, b, h0)
    if b.ndim < 2 or b.shape[1] == 0:
        raise ValueError(f"scan needs at least one step along axis 1; b has shape {tuple(b.shape)}")
    if h0 is None:
        h0 = torch.zeros_like(b[:, 0])
    elif h0.shape != b[:, 0].shape:
        raise ValueError(f"scan: h0 has shape {tuple(h0.shape)}, expected {tuple(b[:, 0].shape)}")
    auto = "naive" if b.device.type == "cpu" else "parallel"
    return _choose(impl, auto, SCANS)(a.expand_as(b), b, h0)


def _scan_naive(a, b, h):
    """The definition."""
    hs = []
    # a[:, t] would cost a gradient of a's full size per step
    for a_t, b_t in zip(a.unbind(1), b.unbind(1)):
        h = a_t * h + b_t
        hs.append(h)
    return torch.stack(hs, dim=1)


def _scan_parallel(a, b, h0):
    """The associative scan (Blelloch 1990). Two steps in a row are one, with a = a2 a1 and b = a2 b1 + b2, and to make
    them one is associative: steps may be joined in any grouping that keeps their order. A tree needs no more."""
    first = b[:, :1] + a[:, :1] * h0[:, None]  # h_0, from which on nothing needs h0
    return _associative(a, torch.cat([first, b[:, 1:]], dim=1))


def _associative(a, b):
    """h_t = a_t h_{t-1} + b_t from h_0 = b_0: a, b (batch, l, ...) of one shape -> h.

    steps     0     1     2     3     4       1. join neighbours to pairs
              +--+--+     +--+--+     |
    pairs       0-1         2-3       |       2. scan the pairs, half as many (recursion):
                 |           |        |          this gives h_1 and h_3, the states after them
    states    h_0 h_1     h_2 h_3    h_4      3. the states between follow by one step each:
                                                 h_2 from h_1, h_4 from h_3
    """
    l = b.shape[1]
    if l == 1:
        return b
    left = slice(0, l - 1, 2)  # of each pair; if l is odd the last step has no partner
    right = slice(1, l, 2)
    a_pair = a[:, right] * a[:, left]
    b_pair = a[:, right] * b[:, left] + b[:, right]
    odd = _associative(a_pair, b_pair)  # h_1, h_3, ...
    between = slice(2, l, 2)
    before = odd[:, :(l - 1) // 2]  # the states before those steps
    even = a[:, between] * before + b[:, between]  # h_2, h_4, ...
    even = torch.cat([b[:, :1], even], dim=1)  # h_0, h_2, h_4, ...
    h = torch.stack([even[:, :l // 2], odd], dim=2).flatten(1, 2)
    return h if l % 2 == 0 else torch.cat([h, even[:, -1:]], dim=1)


SCANS = {"naive": _scan_naive, "parallel": _scan_parallel}

# ---------------------------------------------------------------------------------------------------------------------
# 3. Time-invariant systems (S4): A, B, C do not depend on t, so the recurrence is a convolution
#
# A mass on a spring: place s, velocity s', and s'' = -k s - r s' + x when a force x pushes it. With h = (s, s') this
# is h' = A h + B x, y = C h, where A = [[0, 1], [-k, -r]], B = (0, 1), C = (1, 0). Two numbers are all that the
# future needs to know of the past, and A's eigenvalues, -r/2 +- i sqrt(k - r^2/4), say how they fade and swing.
# Section 1's rules make it a recurrence (for a full matrix A: tests/dense.py). Unrolled from h = 0 that reads
#     y_t = sum_j K_j x_{t-j},      K_j = C Abar^j Bbar: the answer to one push, j steps later        (S4 eq. 5)
# so a whole sequence is one convolution, by FFT in l log l operations once K is known. A layer is d such
# systems of n numbers each, and each has its own step size dt. Two questions are left. Which A remembers well? (HiPPO.)
# How does a step of such an A cost n operations, not n^2? (S4: A is diagonal plus rank one in a complex basis.) S4D
# leaves the rank one out: its state is no polynomial of the past any more, and it learns about as well. For S4D alone,
# read fft_conv, then go on at "S4D" below.


def dense_kernel(Abar, Bbar, C, l):
    """K_j = C Abar^j Bbar for j < l, by the definition: Abar (n, n), Bbar and C (n,) -> K (l,)."""
    K = []
    h = Bbar
    for _ in range(l):
        K.append(C @ h)
        h = Abar @ h
    return torch.stack(K)


def fft_conv(x, K, D=None):
    """y_t = sum_{j <= t} K_j x_{t-j} + D x_t: x (b, l, d), K (d, l) or (1, l), D (d,) or (1,) -> y (b, l, d).

    y has x's dtype, and is computed in float32 or wider, since there is no FFT in bfloat16. The inverse of a product of
    FFTs of length N is sum_j K_j x_{(t-j) mod N}: what runs over the end comes back at the beginning. With zeros up to
    N >= 2l - 1 nothing does.
    """
    l = x.shape[1]
    if K.shape[-1] != l:
        raise ValueError(f"fft_conv: K has {K.shape[-1]} steps, x has {l}")
    size = 1 << (2 * l - 2).bit_length()  # a power of two: simple, and fast
    wide, K, D = _widen(x, K, D)
    if wide.numel() == 0:  # an empty batch, which FFTs refuse
        return _add_skip(wide * K.mT, wide, D).to(x.dtype)  # K, for its gradient
    with _no_autocast(x.device):
        product = torch.fft.rfft(wide, size, dim=1) * torch.fft.rfft(K, size).T
        return _add_skip(torch.fft.irfft(product, size, dim=1)[:, :l], wide, D).to(x.dtype)


# HiPPO: an A whose state is the whole past, written in Legendre polynomials


def hippo_legs(n):
    """A (n, n), B (n,) of HiPPO-LegS, float64: the state h is the past, as a polynomial (2008.07669, theorem 2).

    A_ij = -sqrt((2i+1)(2j+1)) for i > j, -(i+1) for i = j, 0 above; B_i = sqrt(2i+1).
    With Legendre's polynomials p_i let h_i = sqrt(2i+1)/t times the integral of x(s) p_i(z) over s from 0 to t, where z
    = 2s/t - 1: the coefficients of x on [0, t] in the normalized polynomials sqrt(2i+1) p_i. Differentiate by t. The
    factor 1/t gives -h_i/t; p_i(1) = 1 gives B_i x/t; z changes by -(z + 1)/t, and since (z + 1) p_i' = i p_i +
    sum_{j<i} (2j+1) p_j (by induction), that gives -i h_i/t and the A_ij h_j/t below the diagonal. Together h' = (A h +
    B x)/t. S4 drops the 1/t, as if log t were the time: an even memory of [0, t] becomes one that fades as exp(-age).
    (legs_basis in tests/dense.py gives x back from h.)
    """
    i = torch.arange(n, dtype=torch.float64)
    B = torch.sqrt(2 * i + 1)
    return -torch.tril(B[:, None] * B, -1) - torch.diag(i + 1), B


def dplr_legs(n):
    """Lambda, P, B (n,), V (n, n), complex128: LegS is A = V (diag(Lambda) - P P^*) V^*, V unitary (S4 theorem 1).

    A cannot be diagonalized without losing digits: its eigenvectors are so nearly parallel that n = 16 already costs up
    to 11 of float64's 16. But with p_i = sqrt(i + 1/2), p p^T halves A below the diagonal and puts the opposite above:
    S = A + p p^T is -1/2 plus a skew-symmetric matrix, and a Hermitian solver diagonalizes that without loss. In the
    new basis p becomes P = V^* p, LegS's B becomes V^* B, and a C becomes C V. A mode is an eigenvector with its
    eigenvalue. They ascend by Im Lambda; for even n mode n-1-i is the conjugate of mode i (P, B up to a phase).
    model.py's S4 learns the second half and puts the conjugates back before it calls s4, since P P^* ties every mode to
    every other.
    """
    A, B = hippo_legs(n)
    p = torch.sqrt(torch.arange(n, dtype=A.dtype) + 0.5)
    skew = A + p[:, None] * p + 0.5 * torch.eye(n, dtype=A.dtype)
    imag, V = torch.linalg.eigh(-1j * skew)
    Lambda = torch.complex(torch.full_like(imag, -0.5), imag)
    return Lambda, V.mH @ p.to(V.dtype), V.mH @ B.to(V.dtype), V


def dplr_discretize(dt, Lambda, P, B):
    """times, Bbar of the bilinear rule for A = diag(Lambda) - P P^*. times(h) is Abar h in O(n): h (..., d, n).

    dt (d,), Lambda, P, B (d, n) -> Bbar (d, n). The matrix 1 - dt/2 A is diagonal plus dt/2 P P^*, so its inverse is
    diagonal minus rank one (Woodbury; S4 appendix C.2), and so is Abar = 2 (1 - dt/2 A)^-1 - 1:
        (1 - dt/2 A)^-1 = diag(E) - Q R^T,   E = 1/(1 - dt/2 Lambda),   R = conj(P) E,   Q = E P / (2/dt + R^T P)
    """
    half = dt[:, None] / 2
    E = 1 / (1 - half * Lambda)
    R = P.conj() * E
    Q = E * P / (1 / half + (R * P).sum(-1, keepdim=True))
    diagonal = 2 * E - 1
    column = 2 * Q

    def times(h):
        return diagonal * h - column * (R * h).sum(-1, keepdim=True)

    return times, 2 * half * (E * B - Q * (R * B).sum(-1, keepdim=True))


def s4_kernel(dt, Lambda, P, B, C, l):
    """K_j = Re C Abar^j Bbar by the bilinear rule, in l steps of O(n): dt (d,), Lambda, P, B, C (d, n) -> K (d, l).

    Re changes nothing where every mode comes with its conjugate, C's too, as they do in LegS.
    S4's own way (appendix C.3) takes no steps but learns C (1 - Abar^l) in the place of C, for one l; tests/dense.py
    has it, and the two agree to 1e-12. We learn C, so that l may change at will. K is made once for a whole batch.
    """
    times, Bbar = dplr_discretize(dt, Lambda, P, B)
    hs = [Bbar]
    for _ in range(l - 1):
        hs.append(times(hs[-1]))
    return (torch.stack(hs, dim=-2) * C[:, None]).sum(-1).real


def s4(x, dt, Lambda, P, B, C, D=None, h0=None, upto=None):
    """h_t = Abar h_{t-1} + Bbar x_t,   y_t = Re C h_t + D x_t,   bilinear rule, A = diag(Lambda) - P P^*

    x (b, l, d), dt (d,); Lambda, P, B, C (d, n) complex; D (d,); h0 (b, d, n) complex, zero if None
    -> y (b, l, d) in x's dtype, h (b, d, n) after the first upto steps, by default all. Where no state comes in or is
    asked for, h0 = None and upto = 0, y is a convolution, as in training; otherwise the states are stepped through.
    """
    _check("s4", x=(x, "b l d"), dt=(dt, "d"), Lambda=(Lambda, "d n"), P=(P, "d n"),
           B=(B, "d n"), C=(C, "d n"), D=(D, "d"), h0=(h0, "b d n"))
    l = x.shape[1]
    end = _steps(upto, l)
    wide, dt = _widen(x, dt)
    # zero, in the shape and dtype of a state
    before = torch.zeros_like(wide[:, 0, :, None] * B) if h0 is None else h0
    if h0 is None and end == 0:
        return fft_conv(x, s4_kernel(dt, Lambda, P, B, C, l), D), before
    times, Bbar = dplr_discretize(dt, Lambda, P, B)
    hs = [before]
    for x_t in wide.unbind(1):
        hs.append(times(hs[-1]) + Bbar * x_t[..., None])
    y = (torch.stack(hs[1:], dim=1) * C).sum(-1).real
    return _add_skip(y, wide, D).to(x.dtype), hs[end]


# S4D: A diagonal, zero-order hold. A system is n separate complex numbers


def s4d_kernel(dt, A, B, C, l):
    """K_j = Re sum_n C_n Bbar_n Abar_n^j, zero-order hold: dt (d,), A, B, C (d, n) or (1, n) complex -> K (d, l)

    B may be a number. A Vandermonde matrix times a vector (S4D, section 3). Where one mode of each conjugate pair is
    kept, C has to come doubled: a mode and its conjugate add up to twice the real part.
    """
    Bbar = discretize(dt[:, None], A, B, "zoh")[1]
    return _vandermonde_times(_vandermonde(dt[:, None] * A, l), C * Bbar)[..., :l]


def s4d(x, dt, A, B, C, D=None, h0=None, upto=None):
    """h_t = Abar h_{t-1} + Bbar x_t,   y_t = Re sum_n C h_t + D x_t,   by zero-order hold

    x (b, l, d), dt (d,); A, B, C (d, n) complex, B may be a number; D (d,); h0 (b, d, n) complex, zero if None -> y (b,
    l, d) in x's dtype, h (b, d, n) after the first upto steps, by default all. One input is a step. More are a
    convolution, which is exact with states too: h0 adds Re C Abar^(t+1) h0 to y_t whatever x is, and h is a sum over
    the inputs.
    """
    _check("s4d", x=(x, "b l d"), dt=(dt, "d"), A=(A, "d n"), B=(B, "d n"), C=(C, "d n"),
           D=(D, "d"), h0=(h0, "b d n"))
    l = x.shape[1]
    end = _steps(upto, l)
    wide, dt = _widen(x, dt)
    Abar, Bbar = discretize(dt[:, None], A, B, "zoh")
    before = torch.zeros_like(wide[:, 0, :, None] * C) if h0 is None else h0
    if l == 1:
        h = Abar * before + Bbar * wide[:, 0, :, None]
        y = _add_skip((C * h).sum(-1).real[:, None], wide, D)
        return y.to(x.dtype), h if end else before
    z = dt[:, None] * A
    powers = _vandermonde(z, l)
    y = fft_conv(wide, _vandermonde_times(powers, C * Bbar)[..., :l], D)
    if h0 is not None:
        y = y + _vandermonde_times(powers, C * Abar * h0)[..., :l].mT
    if end == 0:
        return y.to(x.dtype), before
    inputs = _inputs_in_state(_vandermonde(z, end), wide[:, :end])
    return y.to(x.dtype), torch.exp(end * z) * before + Bbar * inputs


def _vandermonde(z, l):
    """exp(j z) for j < l in two factors, j = r + size m: exp(r z) (d, n, size), exp(size m z) (d, n, count).

    size and count are about sqrt(l): for l = 6, exp(4 z) = exp(1 z) exp(3 z). Written out, exp(j z) are n l d numbers,
    so they are never written out.
    """
    size = math.isqrt(l - 1) + 1
    count = math.ceil(l / size)
    r, m = (torch.arange(k, dtype=z.real.dtype, device=z.device) for k in (size, count))
    return torch.exp(z[..., None] * r), torch.exp(z[..., None] * size * m)


def _vandermonde_times(powers, w):
    """Re sum_n w_n exp(j z_n) for every j: w (..., d, n) -> (..., d, l or a little more).

    A product of two small matrices, w exp(size m z) and exp(r z). Its real part is one product of real matrices.
    """
    fine, coarse = powers
    left = w[..., None] * coarse  # (..., d, n, count)
    left = torch.cat([left.real, -left.imag], dim=-2)
    right = torch.cat([fine.real, fine.imag], dim=-2)
    with _no_autocast(w.device):
        return (left.mT @ right).flatten(-2)


def _inputs_in_state(powers, x):
    """sum_j exp(j z) x_{l-1-j}, what the inputs leave in the state: x (b, l, d), real -> (b, d, n)."""
    fine, coarse = powers
    size, count = fine.shape[2], coarse.shape[2]
    x = F.pad(x.flip(1), (0, 0, 0, size * count - x.shape[1]))
    x = x.unflatten(1, (count, size)).permute(3, 0, 1, 2)  # (d, b, count, size)
    with _no_autocast(x.device):
        h = x.flatten(1, 2) @ torch.cat([fine.real, fine.imag], dim=1).mT  # (d, b count, 2n)
    h = torch.complex(*h.chunk(2, dim=-1)).unflatten(1, x.shape[1:3])
    return torch.einsum("dbmn,dnm->bdn", h, coarse)

# ---------------------------------------------------------------------------------------------------------------------
# 4. The selective scan (Mamba's paper, section 3): dt, B and C depend on the input, so the model chooses what to keep
#
# It is the scan of section 2 with a_t = exp(dt_t A) and b_t = dt_t B_t x_t, read out by C_t. All channels share B_t and
# C_t; each has a step size of its own, and that is the choice: dt -> 0 freezes the state (a = 1, b = 0: the byte is
# ignored), a large dt overwrites it (a = 0, and what is written grows with dt).
# What makes it hard is memory: the inputs are b l d numbers, the states b l d n. So the fast path never holds all of
# the states at once.


def selective_scan(x, dt, A, B, C, D=None, h0=None, impl="auto", upto=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,   y_t = C_t h_t + D x_t        (Mamba algorithm 2; rule "mamba")

    x, dt (b, l, d), A (d, n), B, C (b, l, n), D (d,), h0 (b, d, n), zero if None -> y (b, l, d), h (b, d, n) after the
    first upto steps, by default all; an upto of 1 to l - 1 costs a second scan. y always covers all steps. dt is
    positive already; softplus is the caller's. y has x's dtype; h is float32, or float64 if any input is. Gradients
    reach every input, also through h; naive and parallel have higher derivatives too, and work under torch.func. impl:
    naive, parallel, chunked, triton (section 6), or auto: naive for one step, else triton where it runs on a CUDA GPU,
    else chunked.
    """
    sizes = _check("selective_scan", x=(x, "b l d"), dt=(dt, "b l d"), A=(A, "d n"),
                   B=(B, "b l n"), C=(C, "b l n"), D=(D, "d"), h0=(h0, "b d n"))
    b, l, d, n = (sizes[a] for a in "bldn")
    end = _steps(upto, l)
    dtype = _wide_dtype(x, dt, A, B, C, D, h0)
    if dtype.is_complex:
        raise ValueError(f"selective_scan takes real floats, not {dtype}")
    h0 = x.new_zeros(b, d, n, dtype=dtype) if h0 is None else h0.to(dtype)
    auto_triton = impl == "auto" and x.is_cuda and l > 1 and not _why_no_triton(x, n)
    if impl == "triton" or auto_triton:
        y, h = _selective_triton(x, dt, A, B, C, D, h0)
    else:
        paths = {**SELECTIVE_SCANS, "triton": None}  # None: only for the error's list
        path = _choose(impl, "naive" if l == 1 else "chunked", paths)
        wide, *rest = (t.to(dtype) for t in (x, dt, A, B, C))
        with _no_autocast(x.device):
            y, h = path(wide, *rest, h0)
            y = _add_skip(y, wide, None if D is None else D.to(dtype)).to(x.dtype)
    if 0 < end < l:
        x, dt, B, C = (t[:, :end] for t in (x, dt, B, C))
        h = selective_scan(x, dt, A, B, C, None, h0, impl)[1]
    return y, (h if end else h0)


def _selective_naive(x, dt, A, B, C, h):
    """The definition, one step at a time, from the state h: y (b, l, d), D left to the caller, and the last h."""
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


class ChunkedSelectiveScan(torch.autograd.Function):
    """Chunk after chunk, each small enough, where possible, that its states stay in the processor's cache.

    apply(x, dt, A, B, C, h0) -> y, h_last, with shapes as above, all of one dtype, D left to the caller. Forward keeps
    the state before every chunk and forgets the rest; backward computes a chunk's states again and walks it in reverse.
    The gradient of a scan is a scan backwards (Martin and Cundy 2018, section 2.2). Let g_t be all the gradient that
    reaches h_t: from y_t = C_t h_t, and from h_{t+1} = a_{t+1} h_t + ..; at the last step the caller's dh in its place.
        (1) g_t = C_t dy_t + a_{t+1} g_{t+1}
        (2) dx_t = dt_t du_t,   du_t = sum_n g_t B_t        u = dt x
        (3) dB_t = sum_d g_t u_t,   dC_t = sum_d h_t dy_t
        (4) w_t = dL/d(dt_t A) = g_t a_t h_{t-1},   dA = sum_{b,t} w_t dt_t,   ddt_t = sum_n w_t A + x_t du_t,
            since a_t = exp(dt_t A) is its own derivative
    Here channels lie last, (b, t, n, d): a step is one multiply-add in place over whole rows, and most sums over n or d
    are products of matrices.
    """

    @staticmethod
    def forward(ctx, x, dt, A, B, C, h0):
        b, l, d = x.shape
        n = A.shape[1]
        A = A.T.contiguous()  # (n, d)
        u = dt * x
        chunks = _chunk_slices(b, l, d * n)
        starts = x.new_empty(len(chunks), b, n, d)
        buffers = x.new_empty(2, b, chunks[0].stop, n, d)
        y = torch.empty_like(x)
        h = h0.transpose(1, 2)
        for start, s in zip(starts, chunks):
            start.copy_(h)
            _, hs = _chunk_states(dt[:, s], A, u[:, s], B[:, s], start, buffers)
            y[:, s] = (C[:, s, None] @ hs).squeeze(2)
            h = hs[:, -1]  # a view of a buffer, copied into the next start first
        ctx.save_for_backward(x, dt, A, B, C, starts)
        # a copy, since a view would keep the whole buffer
        return y, h.transpose(1, 2).clone(memory_format=torch.contiguous_format)

    @staticmethod
    @_differentiable_once
    def backward(ctx, dy, dh):
        x, dt, A, B, C, starts = ctx.saved_tensors
        b, l, d = x.shape
        dx, ddt, dB, dC = (torch.empty_like(t) for t in (x, dt, B, C))
        dA = torch.zeros_like(starts[0])  # (b, n, d), summed over b at the end
        chunks = _chunk_slices(b, l, A.numel())
        buffers = x.new_empty(3, b, chunks[0].stop, *A.shape)
        # what reaches a chunk's last state from behind: dh, then a_{t+1} g_{t+1}
        carry = dh.transpose(1, 2)
        for start, s in zip(reversed(starts.unbind(0)), reversed(chunks)):
            x_s, dt_s, dy_s = (t[:, s] for t in (x, dt, dy))
            u = dt_s * x_s
            a, h = _chunk_states(dt_s, A, u, B[:, s], start, buffers)
            g = torch.mul(C[:, s, :, None], dy_s[:, :, None], out=buffers[2, :, :x_s.shape[1]])
            a_steps = a.unbind(1)
            g_steps = g.unbind(1)
            g_steps[-1].add_(carry)
            for t in range(len(g_steps) - 2, -1, -1):
                g_steps[t].addcmul_(a_steps[t + 1], g_steps[t + 1])  # (1)
            carry = a_steps[0] * g_steps[0]
            du = (B[:, s, None] @ g).squeeze(2)  # (b, t, d)
            dx[:, s] = du * dt_s  # (2)
            dB[:, s] = (u[:, :, None] @ g.mT).squeeze(2)  # (3)
            dC[:, s] = (dy_s[:, :, None] @ h.mT).squeeze(2)
            w = a.mul_(g)  # (4), in the memory of a, which is not needed any more
            w[:, 1:].mul_(h[:, :-1])
            w[:, 0].mul_(start)
            for w_t, dt_t in zip(w.unbind(1), dt_s[:, :, None].unbind(1)):
                dA.addcmul_(w_t, dt_t)
            ddt[:, s] = w.mul_(A).sum(2).addcmul_(du, x_s)
        return dx, ddt, dA.sum(0).T, dB, dC, carry.transpose(1, 2)  # carry is a_0 g_0, which is dh0


def _chunk_slices(b, l, state_size):
    """Slices of the length axis: 64 steps, or fewer, but not below 16, to keep a buffer of states near 2 MB (2**19
    float32)."""
    size = 2**19 // max(1, b * state_size)
    size = min(l, max(16, min(64, size)))
    return [slice(i, min(i + size, l)) for i in range(0, l, size)]


def _chunk_states(dt, A, u, B, h, buffers):
    """Decays a and states h of one chunk, both (b, t, n, d), written into two reused buffers."""
    steps = dt.shape[1]
    a = torch.mul(dt[:, :, None], A, out=buffers[0, :, :steps]).exp_()
    hs = torch.mul(u[:, :, None], B[..., None], out=buffers[1, :, :steps])
    for a_t, h_t in zip(a.unbind(1), hs.unbind(1)):
        h_t.addcmul_(a_t, h)  # h_t held u_t B_t
        h = h_t
    return a, hs


SELECTIVE_SCANS = {"naive": _selective_naive, "parallel": _selective_parallel,
                   "chunked": ChunkedSelectiveScan.apply}

# ---------------------------------------------------------------------------------------------------------------------
# 5. SSD, state-space duality (Mamba-2, 2405.21060): one decay per head turns the scan into products of matrices
#
# A head is p channels with one decay, one B and one C. Their states are a matrix h (p, n), and a step adds the outer
# product of what is written, u_t = dt_t x_t (p numbers), and where, B_t (n numbers). Unroll
# h_t = a_t h_{t-1} + u_t B_t^T from h = 0, with a number a_t = exp(dt_t A), read it out by C_t, and attention appears:
#     y_i = sum_{j <= i} L_ij (C_i . B_j) u_j,   L_ij = a_i a_{i-1} ... a_{j+1} = exp(dt_i A + ... + dt_{j+1} A)
# with C as queries, B as keys, u as values, and a decay where softmax was. (Mamba has a decay per channel and state: it
# cannot be taken out of the sum over states C_i . B_j, so there is no matrix L.) So u becomes y by the matrix of the
# elements L_ij (C_i . B_j). For l = 6 and chunks of q = 2 it is
#
#     [ #          ]    #: attention inside a chunk. o: through the n numbers of the state per channel. In three steps:
#     [ # #        ]    1. u goes into the state at the end of its chunk, each chunk from h = 0 (_last_state),
#     [ o o #      ]    2. states are carried from chunk to chunk (section 2's scan, a chunk being a step),
#     [ o o # #    ]    3. C reads out the state that enters its chunk, and the chunk itself (_attend).
#     [ o o o o #  ]    This is exact, since h is linear in the state that enters:
#     [ o o o o # #]    h_t = (h_t from zero) + a_t ... a_first (the state that enters).
#
#    per head    multiply-adds in products    numbers kept              what it is
#    naive       2 l n p                      l n p, by autograd        the recurrence
#    quadratic   l (l (n + p + l) + 2 n p)    l^2, a few times          masked attention (l^3 is for L)
#    chunked     l (q (n + p + q) + 2 n p)    l (q + n p / q), ditto    attention in chunks, a scan between them
#
# With other decays the same frame has other names. a = 1: linear attention. A constant: RetNet. n numbers: gated linear
# attention (use scan). A matrix 1 - beta_t B_t B_t^T: DeltaNet (not here). Mamba-3 (model.py) also turns B and C.


def ssd(x, dt, A, B, C, D=None, h0=None, impl="auto", upto=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,   y_t = h_t C_t + D x_t        (sections 5 and 6 of the paper)

    x (b, l, nh, p), dt (b, l, nh) > 0, A (nh,) <= 0, B, C (b, l, g, n): head i reads group i // (nh // g),
    D (nh,), h0 (b, nh, p, n), zero if None -> y (b, l, nh, p) in x's dtype, h (b, nh, p, n), float32 or float64, after
    the first upto steps, by default all. Gradients reach every input, also through h. impl: naive, quadratic, chunked,
    or auto, which is chunked (naive for one step). A NaN spoils what comes after it; in chunked also its whole chunk of
    32 steps, and in quadratic everything, since 0 times NaN is NaN.
    """
    _check("ssd", x=(x, "b l nh p"), dt=(dt, "b l nh"), A=(A, "nh"), D=(D, "nh"))
    wide, dt, A, B, C, D, h0 = _widen(x, dt, A, B, C, D, h0)
    y, h = ssd_scan(dt[..., None] * wide, dt * A, B, C, h0, impl, upto)
    return _add_skip(y, wide, None if D is None else D[:, None]).to(x.dtype), h


def ssd_scan(u, log_a, B, C, h0=None, impl="auto", upto=None):
    """h_t = exp(log_a_t) h_{t-1} + u_t B_t^T,   y_t = h_t C_t: ssd's u = dt x and log_a = dt A, given apart.

    u (b, l, nh, p), log_a (b, l, nh) <= 0, the rest as above -> y, h, both float32 or float64. For a layer whose u is
    not x times the dt of its decay (Mamba-3).
    """
    sizes = _check("ssd", u=(u, "b l nh p"), log_a=(log_a, "b l nh"), B=(B, "b l g n"),
                   C=(C, "b l g n"), h0=(h0, "b nh p n"))
    if sizes["g"] == 0 or sizes["nh"] % sizes["g"]:
        raise ValueError(f"ssd: {sizes['nh']} heads do not divide into {sizes['g']} groups")
    end = _steps(upto, sizes["l"])
    u, log_a, B, C, h0 = _widen(u, log_a, B, C, h0)
    if h0 is None:
        h0 = u.new_zeros(*(sizes[a] for a in ("b", "nh", "p", "n")))
    path = _choose(impl, "naive" if sizes["l"] == 1 else "chunked", SSDS)
    with _no_autocast(u.device):
        log_a = log_a.clamp(min=-1e30)  # -inf times a zero would be NaN in _decays
        return path(u, log_a, B, C, h0, end)


def _ssd_naive(u, log_a, B, C, h0, end):
    """The definition, one step at a time."""
    B = per_head(B, u.shape[2], 2)
    C = per_head(C, u.shape[2], 2)
    ys = []
    hs = [h0]
    for u_t, a_t, B_t, C_t in zip(u.unbind(1), log_a.exp().unbind(1), B.unbind(1), C.unbind(1)):
        hs.append(a_t[..., None, None] * hs[-1] + u_t[..., None] * B_t[:, :, None])
        ys.append((hs[-1] @ C_t[..., None]).squeeze(-1))  # (b, nh, p)
    return torch.stack(ys, dim=1), hs[end]


def per_head(t, heads, dim):
    """For each head what its group has along dim; one group broadcasts as it is."""
    groups = t.shape[dim]
    return t if groups in (1, heads) else t.repeat_interleave(heads // groups, dim=dim)


def _ssd_quadratic(u, log_a, B, C, h0, end):
    """Masked attention over the whole length."""
    parts = _heads_first(u, log_a, B, C)
    y = _attend(*parts, h0).transpose(1, 2)
    return y, _last_state(*(t[:, :, :end] for t in parts), h0)


def _ssd_chunked(u, log_a, B, C, h0, end, size=32):
    """The three steps beside the matrix above, q = size (on two cores 32 is best for small heads, 64 for large).
    The last chunk is filled up with steps of u = 0, a = 1, which change nothing."""
    b, l = u.shape[:2]
    if l <= size:
        return _ssd_quadratic(u, log_a, B, C, h0, end)
    inputs = u, log_a, B, C
    if l % size:
        fill = (0, -l % size)  # F.pad counts axes from the last: (0, 0) for each one after l
        inputs = [F.pad(t, (0, 0) * (t.ndim - 2) + fill) for t in inputs]
    count = math.ceil(l / size)
    chunks = [t.reshape(b * count, size, *t.shape[2:]) for t in inputs]
    parts = _heads_first(*chunks)  # (b count, nh, size, ...)
    no_state = torch.zeros_like(h0[:1])
    ends = _last_state(*parts, no_state).unflatten(0, (b, count))  # 1
    decays = chunks[1].sum(1).exp().unflatten(0, (b, count))  # of whole chunks
    h = scan(decays[..., None, None], ends, h0, "naive")  # 2: few steps
    starts = torch.cat([h0[:, None], h[:, :-1]], dim=1).flatten(0, 1)
    y = _attend(*parts, starts).transpose(1, 2)  # 3
    y = y.unflatten(0, (b, count)).flatten(1, 2)[:, :l]
    if end < l:
        return y, _last_state(*_heads_first(*(t[:, :end] for t in inputs)), h0)
    return y, h[:, -1].clone(memory_format=torch.contiguous_format)  # a view would keep all of h


def _heads_first(u, log_a, B, C):
    """From (b, l, heads or groups, ...): u (b, nh, l, p), log_a (b, nh, l), B, C (b, g, l, n)."""
    return [t.transpose(1, 2) for t in (u, log_a, B, C)]


def _decays(log_a):
    """L (..., l, l), L_ij = exp(log_a_{j+1} + ... + log_a_i) for j <= i, else 0: log_a (..., l).

    The sums are a product with a matrix of ones and zeros. For l = 3 and log_a = (r, s, t):
        [1 0 0] [0 0 0]   [ 0   0 0]             [1        0    0]
        [1 1 0] [s 0 0] = [ s   0 0]       L =   [e^s      1    0]
        [1 1 1] [t t 0]   [s+t  t 0]             [e^(s+t)  e^t  1]
    A difference of two cumulative sums would be shorter and lose digits after strong decays.
    """
    l = log_a.shape[-1]
    lower = torch.ones(l, l, dtype=log_a.dtype, device=log_a.device).tril()
    return (lower @ (log_a[..., None] * lower.tril(-1))).exp() * lower


def _attend(u, log_a, B, C, h0):
    """y_i = a_i ... a_0 h0 C_i + sum_{j <= i} L_ij (C_i . B_j) u_j for every position i: (b, nh, l, p)."""
    heads = u.shape[1]
    scores = _decays(log_a) * per_head(C @ B.mT, heads, 1)  # (b, nh, l, l)
    # a group's heads share C: their rows of h0 are stacked, for one product per group
    from_h0 = h0.unflatten(1, (C.shape[1], -1)).flatten(2, 3) @ C.mT  # (b, g, nh/g p, l)
    from_h0 = from_h0.flatten(1, 2).unflatten(1, (heads, -1)).mT  # (b, nh, l, p)
    return torch.addcmul(scores @ u, log_a.cumsum(-1).exp()[..., None], from_h0)


def _last_state(u, log_a, B, C, h0):
    """h_last = a_{l-1} ... a_0 h0 + sum_j a_{l-1} ... a_{j+1} u_j B_j^T: (b, nh, p, n)."""
    later = F.pad(log_a[..., 1:], (0, 1))  # shifted, so that j's sum begins at j + 1
    to_end = later.flip(-1).cumsum(-1).flip(-1).exp()[..., None]  # a_{l-1} ... a_{j+1} for every j
    decayed = (u * to_end).mT.unflatten(1, (B.shape[1], -1)).flatten(2, 3)  # (b, g, nh/g p, l)
    from_u = (decayed @ B).flatten(1, 2).unflatten(1, (u.shape[1], -1))  # (b, nh, p, n)
    return torch.addcmul(from_u, log_a.sum(-1)[..., None, None].exp(), h0)


SSDS = {"naive": _ssd_naive, "quadratic": _ssd_quadratic, "chunked": _ssd_chunked}

# ---------------------------------------------------------------------------------------------------------------------
# 6. The selective scan on a GPU, in Triton
#
# If you only want to understand Mamba, stop here: this section computes nothing new. It improves on section 4 in memory
# traffic. A GPU computes far faster than its memory delivers, and section 4 moves b l d n states. Here x, dt, B and C
# come in, y goes out, and forward lets only every 16th state leave the chip, which backward needs.
#
# A kernel is a function that many programs run at once, each with a program_id of its own. A program here is one warp,
# 32 threads in step, which takes one sequence and a tile of DIM channels and loops over t as the naive path does.
#
#             DIM channels                          one long sequence, cut into two pieces
#           +--------------+
#           | h and A stay | <- B_t, a column       walk    0 ----> end    0 ----> end     both at once
#  n states | in registers |                        carry  h0 --------->  h --------->     in order
#           |              | <- C_t, a column       walk   h0 ----> y     h ----> y        both at once
#           +--------------+
#            ^ x_t, dt_t, rows    v y_t, a row: the sum over states
#
# One long sequence is too few programs to fill a GPU, so if its length allows it is cut into 2, 4, 8 .. equal pieces of
# whole chunks (16 steps, see below), which are rows of a larger batch.
# As in section 5 every piece is walked from zero, the states are carried through the pieces (the decay of a piece is
# exp(A sum dt)), and every piece is walked again, from the state that enters it.
#
# Backward, with g_t and w_t as in section 4. It carries q_t = a_t g_t, since that travels from step t to step t - 1:
#     g_t = C_t dy_t + q_{t+1}        q_t = a_t g_t        w_t = q_t h_{t-1}        dh0 = q_0
# q_t = a_t q_{t+1} + a_t C_t dy_t has the form of the recurrence of h, so the same kernel walks it from zero through
# the pieces. Every h_{t-1} is needed again, the last one first, and division by a_t would not give it back where a_t is
# close to 0. So backward takes the chunks of 16 steps, the last one first: from the state that forward kept it walks
# forward through the chunk, writes each state into a scratch of 16 tiles, and walks back through it.
#
# Sums over channels, dB and dC, are written in parts, one per tile, and added up in a fixed order. There are no
# atomics, so two runs give the same bits. There are d n/512 tiles, each with b l n numbers of dB and of dC, together
# n^2/256 times as many as x: hence n <= 64.

CHUNK = 16  # steps between the states that are kept
TILE = 512  # numbers of a tile, 16 per thread


def _kernel(f):
    """f as a Triton kernel, or as it is where there is no Triton.

    Triton compiles a kernel anew for each value of a constexpr, and for integers that are 1 or divisible by 16 unless
    told not to. d and n are constexpr, as a model has few of them; the length changes from call to call.
    """
    return f if triton is None else triton.jit(f, do_not_specialize=["l"])


@_kernel
def _tile(d: tl.constexpr, n: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr):
    """A program's sequence, states and channels, its tile's offsets in a matrix (n, d), and a mask.

    N and DIM are powers of two. States beyond n and channels beyond d read as zero and are not written. The sequence is
    int64, and so is all that is computed from it: an offset may pass 2^31.
    """
    states = tl.arange(0, N)[:, None]  # (N, 1)
    channels = tl.program_id(1) * DIM + tl.arange(0, DIM)[None, :]  # (1, DIM)
    mask = (states < n) & (channels < d)
    return tl.program_id(0).to(tl.int64), states, channels, states * d + channels, mask


@_kernel
def _row(matrix, row, columns, width: tl.constexpr, like):
    """The given columns of a row of a matrix, in the dtype of like."""
    return tl.load(matrix + row * width + columns, mask=columns < width, other=0.0).to(like.dtype)


@_kernel
def _walk(x, dt, A, B, C, D, enter, y, starts, last, l,
          d: tl.constexpr, n: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr,
          CHUNK: tl.constexpr, FULL: tl.constexpr, BACK: tl.constexpr):
    """Walks through a sequence, from the state that enters it to its last state. A sequence may be a piece, and l is
    its length; a piece is whole chunks, so the chunks of all pieces have numbers in a row.

    FULL: also writes y and the states before chunks. BACK: q instead of h, from the last step to the first; then x is
    dy and B is C. exp(z) is exp2(z log2(e)), and exp2 is one instruction: A comes times log2(e).
    """
    sequence, states, channels, tile, mask = _tile(d, n, N, DIM)
    A_tile = tl.load(A + tile, mask=mask, other=0.0)  # (N, DIM)
    h = tl.load(enter + sequence * n * d + tile, mask=mask, other=0.0)  # (N, DIM)
    if FULL:
        D_row = tl.load(D + channels, mask=channels < d, other=0.0)  # (1, DIM)
    for i in tl.range(0, l, num_stages=3):  # the rows of the next two steps are on their way
        row = sequence * l + (l - 1 - i if BACK else i)
        x_t = _row(x, row, channels, d, h)  # (1, DIM)
        dt_t = _row(dt, row, channels, d, h)  # (1, DIM)
        B_t = _row(B, row, states, n, h)  # (N, 1)
        a = tl.exp2(dt_t * A_tile)  # (N, DIM)
        if FULL and i % CHUNK == 0:
            chunk = sequence * tl.cdiv(l, CHUNK) + i // CHUNK
            tl.store(starts + chunk * n * d + tile, h, mask=mask)
        if BACK:
            h = a * (h + B_t * x_t)  # q_t = a_t (q_{t+1} + C_t dy_t)
        else:
            h = a * h + B_t * (dt_t * x_t)
        if FULL:
            C_t = _row(C, row, states, n, h)  # (N, 1)
            y_t = tl.sum(C_t * h, 0, keep_dims=True) + D_row * x_t  # (1, DIM)
            tl.store(y + row * d + channels, y_t, mask=channels < d)
    tl.store(last + sequence * n * d + tile, h, mask=mask)


@_kernel
def _walk_back(x, dt, A, B, C, D, starts, dy, enter, scratch, dx, ddt, dA, dB, dC, dD, dh0, l,
               d: tl.constexpr, n: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr,
               CHUNK: tl.constexpr):
    """All gradients of a sequence and a tile; dA and dD per sequence, dB and dC per tile."""
    sequence, states, channels, tile, mask = _tile(d, n, N, DIM)
    A_tile = tl.load(A + tile, mask=mask, other=0.0)  # (N, DIM)
    D_row = tl.load(D + channels, mask=channels < d, other=0.0)  # (1, DIM)
    q = tl.load(enter + sequence * n * d + tile, mask=mask, other=0.0)  # (N, DIM)
    dA_sum = tl.zeros_like(q)
    dD_sum = tl.zeros_like(D_row)
    part = tl.program_id(1).to(tl.int64) * tl.num_programs(0) * l  # in rows of dB and dC
    scratch += (sequence * tl.num_programs(1) + tl.program_id(1)) * CHUNK * N * DIM
    scratch += tl.arange(0, N)[:, None] * DIM + tl.arange(0, DIM)[None, :]  # (N, DIM)
    for chunk in range(tl.cdiv(l, CHUNK) - 1, -1, -1):
        first = sequence * l + chunk * CHUNK
        steps = tl.minimum(CHUNK, l - chunk * CHUNK)
        kept = sequence * tl.cdiv(l, CHUNK) + chunk
        h = tl.load(starts + kept * n * d + tile, mask=mask, other=0.0)  # (N, DIM)
        for i in tl.range(0, steps, num_stages=3):
            tl.store(scratch + i * (N * DIM), h)  # h_{t-1}
            x_t = _row(x, first + i, channels, d, h)
            dt_t = _row(dt, first + i, channels, d, h)
            B_t = _row(B, first + i, states, n, h)
            h = tl.exp2(dt_t * A_tile) * h + B_t * (dt_t * x_t)
        # With num_stages loads run ahead of stores. So the loop above only writes the scratch, the one below only reads
        # it, and between them a barrier makes the stores of each thread visible to all threads of the program.
        tl.debug_barrier()
        for i in tl.range(0, steps, num_stages=3):
            row = first + steps - 1 - i
            before = tl.load(scratch + (steps - 1 - i) * (N * DIM))  # h_{t-1}, while h is h_t
            x_t = _row(x, row, channels, d, h)  # (1, DIM)
            dt_t = _row(dt, row, channels, d, h)  # (1, DIM)
            dy_t = _row(dy, row, channels, d, h)  # (1, DIM)
            B_t = _row(B, row, states, n, h)  # (N, 1)
            C_t = _row(C, row, states, n, h)  # (N, 1)
            g = C_t * dy_t + q  # (N, DIM)
            q = tl.exp2(dt_t * A_tile) * g
            w = q * before
            dA_sum += w * dt_t
            dD_sum += x_t * dy_t
            du = tl.sum(g * B_t, 0, keep_dims=True)  # (1, DIM)
            wA = 0.6931471805599453 * tl.sum(w * A_tile, 0, keep_dims=True)  # ln 2 undoes log2(e)
            tl.store(dx + row * d + channels, dt_t * du + D_row * dy_t, mask=channels < d)
            tl.store(ddt + row * d + channels, x_t * du + wA, mask=channels < d)
            dB_t = tl.sum(g * (dt_t * x_t), 1, keep_dims=True)  # (N, 1)
            dC_t = tl.sum(h * dy_t, 1, keep_dims=True)
            tl.store(dB + (part + row) * n + states, dB_t, mask=states < n)
            tl.store(dC + (part + row) * n + states, dC_t, mask=states < n)
            h = before
        tl.debug_barrier()  # the next chunk writes over the scratch
    tl.store(dh0 + sequence * n * d + tile, q, mask=mask)
    tl.store(dA + sequence * n * d + tile, dA_sum, mask=mask)
    tl.store(dD + sequence * d + channels, dD_sum, mask=channels < d)


def _constants(d, n):
    """The constants of a kernel, and the number of tiles."""
    N = triton.next_power_of_2(n)
    DIM = TILE // N
    return {"d": d, "n": n, "N": N, "DIM": DIM, "CHUNK": CHUNK}, math.ceil(d / DIM)


def _launch(kernel, n, x, *args, **flags):
    """Starts a program, one warp, for every sequence of x (b, l, d) and every tile."""
    constants, tiles = _constants(x.shape[2], n)
    if len(x):
        with torch.cuda.device_of(x):
            kernel[len(x), tiles](x, *args, x.shape[1], num_warps=1, **constants, **flags,
                                  enable_fp_fusion=True)  # a product and a sum in one instruction


def _pieces(b, l, d, n, device):
    """The number of pieces of a sequence: doubled while a multiprocessor has fewer than 2 programs and pieces of half
    the length are whole chunks."""
    fill = 0
    if device.type == "cuda":
        fill = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    pieces = 1
    while pieces * b * _constants(d, n)[1] < fill and l % (2 * pieces * CHUNK) == 0:
        pieces *= 2
    return pieces


def _cut(pieces, *tensors):
    """Sequences (b, l, ...) in pieces (b pieces, l / pieces, ...), contiguous."""
    return [t.unflatten(1, (pieces, -1)).flatten(0, 1).contiguous() for t in tensors]


def _entering(x, dt, A, B, h0, pieces, back):
    """What enters each piece (b pieces, n, d), given h0 (b, n, d); x, dt and B are cut. back: the q from behind."""
    if pieces == 1:
        return h0
    ends = A.new_zeros(len(x), *A.shape)  # zero enters, and a piece's last state replaces it
    _launch(_walk, len(A), x, dt, A, B, None, None, ends, None, None, ends, FULL=False, BACK=back)
    decay = torch.exp2(dt.sum(1, dtype=A.dtype)[:, None] * A).unflatten(0, (-1, pieces))
    ends = ends.unflatten(0, (-1, pieces))  # (b, pieces, n, d)
    if back:
        decay, ends = (t.flip(1) for t in (decay, ends))
    h = scan(decay, ends, h0, "naive")
    enter = torch.cat([h0[:, None], h[:, :-1]], dim=1)
    return (enter.flip(1) if back else enter).flatten(0, 1)


class _SelectiveTriton(torch.autograd.Function):
    """Both directions. A is (n, d) and states are (b, n, d), so that neighbouring threads read neighbouring channels.
    Strided inputs are copied, since a GPU reads no less than 32 bytes at a place."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, h0):
        b, l, d = x.shape
        A = (A.mT * math.log2(math.e)).contiguous()
        D = D.contiguous()
        pieces = _pieces(b, l, d, len(A), x.device)
        x, dt, B, C = _cut(pieces, x, dt, B, C)
        enter = _entering(x, dt, A, B, h0.mT.contiguous(), pieces, back=False)
        y, last = (torch.empty_like(t) for t in (x, enter))
        # the states before chunks, of all pieces in order
        starts = A.new_empty(b, math.ceil(l / CHUNK), *A.shape)
        _launch(_walk, len(A), x, dt, A, B, C, D, enter, y, starts, last, FULL=True, BACK=False)
        ctx.save_for_backward(x, dt, A, B, C, D, starts)
        ctx.pieces = pieces
        last = last[pieces - 1::pieces].mT.clone(memory_format=torch.contiguous_format)
        return y.view(b, l, d), last

    @staticmethod
    @_differentiable_once
    def backward(ctx, dy, dh):
        x, dt, A, B, C, D, starts = ctx.saved_tensors  # in pieces
        b, l, d = dy.shape
        n = len(A)
        dy = _cut(ctx.pieces, dy)[0]
        enter = _entering(dy, dt, A, C, dh.mT.contiguous(), ctx.pieces, back=True)
        constants, tiles = _constants(d, n)
        scratch = A.new_empty(len(x), tiles, CHUNK, constants["N"], constants["DIM"])
        dx, ddt, dA, dh0 = (torch.empty_like(t) for t in (x, dt, enter, enter))
        dB, dC = (A.new_empty(tiles, *t.shape) for t in (B, C))
        dD = A.new_empty(len(x), d)
        _launch(_walk_back, n, x, dt, A, B, C, D, starts, dy, enter, scratch,
                dx, ddt, dA, dB, dC, dD, dh0)
        dB = dB.sum(0).to(B.dtype).view(b, l, n)
        dC = dC.sum(0).to(C.dtype).view(b, l, n)
        dA = dA.sum(0).mT
        return dx.view(b, l, d), ddt.view(b, l, d), dA, dB, dC, dD.sum(0), dh0[::ctx.pieces].mT


def _why_no_triton(x, n):
    """Why the kernels cannot run on x with n states, or None."""
    if triton is None:
        return f"Triton does not import ({no_triton})"
    if not 1 <= n <= 64:
        return f"its kernels take 1 to 64 states per channel, not {n}"
    if not x.is_cuda and isinstance(_walk, triton.JITFunction):
        return f"on {x.device} it needs TRITON_INTERPRET=1 in the environment when Python starts"
    if x.is_cuda and (torch.version.hip or torch.cuda.get_device_capability(x.device) < (8, 0)):
        return f"it compiles for compute capability 8.0 and higher, which {x.device} has not"
    return None


@torch.compiler.disable  # a graph ends here: torch.compile need not look into kernels
def _selective_triton(x, dt, A, B, C, D, h0):
    """selective_scan by these kernels. x, dt, B and C keep their dtypes in memory and are widened in registers."""
    why = _why_no_triton(x, A.shape[1])
    if why:
        raise RuntimeError(f'selective_scan: impl="triton" cannot run: {why}; use impl="chunked"')
    D = h0.new_zeros(len(A)) if D is None else D.to(h0.dtype)
    return _SelectiveTriton.apply(x, dt, A.to(h0.dtype), B, C, D, h0)
