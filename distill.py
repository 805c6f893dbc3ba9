"""The Mamba in the Llama (Wang et al. 2024): a transformer becomes a state-space or hybrid model, most weights kept.

    python train.py --layer attention --n_layer 8 --d_model 128 --out out/attention
    python distill.py --teacher out/attention --keep_attention 0.25 --out out/hybrid

Some layers may stay attention: that is a hybrid. Take the softmax out of causal attention, and what is left is the
recurrence of a state-space model with dt = 1, A = 0 (letters as in scan.py; per head v_t (p), k_t, q_t (n), h (p, n)):

    y_t = sum_{s <= t} (q_t . k_s) v_s = h_t q_t,        h_t = h_{t-1} + v_t k_t^T.

So the projections of a trained attention layer are where a Mamba-2 layer can begin, head for head, n = p = head size:

    attention      state-space layer                            origin
    V         ->   x, what is written                           copied
    K         ->   B, where to                                  copied
    Q         ->   C, where from                                copied
    O         ->   out_proj                                     copied
                   dt, A, D, convolution, gate z, its norm      new
    norms, SwiGLU, embedding, head                              copied

Keys and values that several queries share are copied to each of them (g = n_head groups). Rotary positions and the
factor 1/sqrt(head size) go: order is left to the decay and the convolution, scale to the norm before out_proj. The new
parts begin near to neutral, which differs from the paper: the convolution is the identity, D is 0, and dt is 0.1 where
its projection gives 0. Not neutral are SiLU after the convolution, the random gate z and rows of dt, the norm, and A,
which stays Mamba-2's, -16 .. -1: with A = 0 nothing would be forgotten and order be lost; so a head remembers 0.6 to 10
steps. So the new layer does not answer as attention did; its weights are a place to begin.
"""
import dataclasses
import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from data.bpe import in_words
from data.corpus import load_corpus, load_tokens
from data.files import require
from model import LM, inverse_softplus, load
from train import (RunFlags, claim, evaluate, fit, flag, join_processes, keep_memory, open_run,
                   parse, pick_device, pick_dtype, script)


@dataclass
class Flags(RunFlags):
    script: ClassVar[str] = "distill.py"
    out: str = flag("out/student", "folder of the run")
    teacher: str = flag("out/attention", "a checkpoint with attention, also a Llama", fixed=True)
    student: str = flag("", "an earlier stage's, to go on with; if empty, the teacher", fixed=True)
    keep_attention: float = flag(0.25, "the share of all layers, evenly spread, where attention "
                                 "may stay", high=1, fixed=True)
    mixers: str = flag("attention", "new mixers from attention or random; scratch: all weights new",
                       one_of=("attention", "random", "scratch"), fixed=True)
    stage: str = flag("all", "align and mixers train the new mixers, all trains everything",
                      one_of=("align", "mixers", "all"), fixed=True)
    kl: float = flag(1.0, "weight of KL(teacher || student)")
    reverse_kl: float = flag(0.0, "weight of KL(student || teacher)")
    ce: float = flag(0.0, "weight of the cross entropy of the training text")
    pseudo: str = flag("", "train on 90 % of this file, which the teacher wrote "
                       "(sample.py --raw, or .npy)")


# ---------------------------------------------------------------------------------------------------------------------
# The student: which layers, which weights


def keeps_attention(i, share):
    """Whether layer i stays attention: if floor((i + 1) share) > floor(i share), as in the paper.

        of 8 layers stay   1/8  . . . . . . . 7        3/4  . 1 2 3 . 5 6 7
                           1/4  . . . 3 . . . 7        7/8  . 1 2 3 4 5 6 7
                           1/2  . 1 . 3 . 5 . 7        1    0 1 2 3 4 5 6 7
    Each of these shares keeps the layers that a smaller one keeps, so they can follow one another, the larger first.
    """
    return int((i + 1) * share + 1e-9) > int(i * share + 1e-9)  # a share may be rounded down


def student_config(c, share, mixers):
    """The Config c with Mamba-2 where attention is not kept, in the sizes that the map wants. A source that is a hybrid
    already keeps its sizes, since a Config has one for all layers; if they are not the map's, nothing can be copied."""
    size = c.d_model // c.n_head
    shape = {"expand": 1, "d_state": size, "head_dim": size, "n_group": c.n_head}
    layers = tuple(name if keeps_attention(i, share) else name.replace("attention", "mamba2")
                   for i, name in enumerate(c.layers))
    if c.kinds != {"attention"}:
        same = all(getattr(c, name) == value for name, value in shape.items())  # copying fits
        nothing_copied = mixers != "attention" or layers == c.layers
        require(same or nothing_copied, "there are state-space "
                f"layers of other sizes than {shape}; add --mixers random")
        shape = {}
    return dataclasses.replace(c, layers=layers, **shape)


def input_rows(mixer):
    """The parts of Mamba-2's in_proj by name, as views of its weight, (rows, d_model). z is as wide as x."""
    sizes = [mixer.conv_parts[0], *mixer.conv_parts, mixer.heads]
    return dict(zip(["z", "x", "B", "C", "dt"], mixer.in_proj.weight.split(sizes)))


@torch.no_grad()
def copy_attention(mixer, attention):
    """The map of this file's first page. A key or value head that r queries share is repeated r times.

    mixer, a Mamba2: in_proj (its rows: input_rows), conv1d (weight (channels, 1, taps), the last tap meets the present;
    bias, or None), D and dt_bias (heads,), where dt = softplus(dt_bias + its rows), out_proj, heads. attention: q_proj,
    k_proj, v_proj, out_proj, linear without bias, and size, the rows of one head.
    """
    rows = input_rows(mixer)
    source = {"x": attention.v_proj, "B": attention.k_proj, "C": attention.q_proj}
    for part, projection in source.items():
        heads = projection.weight.unflatten(0, (-1, attention.size))  # (heads, size, d_model)
        r = mixer.heads // len(heads)
        rows[part].copy_(heads.repeat_interleave(r, dim=0).flatten(0, 1))
    mixer.out_proj.weight.copy_(attention.out_proj.weight)
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[..., -1] = 1
    for part in (mixer.in_proj, mixer.conv1d, mixer.out_proj):
        if part.bias is not None:
            part.bias.zero_()
    mixer.D.zero_()
    mixer.dt_bias.fill_(inverse_softplus(torch.tensor(0.1)))


def replaced(student, other):
    """Indices of the layers that are attention in the other model and not in the student."""
    layers = enumerate(zip(student.config.layers, other.config.layers))
    return [i for i, (own, its) in layers if "attention" in its and "attention" not in own]


def make_student(source, share, mixers):
    """source with attention replaced where it is not kept: all weights but the new mixers' are taken over, and
    none if mixers is scratch."""
    student = LM(student_config(source.config, share, mixers)).to(source.embedding.weight)
    if mixers != "scratch":
        new = replaced(student, source)
        skipped = tuple(f"layers.{i}.mixer." for i in new)
        weights = source.state_dict().items()
        kept = {name: w for name, w in weights if not name.startswith(skipped)}
        student.load_state_dict(kept, strict=False)  # all but the new mixers'
        if mixers == "attention":
            for i in new:
                copy_attention(student.layers[i].mixer, source.layers[i].mixer)
    return student


# ---------------------------------------------------------------------------------------------------------------------
# Stages: which parameters train
#
# --stage  trains
# align    new mixers   each learns its attention layer's output from the teacher's input to it (not in the paper)
# mixers   new mixers   stage 1 of the released code: --kl 0.1 --ce 1 --pseudo FILE, on text that the teacher wrote
# all      everything   end to end. With --student and a smaller --keep_attention, attention goes a few layers at a time
# The bar shows the stage's loss; train_bpb in log.jsonl is that / ln 2 / bytes per token, also of align, where it means
# nothing. val_bpb is the student's own.


def freeze(student, stage, new):
    """Gradients only for what the stage trains: without one AdamW neither steps nor decays."""
    student.requires_grad_(stage == "all")
    for i in new:
        student.layers[i].mixer.requires_grad_()


# ---------------------------------------------------------------------------------------------------------------------
# Losses, means over positions: match in nats, align_loss a ratio


def divergence(log_a, log_b):
    """KL(a || b), the mean over positions, from log probabilities (positions, v)."""
    return F.kl_div(log_b, log_a, log_target=True, reduction="batchmean")


def match(student, teacher, targets, kl, reverse_kl, ce):
    """kl KL(t || s) + reverse_kl KL(s || t) - ce log s[target],   s = softmax(student), t = softmax(teacher).

    The reverse divergence is that of M1, a later paper (2504.10449). student and teacher are logits (b, l, v), teacher
    None if only ce counts; targets (b, l). It holds a few tensors of the logits' size: 8 MB each for 8 x 1,024 bytes,
    1 GB for one window of 2,048 tokens of a Llama's 128,256.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    log_s = torch.log_softmax(student.flatten(0, 1), -1, dtype=wide)  # (b l, v)
    loss = ce * F.nll_loss(log_s, targets.flatten())
    if teacher is not None:
        log_t = torch.log_softmax(teacher.flatten(0, 1), -1, dtype=wide)
        if kl:
            loss = loss + kl * divergence(log_t, log_s)
        if reverse_kl:
            loss = loss + reverse_kl * divergence(log_s, log_t)
    return loss


def align_loss(student, teacher, tokens, new):
    """The mean over the new layers of |mixer(h) - y|^2 / |y|^2, where the teacher's attention reads h and answers y."""
    each = []
    x = teacher.embedding(tokens)
    for i, layer in enumerate(teacher.layers):
        h = layer.norm(x)
        y, _ = layer.mixer(h, upto=0)
        if i in new:
            error = student.layers[i].mixer(h, upto=0)[0] - y
            each.append(error.square().mean() / y.square().mean())
        x = layer.go_on(x, y)
    return torch.stack(each).mean()


def make_loss(c, teacher, new):
    """loss_of(student, tokens, targets) for train.fit."""
    teacher.requires_grad_(False)

    def loss_of(student, tokens, targets):
        if c.stage == "align":
            return align_loss(student, teacher, tokens, new)
        wanted = teacher(tokens, upto=0)[0] if c.kl or c.reverse_kl else None
        return match(student(tokens, upto=0)[0], wanted, targets, c.kl, c.reverse_kl, c.ce)

    return loss_of


# ---------------------------------------------------------------------------------------------------------------------
# The script

GLANCE = 100_000  # tokens to validate teacher and student on before the first step


def load_lm(name, path, device, dtype):
    """The LM that the flag --name gives."""
    model, _ = load(path, device)
    require(not model.config.block, f"--{name} {path} holds an encoder, not a causal LM")
    return model.to(dtype)


def load_models(c, device, resumed):
    """(teacher, the model from which the student is made: an earlier stage's, or the teacher)."""
    dtype, _ = pick_dtype(c.dtype, device)
    teacher = load_lm("teacher", c.teacher, device, dtype)
    kinds = ", ".join(sorted(teacher.config.kinds))
    require("attention" in kinds, f"--teacher {c.teacher} has no attention but {kinds}; "
            "train one: python train.py --layer attention --n_layer 8 --out out/attention")
    if resumed or not c.student:
        return teacher, teacher
    source = load_lm("student", c.student, device, dtype)
    theirs, ours = ({"n_layer": len(m.layers), "vocab": m.config.vocab, "d_model": m.config.d_model,
                     "n_head": m.config.n_head} for m in (teacher, source))
    require(ours == theirs, f"--student {c.student} has {ours}, the teacher {theirs}")
    require(source.config.merges == teacher.config.merges,
            f"--student {c.student} reads other words than the teacher")
    return teacher, source


def load_text(name, config):
    """A corpus of bytes, or for another program's vocabulary one of token ids."""
    reads_bytes = config.vocab == 256 or config.merges
    return load_corpus(name) if reads_bytes else load_tokens(name, config.vocab)


def show(c, teacher, student, corpus):
    """What is trained, and how far the student is from its teacher before the first step."""
    kept = [i for i, layer in enumerate(student.config.layers) if "attention" in layer]
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    print(f"student     attention stays in layers {kept}; --stage {c.stage} trains {trained:,} "
          f"of {sum(p.numel() for p in student.parameters()):,} parameters")
    few = corpus._replace(train=corpus.val[:1])  # in_words need not encode the text to train on
    glance = in_words(few, teacher.config.merges).val[:GLANCE]
    bits = [evaluate(m, glance, c.seq_len, c.batch_size)[0] for m in (teacher, student)]
    unit = "byte" if teacher.config.vocab == 256 else "token"
    print(f"beginning   teacher {bits[0]:.4f}, student {bits[1]:.4f} bits per {unit} "
          f"of the first {len(glance):,} to validate")


@script
def main(argv):
    c, given = parse(Flags, argv, "Distil a transformer into a state-space or hybrid model.")
    with claim(c):
        c, student, extra = open_run(c, given)
        require(c.stage == "align" or c.kl + c.reverse_kl + c.ce > 0,
                "--kl, --reverse_kl and --ce are all 0; raise one")
        rank, world, device = where = join_processes(pick_device(c.device))
        require(c.stage != "align" or world == 1, "--stage align runs without torchrun")
        require(c.stage == "all" or c.mixers != "scratch",
                f"--mixers scratch: all weights are new, and --stage {c.stage} trains a part")
        teacher, source = load_models(c, device, extra)
        corpus = load_text(c.data, teacher.config)
        if c.pseudo:
            text = load_text(c.pseudo, teacher.config).train
            corpus = corpus._replace(train=text, note=f"trains on {c.pseudo} instead")
        torch.manual_seed(c.seed)
        layers = range(len(source.layers))
        require(not c.keep_attention or any(keeps_attention(i, c.keep_attention) for i in layers),
                f"--keep_attention {c.keep_attention} of {len(layers)} layers keeps none; say 0, "
                "or take a teacher with more layers: train.py --n_layer 8")
        if not extra:
            student = make_student(source, c.keep_attention, c.mixers)
        new = replaced(student, teacher)  # those of earlier stages too
        require(c.stage == "all" or new, f"--stage {c.stage} trains new mixers, "
                f"and --keep_attention {c.keep_attention} leaves none")
        freeze(student, c.stage, new)
        if rank == 0 and not extra:
            show(c, teacher, student, corpus)
        return fit(c, where, student, extra, corpus, loss_of=make_loss(c, teacher, new))


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
