"""Mamba-3 (2603.15569) in model.py: its recurrence in numbers, spelt out, and what its rotation is for.

The golden numbers come from the step-by-step reference of the published kernels (state-spaces/mamba at e9594ce,
tests/ops/triton/test_mamba3_siso.py), run in float64.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import conftest
from model import Config, Mamba3, Mamba3State, turn
from scan import ssd_scan

F64 = torch.float64


def close(actual, expected, tol=1e-9):
    """expected may be its numbers in order, in a string."""
    if isinstance(expected, str):
        numbers = [float(word) for word in expected.split()]
        expected = torch.tensor(numbers, dtype=F64).view_as(actual)
    conftest.close(actual, expected, tol)


def wave(c, *shape):
    """Element i, from 0, is sin(0.1 (i + 1) + c)."""
    return torch.sin(0.1 * (torch.arange(math.prod(shape), dtype=F64) + 1) + c).view(shape)


def golden_layer(**starts):
    """2 heads of 3 channels, n = 4, in one group; parameters are waves, D zero if none is given."""
    mixer = Mamba3(Config(("mamba3",), d_model=3, d_state=4, head_dim=3)).double()
    mixer.D.data.zero_()
    for name, c in ({"B_bias": 3, "C_bias": 4} | starts).items():
        p = mixer.get_parameter(name)
        p.data = wave(c, *p.shape)
    return mixer


def golden_inputs(k=1):
    """Of recur: x, dt, A, w, theta, B, C, from leaves that have gradients."""
    leaves = {"x": wave(0, 1, 5, 2, 3), "dt": wave(5, 1, 5, 2), "A": wave(6, 1, 5, 2), "w": wave(7, 1, 5, 2),
              "theta": wave(8, 1, 5, k), "B": wave(1, 1, 5, 1, 4), "C": wave(2, 1, 5, 1, 4)}
    for t in leaves.values():
        t.requires_grad_()
    A = leaves["A"]
    A = -torch.where(A >= 0, 1 + A, 1 / (1 - A))
    theta = math.pi * torch.tanh(leaves["theta"])
    return leaves, (leaves["x"], F.softplus(leaves["dt"]), A, torch.sigmoid(leaves["w"]), theta, leaves["B"], leaves["C"])


Y = """
-0.00791454903525 -0.0157500185127 -0.0234281190115 -0.0354869398178 -0.0436891214078 -0.0514547757385
-0.255590024698 -0.306555218947 -0.354457414783 -0.294356246785 -0.322741199594 -0.347901429021
-0.975225227406 -1.03943795168 -1.09326495554 -0.680486489216 -0.696797042947 -0.706145430955
-1.35787748532 -1.3520569218 -1.33272705244 -0.476214383578 -0.460134078026 -0.439456264867
-0.612106457963 -0.569944423752 -0.522087693257 0.215005826902 0.161343342755 0.10606876926"""
H = """
-0.199503352746 -0.256095009098 0.200076372831 0.101738855714 -0.209112123853 -0.226123437372 0.201354292565 0.109619181698
-0.216631515743 -0.193892515007 0.200620346766 0.116404229053 -0.130397842125 -0.0629543713157 0.0195019338893 -0.047508659254
-0.124967666725 -0.0511905666864 0.0317696855849 -0.0263384912402 -0.118288855708 -0.038915282836 0.0437200050838 -0.0049051577284"""
B_LAST = """0.225662764735 -0.495495323802 0.0815036350707 -0.114421093967
-0.0925190018484 -0.0941832020356 -0.290586811695 -0.470737882883"""
GRADIENTS = {
    "theta": "-0.140951441218 -0.142150032323 -0.147027612227 -0.124460845592 0.111897220264",
    "w": """-0.0071169379494 -0.00437803964782 -0.0328967252755 -0.00531497288675 0.0103759647319 -0.0159502418927
            0.012283203353 -0.0379164307131 -0.0188131052722 0.00684435784193""",
    "A": """0 0 0.0059530594133 -0.00839185130313 -0.0147512537697 -0.0738085869669 -0.131319884508 -0.0722517769351
            -0.0988839942844 0.0954967742061""",
    "dt": """-0.0808250902078 -0.152975560157 -0.158215440739 -0.137005407284 -0.0387818273867 -0.11471093515
             -0.0855895144559 -0.171715940546 -0.133404154498 0.0280680668758"""}
SUM_AND_NORM = {"x": "-0.388665908713 0.478555184478", "B": "1.32863242108 1.06672208466",
                "C": "0.586861830498 0.438559486705"}


def test_the_recurrence_in_numbers():
    """The published step reference: outputs, and all four parts of the last state."""
    _, inputs = golden_inputs()
    y, state = golden_layer().recur(*inputs, None, None)
    close(y, Y)
    close(state.phi, "4.60682910361 4.88775854515")
    close(state.B, B_LAST)
    close(state.h, H)
    assert torch.equal(state.x, inputs[0][:, -1])


def test_all_of_the_state_turns():
    """k = n/2 angles, which released models may have; ours turn half of n."""
    _, inputs = golden_inputs(k=2)
    y, state = golden_layer(D=9).recur(*inputs, None, None)
    weighted = y * F.silu(wave(10, 1, 5, 2, 3)) * wave(11, 1, 5, 2, 3)
    close(weighted.sum() + (state.h * wave(12, 1, 2, 3, 4)).sum(), "-0.0236120642754")


def test_an_initial_state_in_numbers():
    """A state that was handed over: phi, h, and the B and x of the position before."""
    _, inputs = golden_inputs()
    state = Mamba3State(wave(13, 1, 2, 1), wave(14, 1, 2, 3, 4), wave(15, 1, 2, 4), wave(16, 1, 2, 3))
    y, _ = golden_layer().recur(*inputs, state, None)
    close(y[0, 0], """-0.258259592285 -0.215876971164 -0.141186177114
                      -0.0853117377193 0.0666034971172 0.201164631141""")
    close(y[0, -1], """-0.936961001218 -0.850226513399 -0.712470883832
                       0.142841128291 0.204464618161 0.257849602744""")


def test_the_gradients_in_numbers():
    """Those of the published step reference, to every input."""
    leaves, inputs = golden_inputs()
    mixer = golden_layer(D=9)
    y, state = mixer.recur(*inputs, None, None)
    y = y * F.silu(wave(10, 1, 5, 2, 3))
    loss = (y * wave(11, 1, 5, 2, 3)).sum() + (state.h * wave(12, 1, 2, 3, 4)).sum()
    close(loss, "0.109151691308")
    loss.backward()
    for name, expected in GRADIENTS.items():
        close(leaves[name].grad, expected)
    for name, expected in SUM_AND_NORM.items():
        grad = leaves[name].grad
        close(torch.stack([grad.sum(), grad.norm()]), expected)
    close(mixer.D.grad, "0.456043891665 0.500920791767")


def test_the_whole_block_in_numbers():
    """From the projection in to the projection out, as the published module computes it."""
    mixer = golden_layer(**{"in_proj.weight": 1, "dt_bias": 2, "B_norm.weight": 5,
                            "C_norm.weight": 6, "D": 7, "out_proj.weight": 8})
    y, _ = mixer(wave(0, 1, 5, 3))
    close(y, """
        0.305607336541 0.151155047274 -0.0561000487642 4.89470685604 2.32736450973 -1.05299321852
        18.9254437673 8.87777377295 -4.27115801548 39.0542753444 18.1773768501 -9.0494023443
        54.3218652366 25.1683314644 -12.7772245857""")


def test_the_block_spelt_out():
    """The recurrence of the paper, step by step, in two groups of two heads."""
    torch.manual_seed(0)
    mixer = Mamba3(Config(("mamba3",), d_model=6, d_state=9, head_dim=3, n_group=2)).double()
    for p in mixer.parameters():
        nn.init.normal_(p)
    u = torch.randn(2, 7, 6, dtype=F64)
    z, x, B, C, dt, A, w, theta = mixer.in_proj(u).split([12, 12, 18, 18, 4, 4, 4, 2], dim=-1)
    dt = F.softplus(dt + mixer.dt_bias)
    a = torch.exp(-dt * torch.where(A >= 0, 1 + A, 1 / (1 - A)))
    w, theta = torch.sigmoid(w), math.pi * torch.tanh(theta)
    phi, h = torch.zeros(2, 4, 2, dtype=F64), torch.zeros(2, 4, 3, 9, dtype=F64)
    written, ys = torch.zeros_like(h), []
    for t in range(7):
        phi = phi + theta[:, t, None] * dt[:, t, :, None]
        B_t, C_t = (turn(norm(m[:, t].unflatten(-1, (2, 9))).repeat_interleave(2, dim=1) + bias[:, 0], phi) for
                    m, norm, bias in ((B, mixer.B_norm, mixer.B_bias), (C, mixer.C_norm, mixer.C_bias)))
        x_t = x[:, t].unflatten(-1, (4, 3))
        a_t, dt_t, w_t = (m[:, t, :, None, None] for m in (a, dt, w))
        now = torch.einsum("bhp,bhn->bhpn", x_t, B_t)
        h = a_t * h + (1 - w_t) * dt_t * a_t * written + w_t * dt_t * now
        written = now
        ys.append((torch.einsum("bhpn,bhn->bhp", h, C_t) + mixer.D[:, None] * x_t).flatten(1))
    y, state = mixer(u)
    close(y, mixer.out_proj(torch.stack(ys, dim=1) * F.silu(z)), 1e-10)
    close(state.h, h, 1e-10)


def test_the_angle_of_a_long_text_stays_exact_in_float32():
    """Thousands of turns are summed in float64 and kept modulo 2 pi: one call, and pieces, near float64."""
    torch.manual_seed(0)
    mixer = Mamba3(Config(("mamba3",), d_model=16, d_state=16, head_dim=8)).requires_grad_(False)
    mixer.in_proj.weight[-4:] *= 20
    mixer.dt_bias.fill_(1.0)
    u = torch.randn(1, 5_000, 16)
    once, _ = mixer(u)
    first, state = mixer(u[:, :3_500])
    then, _ = mixer(u[:, 3_500:], state)
    want, _ = mixer.double()(u.double())
    for got in (once, torch.cat([first, then], dim=1)):
        assert (got - want).abs().max() < 2e-6 * want.abs().max()


def test_small_decays_keep_their_gradient_in_float32():
    """Why u and log a go apart into ssd_scan: |dt A| = 1e-6 costs no digits."""
    torch.manual_seed(0)
    u, B, C = (torch.randn(1, 64, 1, 4, dtype=F64) for _ in range(3))
    grads = {}
    for dtype in (F64, torch.float32):
        log_a = torch.full((1, 64, 1), -1e-6, dtype=dtype, requires_grad=True)
        y, _ = ssd_scan(u.to(dtype), log_a, B.to(dtype), C.to(dtype))
        y.square().sum().backward()
        grads[dtype] = log_a.grad.double()
    assert (grads[F64] - grads[torch.float32]).norm() < 1e-5 * grads[F64].norm()


def test_a_turn_by_pi_is_parity():
    """Grazzi et al. 2411.12537: eigenvalues in [0, 1] cannot count modulo 2, and -1 can. A pair that turns by pi at
    each 1 points forwards or backwards by the parity of all ones so far."""
    bits = torch.randint(2, (1, 50), generator=torch.Generator().manual_seed(0))
    phi = math.pi * bits.cumsum(1)[..., None].double()
    signs = turn(torch.tensor([1.0, 0.0], dtype=F64).expand(1, 50, 2), phi)[..., 0]
    close(signs, 1 - 2.0 * (bits.cumsum(1) % 2).double(), 1e-12)
