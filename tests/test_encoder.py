"""The bidirectional encoder (BiGS, Wang et al. 2022, 2212.10544): as published, any length."""
import math

import pytest
import torch
import torch.nn as nn

from conftest import close
from data.files import UserError
from model import BidirectionalS4D, BiGS, Config, Encoder, SharedS4D, load, make_model, rotate, save
from scan import discretize, dplr_legs, scan

F64 = torch.float64
every_kind = pytest.mark.parametrize("block, layer", [
    (block, layer) for block in ("gated", "stacked") for layer in ("s4d", "attention")])


def config(block="gated", layer="s4d", n_layer=2, **sizes):
    small = dict(d_model=12, vocab=17, d_state=6, expand=3, norm="layer", n_head=2, n_kv_head=2)
    return Config((layer,) * n_layer, block=block, **small | sizes)


def perturbed(model):
    """In float64, with every parameter unlike its neighbours, and kernels that reach far."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.double().named_parameters():
            p += 0.3 * torch.randn_like(p) - 2 * ("log_dt" in name)
    return model.eval()


def make(block, layer, **sizes):
    return perturbed(Encoder(config(block, layer, **sizes)))


def tokens(l, b=3, vocab=17):
    return torch.randint(vocab, (b, l), generator=torch.Generator().manual_seed(1))


def fill(seed, *shape):
    """Entry number i = 1, 2, ..., row by row, is sin(seed + 0.7 i) / 2."""
    return (0.5 * torch.sin(seed + 0.7 * torch.arange(1, math.prod(shape) + 1, dtype=F64))).view(shape)


# The published block


@pytest.mark.parametrize("gelu, first, last, total", [
    ("none", [0.9045365829, 1.1467273851, 0.8749812258, 0.1999562722],
     [-0.2554372228, 0.0318743705, 0.2762178320, 0.6111787168], 3.19955905942599),
    ("tanh", [0.9045281022, 1.1467310627, 0.8749861005, 0.1999478149],
     [-0.2555063675, 0.0318710903, 0.2762901930, 0.6111110455], 3.199377598093915)])
def test_a_bigs_layer_gives_the_reference_layers_numbers(gelu, first, last, total):
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
    close(y[0, [0, 4]], torch.tensor([first, last], dtype=F64))
    assert y.sum().item() == pytest.approx(total, rel=1e-12)


def test_published_parameter_counts():
    """BiGS_128 and BiGS_4096, 23 layers, head tied, no pooler: their flax files are as long as
    these say. Of their table of segment types, two rows, ours has none."""
    for n_position, count in ((128, 346_314_134), (4096, 350_377_366)):
        with torch.device("meta"):
            model = Encoder(config(n_layer=1, d_model=1024, vocab=30522, d_state=64,
                                   n_position=n_position))
        whole, layer = (sum(p.numel() for p in m.parameters()) for m in (model, model.layers[0]))
        assert layer == 13_645_316
        assert whole + 22 * layer + 2 * 1024 == count


@every_kind
def test_all_four_have_the_same_weights_to_the_biases(block, layer):
    """13 d_model^2 a layer at m = 3 d_model."""
    layers = Encoder(config(block, layer)).layers
    linear = [m.weight.numel() for m in layers.modules() if isinstance(m, nn.Linear)]
    assert sum(linear) == 2 * 13 * 12**2


# The SSM: one kernel for all channels, the plain real part


@pytest.mark.parametrize("l", [1, 2, 7, 100])
def test_the_convolution_is_the_recurrence(l):
    """h_t = Abar h_{t-1} + Bbar x_t under zero-order hold, y = Re(C h) + D x, in every channel the
    same. No mode grows: real parts above -1e-4 count as -1e-4."""
    layer = perturbed(SharedS4D(config()))
    with torch.no_grad():
        layer.A_real[:2] = 0.5
    A = torch.complex(layer.A_real.clamp(max=-1e-4), layer.A_imag)
    Abar, Bbar = discretize(layer.log_dt.exp(), A, 1.0, "zoh")
    x = torch.randn(2, l, 5, dtype=F64)
    h = scan(Abar.expand(2, l, 5, -1), Bbar * x[..., None], impl="naive")
    close(layer(x), (h @ torch.complex(layer.C[:, 0], layer.C[:, 1])).real + layer.D * x)


def test_the_ssm_begins_as_published():
    """Both of each pair of LegS's eigenvalues, |C|^2 about 1, D = 1, dt in [0.01, 1]."""
    layer = SharedS4D(config(d_state=64))
    close(torch.complex(layer.A_real, layer.A_imag), dplr_legs(64)[0].to(torch.complex64))
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
    everywhere = torch.ones(9, 9, dtype=torch.bool)
    mixer = make("stacked", "s4d").layers[0].mixer
    assert torch.equal(influence(mixer), everywhere)
    for silent, seen in (("backward", everywhere.tril()), ("forward", everywhere.triu())):
        mixer = make("stacked", "s4d").layers[0].mixer
        nn.init.zeros_(getattr(mixer, f"duc_{silent}").weight)
        assert torch.equal(influence(mixer), seen)


@pytest.mark.parametrize("block, join", [("gated", torch.mul), ("stacked", torch.add)])
def test_the_gated_block_multiplies_its_directions_and_the_stacked_adds_them(block, join):
    mixer, parts = BidirectionalS4D(config(block)), []
    for linear in (mixer.duc_forward, mixer.duc_backward):
        linear.register_forward_hook(lambda module, x, y: parts.append(y))
    y = mixer(torch.randn(1, 5, 12))
    close(y, join(*parts))


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
        model.position_table.weight[6:] *= -1
        close(model(text)[0], before)  # a row that no position reads
        model.position_table.weight[5] *= -1
    assert (model(text)[0] - before).abs().max() > 1e-3
    with pytest.raises(ValueError, match="9 tokens, but the table of positions has 8"):
        model(tokens(9))


def test_the_head_is_the_embedding_again():
    model = make("gated", "s4d")
    with torch.no_grad():
        x = model.head_norm(nn.functional.gelu(model.head(
            model.layers[1](model.layers[0](model.norm(model.embedding(tokens(5))))))))
        close(model(tokens(5))[0], x @ model.embedding.weight.T + model.lm_head.bias)


@pytest.mark.parametrize("layer", ["s4d", "attention"])
def test_a_stacked_block_spelt_out(layer):
    """Attention or SSM, then two layers, each added."""
    model, x = make("stacked", layer).layers[0], torch.randn(2, 5, 12, dtype=F64)
    y = x + model.mixer(model.norm(x))
    hidden = nn.functional.gelu(model.up_proj(model.mlp_norm(y)), approximate="tanh")
    close(model(x), y + model.down_proj(hidden))


def test_attention_is_a_softmax_over_everything():
    mixer, h = make("stacked", "attention", n_head=1, n_kv_head=1).layers[0].mixer, torch.randn(2, 5, 12, dtype=F64)
    q, k = (rotate(p(h)[:, :, None], 0, *mixer.rope)[:, :, 0] for p in (mixer.q_proj, mixer.k_proj))
    close(mixer(h), mixer.out_proj(torch.softmax(q @ k.mT / math.sqrt(12), -1) @ mixer.v_proj(h)))


@every_kind
def test_an_untrained_encoder_guesses_uniformly(block, layer):
    torch.manual_seed(0)
    logits = Encoder(config(block, layer, d_model=64, vocab=257))(tokens(30, vocab=257))[0]
    assert logits.log_softmax(-1).mean().item() == pytest.approx(-math.log(257), abs=0.1)


@every_kind
def test_a_saved_encoder_comes_back_as_one(block, layer, tmp_path):
    model = make(block, layer)
    save(tmp_path / "encoder.pt", model)
    back, _ = load(tmp_path / "encoder.pt")
    assert isinstance(back, Encoder) and back.config == model.config
    assert torch.equal(back(tokens(5))[0], model(tokens(5))[0])


@pytest.mark.parametrize("sizes, part", [
    (dict(block="gate"), "gated, stacked"), (dict(layer="mamba"), "s4d, attention"),
    (dict(layer="s4d+mlp"), r"s4d\+mlp"), (dict(layer="attention", n_head=5), "n_head 5")])
def test_impossible_encoders_are_one_line_errors(sizes, part):
    with pytest.raises(UserError, match=part) as error:
        make_model(config(**sizes))
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
