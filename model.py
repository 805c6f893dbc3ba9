"""Mixers, blocks and the byte language model; letters as in scan.py.

Everything here has one signature: y, state = layer(x, state). A state of None is the beginning of a sequence, and any
later state continues it, so training (l = a window), prefill (l = a prompt), chunked evaluation and decoding (l = 1)
are one code path with a different l. States are NamedTuples of tensors that nothing mutates: keeping the old variable
is the rollback. y, state = layer(x, state, upto) returns the state after the first keep positions instead, and y for
all: what reads ahead, as speculative sampling does, keeps only what came true. upto is a number from 1 to l, or in
Mamba's layers a tensor (b,), from 0 to l for each row. Only the encoder's layers, which see both sides of every
position, have no state.
"""
import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from data.checkpoints import FILES, FORMAT, find, misfits, read, read_file, write
from data.files import UserError, whole_file
from scan import (dplr_legs, fft_conv, s4, s4d, s4d_init, s4d_kernel, selective_scan, ssd, takes_triton,
                  triton_conv)


MASK = 256  # the token that stands for a masked byte


@dataclasses.dataclass
class Config:
    """The shape of an LM. layers names each layer's mixer (a key of MIXERS), with "+mlp" where a SwiGLU block follows.

    With a block (a key of BLOCKS) it is the shape of an Encoder, and its mixers are keys of ENCODER_MIXERS.
    """
    layers: tuple = ("mamba2",) * 4
    block: str = ""       # encoder: gated or stacked
    d_model: int = 256
    vocab: int = 256
    d_state: int = 16     # n
    expand: int = 2       # Mamba: channels d = expand * d_model; encoder: m = expand * d_model
    d_conv: int = 4       # k, taps of the causal convolution
    head_dim: int = 64    # p, Mamba-2
    n_group: int = 1      # g, Mamba-2
    n_head: int = 4       # attention
    n_kv_head: int = 4    # attention: heads of k and v, each shared by n_head / n_kv_head queries
    window: int = 0       # attention: each position sees the last `window` positions; 0 = all
    rope_base: float = 10000.0
    rope_scaling: tuple = ()  # attention: Llama 3.1's four numbers, see slow_down
    d_mlp: int = 0        # hidden size of SwiGLU; 0 = 8/3 d_model, rounded up to a multiple of 32
    norm: str = "rms"     # rms (weight only) or layer (weight and bias)
    norm_eps: float = 1e-5
    bias: bool = False    # Mamba, Mamba-2: of the projections in and out; no released model has them
    conv_bias: bool = True
    merges: tuple = ()    # of byte pairs, where the tokens are words (data/bpe.py)
    tie: bool = True      # the head shares the embedding's weight
    dropout: float = 0.0
    gelu: str = "tanh"    # encoder's blocks: BiGS's were trained with the tanh form; none is the exact one, the head's
    n_position: int = 0   # encoder: rows of a learned table of positions; 0 = none, and any length
    n_type: int = 0       # encoder: rows of a table of segment types

    def __post_init__(self):
        self.layers, self.rope_scaling = tuple(self.layers), tuple(self.rope_scaling)
        self.merges = tuple(map(tuple, self.merges))
        if self.block and self.block not in BLOCKS:
            raise UserError(f"--block {self.block} is not one of {', '.join(BLOCKS)}")
        mixers = ENCODER_MIXERS if self.block else MIXERS
        for layer in self.layers:
            if (layer if self.block else layer.removesuffix("+mlp")) not in mixers:
                raise UserError(f'layer "{layer}" is not one of {", ".join(mixers)}'
                                  + " for an encoder" * bool(self.block))
        for name in ("d_model", "vocab", "d_state", "expand", "d_conv", "head_dim", "n_head", "n_kv_head"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} is not positive")
        if not self.layers:
            raise UserError("--n_layer 0: a model needs at least one layer")
        kinds = self.kinds
        if "attention" in kinds:
            _divides(self.d_model, "d_model", self.n_head, "n_head", 2)
            _divides(self.n_head, "n_head", self.n_kv_head, "n_kv_head")
        if kinds & {"s4", "s4d"} and self.d_state % 2:
            raise UserError(f"--d_state {self.d_state} is odd, but s4 and s4d keep conjugate pairs; "
                              f"try {self.d_state + 1}")
        if "mamba2" in kinds:
            _divides(self.d_model, "d_model", self.head_dim, "head_dim", factor=self.expand)

    @property
    def kinds(self):
        """The mixers in use, a set of names."""
        return {layer.removesuffix("+mlp") for layer in self.layers}


def _divides(whole, whole_name, part, part_name, times=1, factor=1):
    """Error unless part * times divides whole * factor, with the nearest sizes of the whole that would do."""
    unit = part * times // math.gcd(part * times, factor)
    if whole % unit:
        low = max(whole // unit, 1) * unit
        product = f" times {factor}" if factor > 1 else ""
        also = " into even sizes" if times > 1 else ""
        raise UserError(f"--{whole_name} {whole}{product} is not divisible by --{part_name} {part}{also}; "
                          f"try --{whole_name} {low} or {low + unit}")


class Linear(nn.Linear):
    """y = W x + b. On a CPU a large W meets a single x as eight products of an eighth of the rows each, so that every
    thread reads rows of its own: at 20 GB/s where one product of the BLAS has 14 and memory 22 (two cores, float32)."""

    def forward(self, x):
        rows, columns = self.weight.shape
        if x.numel() != columns or rows % 8 or self.weight.numel() < 2**20 or x.device.type != "cpu":
            return super().forward(x)
        eighths = self.weight.view(8, -1, columns)
        y = torch.bmm(x.reshape(1, 1, -1).expand(8, -1, -1), eighths.mT).view(*x.shape[:-1], rows)
        return y if self.bias is None else y + self.bias


def make_norm(c):
    return nn.RMSNorm(c.d_model, eps=c.norm_eps) if c.norm == "rms" else nn.LayerNorm(c.d_model, eps=c.norm_eps)


# ---------------------------------------------------------------------------------------------------------------------
# S4 and S4D: every channel a linear system of its own that does not look at what it reads


def init_log_dt(size):
    """log dt for dt log-uniform in [0.001, 0.1]: a step that small remembers for 1/dt, hence 10 to 1,000 bytes."""
    return torch.rand(size) * math.log(100) + math.log(0.001)


class S4State(NamedTuple):
    h: torch.Tensor  # (b, d, modes), complex


class S4D(nn.Module):
    """The layer of S4D (Gu et al. 2022): d_model diagonal systems, then one linear map across channels, as S4 has it.

    y = s4d(x, dt, A, 1, C, D);   output a * sigmoid(b), (a, b) = W_out gelu(y).   B is 1, for C B is all that counts.
    n = d_state real numbers a channel are n/2 complex modes, each standing for itself and its conjugate: hence 2 C, and
    this is the only place with that 2. Re A = -exp(.) stays negative. Complex parameters are kept as pairs of real
    ones, (d, n/2, 2), since .to(dtype) would drop an imaginary part.
    """

    def __init__(self, c):
        super().__init__()
        d, A = c.d_model, s4d_init("lin", c.d_state)[0]
        self.log_dt = nn.Parameter(init_log_dt(d))
        self.log_A_real = nn.Parameter((-A.real).log().float().repeat(d, 1))  # (d, n/2)
        self.A_imag = nn.Parameter(A.imag.float().repeat(d, 1))
        self.C = nn.Parameter(torch.view_as_real(torch.randn(d, len(A), dtype=torch.complex64)))
        self.D = nn.Parameter(torch.randn(d))
        self.out_proj = Linear(d, 2 * d)

    def systems(self, x, h):
        A = torch.complex(-torch.exp(self.log_A_real), self.A_imag)
        return s4d(x, torch.exp(self.log_dt), A, 1.0, 2 * torch.view_as_complex(self.C), self.D, h)

    def forward(self, x, state=None, upto=None):
        before, = state or (None,)
        y, h = self.systems(x, before)
        if upto is not None:  # for all rows: with steps of their own they would be at different powers of Abar
            h = self.systems(x[:, :upto], before)[1]
        return F.glu(self.out_proj(F.gelu(y)), dim=-1), S4State(h)


class S4(S4D):
    """The layer of S4 (Gu et al. 2021): the same with HiPPO-LegS, A = diag(Lambda) - P P^*, and a trained B.

    P P^* ties every mode to every other, so the conjugates are computed too; only their parameters are shared.
    """

    def __init__(self, c):
        super().__init__(c)
        n = c.d_state
        Lambda, P, B, _ = (t[n // 2:].to(torch.complex64).repeat(c.d_model, 1) for t in dplr_legs(n))
        with torch.no_grad():
            self.log_A_real.copy_((-Lambda.real).log())
            self.A_imag.copy_(Lambda.imag)
        self.P, self.B = nn.Parameter(torch.view_as_real(P)), nn.Parameter(torch.view_as_real(B))

    def systems(self, x, h):
        Lambda = torch.complex(-torch.exp(self.log_A_real), self.A_imag)
        halves = [Lambda, *(torch.view_as_complex(t) for t in (self.P, self.B, self.C))]
        return s4(x, torch.exp(self.log_dt), *(torch.cat([t, t.conj()], dim=-1) for t in halves), self.D, h)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces that Mamba and Mamba-2 share


def _shifted_products(seen, taps, bias):
    """y_t = bias + sum_j taps_j x_{t+j}: seen (b, k-1+l, d), taps (k, d), bias (d,) -> y (b, l, d)."""
    l = seen.shape[1] - len(taps) + 1
    y = torch.addcmul(bias, seen[:, :l], taps[0])
    for j in range(1, len(taps)):
        y.addcmul_(seen[:, j:j + l], taps[j])
    return y


class _CausalConv(torch.autograd.Function):
    """_shifted_products with a backward of its own.

    The same shifted products run backwards, into one buffer: autograd would make a dozen tensors of the size of y, and
    a tenth of a training step on a CPU goes into touching their memory.
    """

    @staticmethod
    def forward(ctx, seen, taps, bias):
        ctx.save_for_backward(seen, taps)
        return _shifted_products(seen, taps, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        seen, taps = ctx.saved_tensors
        l = dy.shape[1]
        dseen, dtaps, buffer = torch.zeros_like(seen), torch.empty_like(taps), torch.empty_like(dy)
        for j in range(len(taps)):
            dseen[:, j:j + l].addcmul_(dy, taps[j])
            torch.sum(torch.mul(dy, seen[:, j:j + l], out=buffer), (0, 1), out=dtaps[j])
        return dseen, dtaps, dy.sum((0, 1))


def causal_conv(x, weight, bias, tail, upto=None):
    """Depthwise causal convolution: y_t = bias + sum_j weight_j x_{t-(k-1)+j}, so the last tap meets the present.

    x (b, l, d) · weight (d, 1, k), nn.Conv1d's layout · bias (d,) · tail (b, k-1, d), the inputs before x. None is 0.
    Returns y (b, l, d), in the parameters' dtype or wider, and the tail for what comes after position upto, or l.
    """
    (b, l, d), k = x.shape, weight.shape[2]
    if tail is None:
        tail = x.new_zeros(b, k - 1, d)
    if bias is None:
        bias = weight.new_zeros(d)
    seen = torch.cat([tail.to(x.dtype), x], dim=1)  # (b, k-1+l, d)
    if isinstance(upto, torch.Tensor):
        tail = seen.gather(1, (upto[:, None, None] + torch.arange(k - 1, device=x.device)[:, None]).expand(b, k - 1, d))
    else:
        end = l if upto is None else upto
        tail = seen[:, end:end + k - 1].clone(memory_format=torch.contiguous_format)  # a view would keep all of seen
    taps = weight[:, 0].T
    if takes_triton("auto", seen):
        return triton_conv(seen, taps, bias), tail
    wide = seen.to(torch.promote_types(x.dtype, weight.dtype))
    if l <= 32:  # all in one product: few operations for few bytes, and k times their memory
        return (wide.unfold(1, k, 1).mT * taps).sum(2) + bias, tail
    convolve = _CausalConv.apply if torch.is_grad_enabled() else _shifted_products  # bookkeeping costs as much again
    return convolve(wide, taps.contiguous(), bias), tail


def inverse_softplus(dt):
    """b with softplus(b) = dt > 0, in a form that does not overflow."""
    return dt + torch.log(-torch.expm1(-dt))


def init_dt_bias(size):
    """b with softplus(b) = dt, spread as in S4."""
    return inverse_softplus(torch.exp(init_log_dt(size)).clamp(min=1e-4))


class MambaState(NamedTuple):
    conv: torch.Tensor  # (b, k-1, channels), the last inputs of the convolution
    h: torch.Tensor     # Mamba (b, d, n), Mamba-2 (b, nh, p, n); float32 or wider


class Mamba(nn.Module):
    """The block of Mamba (Gu and Dao 2023, figure 3): gate and input, convolution, selective scan, gated output.

    u, z = W_in x;   u = silu(conv(u));   dt, B, C = W_x u;   y = selective_scan(u, softplus(W_dt dt + b), A, B, C, D);
    output W_out (y * silu(z)). Channels d = expand * d_model, A = -exp(A_log), dt through a bottleneck of d_model/16.
    """

    def __init__(self, c):
        super().__init__()
        d, n, rank = c.expand * c.d_model, c.d_state, math.ceil(c.d_model / 16)
        self.in_proj = Linear(c.d_model, 2 * d, bias=c.bias)
        self.conv1d = nn.Conv1d(d, d, c.d_conv, groups=d, bias=c.conv_bias)  # the weights; causal_conv does the work
        self.x_proj = Linear(d, rank + 2 * n, bias=False)
        self.dt_proj = Linear(rank, d)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, n + 1)).repeat(d, 1))  # S4D-Real: A = -1 .. -n
        self.D = nn.Parameter(torch.ones(d))
        self.out_proj = Linear(d, c.d_model, bias=c.bias)
        nn.init.uniform_(self.dt_proj.weight, -rank**-0.5, rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(init_dt_bias(d))

    def forward(self, x, state=None, upto=None):
        n = self.A_log.shape[1]
        conv, h = state or (None, None)
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (b, l, d)
        u, conv = causal_conv(u, self.conv1d.weight, self.conv1d.bias, conv, upto)
        u = F.silu(u)
        dt, B, C = self.x_proj(u).split([self.dt_proj.in_features, n, n], dim=-1)
        dt = F.softplus(F.linear(dt, self.dt_proj.weight) + self.dt_proj.bias)
        y, h = selective_scan(u, dt, -torch.exp(self.A_log), B, C, self.D, h, keep=upto)
        return self.out_proj(y * F.silu(z)), MambaState(conv, h)


class Mamba2(nn.Module):
    """The block of Mamba-2 (Dao and Gu 2024, section 7): one projection for all, one decay a head, a norm at the end.

    z, u, B, C, dt = W_in x;   u, B, C = silu(conv(u, B, C));   y = ssd(u, softplus(dt + dt_bias), A, B, C, D);
    output W_out (RMSNorm(y * silu(z))): the gate comes before the norm, and each of the g groups is normed on its own.
    """

    def __init__(self, c):
        super().__init__()
        d, nh = c.expand * c.d_model, c.expand * c.d_model // c.head_dim
        self.sizes = [d, d + 2 * c.n_group * c.d_state, nh]  # z | x B C | dt
        self.heads, self.groups, self.n = nh, c.n_group, c.d_state
        self.in_proj = Linear(c.d_model, sum(self.sizes), bias=c.bias)
        self.conv1d = nn.Conv1d(self.sizes[1], self.sizes[1], c.d_conv, groups=self.sizes[1], bias=c.conv_bias)
        self.dt_bias = nn.Parameter(init_dt_bias(nh))
        self.A_log = nn.Parameter(torch.log(torch.empty(nh).uniform_(1, 16)))
        self.D = nn.Parameter(torch.ones(nh))
        self.norm = nn.RMSNorm(d, eps=c.norm_eps)  # holds the weight; forward norms each group
        self.out_proj = Linear(d, c.d_model, bias=c.bias)

    def forward(self, x, state=None, upto=None):
        conv, h = state or (None, None)
        z, u, dt = self.in_proj(x).split(self.sizes, dim=-1)
        u, conv = causal_conv(u, self.conv1d.weight, self.conv1d.bias, conv, upto)
        d, gn = self.sizes[0], self.groups * self.n
        u, B, C = F.silu(u).split([d, gn, gn], dim=-1)
        dt = F.softplus(dt + self.dt_bias)  # (b, l, nh)
        y, h = ssd(u.unflatten(-1, (self.heads, -1)), dt, -torch.exp(self.A_log),
                   B.unflatten(-1, (self.groups, -1)), C.unflatten(-1, (self.groups, -1)), self.D, h, keep=upto)
        y = (y.flatten(2) * F.silu(z)).unflatten(-1, (self.groups, -1))
        y = F.rms_norm(y, y.shape[-1:], eps=self.norm.eps).flatten(2) * self.norm.weight
        return self.out_proj(y), MambaState(conv, h)


# ---------------------------------------------------------------------------------------------------------------------
# Attention: the baseline, and the teacher to distil from


class AttentionState(NamedTuple):
    k: torch.Tensor         # (b, positions kept, n_kv_head, head size), already rotated
    v: torch.Tensor
    position: torch.Tensor  # (), how many positions have passed


def slow_down(frequency, factor, low, high, length):
    """Llama 3.1's rotary scaling, for a context factor times longer than the length of pretraining.

    A channel that turned fewer than `low` times in that length is slowed down by the factor, one that turned more than
    `high` times stays as it is, and those between are mixed in proportion.
    """
    kept = ((length * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / factor)


def rotate(x, position, base, scaling=()):
    """Rotary positions (Su et al. 2021), Llama's layout: channels i and i + size/2 turn by position * base^(-2i/size).

    x (b, l, heads, size), its first position given; scaling, if any, for slow_down; angles are float32 or wider.
    """
    half = x.shape[3] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = base ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    if scaling:
        frequency = slow_down(frequency, *scaling)
    angle = (position + torch.arange(x.shape[1], device=x.device, dtype=dtype))[:, None, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)  # (l, 1, half)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


class Attention(nn.Module):
    """Causal self-attention as in Llama: rotary positions, grouped queries, no biases.

    Its state is the cache of keys and values. With a window w every position sees itself and the w - 1 before it, so a
    cache of w - 1 is exact: constant memory here too, at the price of a model that cannot look further back.
    upto is one number: rows that keep different numbers of positions would need caches of different lengths.
    """

    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.size = c.n_head, c.n_kv_head, c.d_model // c.n_head
        self.window, self.rope = c.window, (c.rope_base, c.rope_scaling)
        self.q_proj = Linear(c.d_model, self.heads * self.size, bias=False)
        self.k_proj = Linear(c.d_model, self.kv_heads * self.size, bias=False)
        self.v_proj = Linear(c.d_model, self.kv_heads * self.size, bias=False)
        self.o_proj = Linear(self.heads * self.size, c.d_model, bias=False)

    def forward(self, x, state=None, upto=None):
        l = x.shape[1]
        position = x.new_zeros((), dtype=torch.long) if state is None else state.position
        q = rotate(self.q_proj(x).unflatten(-1, (self.heads, -1)), position, *self.rope)
        k = rotate(self.k_proj(x).unflatten(-1, (self.kv_heads, -1)), position, *self.rope)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1))
        if state is not None:
            k, v = torch.cat([state.k.to(k.dtype), k], dim=1), torch.cat([state.v.to(v.dtype), v], dim=1)
        passed = l if upto is None else upto
        end = k.shape[1] - l + passed
        first = max(0, end - self.window + 1) if self.window else 0
        cache = (t[:, first:end] for t in (k, v))
        cache = (t.clone() for t in cache) if self.window and l > 1 else cache  # a view would keep a long prompt's
        state = AttentionState(*cache, position + passed)
        share = self.heads // self.kv_heads
        q, k, v = (t.repeat_interleave(r, dim=2).transpose(1, 2) for t, r in ((q, 1), (k, share), (v, share)))
        if l > 1 and (k.shape[2] > l or 0 < self.window < l):
            seen, keys = k.shape[2] - l, torch.arange(k.shape[2], device=x.device)
            ahead = keys - seen - torch.arange(l, device=x.device)[:, None]  # (l, keys): how far a key lies ahead
            mask = ahead <= 0 if not self.window else (ahead <= 0) & (ahead > -self.window)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=l > 1)
        return self.o_proj(y.transpose(1, 2).flatten(2)), state


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, c):
        super().__init__()
        hidden = c.d_mlp or -(-8 * c.d_model // 3 // 32) * 32
        self.gate_proj = Linear(c.d_model, hidden, bias=False)
        self.up_proj = Linear(c.d_model, hidden, bias=False)
        self.down_proj = Linear(hidden, c.d_model, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


MIXERS = {"s4": S4, "s4d": S4D, "mamba": Mamba, "mamba2": Mamba2, "attention": Attention}
KEEP_BY_ROW = {"mamba", "mamba2"}  # whose keep may be a tensor (b,)

# ---------------------------------------------------------------------------------------------------------------------
# The language model


class Block(nn.Module):
    """x + mixer(norm(x)), and where the layer's name ends in "+mlp", x + mlp(norm(x)) after it."""

    def __init__(self, c, layer):
        super().__init__()
        self.norm = make_norm(c)
        self.mixer = MIXERS[layer.removesuffix("+mlp")](c)
        self.mlp_norm, self.mlp = (make_norm(c), MLP(c)) if layer.endswith("+mlp") else (None, None)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x, state=None, upto=None):
        y, state = self.mixer(self.norm(x), state, upto)
        x = x + self.dropout(y)
        if self.mlp is not None:
            x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x, state


class LM(nn.Module):
    """Tokens (b, l) -> logits (b, l, vocab), each position's of the next token, and the state after the last, or after
    the first keep.

    The residual stream stays in the parameters' dtype; under autocast only the projections are narrow.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.embedding = nn.Embedding(c.vocab, c.d_model)
        self.layers = nn.ModuleList(Block(c, layer) for layer in c.layers)
        self.norm_f = make_norm(c)
        self.lm_head = Linear(c.d_model, c.vocab, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)  # small logits: the first guess is nearly uniform
        if c.tie:
            self.embedding.weight = self.lm_head.weight
        with torch.no_grad():  # every layer adds to the residual stream: keep its variance from growing with depth
            for name, p in self.named_parameters():
                if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
                    p /= math.sqrt(len(c.layers))

    def forward(self, tokens, state=None, upto=None):
        if upto is not None:
            self.check_keep(upto, tokens.shape[1])
        x, states = self.embedding(tokens), []
        for layer, s in zip(self.layers, state or [None] * len(self.layers)):
            x, s = layer(x, s, upto)
            states.append(s)
        return self.lm_head(self.norm_f(x)), tuple(states)

    def check_keep(self, upto, l):
        """ValueError unless upto is a number from 1 to l, or a tensor where all layers are Mamba's."""
        if isinstance(upto, torch.Tensor):
            if others := self.config.kinds - KEEP_BY_ROW:
                raise ValueError(f"layers of {', '.join(sorted(others))} keep one number of positions for all rows")
        elif not 1 <= upto <= l:
            raise ValueError(f"upto {upto} is not from 1 to {l}, the number of positions")

    @property
    def recurrent(self):
        """True if no layer is attention: the state has one size from the first byte on."""
        return not any(layer.startswith("attention") for layer in self.config.layers)


# ---------------------------------------------------------------------------------------------------------------------
# The bidirectional encoder: BiGS, and the three models it is compared with
#
# An encoder sees both sides of every position, so there is no state to carry: a layer is y = layer(x, real), with real
# (b, l) False where a text has ended and padding begins, or None. What a mixer exchanges between positions, and what
# the block around it does, are two choices:
#
#                 gated                                       stacked
#    s4d          BiGS                                        a transformer, its attention replaced
#    attention    a gate instead of the two-layer network     a transformer
#
# At m = expand * d_model all four have 4 d_model^2 + 3 d_model m weights a layer,
# not counting biases and the SSMs' few numbers.


class SharedS4D(nn.Module):
    """The SSM of BiGS: one real kernel for all channels, y = K * x + D x (Wang et al. 2022; x (b, l, d)).

    K_l = Re sum_n C_n (exp(dt a_n) - 1)/a_n exp(l dt a_n),   a_n = min(A_real, -1e-4) + i A_imag,
    with dt = exp(log_dt), B = 1. The n modes begin as the eigenvalues of HiPPO-LegS's normal part, both of each
    conjugate pair, so nothing is doubled.
    """

    def __init__(self, c):
        super().__init__()
        A = dplr_legs(c.d_state)[0]
        self.A_real = nn.Parameter(A.real.float())
        self.A_imag = nn.Parameter(A.imag.float())
        self.C = nn.Parameter(torch.randn(c.d_state, 2) / math.sqrt(2))  # real and imaginary part
        self.D = nn.Parameter(torch.ones(1))
        self.log_dt = nn.Parameter(torch.rand(1) * math.log(100) - math.log(100))  # dt log-uniform in [0.01, 1]

    def forward(self, x):
        A = torch.complex(self.A_real.clamp(max=-1e-4), self.A_imag)
        C = torch.complex(self.C[:, 0], self.C[:, 1])
        K = s4d_kernel(self.log_dt.exp(), A[None], 1.0, C[None], x.shape[1])  # (1, l)
        return fft_conv(x, K, self.D)


class BidirectionalS4D(nn.Module):
    """The two directions of BiGS:  W_duc SSM(gelu(W_du h)), over the text as it stands and over the text reversed.

    The product of the two, in a stacked block (which has no gates) their sum. Both see the present. Padding enters the
    SSMs as zeros, so that what it holds never reaches the text; the published models let it flow backwards, as does
    real = None.
    """

    def __init__(self, c):
        super().__init__()
        d = c.d_model
        self.du_forward, self.du_backward = Linear(d, d), Linear(d, d)
        self.duc_forward, self.duc_backward = Linear(d, d), Linear(d, d)
        self.fs4, self.bs4 = SharedS4D(c), SharedS4D(c)
        self.join, self.gelu = torch.mul if c.block == "gated" else torch.add, c.gelu

    def forward(self, h, real=None):
        f, b = (F.gelu(du(h), approximate=self.gelu) for du in (self.du_forward, self.du_backward))
        if real is not None:
            f, b = f * real[..., None], b * real[..., None]
        forward = self.duc_forward(self.fs4(f))
        return self.join(forward, self.duc_backward(self.bs4(b.flip(1)).flip(1)))


class BidirectionalAttention(Attention):
    """Attention without a mask, except over padding; its rotary positions reach any length."""

    def forward(self, h, real=None):
        q, k, v = (proj(h).unflatten(-1, (-1, self.size)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, 0, *self.rope), rotate(k, 0, *self.rope)
        mask = None if real is None else real[:, None, None]
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


ENCODER_MIXERS = {"s4d": BidirectionalS4D, "attention": BidirectionalAttention}


class BiGS(nn.Module):
    """The gated block (Wang et al. 2022, 2212.10544): y = x + W_do (gelu(W_dol mix(h)) * gelu(W_dv h)), h = norm(x)."""

    def __init__(self, c, layer):
        super().__init__()
        d, m = c.d_model, c.expand * c.d_model
        self.norm, self.mixer, self.gelu = make_norm(c), ENCODER_MIXERS[layer](c), c.gelu
        self.dv, self.dol, self.do = Linear(d, m), Linear(d, m), Linear(m, d)

    def forward(self, x, real=None):
        h = self.norm(x)
        v = F.gelu(self.dv(h), approximate=self.gelu)
        u = F.gelu(self.dol(self.mixer(h, real)), approximate=self.gelu)  # (b, l, m)
        return x + self.do(u * v)


class Stacked(nn.Module):
    """A transformer's block: x + mix(norm(x)), then x + W_2 gelu(W_1 norm(x)) with as many weights as BiGS's gates."""

    def __init__(self, c, layer):
        super().__init__()
        d, m = c.d_model, 3 * c.expand * c.d_model // 2
        self.norm, self.mixer, self.gelu = make_norm(c), ENCODER_MIXERS[layer](c), c.gelu
        self.mlp_norm, self.up_proj, self.down_proj = make_norm(c), Linear(d, m), Linear(m, d)

    def forward(self, x, real=None):
        x = x + self.mixer(self.norm(x), real)
        return x + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(x)), approximate=self.gelu))


BLOCKS = {"gated": BiGS, "stacked": Stacked}


class Encoder(nn.Module):
    """Tokens (b, l) -> logits (b, l, vocab), each position's of its own token, from both sides; the state is None.

    real (b, l) is False at padding; types (b, l) name segments, all 0 if None. As in BERT the embeddings are summed and
    normed, and the head is a layer, the exact gelu whatever the blocks have, a norm and the embedding's weight again.
    """
    recurrent = False

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.embedding = nn.Embedding(c.vocab, c.d_model)
        self.position_table = nn.Embedding(c.n_position, c.d_model) if c.n_position else None
        self.type_table = nn.Embedding(c.n_type, c.d_model) if c.n_type else None
        self.norm, self.dropout = make_norm(c), nn.Dropout(c.dropout)
        self.layers = nn.ModuleList(BLOCKS[c.block](c, layer) for layer in c.layers)
        self.head, self.head_norm = Linear(c.d_model, c.d_model), make_norm(c)
        self.lm_head = Linear(c.d_model, c.vocab)
        self.lm_head.weight = self.embedding.weight
        for table in filter(None, (self.embedding, self.position_table, self.type_table)):
            nn.init.normal_(table.weight, std=0.02)
        nn.init.zeros_(self.lm_head.bias)

    def forward(self, tokens, real=None, types=None):
        x = self.embedding(tokens)
        if self.position_table is not None:
            if tokens.shape[1] > self.config.n_position:
                raise ValueError(f"{tokens.shape[1]} tokens, but the table of positions has {self.config.n_position}")
            x = x + self.position_table.weight[:tokens.shape[1]]
        if self.type_table is not None:
            x = x + self.type_table(torch.zeros_like(tokens) if types is None else types)
        x = self.dropout(self.norm(x))
        for layer in self.layers:
            x = layer(x, real)
        return self.lm_head(self.head_norm(F.gelu(self.head(x)))), None


def make_model(config):
    """The model that a config is the shape of."""
    return (Encoder if config.block else LM)(config)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

def save(path, model, layout="own", **extra):
    """Config, weights and whatever extra a run keeps, in one file, which appears under its name when it is whole.

    Any other layout of data/checkpoints.py (hf opens in transformers) is a folder for another program, without extra.
    """
    if layout != "own":
        return write(path, layout, dataclasses.asdict(model.config), model.state_dict())
    try:
        with whole_file(Path(path)) as file:
            torch.save({"format": FORMAT, "torch": str(torch.__version__), "config": dataclasses.asdict(model.config),
                        "model": model.state_dict(), **extra}, file)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path}: {str(e).splitlines()[0]}; "
                              "the file there before is untouched") from e


def load(path, device="cpu"):
    """(model, extra) from a file or a folder: of a run (best.pt, or last.pt if nothing has been validated yet), or a
    published checkpoint, in any layout of data/checkpoints.py.

    The tensors of the file become the parameters: there is never a second copy of the weights.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("best.pt", "last.pt") if (path / name).exists()] or [find(path)]
        if not found[0]:
            raise UserError(f"no best.pt or last.pt in {path}, nor one of {', '.join(FILES)}; "
                                  f"train one: python train.py --out {path}")
        path = found[0]
    elif not path.exists():
        folder = path.parent if path.suffix == ".pt" else path
        raise UserError(f"no checkpoint at {path}; train one: python train.py --out {folder}")
    extra, layout = read_file(path), None
    if not isinstance(extra, dict) or extra.get("format") != FORMAT:
        layout, config, weights = read(path, extra)
        extra = {"layout": layout, "config": config, "model": weights}
    try:
        with torch.device("meta"):
            model = make_model(Config(**extra.pop("config")))
        weights = extra.pop("model")
        if wrong := misfits(layout, model.state_dict(), weights):
            raise ValueError(wrong)
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as e:
        raise UserError(f"{path} does not fit this program: {' '.join(str(e).split())}") from e
    if model.config.tie:
        model.embedding.weight = model.lm_head.weight
    return model.to(device).eval(), extra
