"""SSD, the scan of Mamba-2: the recurrence, masked attention and the chunked form are one map, values and gradients."""
import math

import pytest
import torch

from conftest import Operations, all_close, close
from scan import SSDS, selective_scan, ssd
from test_scan import F64, LENGTHS, values_and_gradients

NAMES = "y h dx ddt dA dB dC dD dh0"  # what values_and_gradients gives
b, nh, p, n = 2, 6, 7, 5  # with g = 1 or 3, the sizes are pairwise distinct: a transposed axis cannot pass


def inputs(l, g=3, dtype=F64, dt_max=0.5, sizes=(b, nh, p, n)):
    """x, dt, A, B, C, D, h0 of an ssd."""
    torch.manual_seed(0)
    b, nh, p, n = sizes
    x, dt, A = torch.randn(b, l, nh, p), torch.rand(b, l, nh) * dt_max, -torch.rand(nh) * 3
    B, C = torch.randn(b, l, g, n), torch.randn(b, l, g, n)
    D, h0 = torch.randn(nh), torch.randn(b, nh, p, n)
    return [t.to(dtype) for t in (x, dt, A, B, C, D, h0)]


def as_selective_scan(x, dt, A, B, C, D, h0):
    """The same: each channel has its head's dt, A and D, each head its group's B and C."""
    ys, hs = [], []
    for i in range(nh):
        B_i, C_i = (t[:, :, i // (nh // t.shape[2])] for t in (B, C))
        y, h = selective_scan(x[:, :, i], dt[:, :, i, None].expand(-1, -1, p), A[i].expand(p, n),
                              B_i, C_i, D[i].expand(p), h0[:, i], "naive")
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
    for impl in ("quadratic", "chunked"):
        all_close(values_and_gradients(lambda *t: ssd(*t, impl=impl), tensors), want, NAMES)


@pytest.mark.parametrize("l", [1, 8, 31, 100])
@pytest.mark.parametrize("g", [1, 3])
@pytest.mark.parametrize("impl", ["quadratic"])  # all forms agree
def test_ssd_is_the_selective_scan_with_one_decay_a_head(impl, g, l):
    """Mamba-2 section 2.4.1: A is a scalar times the identity, and a head's p channels share it."""
    tensors = inputs(l, g)
    got = values_and_gradients(lambda *t: ssd(*t, impl=impl), tensors)
    all_close(got, values_and_gradients(as_selective_scan, tensors), NAMES)


@pytest.mark.parametrize("impl", SSDS)
def test_ssd_passes_gradcheck(impl):
    """Against finite differences, which know nothing of our code; 37 steps are more than a chunk.

    Fast mode compares one random projection of the Jacobian instead of its every entry.
    """
    tensors = [t.requires_grad_() for t in inputs(37, 1, sizes=(1, 2, 1, 2))]
    assert torch.autograd.gradcheck(lambda *t: ssd(*t, impl=impl), tensors, fast_mode=True)


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
    x, dt, *rest = inputs(70)
    y, h = ssd(x, dt, *rest, impl, upto)
    close(y, ssd(x, dt, *rest, impl)[0], name="y")
    dt[:, upto:] = 0  # steps that change nothing
    close(h, ssd(x, dt, *rest, "naive")[1], name="h")


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


@pytest.mark.parametrize("impl, change, safe", [
    *((impl, 1, 70) for impl in SSDS), ("naive", math.nan, 70), ("naive", math.inf, 70),
    ("chunked", math.nan, 64), ("chunked", math.inf, 64)])
def test_the_future_cannot_be_seen(impl, change, safe):
    """Another input from step 70 on leaves y before it as it is, and changes every y from there on.

    What is not finite spoils no chunk of 32 steps before its own, where a mask makes 0 * nan of it.
    """
    tensors = inputs(100)
    y, _ = ssd(*tensors, impl=impl)
    for i in (0, 1, 3, 4):  # x, dt, B, C
        changed = [t.clone() for t in tensors]
        changed[i][:, 70:] += change
        y2, _ = ssd(*changed, impl=impl)
        close(y2[:, :safe], y[:, :safe], 1e-14)
        assert not ((y2[:, 70:] - y[:, 70:]).abs().amax((0, 3)) <= 1e-6).any()


@pytest.mark.parametrize("impl", SSDS)
def test_the_initial_state_enters_linearly(impl):
    """y_t(h0) = y_t(0) + exp(A sum dt) h0 C_t: what lets chunks be computed apart and joined later."""
    x, dt, A, B, C, D, h0 = inputs(65)
    y, h = ssd(x, dt, A, B, C, D, h0, impl)
    y0, h_zero = ssd(x, dt, A, B, C, D, impl=impl)
    decay = torch.exp(dt.cumsum(1) * A)  # (b, l, nh)
    close(y, y0 + decay[..., None] * torch.einsum("bhpn,blhn->blhp", h0, C.repeat_interleave(nh // 3, dim=2)))
    close(h, h_zero + decay[:, -1, :, None, None] * h0)


# Numbers: long sequences, large steps, narrow types


@pytest.mark.parametrize("dt_max", [0.05, 20.0])
@pytest.mark.parametrize("impl, l", [("quadratic", 500), ("chunked", 1000)])
def test_float32_stays_within_1e5_of_the_float64_recurrence(impl, l, dt_max):
    """Values and gradients, weak decays and strong ones, relative to the largest number."""
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
    def under_autocast(*tensors):
        with torch.autocast("cpu", torch.bfloat16):
            return ssd(*tensors, impl=impl)
    tensors = inputs(70, dtype=torch.float32)
    want = values_and_gradients(lambda *t: ssd(*t, impl=impl), tensors)
    all_close(values_and_gradients(under_autocast, tensors), want, NAMES, 1e-6)


# Memory


def largest_and_kept(impl, l, heads, size, state):
    """Elements of the largest tensor of forward and backward, and of all that autograd keeps."""
    tensors = inputs(l, 1, torch.float32, sizes=(1, heads, size, state))
    leaves = [t.requires_grad_() for t in tensors]
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
        return t

    with Operations() as seen:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y, h = ssd(*leaves, impl=impl)
        torch.autograd.grad(y.sum() + h.sum(), leaves)
    return max(size for _, size in seen.calls), sum(kept.values())


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


def test_what_does_not_fit_is_an_error_of_one_line():
    x, dt, A, B, C, D, h0 = inputs(8)
    for arguments, message in (
            ((x, dt, A, B, C[:, :, :2]),
             r"C has shape \(2, 8, 2, 5\), expected \(b = 2, l = 8, g = 3, n = 5\)"),
            ((x, dt, A, B.repeat(1, 1, 4, 1), C.repeat(1, 1, 4, 1)), "6 heads .* into 12 groups"),
            ((x[:, :0], dt[:, :0], A, B[:, :0], C[:, :0]), "at least one step"),
            ((x, dt, A, B, C, D, h0, "chunkd"), '"chunkd" is not one of naive, quadratic')):
        with pytest.raises(ValueError, match=message) as error:
            ssd(*arguments)
        assert "\n" not in str(error.value)


def test_an_empty_batch_gives_an_empty_answer():
    for l in (1, 8, 70):
        x, dt, A, B, C, D, h0 = inputs(l)
        y, h = ssd(x[:0], dt[:0], A, B[:0], C[:0], D, h0[:0])
        assert y.shape == x[:0].shape and h.shape == h0[:0].shape
