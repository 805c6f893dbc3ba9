"""SSD, the scan of Mamba-2: the recurrence, masked attention and the chunked form are one map, values and gradients."""
import contextlib
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import all_close, close
from scan import SSDS, selective_scan, ssd

LENGTHS = [1, 2, 3, 7, 8, 31, 64, 100, 257]
F64 = torch.float64
NAMES = "y h dx ddt dA dB dC dD dh0"  # what values_and_gradients gives
b, nh, p, n = 2, 6, 7, 5  # with g = 1 or 3, the sizes are pairwise distinct: a transposed axis cannot pass


def inputs(l, g=3, dtype=F64, dt_max=0.5, seed=0):
    """x, dt, A, B, C, D, h0 of an ssd."""
    torch.manual_seed(seed)
    x, dt, A = torch.randn(b, l, nh, p), torch.rand(b, l, nh) * dt_max, -torch.rand(nh) * 3
    B, C, D, h0 = torch.randn(b, l, g, n), torch.randn(b, l, g, n), torch.randn(nh), torch.randn(b, nh, p, n)
    return [t.to(dtype) for t in (x, dt, A, B, C, D, h0)]


def values_and_gradients(f, tensors, cast=contextlib.nullcontext()):
    """Outputs of f, run under cast, and the gradients of a fixed random functional of all of them."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    with cast:
        outs = f(*leaves)
    gen = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=gen, dtype=torch.float64).to(o.dtype) for o in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, weights)]


def as_selective_scan(x, dt, A, B, C, D=None, h0=None, impl="naive"):
    """The same by the selective scan: each channel has its head's dt, A and D, each head its group's B and C."""
    ys, hs, heads = [], [], nh // B.shape[2]
    for i in range(nh):
        B_i, C_i = B[:, :, i // heads], C[:, :, i // heads]
        y, h = selective_scan(x[:, :, i], dt[:, :, i:i + 1].expand(-1, -1, p), A[i].expand(p, n), B_i, C_i,
                              None if D is None else D[i].expand(p), None if h0 is None else h0[:, i], impl)
        ys.append(y)
        hs.append(h)
    return torch.stack(ys, dim=2), torch.stack(hs, dim=1)


@pytest.mark.parametrize("with_h0", [False, True])
@pytest.mark.parametrize("g", [1, 3])
@pytest.mark.parametrize("l", LENGTHS)
def test_all_forms_agree_for_every_length(l, g, with_h0):
    """Mamba-2 (2405.21060), sections 5 and 6: y, last state, and gradients to x, dt, A, B, C, D, h0 through both."""
    tensors = inputs(l, g)[:6 + with_h0]
    want = values_and_gradients(lambda *t: ssd(*t, impl="naive"), tensors)
    for impl in ("quadratic", "chunked", "auto"):
        all_close(values_and_gradients(lambda *t: ssd(*t, impl=impl), tensors), want, NAMES)


@pytest.mark.parametrize("l", [1, 8, 31, 100])
@pytest.mark.parametrize("g", [1, 3])
@pytest.mark.parametrize("impl", SSDS)
def test_ssd_is_the_selective_scan_with_one_decay_a_head(impl, g, l):
    """Mamba-2 section 2.4.1: A is a scalar times the identity, and a head's p channels share it."""
    tensors = inputs(l, g)
    got = values_and_gradients(lambda *t: ssd(*t, impl=impl), tensors)
    all_close(got, values_and_gradients(as_selective_scan, tensors), NAMES)


@pytest.mark.parametrize("l", [5, 37])
@pytest.mark.parametrize("impl", SSDS)
def test_ssd_passes_gradcheck(impl, l):
    """Against finite differences, which know nothing of our code; 37 steps are more than a chunk.

    Fast mode compares one random projection of the Jacobian instead of its every entry.
    """
    torch.manual_seed(0)
    tensors = [torch.randn(1, l, 2, 1), torch.rand(1, l, 2), -torch.rand(2), torch.randn(1, l, 1, 2),
               torch.randn(1, l, 1, 2), torch.randn(2), torch.randn(1, 2, 1, 2)]
    tensors = [t.double().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: ssd(*t, impl=impl), tensors, fast_mode=l > 5)


@pytest.mark.parametrize("impl", SSDS)
@pytest.mark.parametrize("cut", [1, 2, 31, 32, 50, 99])
def test_any_split_of_a_sequence_gives_the_whole_sequence(impl, cut):
    """The last state of one part, given to the next: y and the state are those of one call."""
    x, dt, A, B, C, D, h0 = inputs(100)
    y, h = ssd(x, dt, A, B, C, D, h0, impl)
    y1, h1 = ssd(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D, h0, impl)
    y2, h2 = ssd(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D, h1, impl)
    close(torch.cat([y1, y2], 1), y, name="y")
    close(h2, h, name="h")


@pytest.mark.parametrize("impl", SSDS)
@pytest.mark.parametrize("upto", [0, 1, 32, 69, 70])
def test_the_state_after_the_first_steps_has_not_read_the_others(impl, upto):
    """y is that of all steps, h that of the first upto alone."""
    x, dt, A, B, C, D, h0 = inputs(70)
    y, h = ssd(x, dt, A, B, C, D, h0, impl, upto)
    close(y, ssd(x, dt, A, B, C, D, h0, impl)[0], name="y")
    first = [t[:, :upto] for t in (x, dt, B, C)]
    want = ssd(first[0], first[1], A, *first[2:], D, h0, "naive")[1] if upto else h0
    close(h, want, name="h")


@pytest.mark.parametrize("l", [1, 7, 64, 100])
@pytest.mark.parametrize("impl", SSDS)
def test_a_step_of_length_zero_changes_nothing(impl, l):
    """exp(0 A) = 1 and 0 x B = 0: the state passes bit for bit, and what is read out is D x + h0 C."""
    x, dt, A, B, C, D, h0 = inputs(l, dtype=torch.float32)
    y, h = ssd(x, torch.zeros_like(dt), A, B, C, D, h0, impl)
    assert torch.equal(h, h0)
    C_head = C.repeat_interleave(nh // 3, dim=2)
    close(y, D[:, None] * x + torch.einsum("bhpn,blhn->blhp", h0, C_head), 1e-5)


@pytest.mark.parametrize("impl", SSDS)
def test_without_decay_it_is_causal_linear_attention(impl):
    """Katharopoulos et al. 2020, eq. 8 without feature map and normalizer: y_t = sum_{s <= t} (C_t . B_s) x_s."""
    x, dt, A, B, C, _, _ = inputs(70)
    y, h = ssd(x, torch.ones_like(dt), torch.zeros_like(A), B, C, impl=impl)
    B, C = B.repeat_interleave(nh // 3, dim=2), C.repeat_interleave(nh // 3, dim=2)
    scores = torch.einsum("blhn,bshn->bhls", C, B).tril()
    close(y, torch.einsum("bhls,bshp->blhp", scores, x), name="y")
    close(h, torch.einsum("bshp,bshn->bhpn", x, B), name="h")


@pytest.mark.parametrize("impl", SSDS)
def test_the_future_cannot_be_seen(impl):
    """Another input from step 41 on leaves y before it as it is, and changes every y from there on."""
    tensors = inputs(70)
    y, _ = ssd(*tensors, impl=impl)
    for i in (0, 1, 3, 4):  # x, dt, B, C
        changed = [t.clone() for t in tensors]
        changed[i][:, 41:] += 1
        y2, _ = ssd(*changed, impl=impl)
        close(y2[:, :41], y[:, :41], 1e-14)
        assert ((y2[:, 41:] - y[:, 41:]).abs().amax((0, 3)) > 1e-6).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("impl, safe", [("naive", 70), ("chunked", 64)])
def test_what_is_not_finite_does_not_reach_the_past(impl, safe, bad):
    """Of the chunks before its own, of 32 steps: within one, the masked product makes 0 * nan of it."""
    tensors = inputs(100)
    y, _ = ssd(*tensors, impl=impl)
    for i in (0, 1, 3, 4):  # x, dt, B, C
        changed = [t.clone() for t in tensors]
        changed[i][:, 70] = bad
        close(ssd(*changed, impl=impl)[0][:, :safe], y[:, :safe], 1e-14)


@pytest.mark.parametrize("impl", ["naive", "quadratic", "chunked"])
def test_the_initial_state_enters_linearly(impl):
    """y_t(h0) = y_t(0) + exp(A sum dt) h0 C_t: what lets chunks be computed apart and joined later."""
    x, dt, A, B, C, D, h0 = inputs(65)
    y, h = ssd(x, dt, A, B, C, D, h0, impl)
    y0, h_zero = ssd(x, dt, A, B, C, D, impl=impl)
    decay = torch.exp(dt.cumsum(1) * A)  # (b, l, nh)
    close(y, y0 + decay[..., None] * torch.einsum("bhpn,blhn->blhp", h0, C.repeat_interleave(nh // 3, dim=2)))
    close(h, h_zero + decay[:, -1, :, None, None] * h0)


# Numbers: long sequences, large steps, narrow types


def test_large_steps_over_a_long_sequence_neither_overflow_nor_lose_digits():
    """dt up to 20, l = 8192: exp(c_i - c_j) above the diagonal would be inf, and inf * 0 NaN.

    float32 is within 1e-5 of float64, relative to the largest element, in outputs and every gradient.
    """
    torch.manual_seed(0)
    l = 8192
    tensors = [torch.randn(1, l, 2, 3), torch.rand(1, l, 2) * 20, -torch.rand(2), torch.randn(1, l, 1, 5),
               torch.randn(1, l, 1, 5), torch.randn(2), torch.randn(1, 2, 3, 5)]
    got = values_and_gradients(ssd, tensors)
    want = values_and_gradients(ssd, [t.double() for t in tensors])
    for name, g, w in zip(NAMES.split(), got, want, strict=True):
        assert g.dtype == torch.float32 and g.isfinite().all() and w.isfinite().all(), name
        assert (g - w).abs().max() <= 1e-5 * w.abs().max(), name


@pytest.mark.parametrize("dt_max, l", [(0.05, 1000), (20.0, 1000)])
@pytest.mark.parametrize("impl", ["quadratic", "chunked"])
def test_float32_stays_within_1e5_of_the_float64_recurrence(impl, dt_max, l):
    """Values and gradients over 1,000 steps, weak decays and strong ones, relative to the largest number."""
    tensors = inputs(l, dtype=torch.float32, dt_max=dt_max)
    got = values_and_gradients(lambda *t: ssd(*t, impl=impl), tensors)
    want = values_and_gradients(lambda *t: ssd(*t, impl="naive"), [t.double() for t in tensors])
    for name, g, w in zip(NAMES.split(), got, want, strict=True):
        assert g.isfinite().all() and (g - w).abs().max() <= 1e-5 * w.abs().max(), name


@pytest.mark.parametrize("impl", SSDS)
def test_the_decay_between_neighbours_is_right_after_much_has_been_forgotten(impl):
    """An impulse after a sum of dt A near -40,000, where a float32 sum has a grain of 0.004.

    Each further step still decays it by exp(-0.01), not by something 0.3 % away.
    """
    l, at = 2048, 2048 - 10
    dt, x = torch.full((1, l, 1), 20.0), torch.zeros(1, l, 1, 1)
    x[:, at], dt[:, at], dt[:, at + 1:] = 1, 1, 0.01
    ones = torch.ones(1, l, 1, 1)
    y, h = ssd(x, dt, -torch.ones(1), ones, ones, impl=impl)
    want = torch.exp(-0.01 * torch.arange(10, dtype=F64))
    close(y[0, at:, 0, 0].double(), want, 1e-6)
    close(h.double(), want[-1].expand(1, 1, 1, 1), 1e-6)
    assert (y[:, :at] == 0).all()


@pytest.mark.parametrize("impl", SSDS)
def test_bfloat16_inputs_keep_a_float32_state(impl):
    """bfloat16 rounds 0.999 to 1: a state in bfloat16 would never forget; ours does, under autocast too."""
    l = 500
    x, dt = torch.zeros(1, l, 1, 1, dtype=torch.bfloat16), torch.ones(1, l, 1, dtype=torch.bfloat16)
    B, A = torch.ones_like(x), torch.tensor([math.log(0.999)])
    with torch.autocast("cpu", torch.bfloat16):
        y, h = ssd(x, dt, A, B, B, h0=torch.ones(1, 1, 1, 1), impl=impl)
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
    assert abs(h.item() - 0.999**l) < 1e-4


@pytest.mark.parametrize("impl", SSDS)
def test_autocast_changes_nothing(impl):
    """The matrix products inside run in float32 whatever autocast would like: same answer, same gradients."""
    tensors = inputs(70, dtype=torch.float32)
    want = values_and_gradients(lambda *t: ssd(*t, impl=impl), tensors)
    got = values_and_gradients(lambda *t: ssd(*t, impl=impl), tensors, torch.autocast("cpu", torch.bfloat16))
    all_close(got, want, NAMES, 1e-6)


def test_dtypes_out_follow_the_contract():
    """y has x's dtype; h_last is float32, or float64 for float64 inputs."""
    for dtype, state in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (F64, F64)):
        for impl in SSDS:
            y, h = ssd(*inputs(40, dtype=dtype), impl=impl)
            assert y.dtype == dtype and h.dtype == state
            assert y.shape == (b, 40, nh, p) and h.shape == (b, nh, p, n)


# Memory


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


def largest_and_kept(impl, l, heads, size, state):
    """Elements of the largest tensor seen in forward and backward, and of all that autograd keeps in between."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, l, heads, size), torch.rand(1, l, heads), -torch.rand(heads), torch.randn(1, l, 1, state),
               torch.randn(1, l, 1, state), torch.randn(heads), torch.randn(1, heads, size, state)]
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
        return t

    with Largest() as seen:
        leaves = [t.requires_grad_() for t in tensors]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y, h = ssd(*leaves, impl=impl)
        torch.autograd.grad(y.sum() + h.sum(), leaves)
    return seen.numel, sum(kept.values())


def test_no_tensor_of_all_states_is_ever_made():
    """l states of nh p n numbers each are what chunks avoid: the largest tensor has less than a tenth of that.

    All that the backward pass needs has less than a half; the recurrence, which keeps every state, needs more.
    """
    l, heads, size, state = 256, 4, 32, 64
    everything = l * heads * size * state
    largest, kept = largest_and_kept("chunked", l, heads, size, state)
    assert largest < everything / 10
    assert kept < everything / 2
    assert largest_and_kept("naive", l, heads, size, state)[1] > everything


def test_memory_grows_linearly_with_length():
    """Unlike the masked matrix of the quadratic form."""
    (small, kept), (large, kept2) = (largest_and_kept("chunked", l, 2, 8, 16) for l in (256, 1024))
    assert large <= 4.1 * small and kept2 <= 4.1 * kept
    assert largest_and_kept("quadratic", 256, 2, 8, 16)[0] >= 2 * 256**2


# Errors


def test_ssd_names_the_misshapen_input():
    x, dt, A, B, C, D, h0 = inputs(8)
    for arguments, message in (
            ((x, dt[:, :7], A, B, C), r"dt has shape \(2, 7, 6\), expected \(b = 2, l = 8, nh = 6\)"),
            ((x, dt, A[:5], B, C), r"A has shape \(5,\), expected \(nh = 6\)"),
            ((x, dt, A, B, C[:, :, :2]), r"C has shape \(2, 8, 2, 5\), expected \(b = 2, l = 8, g = 3, n = 5\)"),
            ((x, dt, A, B, C, D[:1]), r"D has shape \(1,\), expected \(nh = 6\)"),
            ((x, dt, A, B, C, D, h0[:1]), r"h0 has shape \(1, 6, 7, 5\), expected \(b = 2, nh = 6, p = 7, n = 5\)"),
            ((x, dt, A, torch.cat([B, B[:, :, :1]], 2), torch.cat([C, C[:, :, :1]], 2)), "6 heads do not divide into 4 groups"),
            ((x[:, :0], dt[:, :0], A, B[:, :0], C[:, :0]), "at least one step")):
        with pytest.raises(ValueError, match=message) as error:
            ssd(*arguments)
        assert "\n" not in str(error.value)


def test_ssd_refuses_a_misspelt_path():
    x, dt, A, B, C, D, h0 = inputs(8)
    with pytest.raises(ValueError, match='"chunkd" is not one of naive, quadratic, chunked'):
        ssd(x, dt, A, B, C, impl="chunkd")
