"""model.py: published sizes, one path for any split of a sequence, peers with the same weights, checkpoints."""
import dataclasses
import errno
import math
import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from conftest import Code, close
from data.files import UserError
from model import (FORMAT, LM, MLP, Attention, Config, Mamba, Mamba2, causal_conv,
                   init_dt_bias, load, rotate, save)

F64 = torch.float64
SIZES = dict(d_model=12, vocab=17, d_state=10, d_conv=4, head_dim=4, n_group=3, n_head=2, n_kv_head=1, d_mlp=7)
KINDS = {"s4": Config(("s4",) * 2, **SIZES),
         "s4d": Config(("s4d",) * 2, **SIZES),
         "mamba": Config(("mamba",) * 2, **SIZES),
         "mamba2": Config(("mamba2",) * 2, **SIZES),
         "mamba3": Config(("mamba3",) * 2, **SIZES),
         "attention": Config(("attention+mlp",) * 2, **SIZES),
         "window": Config(("attention+mlp",) * 2, **SIZES, window=5),
         "hybrid": Config(("mamba", "attention+mlp", "mamba2+mlp"), **SIZES, norm="layer", tie=False)}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, dtype=F64):
    """A small model whose every parameter differs from its neighbours: norms, biases and D too."""
    torch.manual_seed(0)
    model = LM(KINDS[kind]).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def tokens(l, b=2, vocab=17, seed=1):
    return torch.randint(vocab, (b, l), generator=torch.Generator().manual_seed(seed))


def tensors_of(state):
    return [t for layer in state for t in layer]


# Sizes


def test_published_parameter_counts():
    """state-spaces/mamba-130m: 129,135,360; MambaByte-353M (2401.13660), LayerNorms and untied head: 353,945,600."""
    with torch.device("meta"):
        mamba = LM(Config(layers=("mamba",) * 24, d_model=768, vocab=50280))
        byte = LM(Config(layers=("mamba",) * 53, d_model=1024, norm="layer", tie=False))
    assert sum(p.numel() for p in mamba.parameters()) == 129_135_360
    assert sum(p.numel() for p in byte.parameters()) == 353_945_600


def test_mamba2_has_the_published_shapes():
    """mamba2.py of state-spaces/mamba: d -> 2E + 2gn + nh, a convolution over E + 2gn, one dt, A and D a head."""
    mixer = Mamba2(Config(("mamba2",), d_model=14, d_state=5, head_dim=7, n_group=2))
    E, gn, nh = 28, 10, 4
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "dt_bias": (nh,), "A_log": (nh,), "D": (nh,), "in_proj.weight": (2 * E + 2 * gn + nh, 14),
        "conv1d.weight": (E + 2 * gn, 1, 4), "conv1d.bias": (E + 2 * gn,), "norm.weight": (E,),
        "out_proj.weight": (14, E)}


# One path: training, prefill and decoding are the same function of different lengths


@pytest.mark.parametrize("cuts", [[1], [2], [3], [12], [22], [1, 2], [3, 6, 7, 8], [5, 10, 20]])
@every_kind
def test_any_split_of_a_sequence_gives_the_whole_sequence(kind, cuts):
    """Chunks shorter than the convolution and sequences longer than the window included; the last states agree too."""
    model, x = make(kind), tokens(23)
    want, last = model(x)
    state, parts = None, []
    for piece in x.tensor_split(cuts, dim=1):
        logits, state = model(piece, state)
        parts.append(logits)
    close(torch.cat(parts, dim=1), want, name="logits")
    for got, w in zip(tensors_of(state), tensors_of(last), strict=True):
        close(got, w, name="last state")


@pytest.mark.parametrize("upto", [0, 1, 2, 5, 22, 23])
@every_kind
def test_the_state_after_a_prefix_has_not_read_the_rest(kind, upto):
    """What speculation keeps: logits of all positions, the state after the first upto, from the beginning and later."""
    model, x = make(kind), tokens(23)
    _, begun = model(tokens(7, seed=2))
    for before in (None, begun):
        logits, state = model(x, before, upto)
        close(logits, model(x, before)[0], name="logits")
        want = model(x[:, :upto], before)[1] if upto else before
        close(model(x[:, :4], state)[0], model(x[:, :4], want)[0], name="logits that follow that state")


@every_kind
def test_one_byte_at_a_time_equals_the_scan(kind):
    """The step of decoding is the recurrence of the scan (Mamba section 3.3.2)."""
    model, x = make(kind), tokens(40)
    want, _ = model(x)
    state, parts = None, []
    for piece in x.split(1, dim=1):
        logits, state = model(piece, state)
        parts.append(logits)
    close(torch.cat(parts, dim=1), want)


@every_kind
def test_the_future_cannot_be_seen(kind):
    model, x = make(kind), tokens(40)
    changed = x.clone()
    changed[:, 25:] = (x[:, 25:] + 1) % 17
    y, y2 = model(x)[0], model(changed)[0]
    close(y2[:, :25], y[:, :25], 1e-13)
    assert ((y2[:, 25:] - y[:, 25:]).abs().amax(2) > 1e-6).all()


@every_kind
def test_rows_of_a_batch_do_not_meet(kind):
    model, x = make(kind), tokens(11, b=3)
    close(model(x)[0][1:2], model(x[1:2])[0])


@every_kind
def test_a_state_is_never_mutated(kind):
    """Keeping the old variable is the rollback: continuing twice from one state gives the same both times."""
    model, x = make(kind), tokens(20)
    _, state = model(x[:, :7])
    before = [t.clone() for t in tensors_of(state)]
    once, _ = model(x[:, 7:], state)
    model(x[:, :1], state), model(x[:, :9], state)
    again, _ = model(x[:, 7:], state)
    assert torch.equal(once, again)
    assert all(torch.equal(t, old) for t, old in zip(tensors_of(state), before, strict=True))


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_both_parts_of_the_state_matter(kind):
    """The tail of the convolution and h: without either of them a continuation is another one."""
    model, x = make(kind), tokens(20)
    _, state = model(x[:, :13])
    want, _ = model(x[:, 13:], state)
    for field in ("tail", "h"):
        less, _ = model(x[:, 13:], tuple(s._replace(**{field: torch.zeros_like(getattr(s, field))}) for s in state))
        assert (less - want).abs().max() > 1e-3
    assert state[0].tail.shape[1] == 3  # k - 1


@pytest.mark.parametrize("kind", ["s4", "s4d", "mamba", "mamba2", "mamba3"])
def test_the_recurrent_state_has_the_same_size_after_any_length(kind):
    model = make(kind)
    shapes = {tuple(t.shape for t in tensors_of(model(tokens(l))[1])) for l in (1, 2, 3, 4, 50)}
    assert len(shapes) == 1 and model.constant_memory


def test_one_query_sees_its_window_of_a_longer_cache():
    """The cache of the same model without a window: the mask cuts it for one byte as for two."""
    config = dataclasses.replace(KINDS["window"], layers=("attention",))  # one, whose cache the window does not change
    model, x = LM(config).double(), tokens(9)
    wide = LM(dataclasses.replace(config, window=0)).double()
    wide.load_state_dict(model.state_dict())
    for pieces in ((6, 1, 2), (6, 2, 1)):
        first, *rest = x.split(pieces, dim=1)
        state = wide(first)[1]
        for piece in rest:
            logits, state = model(piece, state)
        close(logits[:, -1], model(x)[0][:, -1])


def test_a_state_of_another_number_of_layers_is_refused():
    model, x = make("mamba2"), tokens(3)
    with pytest.raises(ValueError, match="a state of 1 layers, expected 2"):
        model(x, model(x)[1][:1])


def test_a_window_bounds_the_cache_and_what_is_seen():
    """Each position sees itself and the 4 before it, in each of 2 layers: a byte reaches 8 positions ahead and no
    further; the cache keeps 4."""
    model, x = make("window"), tokens(30)
    changed = x.clone()
    changed[:, 0] = (x[:, 0] + 1) % 17
    difference = (model(changed)[0] - model(x)[0]).abs().amax((0, 2))
    assert (difference[:9] > 1e-9).all() and (difference[9:] < 1e-13).all()
    assert all(layer.k.shape[1] == layer.v.shape[1] == 4 and layer.position == 30 for layer in model(x)[1])
    assert model.constant_memory and not make("hybrid").constant_memory


@every_kind
def test_gradients_reach_every_parameter(kind):
    model = make(kind)
    model(tokens(20))[0].square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
        if name.endswith(("A_log", "D", "dt_bias", "bias")):
            assert (p.grad != 0).all(), name


def test_dropout_is_for_training_only():
    torch.manual_seed(0)
    model, x = LM(dataclasses.replace(KINDS["mamba"], dropout=0.5)), tokens(9)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


@every_kind
def test_autocast_keeps_the_parameters_and_the_recurrent_state_wide(kind):
    model = make(kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = model(tokens(9))
        logits2, _ = model(tokens(9), state)
    want, _ = model(torch.cat([tokens(9), tokens(9)], dim=1))
    assert all(s.h.dtype in (torch.float32, torch.complex64) for s in state if hasattr(s, "h"))
    assert (torch.cat([logits, logits2], 1) - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["s4", "s4d", "mamba", "mamba2", "mamba3"])
def test_a_model_of_half_precision_is_near_the_whole_one(kind, dtype):
    """Complex parameters have no such type; their kernels stay float32."""
    model, x = make(kind, torch.float32), tokens(20)
    with torch.no_grad():
        want = model(x)[0]
        got = model.to(dtype)(x)[0]
    assert got.dtype == dtype and (got.float() - want).norm() < 0.1 * want.norm()


@every_kind
def test_a_state_fits_the_model_that_it_comes_from_alone(kind):
    model, x = make(kind), tokens(9)
    state = model(x)[1]
    for other in (state[:1], state + state[:1]):
        with pytest.raises(ValueError):
            model(x, other)
    one_text = tuple(type(s)(*(t[:1] if t.ndim else t for t in s)) for s in state)
    with pytest.raises((ValueError, RuntimeError)):
        model(x, one_text)


@pytest.mark.parametrize("upto", [10, -1, 2**40])
def test_no_other_number_of_positions_can_be_kept_than_there_are(upto):
    with pytest.raises(ValueError, match=f"upto is {upto}, expected from 0"):
        make("mamba")(tokens(9), upto=upto)


@pytest.mark.parametrize("changes", [
    dict(norm_eps=1e308), dict(norm_eps=math.nan), dict(rope_base=0.0), dict(rope_base=math.nan), dict(tie="no"),
    dict(window=-5), dict(norm="rsm"), dict(dropout=1.0), dict(d_model=True), dict(d_mlp=-1), dict(gelu="exact"),
    dict(n_group=3), dict(n_group=0), dict(n_group=-1), dict(layers=()), dict(merges=((1, 2, 3),)), dict(vocab=2.0)])
def test_a_setting_that_cannot_be_is_one_line_with_its_name(changes):
    """Heads that do not divide into the groups too: 2 * 16 channels are 4 heads."""
    with pytest.raises(UserError) as error:
        LM(Config(**{"d_model": 16, "head_dim": 8, **changes}))
    name = {"layers": "layer", "merges": "merges"}.get(*changes, *changes)
    assert "\n" not in str(error.value) and name in str(error.value)


# Pieces


@pytest.mark.parametrize("l", [1, 2, 3, 4, 13])
def test_causal_conv_is_conv1d_with_padding_on_the_left(l):
    """As in mamba_simple.py; with a tail before x in the place of zeros, and for x shorter than the convolution too."""
    torch.manual_seed(0)
    b, d, k = 2, 5, 4
    conv = nn.Conv1d(d, d, k, groups=d, dtype=F64)
    x, tail = torch.randn(b, l, d, dtype=F64), torch.randn(b, k - 1, d, dtype=F64)
    for before in (None, tail):
        y, after = causal_conv(x, conv.weight, conv.bias, before)
        seen = torch.cat([torch.zeros_like(tail) if before is None else tail, x], dim=1)
        close(y, conv(seen.transpose(1, 2)).transpose(1, 2), name="y")
        close(after, seen[:, l:], 0, "tail")


def test_the_tail_of_a_convolution_does_not_keep_its_inputs_in_memory():
    """A state that is kept after a long prompt is k - 1 rows, not a view into all of them."""
    b, l, d, k = 2, 97, 5, 4
    for upto in (None, 3):
        _, tail = causal_conv(torch.randn(b, l, d), torch.randn(d, 1, k), None, None, upto)
        assert tail.untyped_storage().nbytes() == b * (k - 1) * d * tail.element_size()


def test_rotary_positions_keep_norms_and_know_only_distances():
    """RoFormer (2104.09864) eq. 16: q at m and k at n meet as R(n - m)."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 7, 3, 10, dtype=F64), torch.randn(2, 7, 3, 10, dtype=F64)
    products = []
    for start in (0, 1, 1000):
        q_r, k_r = rotate(q, start, 10000.0), rotate(k, start, 10000.0)
        close(q_r.norm(dim=-1), q.norm(dim=-1))
        products.append(torch.einsum("blhi,bmhi->bhlm", q_r, k_r))
    close(products[1], products[0], 1e-9)
    close(products[2], products[0], 1e-9)
    assert not torch.allclose(products[0], torch.einsum("blhi,bmhi->bhlm", q, k))


def test_rotary_positions_of_two_channels_are_a_rotation_by_the_position():
    """One frequency, base^0 = 1: position t turns (1, 0) into (cos t, sin t)."""
    x = torch.tensor([1.0, 0.0], dtype=F64).expand(1, 5, 1, 2)
    t = torch.arange(5, dtype=F64)
    close(rotate(x, 0, 10000.0)[0, :, 0], torch.stack([t.cos(), t.sin()], dim=1))


def test_grouped_queries_are_repeated_heads():
    """GQA (2305.13245): 2 heads of keys and values for 6 of queries are 6 heads, each of the 2 written three times."""
    torch.manual_seed(0)
    sizes = dict(layers=("attention",), d_model=24, n_head=6)
    few, many = Attention(Config(**sizes, n_kv_head=2)).double(), Attention(Config(**sizes, n_kv_head=6)).double()
    weights = few.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        weights[name] = weights[name].unflatten(0, (2, 4)).repeat_interleave(3, dim=0).flatten(0, 1)
    many.load_state_dict(weights)
    x = torch.randn(2, 11, 24, dtype=F64)
    close(few(x)[0], many(x)[0])
    assert few(x)[1].k.shape == (2, 11, 2, 4)


def test_attention_is_a_softmax_over_the_past():
    """Vaswani et al. 2017 eq. 1, spelt out for one head, at position 0 where the rotation is none and at the last."""
    torch.manual_seed(0)
    mixer = Attention(Config(("attention",), d_model=6, n_head=1, n_kv_head=1)).double()
    x = torch.randn(2, 5, 6, dtype=F64)
    q, k = (rotate(p(x)[:, :, None], 0, 10000.0)[:, :, 0] for p in (mixer.q_proj, mixer.k_proj))
    v = mixer.v_proj(x)
    y, _ = mixer(x)
    close(y[:, 0], mixer.out_proj(v[:, 0]))
    weights = torch.softmax((q[:, 4:] @ k.transpose(1, 2)) / math.sqrt(6), dim=-1)
    close(y[:, 4], mixer.out_proj((weights @ v)[:, 0]))


def test_swiglu():
    """Shazeer 2020 (2002.05202) eq. 6."""
    torch.manual_seed(0)
    mlp, x = MLP(Config(("mamba",), d_model=6)).double(), torch.randn(2, 3, 6, dtype=F64)
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    close(mlp(x), ((x @ gate.T) * torch.sigmoid(x @ gate.T) * (x @ up.T)) @ down.T)
    assert len(gate) == 32  # 8/3 d_model, rounded up to a multiple of 32
    assert len(MLP(Config(("mamba",), d_model=288)).up_proj.weight) == 768


def test_a_mamba_block_spelt_out():
    """Mamba figure 3 and mamba_simple.py, step by step: which half is the gate, where silu stands, which rows are B."""
    torch.manual_seed(0)
    mixer = Mamba(Config(("mamba",), d_model=6, d_state=5)).double()
    nn.init.normal_(mixer.D)
    u = torch.randn(2, 9, 6, dtype=F64)
    x, z = mixer.in_proj(u).split(12, dim=-1)
    x = F.silu(mixer.conv1d(F.pad(x.mT, (3, 0))).mT)
    dt, B, C = (x @ mixer.x_proj.weight.T).split([1, 5, 5], dim=-1)
    dt = F.softplus(dt @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
    h, ys = torch.zeros(2, 12, 5, dtype=F64), []
    for t in range(9):
        a = torch.exp(-dt[:, t, :, None] * mixer.A_log.exp())
        h = a * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        ys.append((h @ C[:, t, :, None])[..., 0] + mixer.D * x[:, t])
    y, state = mixer(u)
    close(y, mixer.out_proj(torch.stack(ys, dim=1) * F.silu(z)), name="y")
    close(state.h, h, name="h")


def test_a_mamba2_block_spelt_out():
    """Mamba-2 figure 6 and mamba2.py: one projection, convolution over x, B, C, the recurrence, the gate, the norm.

    Each of the 3 groups is normed on its own, which a peer with one group cannot show.
    """
    torch.manual_seed(0)
    mixer = Mamba2(Config(("mamba2",), d_model=12, d_state=5, head_dim=4, n_group=3)).double()
    u = torch.randn(2, 9, 12, dtype=F64)
    nn.init.normal_(mixer.norm.weight)
    nn.init.normal_(mixer.D)
    z, x, B, C, dt = mixer.in_proj(u).split([24, 24, 15, 15, 6], dim=-1)
    seen = F.pad(torch.cat([x, B, C], dim=-1).transpose(1, 2), (3, 0))
    x, B, C = F.silu(mixer.conv1d(seen)[..., :9].transpose(1, 2)).split([24, 15, 15], dim=-1)
    dt, h, ys = F.softplus(dt + mixer.dt_bias), torch.zeros(2, 6, 4, 5, dtype=F64), []
    for t in range(9):
        B_t, C_t = (m[:, t].reshape(2, 3, 5).repeat_interleave(2, dim=1) for m in (B, C))  # two heads a group
        x_t, a = x[:, t].reshape(2, 6, 4), torch.exp(-dt[:, t] * mixer.A_log.exp())
        h = a[..., None, None] * h + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x_t, B_t)
        ys.append((torch.einsum("bhpn,bhn->bhp", h, C_t) + mixer.D[:, None] * x_t).flatten(1))
    y = (torch.stack(ys, dim=1) * F.silu(z)).unflatten(-1, (3, 8))
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    close(mixer(u)[0], mixer.out_proj(y.flatten(2) * mixer.norm.weight))
    close(mixer(u)[1].h, h)


# Initialisation


def test_steps_begin_between_one_thousandth_and_one_tenth():
    """Mamba section 3.6: dt = softplus(bias) is log-uniform in [0.001, 0.1]: half of them below 0.01."""
    torch.manual_seed(0)
    dt = F.softplus(init_dt_bias(20_000).double())
    assert 0.999e-3 < dt.min() < 1.01e-3 and 0.099 < dt.max() < 0.1001
    assert abs((dt < 0.01).double().mean() - 0.5) < 0.02
    for mixer, bias in ((Mamba(Config(d_model=64)), "dt_proj.bias"), (Mamba2(Config(d_model=64)), "dt_bias")):
        dt = F.softplus(mixer.get_parameter(bias).detach())
        assert (0.999e-3 < dt).all() and (dt < 0.1001).all()


def test_decays_and_skips_begin_as_published():
    """Mamba: A = -1 ... -n in every channel (S4D-Real), D = 1; Mamba-2: A uniform in [-16, -1], D = 1, norm = 1."""
    torch.manual_seed(0)
    mamba, mamba2 = Mamba(Config(d_model=64)), Mamba2(Config(d_model=2048, head_dim=4))
    close(torch.exp(mamba.A_log), torch.arange(1.0, 17).expand(128, 16), 1e-6)
    A = torch.exp(mamba2.A_log)
    assert 1 <= A.min() < 1.1 and 15.9 < A.max() <= 16.001 and abs(A.mean() - 8.5) < 0.5
    assert all((p == 1).all() for p in (mamba.D, mamba2.D, mamba2.norm.weight))
    assert mamba.dt_proj.weight.abs().max() <= 4**-0.5  # rank d_model / 16


def test_what_writes_into_the_residual_stream_shrinks_with_depth():
    """GPT-2's rule as Mamba's code has it: output projections are divided by the root of the number of layers."""
    torch.manual_seed(0)
    one = LM(Config(("mamba",), d_model=64)).layers[0].mixer
    torch.manual_seed(0)
    four = LM(Config(("mamba",) * 4, d_model=64)).layers[0].mixer
    close(four.out_proj.weight, one.out_proj.weight / 2, 1e-6)
    assert torch.equal(four.in_proj.weight, one.in_proj.weight)


@pytest.mark.parametrize("layer", ["s4", "s4d", "mamba", "mamba2", "mamba3", "attention+mlp"])
def test_an_untrained_model_guesses_uniformly(layer):
    """The loss at step 0 is ln 256 = 5.545 nats, near enough."""
    torch.manual_seed(0)
    model, x = LM(Config((layer,) * 2, d_model=64)), tokens(257, b=4, vocab=256)
    loss = F.cross_entropy(model(x[:, :-1])[0].flatten(0, 1), x[:, 1:].flatten())
    assert abs(loss - math.log(256)) < 0.1


def test_impossible_sizes_are_one_line_errors():
    attention = dict(layers=("attention",))
    for flags, message in ((dict(layers=("mamba4",)), 'layer mamba4 is not one of s4, s4d, mamba'),
                           (dict(layers=()), "at least one layer"),
                           (attention | dict(d_model=100, n_head=6), "d_model 100 is not a multiple of 12"),
                           (attention | dict(n_head=4, n_kv_head=3), "n_head 4 is not a multiple of 3"),
                           (dict(layers=("mamba2",), d_model=100, head_dim=32),
                            "d_model 100 is not a multiple of 16, .*; try 96 or 112"),
                           (dict(layers=("mamba2",), d_model=100, head_dim=32, expand=1),
                            "d_model 100 is not a multiple of 32, .*; try 96 or 128"),
                           (dict(d_model=0), "d_model 0 is not from 1"), (dict(d_state=-1), "d_state -1"),
                           (dict(norm="rsm"), 'norm rsm is not one of rms, layer'),
                           (dict(n_group=3, head_dim=128), "d_model 256 is not a multiple of 192, .*; try 192 or 384")):
        with pytest.raises(UserError, match=message) as error:
            LM(Config(**flags))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="try 96 or 108"):
        LM(Config(("attention",), d_model=100, n_head=6))  # 96 and 108 are even multiples, as rotary positions need
    for d_model in (96, 112):
        LM(Config(("mamba2",), d_model=d_model, head_dim=32))  # what was advised


@pytest.mark.parametrize("layer", ["mamba", "mamba2", "mamba3", "s4", "s4d"])
def test_second_derivatives_and_functional_transforms(layer):
    """Mamba's chunked scan has neither and says so; Config(impl="naive") has both."""
    config = dict(layers=(layer,), d_model=8, head_dim=4, d_state=4)
    text = tokens(5, vocab=256)

    def second(model):
        loss = model(text)[0].square().mean()
        gradients = torch.autograd.grad(loss, [*model.parameters()], create_graph=True)
        sum(g.square().sum() for g in gradients).backward()

    torch.manual_seed(0)
    model = LM(Config(**config, impl="naive")).double()
    second(model)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    values = dict(model.named_parameters())
    f = lambda values: torch.func.functional_call(model, values, (text,))[0].square().mean()
    got = torch.func.grad(f)(values)
    want = torch.autograd.grad(model(text)[0].square().mean(), [*values.values()])
    for g, w in zip(got.values(), want):
        close(g, w)
    if layer == "mamba":
        with pytest.raises(RuntimeError, match='first derivatives only; use impl="naive"'):
            second(LM(Config(**config)).double())


# Peers: other programs with the same weights


def random_peer(peer, rename, config, **keep):
    """Our model of that config with the peer's weights, which are made random first, norms and biases too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in peer.named_parameters():
            p += 0.2 * torch.randn_like(p)
    ours = LM(config).to(next(peer.parameters()).dtype).eval()
    ours.load_state_dict({rename(name): t for name, t in peer.state_dict().items()})
    return ours


def to_ours(name):
    """A parameter's name here, from the one in transformers."""
    for theirs, here in (("backbone.", ""), ("model.", ""), ("embeddings.", "embedding."),
                         ("self_attn.o_proj.", "mixer.out_proj."), ("self_attn.", "mixer."), ("embed_tokens.", "embedding."), ("post_attention_layernorm.", "mlp_norm."),
                         ("input_layernorm.", "norm.")):
        name = name.replace(theirs, here)
    return name if ".norm." in name or not name.startswith("norm.") else "norm_f" + name[4:]


@pytest.mark.parametrize("tie", [False, True])
def test_mamba_equals_transformers(tie):
    transformers = pytest.importorskip("transformers")
    peer = transformers.MambaForCausalLM(transformers.MambaConfig(
        vocab_size=17, hidden_size=20, state_size=5, num_hidden_layers=3, tie_word_embeddings=tie)).double().eval()
    ours = random_peer(peer, to_ours, Config(("mamba",) * 3, d_model=20, vocab=17, d_state=5, tie=tie))
    with torch.no_grad():
        close(ours(tokens(37))[0], peer(tokens(37), use_cache=False).logits.double(), 1e-5)


def test_mamba2_equals_transformers():
    """Its slow path, in chunks of 8, with one group: it norms over all groups, the published code over each."""
    transformers = pytest.importorskip("transformers")
    peer = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(
        vocab_size=17, hidden_size=20, state_size=5, num_hidden_layers=3, num_heads=8, head_dim=5, n_groups=1,
        chunk_size=8, tie_word_embeddings=False)).double().eval()
    ours = random_peer(peer, to_ours, Config(("mamba2",) * 3, d_model=20, vocab=17, d_state=5, head_dim=5, tie=False))
    with torch.no_grad():
        close(ours(tokens(37))[0], peer(tokens(37), use_cache=False).logits.double(), 1e-5)


def test_attention_equals_transformers_llama():
    transformers = pytest.importorskip("transformers")
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=17, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=29, rms_norm_eps=1e-5, tie_word_embeddings=False)).double().eval()
    config = Config(("attention+mlp",) * 3, d_model=24, vocab=17, n_head=4, n_kv_head=2, d_mlp=29, tie=False)
    ours = random_peer(peer, to_ours, config)
    with torch.no_grad():
        close(ours(tokens(37))[0], peer(tokens(37), use_cache=False).logits.double(), 1e-5)


@pytest.mark.parametrize("pscan", [False, True])
def test_a_mamba_block_equals_mambapy(pscan):
    """Names and shapes of the weights are the same too."""
    peers = pytest.importorskip("mambapy.mamba")
    torch.manual_seed(0)
    block = peers.MambaBlock(peers.MambaConfig(d_model=20, n_layers=1, d_state=5, pscan=pscan)).double()
    ours = Mamba(Config(("mamba",), d_model=20, d_state=5)).double()
    with torch.no_grad():
        for p in ours.parameters():
            p += 0.2 * torch.randn_like(p)
    block.load_state_dict(ours.state_dict())
    x = torch.randn(2, 37, 20, dtype=F64)
    got, want = (torch.autograd.grad(y.square().sum(), list(m.parameters()), retain_graph=True) + (y,)
                 for m, y in ((ours, ours(x)[0]), (block, block(x))))
    names = [name for name, _ in block.named_parameters()]
    got = dict(zip([name for name, _ in ours.named_parameters()] + ["y"], got))
    for name, w in zip(names + ["y"], want, strict=True):
        close(got[name], w, 1e-5)


# Checkpoints


def failure(path):
    """The message of the UserError that loading must raise: one line."""
    with pytest.raises(UserError) as error:
        load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def test_a_file_of_mixed_precision_loads_in_one(tmp_path):
    """The widest, and float32 at least."""
    for part, dtype in (("norm_f", F64), ("layers", torch.float16)):
        model = make("mamba2", torch.float32)
        getattr(model, part).to(dtype)
        save(tmp_path / "m.pt", model)
        want = F64 if dtype == F64 else torch.float32
        assert {p.dtype for p in load(tmp_path / "m.pt")[0].parameters()} == {want}


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_saved_model_comes_back_bit_for_bit(kind, dtype, tmp_path):
    model = make(kind, dtype)
    save(tmp_path / "new folder" / "m.pt", model, step=3, note="text", moments={"a": torch.ones(2)})
    again, extra = load(tmp_path / "new folder" / "m.pt")
    assert again.config == model.config and not again.training
    assert torch.equal(again(tokens(9))[0], model(tokens(9))[0]) and next(again.parameters()).dtype == dtype
    assert extra["step"] == 3 and extra["note"] == "text" and torch.equal(extra["moments"]["a"], torch.ones(2))
    assert os.listdir(tmp_path / "new folder") == ["m.pt"]
    assert (again.lm_head.weight is again.embedding.weight) == model.config.tie


def test_a_folder_gives_its_best_checkpoint_or_else_its_last(tmp_path):
    model = make("mamba")
    save(tmp_path / "last.pt", model, which="last")
    assert load(tmp_path)[1]["which"] == "last"
    save(tmp_path / "best.pt", model, which="best")
    assert load(str(tmp_path))[1]["which"] == "best"


def test_a_missing_file_and_an_empty_folder_say_how_to_train_one(tmp_path):
    assert "python train.py --out" in failure(tmp_path / "none.pt")
    assert "no best.pt, last.pt" in failure(tmp_path) and "python train.py --out" in failure(tmp_path)
    assert "python train.py --out" in failure(tmp_path / "no such folder" / "best.pt")


def test_a_path_below_a_file_is_a_missing_checkpoint(tmp_path):
    (tmp_path / "file").write_text("text")
    failure(tmp_path / "file" / "best.pt")


def test_a_truncated_checkpoint_is_named(tmp_path):
    path = tmp_path / "m.pt"
    save(path, make("mamba"))
    whole = path.read_bytes()
    for size in (0, 1, 2, 10, 100, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert f"{size:,} bytes" in failure(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    path = tmp_path / "m.pt"
    random = np.random.default_rng(0)
    noise = [bytes(random.integers(0, 256, 50, dtype=np.uint8)) for _ in range(100)]
    texts = [b"hello\n", b"import os\n", b"\x80\x02}q\x00.", b"PK\x03\x04", b"0", b".", b"a.", b"\x80", b"N.", b"(l."]
    for data in texts + noise:
        path.write_bytes(data)
        failure(path)


def test_checkpoints_of_other_programs_are_told_by_their_format(tmp_path):
    path = tmp_path / "m.pt"
    for other in ({"weight": torch.ones(2)}, [1, 2], torch.ones(2), {"format": "bytestate-0"}, {}, None):
        torch.save(other, path)
        assert f"expected {FORMAT}" in failure(path)


def test_a_checkpoint_that_does_not_fit_says_where(tmp_path):
    path, model = tmp_path / "m.pt", make("mamba")
    config = dataclasses.asdict(model.config)
    for changes, message in (({"config": config | {"d_model": 16}}, "weight has shape [17, 12], expected [17, 16]"),
                             ({"config": config | {"n_heads": 3}}, "n_heads"),
                             ({"config": config | {"layers": ["mamba"]}}, "layers.1"),
                             ({"config": config | {"layers": ["rwkv"]}}, "rwkv"), ({"model": {}}, "embedding.weight"),
                             ({"config": config | {"d_model": "12"}}, ""), ({"config": config | {"layers": [1]}}, ""),
                             ({"config": None}, ""), ({"model": [1]}, "")):
        torch.save({"format": FORMAT, "config": config, "model": model.state_dict()} | changes, path)
        found = failure(path)
        assert "does not fit" in found and message in found
    torch.save({"format": FORMAT, "model": model.state_dict()}, path)
    assert "config" in failure(path)


@pytest.mark.parametrize("merges", [7, "ab", [[1]], [[256, 1]], [[1, 2.0]], [[[1], 2]], [None], {1: 2},
                                    [[97, 97]] + [[256 + i] * 2 for i in range(59)]])
def test_merges_that_are_none_are_one_line(merges, tmp_path):
    """Also pairs of words that do not exist yet, and words that double sixty times: 4.3 GB each."""
    model = make("mamba")
    count = len(merges) if hasattr(merges, "__len__") else 0
    config = {**dataclasses.asdict(model.config), "merges": merges, "vocab": 256 + count}
    torch.save({"format": FORMAT, "config": config, "model": model.state_dict()}, tmp_path / "m.pt")
    assert "does not fit" in failure(tmp_path / "m.pt")


def test_complex_weights_are_refused(tmp_path):
    model = make("mamba")
    weights = {**model.state_dict(), "norm_f.weight": torch.ones(12, dtype=torch.complex64)}
    torch.save({"format": FORMAT, "config": dataclasses.asdict(model.config), "model": weights}, tmp_path / "m.pt")
    failure(tmp_path / "m.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    for name, write in (("zip", torch.save), ("pickle", lambda value, path: path.write_bytes(pickle.dumps(value)))):
        path, target = tmp_path / f"{name}.pt", tmp_path / f"{name} was run"
        write({"format": FORMAT, "config": Code(target), "model": {}}, path)
        failure(path)
        assert not target.exists()


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path):
    """The limit on a file's size stands for the disk's: writes beyond it fail with an OSError of the same kind."""
    resource = pytest.importorskip("resource", reason="Windows has no limit on a file's size")
    path, model = tmp_path / "best.pt", LM(Config(d_model=64))
    save(path, make("mamba"))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 40_000):  # nothing can be written; the middle of a model cannot
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(UserError) as error:
                save(path, model)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["best.pt"]


def test_a_rename_that_fails_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    path = tmp_path / "best.pt"
    save(path, make("mamba"))
    before = path.read_bytes()

    def fail(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="cannot write .*No space left"):
        save(path, make("mamba2"))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["best.pt"]


def test_saving_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="cannot write"):
        save(tmp_path / "file" / "best.pt", make("mamba"))
    with pytest.raises(UserError, match="cannot write"):
        save(tmp_path / "file" / "run" / "best.pt", make("mamba"))
    assert (tmp_path / "file").read_text() == "text"
