"""model.py: published sizes, one path for any split of a sequence, peers with the same weights, checkpoints."""
import dataclasses
import errno
import math
import os
import pickle
import random
import re
from unittest.mock import Mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from conftest import Code, close
from data.checkpoints import HF_NAMES, rename
from data.files import UserError
from model import (FORMAT, LM, MLP, Attention, Config, Mamba, Mamba2, Mamba3, causal_conv,
                   init_dt_bias, load, rotate, save)
from scan import selective_scan, ssd

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


def disturbed(module):
    """The module with every parameter unlike its neighbours: norms, biases and D too."""
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn_like(p)
    return module


def make(kind, dtype=F64):
    torch.manual_seed(0)
    return disturbed(LM(KINDS[kind]).to(dtype).eval())


def tokens(l, b=2, vocab=17, seed=1):
    return torch.randint(vocab, (b, l), generator=torch.Generator().manual_seed(seed))


def tensors_of(state):
    return [t for layer in state for t in layer]


def in_pieces(model, pieces):
    """The logits and the last state of a text that is read piece by piece."""
    parts = []
    state = None
    for piece in pieces:
        logits, state = model(piece, state)
        parts.append(logits)
    return torch.cat(parts, dim=1), state


def test_published_parameter_counts():
    """state-spaces/mamba-130m: 129,135,360; MambaByte-353M (2401.13660), LayerNorms and untied head: 353,945,600."""
    with torch.device("meta"):
        mamba = LM(Config(layers=("mamba",) * 24, d_model=768, vocab=50280))
        byte = LM(Config(layers=("mamba",) * 53, d_model=1024, norm="layer", tie=False))
    assert sum(p.numel() for p in mamba.parameters()) == 129_135_360
    assert sum(p.numel() for p in byte.parameters()) == 353_945_600


# One path: training, prefill and decoding are the same function of different lengths


@pytest.mark.parametrize("cuts", [[1], [2], [3], [12], [22], [1, 2], [3, 6, 7, 8], [5, 10, 20]])
@every_kind
def test_any_split_of_a_sequence_gives_the_whole_sequence(kind, cuts):
    """Chunks shorter than the convolution and sequences longer than the window included; the last states agree too."""
    model, x = make(kind), tokens(23)
    want, last = model(x)
    got, state = in_pieces(model, x.tensor_split(cuts, dim=1))
    close(got, want, name="logits")
    for t, expected in zip(tensors_of(state), tensors_of(last), strict=True):
        close(t, expected, name="last state")


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
    close(in_pieces(model, x.split(1, dim=1))[0], model(x)[0])


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
    """Keeping the old variable is the rollback."""
    model, x = make(kind), tokens(20)
    _, state = model(x[:, :7])
    before = [t.clone() for t in tensors_of(state)]
    model(x[:, 7:8], state)
    model(x[:, 8:], state)
    assert all(torch.equal(t, old) for t, old in zip(tensors_of(state), before, strict=True))


@pytest.mark.parametrize("kind", ["s4", "s4d", "mamba", "mamba2", "mamba3"])
def test_the_recurrent_state_has_the_same_size_after_any_length(kind):
    model = make(kind)
    shapes = {tuple(t.shape for t in tensors_of(model(tokens(l))[1])) for l in (1, 2, 3, 4, 50)}
    assert len(shapes) == 1 and model.constant_memory


def test_a_window_bounds_the_cache_and_what_is_seen():
    """Each position sees itself and the 4 before it, in each of 2 layers: a byte reaches 8
    positions ahead. The cache keeps 4; the rest of a longer one is masked, for one byte too."""
    model, x = make("window"), tokens(30)
    changed = x.clone()
    changed[:, 0] = (x[:, 0] + 1) % 17
    want, state = model(x)
    difference = (model(changed)[0] - want).abs().amax((0, 2))
    assert (difference[:9] > 1e-9).all() and (difference[9:] < 1e-13).all()
    assert all(s.k.shape[1] == s.v.shape[1] == 4 and s.position == 30 for s in state)
    assert model.constant_memory and not make("hybrid").constant_memory
    longer = Attention(KINDS["attention"]).double()
    mixer = Attention(KINDS["window"]).double()
    longer.load_state_dict(mixer.state_dict())
    u = torch.randn(2, 9, 12, dtype=F64)
    for l in (1, 2):
        close(mixer(u[:, -l:], longer(u[:, :-l])[1])[0], mixer(u)[0][:, -l:])


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
def test_another_models_state_or_another_texts_position_is_refused(kind):
    """Layers too few or many, rows of another batch; upto beyond what is there."""
    model, x = make(kind), tokens(9)
    state = model(x)[1]
    for other in (state[:1], state + state[:1]):
        with pytest.raises(ValueError, match=f"a state of {len(other)} layers"):
            model(x, other)
    one_text = tuple(type(s)(*(t[:1] if t.ndim else t for t in s)) for s in state)
    with pytest.raises((ValueError, RuntimeError)):
        model(x, one_text)
    for upto in (10, -1, 2**40):
        with pytest.raises(ValueError, match=f"upto is {upto}, expected from 0"):
            model(x, upto=upto)


@pytest.mark.parametrize("flags, message", [
    (dict(layers=()), "at least one layer"),
    (dict(layers=("mamba4",)), "layer mamba4 is not one of s4, s4d, mamba"),
    (dict(norm="rsm"), "norm rsm is not one of rms, layer"), (dict(tie="no"), "tie 'no'"),
    (dict(d_model=True), "d_model True"), (dict(vocab=2.0), "vocab 2.0"),
    (dict(d_model=0), "d_model 0 is not from 1"), (dict(window=-5), "window -5"),
    (dict(n_group=0), "n_group 0"), (dict(rope_base=0.0), "rope_base 0.0"),
    (dict(norm_eps=math.nan), "norm_eps nan"), (dict(dropout=1.0), "dropout 1.0"),
    (dict(block="gated", layers=("s4d",)), "block gated is for an Encoder"),
    (dict(rope_scaling=(8, 4, 1, 64)), "four positive numbers"),
    (dict(merges=((1, 2, 3),)), "merges"), (dict(n_kv_head=3), "n_head 4 is not a multiple of 3"),
    (dict(d_model=100, n_head=6, n_kv_head=2), "d_model 100 is not .* of 12, .*; try 96 or 108"),
    (dict(layers=("mamba2",), d_model=100, head_dim=32), "of 16, .*; try 96 or 112"),
    (dict(layers=("mamba2",), d_model=100, head_dim=32, expand=3), "of 32, .*; try 96 or 128"),
    (dict(layers=("mamba2",), n_group=3, head_dim=128), "of 192, .*; try 192 or 384")])
def test_a_setting_that_cannot_be_is_one_line_with_its_name(flags, message):
    """And a size that is advised instead is possible."""
    flags = {"layers": ("attention",), **flags}
    with pytest.raises(UserError, match=message) as error:
        LM(Config(**flags))
    assert "\n" not in str(error.value)
    for size in re.findall(r"\d+", message.partition("try ")[2]):
        LM(Config(**flags | {"d_model": int(size)}))


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


def test_rotary_positions_turn_pairs_of_channels():
    """RoFormer (2104.09864) eq. 15 in Llama's layout, in complex numbers: q . k knows distances."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, 10, dtype=F64)
    frequency = 10000.0 ** (-torch.arange(5, dtype=F64) / 5)
    angle = torch.arange(1000, 1007)[:, None, None] * frequency
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.exp(1j * angle)
    close(rotate(x, 1000, 10000.0), torch.cat([turned.real, turned.imag], dim=-1))


def test_rotary_positions_keep_their_digits_in_a_long_text():
    """Attention in a window of one text of 2^27 bytes: distances count, to float32's rounding."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 5, 1, 64)
    near, far = ((rotate(q, p, 10000.0) * rotate(k, p, 10000.0)).sum(-1) for p in (0, 2**27))
    shifted = (rotate(q, 2**27 + 3, 10000.0) * rotate(k, 2**27, 10000.0)).sum(-1)
    close(far, near, 1e-5)
    close(shifted, (rotate(q, 3, 10000.0) * rotate(k, 0, 10000.0)).sum(-1), 1e-5)


def test_as_many_heads_of_keys_as_of_queries_unless_said():
    assert [Config(n_head=n).n_kv_head for n in (2, 8)] == [2, 8] and Config(n_head=8, n_kv_head=2).n_kv_head == 2


def test_attention_spelt_out():
    """Vaswani et al. 2017 eq. 1 over the past; GQA (2305.13245): three queries share a key."""
    torch.manual_seed(0)
    mixer = Attention(Config(("attention",), d_model=24, n_head=6, n_kv_head=2)).double()
    x = torch.randn(2, 11, 24, dtype=F64)
    projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    q, k, v = (proj(x).unflatten(-1, (-1, 4)) for proj in projections)
    q, k = rotate(q, 0, 10000.0), rotate(k, 0, 10000.0)
    k, v = (t.repeat_interleave(3, dim=2) for t in (k, v))
    scores = torch.einsum("blhi,bmhi->bhlm", q, k) / math.sqrt(4)
    future = torch.ones(11, 11, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    y, state = mixer(x)
    close(y, mixer.out_proj(torch.einsum("bhlm,bmhi->blhi", weights, v).flatten(2)))
    assert state.k.shape == state.v.shape == (2, 11, 2, 4)


def test_swiglu():
    """Shazeer 2020 (2002.05202) eq. 6."""
    torch.manual_seed(0)
    mlp, x = MLP(Config(("mamba",), d_model=6)).double(), torch.randn(2, 3, 6, dtype=F64)
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    close(mlp(x), ((x @ gate.T) * torch.sigmoid(x @ gate.T) * (x @ up.T)) @ down.T)
    assert len(gate) == 32 and Config(d_model=288).d_mlp == 768  # 8/3 of d_model, in steps of 32


def test_a_mamba_block_spelt_out():
    """Mamba figure 3, mamba_simple.py: which half is the gate, where silu is, which rows are B."""
    torch.manual_seed(0)
    mixer = Mamba(Config(("mamba",), d_model=6, d_state=5)).double()
    nn.init.normal_(mixer.D)
    u = torch.randn(2, 9, 6, dtype=F64)
    x, z = mixer.in_proj(u).split(12, dim=-1)
    x = F.silu(mixer.conv1d(F.pad(x.mT, (3, 0))).mT)
    dt, B, C = (x @ mixer.x_proj.weight.T).split([1, 5, 5], dim=-1)
    dt = F.softplus(dt @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
    want, h = selective_scan(x, dt, -mixer.A_log.exp(), B, C, mixer.D, impl="naive")
    y, state = mixer(u)
    close(y, mixer.out_proj(want * F.silu(z)), name="y")
    close(state.h, h, name="h")


def test_a_mamba2_block_spelt_out():
    """Mamba-2 figure 6 and mamba2.py: one projection, convolution over x, B, C, the recurrence, the
    gate, the norm of each of the 3 groups."""
    torch.manual_seed(0)
    mixer = Mamba2(Config(("mamba2",), d_model=12, d_state=5, head_dim=4, n_group=3)).double()
    u = torch.randn(2, 9, 12, dtype=F64)
    nn.init.normal_(mixer.norm.weight)
    nn.init.normal_(mixer.D)
    z, x, B, C, dt = mixer.in_proj(u).split([24, 24, 15, 15, 6], dim=-1)
    seen = F.pad(torch.cat([x, B, C], dim=-1).transpose(1, 2), (3, 0))
    x, B, C = F.silu(mixer.conv1d(seen)[..., :9].transpose(1, 2)).split([24, 15, 15], dim=-1)
    x, B, C = x.unflatten(-1, (6, 4)), B.unflatten(-1, (3, 5)), C.unflatten(-1, (3, 5))
    dt = F.softplus(dt + mixer.dt_bias)
    y, h = ssd(x, dt, -mixer.A_log.exp(), B, C, mixer.D, impl="naive")
    y = (y.flatten(2) * F.silu(z)).unflatten(-1, (3, 8))
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    close(mixer(u)[0], mixer.out_proj(y.flatten(2) * mixer.norm.weight))
    close(mixer(u)[1].h, h)
    assert len([*mixer.parameters()]) == 8  # those above


# Initialisation


def test_steps_begin_between_one_thousandth_and_one_tenth():
    """Mamba section 3.6: dt = softplus(bias) is log-uniform in [0.001, 0.1]: half of them below 0.01."""
    torch.manual_seed(0)
    dt = F.softplus(init_dt_bias(20_000).double())
    assert 0.999e-3 < dt.min() < 1.01e-3 and 0.099 < dt.max() < 0.1001
    assert abs((dt < 0.01).double().mean() - 0.5) < 0.02
    c = Config(d_model=64)
    for bias in (Mamba(c).dt_proj.bias, Mamba2(c).dt_bias, Mamba3(c).dt_bias):
        dt = F.softplus(bias.detach())
        assert (0.999e-3 < dt).all() and (dt < 0.1001).all()


def test_decays_and_skips_begin_as_published():
    """Mamba: A = -1 ... -n in every channel (S4D-Real); Mamba-2: A uniform in [-16, -1]; D, norms,
    and in Mamba-3 the biases of B and C: 1."""
    torch.manual_seed(0)
    mamba, mamba3 = Mamba(Config(d_model=64)), Mamba3(Config(d_model=64))
    mamba2 = Mamba2(Config(d_model=16, expand=64, head_dim=1))
    close(torch.exp(mamba.A_log), torch.arange(1.0, 17).expand(128, 16), 1e-6)
    A = torch.exp(mamba2.A_log)
    assert 1 <= A.min() < 1.1 and 15.9 < A.max() <= 16.001 and abs(A.mean() - 8.5) < 0.5
    ones = [mamba.D, mamba2.D, mamba2.norm.weight, mamba3.D, mamba3.B_norm.weight]
    ones += [mamba3.C_norm.weight, mamba3.B_bias, mamba3.C_bias]
    assert all((p == 1).all() for p in ones)
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


@pytest.mark.parametrize("layer", ["mamba", "mamba2", "mamba3", "s4", "s4d"])
def test_second_derivatives_and_functional_transforms(layer):
    """Mamba's chunked scan has neither and says so; Config(impl="naive") has both."""
    torch.manual_seed(0)
    config = Config((layer,), d_model=8, head_dim=4, d_state=4)
    text = tokens(5, vocab=256)

    def gradients(model):
        loss = model(text)[0].square().mean()
        first = torch.autograd.grad(loss, [*model.parameters()], create_graph=True)
        sum(g.square().sum() for g in first).backward()
        return first

    model = LM(dataclasses.replace(config, impl="naive")).double()
    want = gradients(model)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    f = lambda values: torch.func.functional_call(model, values, (text,))[0].square().mean()
    got = torch.func.grad(f)(dict(model.named_parameters()))
    for g, w in zip(got.values(), want, strict=True):
        close(g, w)
    if layer == "mamba":
        with pytest.raises(RuntimeError, match='first derivatives only; use impl="naive"'):
            gradients(LM(config).double())


# Peers: other programs with the same weights. tests/test_checkpoints.py opens more of them


@pytest.mark.parametrize("tie", [False, True])
def test_mamba_equals_transformers(tie):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=17, hidden_size=20, state_size=5,
                                      num_hidden_layers=3, tie_word_embeddings=tie)
    peer = disturbed(transformers.MambaForCausalLM(config).double().eval())
    ours = LM(Config(("mamba",) * 3, d_model=20, vocab=17, d_state=5, tie=tie)).double().eval()
    ours.load_state_dict({rename(name, HF_NAMES): t for name, t in peer.state_dict().items()})
    with torch.no_grad():
        close(ours(tokens(37))[0], peer(tokens(37), use_cache=False).logits.double(), 1e-5)


def test_a_mamba_block_equals_mambapy():
    """Names and shapes of the weights are the same too, and the gradients."""
    peers = pytest.importorskip("mambapy.mamba")
    torch.manual_seed(0)
    ours = disturbed(Mamba(Config(("mamba",), d_model=20, d_state=5)).double())
    block = peers.MambaBlock(peers.MambaConfig(d_model=20, n_layers=1, d_state=5)).double()
    block.load_state_dict(ours.state_dict())
    x = torch.randn(2, 37, 20, dtype=F64)
    got, want = ours(x)[0], block(x)
    close(got, want, 1e-5)
    got.square().sum().backward()
    want.square().sum().backward()
    for name, p in ours.named_parameters():
        close(p.grad, block.get_parameter(name).grad, 1e-5, name)


# Checkpoints


def failure(path, f=load, *more):
    """The message of the UserError that f(path, ...) must raise: one line with the path."""
    with pytest.raises(UserError) as error:
        f(path, *more)
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
    assert "no best.pt, last.pt" in failure(tmp_path)
    save(tmp_path / "last.pt", make("mamba"), which="last")
    assert load(tmp_path)[1]["which"] == "last"
    save(tmp_path / "best.pt", make("mamba"), which="best")
    assert load(str(tmp_path))[1]["which"] == "best"


def test_where_nothing_is_the_message_says_how_to_train_one(tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    for path in ("empty", "none.pt", "none/best.pt", "file/best.pt"):
        assert "python train.py --out" in failure(tmp_path / path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_is_cut_short_or_no_checkpoint_is_named(tmp_path):
    path = tmp_path / "m.pt"
    save(path, make("mamba"))
    whole = path.read_bytes()
    for size in (0, 1, 2, 10, 100, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert f"{size:,} bytes" in failure(path)
    noise = random.Random(0)
    texts = [b"import os\n", b"\x80\x02}q\x00.", b"PK\x03\x04", b"0", b".", b"a.", b"N.", b"(l."]
    for data in texts + [noise.randbytes(50) for _ in range(50)]:
        path.write_bytes(data)
        failure(path)
    for other in ({"weight": torch.ones(2)}, [1, 2], torch.ones(2), {"format": "bytestate-0"}, {}):
        torch.save(other, path)
        assert f"expected {FORMAT}" in failure(path)


def test_a_checkpoint_that_does_not_fit_says_where(tmp_path):
    path, model = tmp_path / "m.pt", make("mamba")
    config, weights = dataclasses.asdict(model.config), model.state_dict()
    settings = [({"d_model": 16}, "size mismatch for embedding.weight"),
                ({"n_heads": 3}, "n_heads"), ({"merges": 7}, "merges"),
                ({"layers": ["mamba"]}, "layers.1"), ({"layers": ["rwkv"]}, "rwkv")]
    doubling = [[97, 97]] + [[256 + i] * 2 for i in range(59)]  # the last word has 2^60 bytes
    for merges in ([[1]], [[256, 1]], [[1, 2.0]], [[[1], 2]], [None], doubling):
        settings.append(({"merges": merges, "vocab": 256 + len(merges)}, "is no pair of words"))
    contents = [({"config": config | changes}, message) for changes, message in settings]
    contents += [({"config": None}, ""), ({"model": [1]}, ""), ({"model": {}}, "embedding.weight"),
                 ({"model": weights | {"norm_f.weight": torch.ones(12) + 0j}}, "no floats")]
    for changes, message in contents:
        torch.save({"format": FORMAT, "config": config, "model": weights} | changes, path)
        found = failure(path)
        assert "does not fit" in found and message in found
    torch.save({"format": FORMAT, "model": weights}, path)
    assert "config" in failure(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        config = Code(tmp_path / "was run")
        write({"format": FORMAT, "config": config, "model": {}}, tmp_path / "m.pt")
        failure(tmp_path / "m.pt")
    assert not (tmp_path / "was run").exists()


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    """When the new one takes its name, and while it is written: a limit on a file's size stands for
    the disk's, since writes beyond it fail with an OSError of the same kind."""
    path, model = tmp_path / "best.pt", LM(Config(d_model=64))
    save(path, make("mamba"))
    before = path.read_bytes()

    def fails():
        assert "cannot write" in failure(path, save, model)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["best.pt"]

    with monkeypatch.context() as patch:
        full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
        patch.setattr(os, "replace", full)
        fails()
    resource = pytest.importorskip("resource", reason="Windows has no limit on a file's size")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 40_000):  # nothing can be written; the middle of a model cannot
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            fails()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
