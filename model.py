"""Mixers, blocks, and the byte language model; letters as in scan.py.

A mixer exchanges information between positions, and all mixers of the LM have one signature: y, state = mixer(x,
state). A state of None is the beginning of a sequence, and any later state continues it. So training (l = a window),
prefill (l = a prompt), evaluation in pieces, and decoding (l = 1) are one call with a different l. A state is a
NamedTuple of tensors that no layer changes: to go back, keep the old variable. mixer(x, state, upto) gives y for all
positions, but the state after the first upto of them. Speculative sampling appends guesses to the text: y judges them,
but the state that is kept has not read them. Training has no use for a state and calls with upto = 0, with which
attention keeps no cache and S4 may be a convolution. The encoder's mixers see both sides of every position and have no
state. A model's state is a tuple of its layers' states.

    Mamba           in_proj -+- x -> conv -> silu -> selective_scan -+ * -> out_proj
                             |                  `-> dt, B, C --^     |
                             +- z -------------------------- silu ---+

    Mamba-2         in_proj -+- x, B, C -> conv -> silu -> ssd ------+ * -> norm -> out_proj
                             +- dt ------------------------^         |
                             +- z -------------------------- silu ---+

    Mamba-3         in_proj -+- x ------------------------> ssd_scan + * -> out_proj
                             +- B, C -> norm, + bias, turn ----^     |
                             +- theta, dt -------------^       |     |
                             +- dt, A, w ----------------------+     |
                             +- z -------------------------- silu ---+

The convolution mixes each position with the k - 1 before it, so that already in the first layer B and C, and in Mamba
dt, depend on more than one byte. silu(v) is v sigmoid(v), and z gates the output.

To add a mixer, write a class like the ones below and add it to MIXERS; README has the rules.
"""
import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.bpe import check_merges
from data.checkpoints import read, write
from data.files import UserError, bounded, check_fields, require, require_one_of, whole_file
from data.tensors import FORMAT, find, read_file
from scan import (SELECTIVE_SCANS, dplr_legs, fft_conv, per_head, s4, s4d, s4d_kernel,
                  selective_scan, ssd, ssd_scan)

MASK = 256  # the token that stands for a masked byte


@dataclasses.dataclass
class Config:
    """The shape of an LM. layers names each layer's mixer (a key of MIXERS), with "+mlp" where SwiGLU follows it.

    With a block (a key of BLOCKS) it is the shape of an Encoder, and its mixers are keys of ENCODER_MIXERS. bounded
    fields are checked here, other numbers must not be negative; what a mixer asks of its sizes it checks itself.
    """
    layers: tuple = ("mamba2",) * 4
    d_model: int = bounded(256, low=1)
    vocab: int = bounded(256, low=1)
    merges: tuple = ()        # where tokens are words: pairs of them make new ones (data/bpe.py)
    tie: bool = True          # the head shares the embedding's weight; an encoder's always does
    norm: str = bounded("rms", one_of=("rms", "layer"))  # weight only, or weight and bias
    norm_eps: float = bounded(1e-5, high=1)
    dropout: float = bounded(0.0, high=0.99)  # on layers' outputs; encoder: on the embeddings

    d_state: int = bounded(16, low=1)  # n, of all mixers but attention
    expand: int = bounded(2, low=1)    # Mambas: channels d = expand * d_model; encoder: m there
    d_conv: int = bounded(4, low=1)    # k, taps of the causal convolution of Mamba and Mamba-2
    bias: bool = False                 # Mamba, Mamba-2: of projections; no released model has one
    conv_bias: bool = True
    head_dim: int = bounded(64, low=1)  # p, Mamba-2 and Mamba-3
    n_group: int = bounded(1, low=1)    # g, Mamba-2 and Mamba-3
    impl: str = bounded("auto", one_of=("auto", "triton", *SELECTIVE_SCANS))  # of Mamba's scan

    n_head: int = bounded(4, low=1)     # attention
    n_kv_head: int = 0        # heads of k, v, each for n_head / n_kv_head queries; 0 becomes n_head
    window: int = 0           # LM: each position sees the last `window` positions; 0 = all
    rope_base: float = bounded(10000.0, low=1, high=1e30)
    rope_scaling: tuple = ()  # Llama 3.1's four numbers, see rotate
    d_mlp: int = 0            # hidden size of SwiGLU; 0 becomes 8/3 d_model, up to a multiple of 32

    block: str = ""           # encoder: gated or stacked
    gelu: str = bounded("tanh", one_of=("tanh", "none"))  # encoder: approximate or exact
    n_position: int = 0       # encoder: rows of a learned table of positions; 0 = none

    def __post_init__(self):
        for f in dataclasses.fields(self):
            if isinstance(getattr(self, f.name), list):  # will do for a tuple
                setattr(self, f.name, tuple(getattr(self, f.name)))
        check_fields(self)
        ropes = self.rope_scaling
        fine = len(ropes) == 4 and all(type(i) in (int, float) and 0 < i < 1e30 for i in ropes)
        require(not ropes or fine and ropes[1] < ropes[2],
                f"rope_scaling {ropes!r:.80} is not four positive numbers, "
                "the second below the third")
        self.merges = check_merges(self.merges, self.vocab)
        require(self.layers, "layers is empty: a model needs at least one layer")
        require_one_of("block", self.block, ["", *BLOCKS])
        known = ENCODER_MIXERS if self.block else [*MIXERS, *(f"{kind}+mlp" for kind in MIXERS)]
        for layer in self.layers:
            require_one_of("layer", layer, known)
        require(self.tie or not self.block, "tie is off, but an encoder's head shares the "
                "embedding's weight")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.d_mlp = self.d_mlp or math.ceil(self.d_model / 12) * 32

    @property
    def kinds(self):
        """The names of the mixers in use."""
        return {layer.removesuffix("+mlp") for layer in self.layers}


def require_multiple(name, size, unit, why):
    """UserError unless the size of that name is a multiple of unit, with the nearest sizes that are."""
    low = max(size // unit, 1) * unit
    require(size % unit == 0, f"{name} {size} is not a multiple of {unit}, as {why} needs; "
                              f"try {low} or {low + unit}")


def make_norm(c):
    kind = nn.RMSNorm if c.norm == "rms" else nn.LayerNorm
    return kind(c.d_model, eps=c.norm_eps)


# ---------------------------------------------------------------------------------------------------------------------
# Mamba and Mamba-2


def causal_conv(x, weight, bias, tail, upto=None):
    """Depthwise causal convolution: y_t = bias + sum_j weight_j x_{t-(k-1)+j}, so the last tap meets the present.

    x (b, l, d), weight (d, 1, k), nn.Conv1d's layout, bias (d,) or None, tail (b, k-1, d), the inputs before x, None
    for zeros. Returns y (b, l, d), in the parameters' dtype or wider, and the tail after the first upto positions, by
    default all. (F.conv1d(groups=d) takes 1.4 to 1.7 times as long in training on two cores.)
    """
    b, l, d = x.shape
    k = weight.shape[2]
    if tail is None:
        tail = x.new_zeros(b, k - 1, d)
    if tail.shape != (b, k - 1, d):
        raise ValueError(f"a state's tail has shape {tuple(tail.shape)}, expected {(b, k - 1, d)}")
    longer = torch.cat([tail.to(x.dtype), x], dim=1)  # (b, k-1+l, d)
    end = l if upto is None else upto
    # a view would keep all of longer, and strides of its length, for which torch.compile compiles anew
    tail = longer[:, end:end + k - 1].clone(memory_format=torch.contiguous_format)
    longer = longer.to(torch.promote_types(x.dtype, weight.dtype))
    y = weight.new_zeros(d) if bias is None else bias
    for j, tap in enumerate(weight[:, 0].unbind(1)):
        y = torch.addcmul(y, longer[:, j:j + l], tap)  # (b, l, d)
    return y, tail


def init_log_dt(size):
    """log dt for dt log-uniform in [0.001, 0.1]: where A is -1, a memory of 1/dt, 10 to 1,000 bytes."""
    return torch.rand(size) * math.log(100) + math.log(0.001)


def inverse_softplus(dt):
    """b with softplus(b) = dt > 0, in a form that does not overflow."""
    return dt + torch.log(-torch.expm1(-dt))


def init_dt_bias(size):
    """b with softplus(b) = dt, spread as in S4."""
    return inverse_softplus(torch.exp(init_log_dt(size)))


class MambaState(NamedTuple):
    tail: torch.Tensor  # (b, k-1, channels), the last inputs of the convolution
    h: torch.Tensor     # Mamba (b, d, n), Mamba-2 (b, nh, p, n); float32 or wider


class Mamba(nn.Module):
    """The block of Mamba (Gu and Dao 2023, figure 3): gate and input, convolution, selective scan, gated output.

    x, z = W_in input;   x = silu(conv(x));   r, B, C = W_x x;   y = selective_scan(x, softplus(W_dt r + b), A, ...)
    output W_out (y * silu(z)). Channels d = expand * d_model; A = -exp(A_log) stays negative. A full map from x to dt
    would have d^2 weights, so there is a bottleneck, r, of d_model/16 numbers.
    """

    def __init__(self, c):
        super().__init__()
        d = c.expand * c.d_model
        n = c.d_state
        rank = math.ceil(c.d_model / 16)
        self.impl = c.impl
        self.in_proj = nn.Linear(c.d_model, 2 * d, bias=c.bias)
        self.conv1d = nn.Conv1d(d, d, c.d_conv, groups=d, bias=c.conv_bias)  # only holds weights
        self.x_proj = nn.Linear(d, rank + 2 * n, bias=False)
        self.dt_proj = nn.Linear(rank, d)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, n + 1)).repeat(d, 1))  # A = -1 .. -n
        self.D = nn.Parameter(torch.ones(d))
        self.out_proj = nn.Linear(d, c.d_model, bias=c.bias)
        nn.init.uniform_(self.dt_proj.weight, -rank**-0.5, rank**-0.5)
        self.dt_proj.bias = nn.Parameter(init_dt_bias(d))

    def forward(self, x, state=None, upto=None):
        n = self.A_log.shape[1]
        tail, h = state or (None, None)
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (b, l, d)
        x, tail = causal_conv(x, self.conv1d.weight, self.conv1d.bias, tail, upto)
        x = F.silu(x)
        r, B, C = self.x_proj(x).split([self.dt_proj.in_features, n, n], dim=-1)
        dt = F.linear(r, self.dt_proj.weight) + self.dt_proj.bias  # under autocast a float32 sum
        A = -torch.exp(self.A_log)
        y, h = selective_scan(x, F.softplus(dt), A, B, C, self.D, h, self.impl, upto)
        return self.out_proj(y * F.silu(z)), MambaState(tail, h)


def heads_of(c):
    """The number of heads in Mamba-2 and Mamba-3: expand * d_model channels, head_dim in each, n_group equal groups."""
    size = c.head_dim * c.n_group  # divides expand * d_model just if size / gcd divides d_model
    require_multiple("d_model", c.d_model, size // math.gcd(size, c.expand),
                     f"head_dim {c.head_dim} with expand {c.expand} and n_group {c.n_group}")
    return c.expand * c.d_model // c.head_dim


class Mamba2(nn.Module):
    """The block of Mamba-2 (Dao and Gu 2024, section 7): one projection for all, one decay per head, a norm at the end.

    z, xBC, dt = W_in input;   x, B, C = silu(conv(xBC));   y = ssd(x, softplus(dt + dt_bias), A, B, C, D)
    output W_out (RMSNorm(y * silu(z))): the gate comes before the norm, and each of the g groups is normed on its own.
    """

    def __init__(self, c):
        super().__init__()
        d = c.expand * c.d_model
        gn = c.n_group * c.d_state
        self.heads = heads_of(c)
        self.groups = c.n_group
        self.conv_parts = [d, gn, gn]  # x | B | C
        channels = sum(self.conv_parts)
        self.parts = [d, channels, self.heads]  # z | x B C | dt
        self.in_proj = nn.Linear(c.d_model, sum(self.parts), bias=c.bias)
        self.conv1d = nn.Conv1d(channels, channels, c.d_conv, groups=channels, bias=c.conv_bias)
        self.dt_bias = nn.Parameter(init_dt_bias(self.heads))
        # A in -16 .. -1
        self.A_log = nn.Parameter(torch.log(torch.empty(self.heads).uniform_(1, 16)))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(d, eps=c.norm_eps)  # holds the weight; forward norms each group
        self.out_proj = nn.Linear(d, c.d_model, bias=c.bias)

    def forward(self, x, state=None, upto=None):
        tail, h = state or (None, None)
        z, xBC, dt = self.in_proj(x).split(self.parts, dim=-1)
        xBC, tail = causal_conv(xBC, self.conv1d.weight, self.conv1d.bias, tail, upto)
        x, B, C = F.silu(xBC).split(self.conv_parts, dim=-1)
        x = x.unflatten(-1, (self.heads, -1))  # (b, l, nh, p)
        B = B.unflatten(-1, (self.groups, -1))  # (b, l, g, n)
        C = C.unflatten(-1, (self.groups, -1))
        dt = F.softplus(dt + self.dt_bias)  # (b, l, nh)
        A = -torch.exp(self.A_log)
        y, h = ssd(x, dt, A, B, C, self.D, h, upto=upto)
        y = (y.flatten(2) * F.silu(z)).unflatten(-1, (self.groups, -1))
        y = F.rms_norm(y, y.shape[-1:], eps=self.norm.eps).flatten(2) * self.norm.weight
        return self.out_proj(y), MambaState(tail, h)


# ---------------------------------------------------------------------------------------------------------------------
# Attention: the baseline, and the teacher to distil from


class AttentionState(NamedTuple):
    k: torch.Tensor         # (b, positions kept, n_kv_head, head size), already rotated
    v: torch.Tensor
    position: torch.Tensor  # (), how many positions have passed, of all rows: no batch axis


def angle_dtype(device):
    """float64, in which the angles of a long text keep their digits; mps has float32 only."""
    return torch.float32 if device.type == "mps" else torch.float64


def spin(u, v, angle):
    """The points (u, v) turned by angle: u and v anew."""
    cos = angle.cos()
    sin = angle.sin()
    return u * cos - v * sin, v * cos + u * sin


def rotate(x, position, base, scaling=()):
    """Rotary positions (Su et al. 2021), Llama's layout: channels m and m + size/2 turn by position * base^(-2m/size),
    so that q_i . k_j depends on i - j only.

    x (b, l, heads, size), its first position given. scaling is Llama 3.1's, (factor, low,
    high, length), for a context longer than the length of pretraining: channels that turned fewer than `low` times in
    it are slowed down by the factor, those with more than `high` turns stay, and between the two they are mixed.
    """
    half = x.shape[3] // 2
    dtype = angle_dtype(x.device)
    frequency = float(base) ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    if scaling:
        factor, low, high, length = map(float, scaling)
        turns = length * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    positions = position + torch.arange(x.shape[1], device=x.device, dtype=dtype)
    angle = positions[:, None, None] * frequency % (2 * math.pi)  # (l, 1, half)
    angle = angle.to(torch.promote_types(x.dtype, torch.float32))
    return torch.cat(spin(*x.chunk(2, dim=-1), angle), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention as in Llama: rotary positions, grouped queries, no biases.

    Its state is the cache of keys and values. With a window w every position sees itself and the w - 1 before it, so a
    cache of w - 1 is exact: constant memory here too, at the price of a model that cannot look further back.
    """

    def __init__(self, c):
        super().__init__()
        require_multiple("d_model", c.d_model, 2 * c.n_head,
                         f"n_head {c.n_head} with heads of even size")
        require_multiple("n_head", c.n_head, c.n_kv_head, f"n_kv_head {c.n_kv_head}")
        self.size = c.d_model // c.n_head
        self.window = c.window
        self.rope = (c.rope_base, c.rope_scaling)
        self.q_proj = nn.Linear(c.d_model, c.n_head * self.size, bias=False)
        self.k_proj = nn.Linear(c.d_model, c.n_kv_head * self.size, bias=False)
        self.v_proj = nn.Linear(c.d_model, c.n_kv_head * self.size, bias=False)
        self.out_proj = nn.Linear(c.n_head * self.size, c.d_model, bias=False)

    def project(self, x, position):
        """q, k rotated, and v: (b, l, heads, size)."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.size))
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, position, *self.rope), rotate(k, position, *self.rope), v

    def attend(self, q, k, v, **mask):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (b, heads, l, size)
        shared = q.shape[1] > k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=shared, **mask)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def forward(self, x, state=None, upto=None):
        l = x.shape[1]
        position = x.new_zeros((), dtype=torch.long) if state is None else state.position
        q, k, v = self.project(x, position)
        if state is not None:
            k = torch.cat([state.k.to(k.dtype), k], dim=1)
            v = torch.cat([state.v.to(v.dtype), v], dim=1)
        # window 4, a cache of 3 and l = 2 make 5 keys; upto = 1: end 4, and keys 1 to 3 are the cache
        keys = k.shape[1]
        passed = l if upto is None else upto
        end = keys - l + passed
        first = max(0, end - self.window + 1) if self.window else 0
        cache = [t[:, first:end] for t in (k, v)]
        if end - first < keys:
            cache = [t.clone() for t in cache]  # a view would keep all of a long prompt
        state = AttentionState(*cache, position + passed)
        cut = 0 < self.window < keys
        if not cut and (keys == l or l == 1):  # nothing before x, or one query, which sees all
            return self.attend(q, k, v, is_causal=l > 1), state
        mask = torch.ones(l, keys, dtype=torch.bool, device=x.device).tril(keys - l)
        mask = mask.triu(keys - l - (self.window or keys) + 1)
        return self.attend(q, k, v, attn_mask=mask), state


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.d_model, c.d_mlp, bias=False)
        self.up_proj = nn.Linear(c.d_model, c.d_mlp, bias=False)
        self.down_proj = nn.Linear(c.d_mlp, c.d_model, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# ---------------------------------------------------------------------------------------------------------------------
# The language model: blocks of a mixer each. MIXERS, below, has more of them; the rest of the file may wait.


class Block(nn.Module):
    """x + mixer(norm(x)), and where the layer's name ends in "+mlp", x + mlp(norm(x)) after it.

    The maps that write into the residual stream, a mixer's out_proj and the MLP's down_proj, begin smaller in a deep
    model, by the square root of the number of layers (much as in GPT-2).
    """

    def __init__(self, c, layer):
        super().__init__()
        name = layer.removesuffix("+mlp")
        mlp = name != layer
        self.norm = make_norm(c)
        self.mixer = MIXERS[name](c)
        self.mlp_norm, self.mlp = (make_norm(c), MLP(c)) if mlp else (None, None)
        self.dropout = nn.Dropout(c.dropout)
        with torch.no_grad():
            self.mixer.out_proj.weight /= math.sqrt(len(c.layers))
            if mlp:
                self.mlp.down_proj.weight /= math.sqrt(len(c.layers))

    def forward(self, x, state=None, upto=None):
        y, state = self.mixer(self.norm(x), state, upto)
        return self.go_on(x, y), state

    def go_on(self, x, y):
        """What comes after the mixer: x is the block's input, y the mixer's output."""
        x = x + self.dropout(y)
        if self.mlp is not None:
            x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


def check_tokens(tokens):
    """ValueError unless tokens are (b, l) with at least one position."""
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}, expected (b, l), l >= 1")


class LM(nn.Module):
    """Tokens (b, l) -> logits (b, l, vocab), at each position for the token after it, and the state after the last
    position, or after the first upto. Under autocast the residual stream stays in the parameters' dtype and recurrent
    states in float32; other activations may be bfloat16. With last, logits of the last position only.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        require(not c.block, f"block {c.block} is for an Encoder")
        self.constant_memory = "attention" not in c.kinds or c.window > 0  # its state does not grow
        self.embedding = nn.Embedding(c.vocab, c.d_model)
        self.layers = nn.ModuleList(Block(c, layer) for layer in c.layers)
        self.norm_f = make_norm(c)
        self.lm_head = nn.Linear(c.d_model, c.vocab, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)  # the first guess is nearly uniform
        if c.tie:
            self.embedding.weight = self.lm_head.weight

    def forward(self, tokens, state=None, upto=None, last=False):
        check_tokens(tokens)
        if state and len(state) != len(self.layers):
            raise ValueError(f"a state of {len(state)} layers, expected {len(self.layers)}")
        if upto is not None and not 0 <= upto <= tokens.shape[1]:
            raise ValueError(f"upto is {upto}, expected from 0 to l, {tokens.shape[1]}")
        x = self.embedding(tokens)
        states = []
        for layer, s in zip(self.layers, state or [None] * len(self.layers)):
            x, s = layer(x, s, upto)
            states.append(s)
        if last:
            x = x[:, -1:]
        return self.lm_head(self.norm_f(x)), tuple(states)


# ---------------------------------------------------------------------------------------------------------------------
# Mamba-3


class Mamba3State(NamedTuple):
    phi: torch.Tensor  # (b, nh, pairs), by how much the pairs of B's and C's numbers have turned
    h: torch.Tensor    # (b, nh, p, n)
    B: torch.Tensor    # (b, nh, n), of the last position, normed, biased and turned
    x: torch.Tensor    # (b, nh, p), of the last position


def outer(x, B):
    """x B^T of every head: x (b, nh, p), B (b, nh, n) -> (b, nh, p, n)."""
    return x[..., None] * B[:, :, None]


def turn(x, phi):
    """x (..., n) with channels 2i and 2i + 1 rotated by phi_i (..., pairs); those beyond stay."""
    n = 2 * phi.shape[-1]
    turned = torch.stack(spin(x[..., 0:n:2], x[..., 1:n:2], phi), dim=-1)
    return torch.cat([turned.flatten(-2), x[..., n:]], dim=-1)


class Mamba3(nn.Module):
    """The block of Mamba-3 (Lahoti et al. 2026, 2603.15569) of rank 1, which the paper calls SISO.

    h_t = a_t h_{t-1} + (1 - w_t) dt_t a_t x_{t-1} B_{t-1}^T + w_t dt_t x_t B_t^T,   a_t = exp(dt_t A_t)
    y_t = h_t C_t + D x_t,   output W_out (y * silu(z))

    Three things are new. Both ends of a step count, with weights w and 1 - w (1/2 is discretize's trapezoid), so there
    is no convolution. A comes from the input, as dt does. And B_t and C_t are normed, biased, and turned, R(phi_t), in
    pairs of numbers by phi_t = phi_{t-1} + theta_t dt_t. So R(phi_i) C_i . R(phi_j) B_j = C_i . R(phi_j - phi_i) B_j
    depends on the turn since j, as if the state itself turned back by theta dt in each step: complex decays, as S4 has,
    in real numbers. (Attention's rotary positions turn by a fixed angle per step.) For example, in a string of bits a
    turn by pi at every 1 flips the sign, and so the sign of a pair holds the parity. dt, A, w are one number per head;
    theta has n // 4 numbers for all heads: about half of n turns, the rest stays.
    """

    def __init__(self, c):
        super().__init__()
        d = c.expand * c.d_model
        n = c.d_state
        require(n >= 4, f"d_state {n}: mamba3 needs 4 or more to turn")
        self.heads = heads_of(c)
        self.groups = c.n_group
        # z | x | B | C | dt | A | w | theta
        self.parts = [d, d, self.groups * n, self.groups * n, *[self.heads] * 3, n // 4]
        self.in_proj = nn.Linear(c.d_model, sum(self.parts), bias=False)
        self.dt_bias = nn.Parameter(init_dt_bias(self.heads))
        self.B_norm = nn.RMSNorm(n, eps=1e-5)
        self.C_norm = nn.RMSNorm(n, eps=1e-5)
        self.B_bias = nn.Parameter(torch.ones(self.heads, 1, n))  # the 1 is the rank
        self.C_bias = nn.Parameter(torch.ones(self.heads, 1, n))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.out_proj = nn.Linear(d, c.d_model, bias=False)

    def forward(self, x, state=None, upto=None):
        z, x, B, C, *rest = self.in_proj(x).split(self.parts, dim=-1)
        wide = torch.promote_types(x.dtype, torch.float32)
        dt, A, w, theta = (t.to(wide) for t in rest)
        # (b, l, g, n), which autocast has made narrower than the norms' weights
        B, C = (t.unflatten(-1, (self.groups, -1)).to(self.D.dtype) for t in (B, C))
        x = x.unflatten(-1, (self.heads, -1))  # (b, l, nh, p)
        dt = F.softplus(dt + self.dt_bias)  # (b, l, nh)
        # as in the authors' code since June 2026: -1 - A, or -1/(1 - A) if A < 0, at most -1e-4
        A = -(F.relu(A) + 1 / (1 - A.clamp(max=0))).clamp(min=1e-4)
        theta = math.pi * torch.tanh(theta)
        y, state = self.recur(x, dt, A, torch.sigmoid(w), theta, self.B_norm(B), self.C_norm(C),
                              state, upto)
        return self.out_proj(y.flatten(2).to(z.dtype) * F.silu(z)), state

    def recur(self, x, dt, A, w, theta, B, C, state, upto):
        """y (b, l, nh, p) and the state after the first upto positions; theta (b, l, pairs), B, C (b, l, g, n) normed.

        One ssd_scan does it. With e_t = (1 - w_t) dt_t the recurrence is
            h_t = a_t (h_{t-1} + e_t x_{t-1} B_{t-1}^T) + w_t dt_t x_t B_t^T.
        Call the bracket H_{t-1}, and add e_{t+1} x_t B_t^T on both sides:
            H_t = a_t H_{t-1} + (w_t dt_t + e_{t+1}) x_t B_t^T,      h_t = H_t - e_{t+1} x_t B_t^T.
        e_{t+1} belongs to the next input, so it is taken out of y_t, and out of the state that is returned (which costs
        float32 some digits of y_t where dt_{t+1} is very large):
            y_t = H_t C_t - e_{t+1} (B_t . C_t) x_t + D x_t.         e_l, after the last, is taken as 0.
        """
        B = per_head(B, self.heads, 2) + self.B_bias[:, 0]  # (b, l, nh, n)
        C = per_head(C, self.heads, 2) + self.C_bias[:, 0]
        phi = theta[:, :, None] * dt[..., None]  # (b, l, nh, pairs)
        phi = phi.cumsum(1, dtype=angle_dtype(x.device))
        if state is None:
            no_phi, no_B, no_x = (torch.zeros_like(t[:, 0]) for t in (phi, B, x))
            no_h = outer(no_x, no_B).to(dt.dtype)
            state = Mamba3State(no_phi.to(dt.dtype), no_h, no_B, no_x)  # all zero
        if state.x.shape != x[:, 0].shape:
            raise ValueError(f"a state's x has shape {tuple(state.x.shape)}, "
                             f"expected {tuple(x[:, 0].shape)}")
        phi = ((phi + state.phi[:, None]) % (2 * math.pi)).to(dt.dtype)
        B = turn(B, phi)
        C = turn(C, phi)
        e = F.pad((1 - w) * dt, (0, 0, 0, 1))[..., None]  # (b, l + 1, nh, 1), 0 after the last
        H = state.h + outer(e[:, 0] * state.x, state.B)
        u = ((w * dt)[..., None] + e[:, 1:]) * x
        y, H = ssd_scan(u, dt * A, B, C, H, upto=upto)
        y = y + (self.D[:, None] - e[:, 1:] * (B * C).sum(-1, keepdim=True)) * x
        end = x.shape[1] if upto is None else upto
        if end == 0:
            return y, state
        phi, B, x = (t[:, end - 1].clone() for t in (phi, B, x))  # not views, of all positions
        return y, Mamba3State(phi, H - outer(e[:, end] * x, B), B, x)


# ---------------------------------------------------------------------------------------------------------------------
# S4 and S4D: every channel is a linear system of its own, with A, B, C and dt that do not depend on the input. Skip
# them until you have read section 3 of scan.py.


def complex_of(pairs):
    """Parameters (..., 2) as complex numbers, complex64 or wider."""
    return torch.view_as_complex(pairs.to(torch.promote_types(pairs.dtype, torch.float32)))


class S4State(NamedTuple):
    h: torch.Tensor  # (b, d, modes), complex


class S4D(nn.Module):
    """The layer of S4D (Gu et al. 2022): d_model diagonal systems, then one linear map across channels, as S4 has it.

    y = s4d(x, dt, A, 1, C, D);   output glu(W_out gelu(y)): one half gates the other.   B is 1, since only C B matters.
    A real system with n = d_state numbers of state is n/2 complex modes and their conjugates. One of each pair is kept
    and C doubled (S4, below, puts the others back instead). Re A = -exp(.) stays negative. A complex parameter is kept
    as pairs of real numbers, (d, n/2, 2), or as two tensors, since .to(dtype) would drop an imaginary part. The modes
    begin as -1/2 + i pi j (S4D-Lin). A small change of dt or A changes the whole kernel, so these learn slowly.
    """
    slow = ("log_dt", "log_A_real", "A_imag")  # train.py: a tenth of the learning rate

    def __init__(self, c):
        super().__init__()
        d = c.d_model
        require_multiple("d_state", c.d_state, 2, "the pairs of s4 and s4d")
        modes = c.d_state // 2
        self.log_dt = nn.Parameter(init_log_dt(d))
        self.log_A_real = nn.Parameter(torch.full((d, modes), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(float(modes)).repeat(d, 1))
        self.C = nn.Parameter(torch.view_as_real(torch.randn(d, modes, dtype=torch.complex64)))
        self.D = nn.Parameter(torch.randn(d))
        self.out_proj = nn.Linear(d, 2 * d)

    def system(self, x, h, upto):
        A = complex_of(torch.stack([-torch.exp(self.log_A_real), self.A_imag], dim=-1))
        C = 2 * complex_of(self.C)
        return s4d(x, torch.exp(self.log_dt), A, 1.0, C, self.D, h, upto=upto)

    def forward(self, x, state=None, upto=None):
        y, h = self.system(x, state.h if state else None, upto)
        return F.glu(self.out_proj(F.gelu(y)), dim=-1), S4State(h)


class S4(S4D):
    """The layer of S4 (Gu et al. 2021): the same with HiPPO-LegS, A = diag(Lambda) - P P^*, and a trained B.

    P P^* ties every mode to every other, so the conjugates are computed too; only their parameters are shared.
    """
    slow = (*S4D.slow, "P", "B")  # as its authors train it

    def __init__(self, c):
        super().__init__(c)
        half = c.d_state // 2
        # sorted, so the second half has Im Lambda > 0
        Lambda, P, B = (t[half:].to(torch.complex64).repeat(c.d_model, 1)
                        for t in dplr_legs(c.d_state)[:3])
        self.log_A_real = nn.Parameter((-Lambda.real).log())
        self.A_imag = nn.Parameter(Lambda.imag.clone())
        self.P = nn.Parameter(torch.view_as_real(P))
        self.B = nn.Parameter(torch.view_as_real(B))

    def system(self, x, h, upto):
        Lambda = torch.stack([-torch.exp(self.log_A_real), self.A_imag], dim=-1)
        halves = [complex_of(t) for t in (Lambda, self.P, self.B, self.C)]
        pairs = [torch.cat([t, t.conj()], dim=-1) for t in halves]
        return s4(x, torch.exp(self.log_dt), *pairs, self.D, h, upto=upto)


MIXERS = {"s4": S4, "s4d": S4D, "mamba": Mamba, "mamba2": Mamba2, "mamba3": Mamba3,
          "attention": Attention}


# ---------------------------------------------------------------------------------------------------------------------
# The bidirectional encoder: BiGS, and the three models it is compared with
#
# An encoder sees both sides of every position, so there is no state to carry: a layer is y = layer(x). What a mixer
# exchanges between positions, and what the block around it does, are two choices:
#
#                 gated                                       stacked
#    s4d          BiGS                                        a transformer, its attention replaced
#    attention    a gate instead of the two-layer network     a transformer
#
# At an even m = expand * d_model, with n_kv_head = n_head, all four have 4 d_model^2 + 3 d_model m weights per layer,
# not counting biases and the SSMs' few numbers. The names du, duc, dv, dol, do, fs4, bs4 are the released checkpoint's
# (d is for dense). SharedS4D needs section 3 of scan.py and S4D above; without them take its K as a learned kernel. In
# these classes h is no state but norm(x), as in the paper.


class SharedS4D(nn.Module):
    """The SSM of BiGS: one real kernel for all channels, y = K * x + D x (Wang et al. 2022; x (b, l, d)).

    K_j = Re sum_n C_n (exp(dt a_n) - 1)/a_n exp(j dt a_n),   a_n = min(A_real, -1e-4) + i A_imag,
    with dt = exp(log_dt), B = 1. The n modes begin as dplr_legs' Lambda, both of each conjugate pair, so nothing is
    doubled.
    """
    slow = ("log_dt", "A_real", "A_imag")

    def __init__(self, c):
        super().__init__()
        A = dplr_legs(c.d_state)[0]
        self.A_real = nn.Parameter(A.real.float())
        self.A_imag = nn.Parameter(A.imag.float())
        self.C = nn.Parameter(torch.randn(c.d_state, 2) / math.sqrt(2))  # real and imaginary part
        self.D = nn.Parameter(torch.ones(1))
        self.log_dt = nn.Parameter(init_log_dt(1) + math.log(10))  # dt in [0.01, 1]

    def forward(self, x):
        A = complex_of(torch.stack([self.A_real.clamp(max=-1e-4), self.A_imag], dim=-1))
        C = complex_of(self.C)
        K = s4d_kernel(self.log_dt.exp(), A[None], 1.0, C[None], x.shape[1])  # (1, l)
        return fft_conv(x, K, self.D)


class BidirectionalS4D(nn.Module):
    """The two directions of BiGS:  W_duc SSM(gelu(W_du h)), over the text as it stands and over the text reversed.

    The product of the two, or in a stacked block, which has no gates, their sum. Both see the position itself.
    """

    def __init__(self, c):
        super().__init__()
        d = c.d_model
        self.du_forward, self.du_backward = nn.Linear(d, d), nn.Linear(d, d)
        self.duc_forward, self.duc_backward = nn.Linear(d, d), nn.Linear(d, d)
        self.fs4, self.bs4 = SharedS4D(c), SharedS4D(c)
        self.join = torch.mul if c.block == "gated" else torch.add
        self.gelu = nn.GELU(c.gelu)

    def forward(self, h):
        past = self.fs4(self.gelu(self.du_forward(h)))
        future = self.gelu(self.du_backward(h))
        future = self.bs4(future.flip(1)).flip(1)
        return self.join(self.duc_forward(past), self.duc_backward(future))


class BidirectionalAttention(Attention):
    """Attention without a mask; its rotary positions reach any length."""

    def forward(self, h):
        return self.attend(*self.project(h, 0))


ENCODER_MIXERS = {"s4d": BidirectionalS4D, "attention": BidirectionalAttention}


class BiGS(nn.Module):
    """The gated block (Wang et al. 2022, 2212.10544): y = x + W_do (gelu(W_dol mix(h)) * gelu(W_dv h)), h = norm(x)."""

    def __init__(self, c, layer):
        super().__init__()
        d = c.d_model
        m = c.expand * d
        self.norm = make_norm(c)
        self.mixer = ENCODER_MIXERS[layer](c)
        self.dv, self.dol, self.do = nn.Linear(d, m), nn.Linear(d, m), nn.Linear(m, d)
        self.gelu = nn.GELU(c.gelu)

    def forward(self, x):
        h = self.norm(x)
        gate = self.gelu(self.dv(h))  # (b, l, m)
        return x + self.do(self.gelu(self.dol(self.mixer(h))) * gate)


class Stacked(nn.Module):
    """A transformer's block: x + mix(norm(x)), then x + W_2 gelu(W_1 norm(x)) with as many weights as BiGS's gates."""

    def __init__(self, c, layer):
        super().__init__()
        d = c.d_model
        m = 3 * c.expand * d // 2
        self.norm = make_norm(c)
        self.mixer = ENCODER_MIXERS[layer](c)
        self.mlp_norm = make_norm(c)
        self.up_proj, self.down_proj = nn.Linear(d, m), nn.Linear(m, d)
        self.gelu = nn.GELU(c.gelu)

    def forward(self, x):
        x = x + self.mixer(self.norm(x))
        return x + self.down_proj(self.gelu(self.up_proj(self.mlp_norm(x))))


BLOCKS = {"gated": BiGS, "stacked": Stacked}


class Encoder(nn.Module):
    """Tokens (b, l) -> logits (b, l, vocab), at each position for its own token, from both sides; the state is None.

    state and upto are those of an LM, and ignored. As in BERT, the embeddings are normed, and the head is a linear
    layer, the exact gelu, a norm, and the embedding's weight again. There is no mask for padding.
    """
    constant_memory = False  # there is no state to carry on

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        require(c.block, f"an Encoder needs a block, {' or '.join(BLOCKS)}")
        self.embedding = nn.Embedding(c.vocab, c.d_model)
        self.position_table = nn.Embedding(c.n_position, c.d_model) if c.n_position else None
        self.norm = make_norm(c)
        self.dropout = nn.Dropout(c.dropout)
        self.layers = nn.ModuleList(BLOCKS[c.block](c, layer) for layer in c.layers)
        self.head = nn.Linear(c.d_model, c.d_model)
        self.head_norm = make_norm(c)
        self.lm_head = nn.Linear(c.d_model, c.vocab)
        self.lm_head.weight = self.embedding.weight
        for table in filter(None, (self.embedding, self.position_table)):
            nn.init.normal_(table.weight, std=0.02)
        nn.init.zeros_(self.lm_head.bias)

    def forward(self, tokens, state=None, upto=None):
        check_tokens(tokens)
        x = self.embedding(tokens)
        if self.position_table is not None:
            l, rows = tokens.shape[1], self.config.n_position
            require(l <= rows, f"{l} tokens, but the table of positions has {rows}")
            x = x + self.position_table.weight[:l]
        x = self.dropout(self.norm(x))
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.head_norm(F.gelu(self.head(x)))), None


def make_model(config):
    """An Encoder or an LM."""
    return Encoder(config) if config.block else LM(config)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save(path, model, layout="own", **extra):
    """Config, weights and whatever extra a run keeps, in one file, which appears under its name when it is whole.

    Any other layout of data/checkpoints.py is for another program (hf for transformers), and holds no extra.
    """
    config = dataclasses.asdict(model.config)
    if layout != "own":
        return write(path, layout, config, model.state_dict())
    content = {**extra, "format": FORMAT, "torch": str(torch.__version__), "config": config,
               "model": model.state_dict()}
    with whole_file(Path(path)) as file:
        torch.save(content, file)


def load(path, device="cpu"):
    """(model, extra) from a file or a folder: of a run (best.pt, or last.pt if nothing has been validated yet), or a
    published checkpoint, in any layout of data/checkpoints.py.

    The tensors of a float32 file become the parameters: on a CPU there is never a second copy of the weights.
    """
    path = find(Path(path))
    content = read_file(path)
    try:
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            content = read(path, content)
        if not isinstance(content.get("flags", {}), dict):  # train.py's, kept in extra
            del content["flags"]
        with torch.device("meta"):
            model = make_model(Config(**content.pop("config")))
        model.load_state_dict(content.pop("model"), assign=True)  # or says what does not fit
        weights = [*model.parameters()]
        require(all(p.is_floating_point() and p.layout == torch.strided and not p.is_meta
                    for p in weights), "its weights are no floats")
        double = any(p.dtype == torch.float64 for p in weights)
        dtype = torch.float64 if double else torch.float32  # float16 makes a file small
        for p in weights:  # a file may hold expanded tensors, whose elements share memory
            p.data = p.data.to(dtype).contiguous()
    except LookupError as e:
        raise UserError(f"{path}, or a config.json beside it, lacks {e}") from e
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as e:
        raise UserError(f"{path}, or a config.json beside it, does not fit this program: "
                        + " ".join(str(e).split())[:400]) from e
    if model.config.tie:  # which assign has ended
        model.embedding.weight = model.lm_head.weight
    return model.to(device).eval(), content
