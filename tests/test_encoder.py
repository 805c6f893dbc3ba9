"""The bidirectional encoder: BiGS as published, its ablations, padding, any length (Wang et al. 2022, 2212.10544)."""
import math

import pytest
import torch
import torch.nn as nn

from conftest import close
from data.files import UserError
from model import (LM, BidirectionalS4D, BiGS, Config, Encoder, SharedS4D, Stacked, load, make_model, save)
from scan import discretize, scan

F64 = torch.float64
KINDS = [(block, layer) for block in ("gated", "stacked") for layer in ("s4d", "attention")]
every_kind = pytest.mark.parametrize("block, layer", KINDS)


def config(block="gated", layer="s4d", **sizes):
    return Config((layer,) * 2, **{**dict(block=block, d_model=12, vocab=17, d_state=6, expand=3, norm="layer",
                                          n_head=2, n_kv_head=2), **sizes})


def make(block, layer, **sizes):
    """A small encoder whose every parameter differs from its neighbours, and whose kernels reach far."""
    torch.manual_seed(0)
    model = Encoder(config(block, layer, **sizes)).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += -2.0 if "log_dt" in name else 0.3 * torch.randn_like(p)
    return model


def tokens(l, b=3, vocab=17, seed=1):
    return torch.randint(vocab, (b, l), generator=torch.Generator().manual_seed(seed))


def fill(seed, *shape):
    """Entry number i = 1, 2, ..., row by row, is sin(seed + 0.7 i) / 2."""
    return (0.5 * torch.sin(seed + 0.7 * torch.arange(1, math.prod(shape) + 1, dtype=F64))).view(shape)


# The published block


@pytest.mark.parametrize("gelu, ends, total", [
    ("none", ([0.9045365829, 1.1467273851, 0.8749812258, 0.1999562722],
              [-0.2554372228, 0.0318743705, 0.2762178320, 0.6111787168]), 3.19955905942599),
    ("tanh", ([0.9045281022, 1.1467310627, 0.8749861005, 0.1999478149],
              [-0.2555063675, 0.0318710903, 0.2762901930, 0.6111110455]), 3.199377598093915)])
def test_a_bigs_layer_gives_the_reference_layers_numbers(gelu, ends, total):
    """The authors' torch layer with these weights gives the same (exact GELU); tanh is what the JAX weights expect."""
    layer = BiGS(config(d_model=4, d_state=2, norm_eps=1e-12, gelu=gelu), "s4d").double()
    layer.dv, layer.dol, layer.do = (nn.Linear(*shape, dtype=F64) for shape in ((4, 6), (4, 6), (6, 4)))
    mixer = layer.mixer
    with torch.no_grad():
        for seed, linear in enumerate((layer.dv, mixer.du_forward, mixer.du_backward, mixer.duc_forward,
                                       mixer.duc_backward, layer.dol, layer.do), 1):
            linear.weight.copy_(fill(seed, *linear.weight.shape))
            linear.bias.copy_(fill(seed + 0.5, *linear.bias.shape))
        layer.norm.weight.copy_(1 + 0.2 * fill(20, 4))
        layer.norm.bias.copy_(0.2 * fill(21, 4))
        for ssm, D, dt, seed in ((mixer.fs4, 1.0, 0.1, 30), (mixer.bs4, 0.5, 0.2, 40)):
            ssm.D.fill_(D)
            ssm.log_dt.fill_(math.log(dt))
            ssm.C.copy_(fill(seed, 2, 2))
            ssm.A_real.fill_(-0.5)
            ssm.A_imag.copy_(torch.tensor([0, math.pi], dtype=F64))
        y = layer(2 * fill(50, 1, 5, 4))
    close(y[0, 0], torch.tensor(ends[0], dtype=F64))
    close(y[0, 4], torch.tensor(ends[1], dtype=F64))
    assert y.sum().item() == pytest.approx(total, rel=1e-12)


def test_published_parameter_counts():
    """BiGS_128 and BiGS_4096, head tied, no pooler: their flax files are as long as these say; 13,645,316 per layer.

    Their table of segment types, two rows, is not ours: its first row goes into the table of positions.
    """
    sizes = dict(block="gated", norm="layer", expand=3)
    with torch.device("meta"):
        for n_position, count in ((128, 346_314_134), (4096, 350_377_366)):
            model = Encoder(Config(("s4d",) * 23, d_model=1024, vocab=30522, d_state=64, n_position=n_position,
                                   **sizes))
            assert sum(p.numel() for p in model.parameters()) + 2 * 1024 == count
        assert sum(p.numel() for p in model.layers[0].parameters()) == 13_645_316
        tiny = Encoder(Config(("s4d",) * 2, d_model=8, vocab=11, d_state=4, n_position=16, **sizes))
    assert sum(p.numel() for p in tiny.parameters()) + 2 * 8 == 2_291


@every_kind
def test_all_four_have_the_same_weights_to_the_biases(block, layer):
    """13 d_model^2 a layer at m = 3 d_model."""
    model = Encoder(config(block, layer))
    linear = [m.weight for m in model.layers.modules() if isinstance(m, nn.Linear)]
    assert sum(w.numel() for w in linear) == 2 * 13 * 12**2


# The SSM: one kernel for all channels, the plain real part


def ssm(n=6):
    torch.manual_seed(0)
    layer = SharedS4D(config(d_state=n)).double()
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer


def test_the_kernel_is_not_doubled():
    """Modes -1/2 and -1/2 + i pi, C = 1, dt = 1: e^l (2(1-e) + (-1)^l (1+e) / (2(1/4 + pi^2))) with e = exp(-1/2).
    These are single modes of whole pairs, and taking twice the real part would double everything but D."""
    layer, e, j = ssm(2), math.exp(-0.5), torch.arange(6, dtype=F64)
    with torch.no_grad():
        layer.A_real.fill_(-0.5)
        layer.A_imag.copy_(torch.tensor([0, math.pi], dtype=F64))
        layer.C.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        layer.log_dt.fill_(0)
        layer.D.fill_(0)
        push = torch.zeros(1, 6, 1, dtype=F64)
        push[0, 0] = 1
        kernel = layer(push)[0, :, 0]
    close(kernel, e**j * (2 * (1 - e) + (-1)**j * (1 + e) / (2 * (0.25 + math.pi**2))))
    assert kernel[0].item() == pytest.approx(0.866315827943, abs=1e-12)


@pytest.mark.parametrize("l", [1, 2, 7, 100])
def test_the_convolution_is_the_recurrence(l):
    """h_t = Abar h_{t-1} + Bbar x_t under zero-order hold, y = Re(C h) + D x, in every channel the same."""
    layer, x = ssm(), torch.randn(2, l, 5, dtype=F64)
    A = torch.complex(layer.A_real.clamp(max=-1e-4), layer.A_imag)
    Abar, Bbar = discretize(layer.log_dt.exp(), A, 1.0, "zoh")
    h = scan(Abar.expand(2, l, 5, -1), Bbar * x[..., None], impl="naive")
    close(layer(x), (h @ torch.complex(layer.C[:, 0], layer.C[:, 1])).real + layer.D * x)


def test_a_mode_never_grows():
    """Real parts above -1e-4 count as -1e-4, so a pulse dies out."""
    layer = ssm()
    with torch.no_grad():
        layer.A_real.fill_(0.5)
        kernel = layer(torch.ones(1, 1, 1, dtype=F64).expand(1, 2000, 1))
    assert kernel.isfinite().all() and kernel.abs().max() < 1e3


def test_the_ssm_begins_as_published():
    """Both of each pair of LegS's eigenvalues, |C|^2 about 1, D = 1, dt in [0.01, 1]."""
    layer = SharedS4D(config(d_state=64))
    close(layer.A_real, torch.full((64,), -0.5))
    close(layer.A_imag, -layer.A_imag.flip(0), tol=1e-4)
    assert layer.A_imag.max().item() == pytest.approx(1303.2738429812, rel=1e-6)
    assert layer.C.square().sum(1).mean().item() == pytest.approx(1, abs=0.5) and layer.D.item() == 1
    steps = torch.cat([SharedS4D(config()).log_dt.exp() for _ in range(100)])
    assert 0.01 <= steps.min() and steps.max() <= 1 and steps.median() < 0.3  # uniform in the logarithm


# Two directions


def influence(mixer, l=9, d=12):
    """(l, l) booleans: does output t depend on input s?"""
    x = torch.randn(1, l, d, dtype=F64)
    jacobian = torch.autograd.functional.jacobian(lambda x: mixer(x)[0].sum(-1), x)  # (l, 1, l, d)
    return jacobian[:, 0].abs().sum(-1) > 1e-12


def test_forward_sees_the_past_backward_the_future_and_both_the_present():
    """Not the strictly anticausal form of other bidirectional S4s."""
    mixer = make("stacked", "s4d").layers[0].mixer
    everywhere = torch.ones(9, 9, dtype=torch.bool)
    assert torch.equal(influence(mixer), everywhere)
    for silent, seen in (("backward", everywhere.tril()), ("forward", everywhere.triu())):
        weight = getattr(mixer, f"duc_{silent}").weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
            assert torch.equal(influence(mixer), seen)
            weight.copy_(kept)


@pytest.mark.parametrize("block", ["gated", "stacked"])
def test_exchanging_the_directions_reverses_the_text(block):
    """mix(flip x) = flip(mix'(x)), where mix' has the parameters of the two directions exchanged."""
    torch.manual_seed(0)
    mixer, other = BidirectionalS4D(config(block)).double(), BidirectionalS4D(config(block)).double()
    exchange = {"forward": "backward", "backward": "forward", "fs4": "bs4", "bs4": "fs4"}
    rename = lambda name: ".".join("_".join(exchange.get(part, part) for part in p.split("_")) if p[0] == "d" else
                                   exchange.get(p, p) for p in name.split("."))
    other.load_state_dict({rename(name): p for name, p in mixer.state_dict().items()})
    x = torch.randn(2, 7, 12, dtype=F64)
    close(mixer(x.flip(1)), other(x).flip(1))
    assert (mixer(x) - other(x)).abs().max() > 0.01


def test_the_gated_block_multiplies_its_directions_and_the_stacked_adds_them():
    mixers = {block: BidirectionalS4D(config(block)).double() for block in ("gated", "stacked")}
    mixers["stacked"].load_state_dict(mixers["gated"].state_dict())
    x, parts = torch.randn(1, 5, 12, dtype=F64), []
    for silent in ("backward", "forward"):  # the sum with one of them silent is the other
        alone = BidirectionalS4D(config("stacked")).double()
        alone.load_state_dict(mixers["gated"].state_dict())
        with torch.no_grad():
            getattr(alone, f"duc_{silent}").weight.zero_()
            getattr(alone, f"duc_{silent}").bias.zero_()
        parts.append(alone(x))
    close(mixers["stacked"](x), parts[0] + parts[1])
    close(mixers["gated"](x), parts[0] * parts[1])


# The encoder


@every_kind
@pytest.mark.parametrize("l", [1, 2, 31, 257])
def test_any_length_sees_both_ends(block, layer, l):
    model, text = make(block, layer), tokens(l, b=1)
    x = model.embedding(text).detach().requires_grad_()
    model.embedding.forward = lambda _: x
    logits, state = model(text)
    assert logits.shape == (1, l, 17) and logits.isfinite().all() and state is None
    logits[0, l // 2].square().sum().backward()
    assert (x.grad[0, [0, -1]] != 0).any(-1).all()


@every_kind
def test_rows_do_not_meet_and_gradients_reach_every_parameter(block, layer):
    model, text = make(block, layer, n_position=8), tokens(8)
    close(model(text)[0][1:2], model(text[1:2])[0])
    model(text)[0].square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_positions_are_added_where_there_is_a_table():
    model, text = make("gated", "s4d", n_position=8), tokens(6)
    with torch.no_grad():
        before = model(text)[0]
        model.position_table.weight[6:] += 1
        close(model(text)[0], before)  # a row that no position reads
        model.position_table.weight[5] *= -1
    assert (model(text)[0] - before).abs().max() > 1e-3
    with pytest.raises(ValueError, match="9 tokens, but the table of positions has 8"):
        model(tokens(9))


def test_the_head_is_the_embedding_again():
    model = make("gated", "s4d")
    assert [name for name, p in model.named_parameters() if p.shape == (17, 12)] == ["embedding.weight"]
    with torch.no_grad():
        x = model.head_norm(nn.functional.gelu(model.head(
            model.layers[1](model.layers[0](model.norm(model.embedding(tokens(5))))))))
        close(model(tokens(5))[0], x @ model.embedding.weight.T + model.lm_head.bias)


@every_kind
def test_a_block_spelt_out(block, layer):
    """BiGS: y = x + W_do (gelu(W_dol mix) * gelu(W_dv h)); stacked: attention or SSM, then two layers, each added."""
    model, x, act = make(block, layer).layers[0], torch.randn(2, 5, 12, dtype=F64), nn.GELU("tanh")
    assert isinstance(model, BiGS if block == "gated" else Stacked)
    h = model.norm(x)
    if block == "gated":
        y = x + model.do(act(model.dol(model.mixer(h))) * act(model.dv(h)))
    else:
        y = x + model.mixer(h)
        y = y + model.down_proj(act(model.up_proj(model.mlp_norm(y))))
    close(model(x), y)


def test_attention_is_a_softmax_over_everything():
    mixer, h = make("stacked", "attention", n_head=1, n_kv_head=1).layers[0].mixer, torch.randn(2, 5, 12, dtype=F64)
    from model import rotate
    q, k = (rotate(p(h)[:, :, None], 0, *mixer.rope)[:, :, 0] for p in (mixer.q_proj, mixer.k_proj))
    close(mixer(h), mixer.out_proj(torch.softmax(q @ k.mT / math.sqrt(12), -1) @ mixer.v_proj(h)))


def test_an_untrained_encoder_guesses_uniformly():
    for block, layer in KINDS:
        torch.manual_seed(0)
        logits = Encoder(config(block, layer, d_model=64, vocab=257))(tokens(30, vocab=257))[0]
        assert logits.log_softmax(-1).mean().item() == pytest.approx(-math.log(257), abs=0.1)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_saved_encoder_comes_back_as_one(block, layer, dtype, tmp_path):
    model = make(block, layer).to(dtype)
    save(tmp_path / "encoder.pt", model)
    back, _ = load(tmp_path / "encoder.pt")
    assert isinstance(back, Encoder) and back.config == model.config
    assert torch.equal(back(tokens(5))[0], model(tokens(5))[0])


def test_the_config_says_which_model_it_is():
    assert isinstance(make_model(config()), Encoder) and isinstance(make_model(Config(d_model=64)), LM)


def test_impossible_encoders_are_one_line_errors():
    for sizes, part in ((dict(block="gate"), "gated, stacked"), (dict(layers=("mamba",)), "s4d, attention"),
                        (dict(layers=("s4d+mlp",)), "s4d+mlp"), (dict(layers=("attention",), n_head=5), "n_head 5")):
        with pytest.raises(UserError, match=part.replace("+", r"\+")) as error:
            make_model(Config(**{**dict(layers=("s4d",), block="gated", d_model=12), **sizes}))
        assert "\n" not in str(error.value)


@every_kind
def test_autocast_narrows_the_projections_and_not_the_kernel(block, layer):
    """bfloat16 has no complex numbers and no FFT; the answer stays close to the float32 one."""
    model, text = make(block, layer).float(), tokens(50)
    with torch.no_grad():
        want = model(text)[0].softmax(-1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(text)[0]
    assert logits.dtype == torch.bfloat16 and (logits.float().softmax(-1) - want).abs().mean() < 0.02
