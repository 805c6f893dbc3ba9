"""The Mamba in the Llama (Wang et al. 2024): a transformer becomes a state-space or hybrid model, most weights kept.

    python train.py --layer attention --n_layer 8 --d_model 128 --out out/attention
    python distill.py --teacher out/attention --keep_attention 0.25 --out out/hybrid

Take the softmax out of causal attention, and what is left is the recurrence of a state-space model with dt = 1, A = 0:

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
factor 1/sqrt(head size) go: order is left to the decay and the convolution, scale to the norm. Here we differ from the
paper: the new parts begin out of the way of what was copied, the convolution as the identity, D = 0 and dt = 0.1.

--layer mamba makes Mamba-1 layers. Only V -> x and O -> out_proj fit there: our Mamba reads B and C from its convolved
x and shares them among all channels. The released Mamba-1 hybrids do copy K and Q, cut in slices of n = 16, and with
heads of 128 and shared keys most slices (83 to 87 %) then meet a wrong part of their head, which training has to mend.
Their step size is softplus(W r + 2 b), for the scan adds the bias that the projection has added already, so that at
first dt is near the square of what was meant. We add it once.
"""
import dataclasses
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from data.corpus import load_corpus, load_tokens
from data.files import UserError
from model import LM, inverse_softplus, load
from train import (RunFlags, check, evaluate, fit, flag, join_processes, open_run, parse, pick_device, pick_dtype,
                   script)


@dataclass
class Flags(RunFlags):
    out: str = flag("out/student", "folder of the run")
    teacher: str = flag("out/attention", "a checkpoint or run with attention layers, a Llama of Hugging Face too")
    student: str = flag("", "the student of an earlier stage, to go on with; empty makes one from the teacher")
    keep_attention: float = flag(0.25, "share of the layers that stay attention, evenly spread")
    layer: str = flag("mamba2", "what the other layers become: mamba2 or mamba")
    init: str = flag("attention", "new mixers from attention, or random; or scratch: all weights new")
    stage: str = flag("all", "align and mixers train the new mixers, all else is frozen; all trains everything")
    kl: float = flag(1.0, "weight of KL(teacher || student)")
    reverse_kl: float = flag(0.0, "weight of KL(student || teacher)")
    ce: float = flag(0.0, "weight of the cross entropy of what is trained on")
    pseudo: str = flag("", "train on this file, which the teacher wrote (sample.py --raw); --data validates")


LIFELONG = ("teacher", "student", "keep_attention", "layer", "init", "stage")  # fixed for a run's whole life

# ---------------------------------------------------------------------------------------------------------------------
# The student: which layers, which weights


def keeps_attention(i, share):
    """Whether layer i stays attention: up to a half the last of every 1/share layers, above it all but the first of
    every 1/(1 - share), as the paper interleaves. Of the shares 1/8, 1/4, 1/2, 3/4, 7/8 each keeps what a smaller one
    keeps; other shares are rounded to 1/m or 1 - 1/m and need not."""
    if share <= 0.5:
        return share > 0 and (i + 1) % round(1 / share) == 0
    return share == 1 or i % round(1 / (1 - share)) != 0


def student_config(c, layer, share):
    """The Config c with attention replaced where it is not kept, in the sizes that the map wants."""
    size = c.d_model // c.n_head
    shape = {"mamba2": {"expand": 1, "d_state": size, "head_dim": size, "n_group": c.n_head},
             "mamba": {"expand": 1, "d_state": 16}}[layer]
    wrong = ", ".join(f"{name} {getattr(c, name)}, not {n}" for name, n in shape.items() if getattr(c, name) != n)
    if wrong and not all(name.startswith("attention") for name in c.layers):
        raise UserError(f"--layer {layer}: the state-space layers that are there already have {wrong}; "
                          "take the --layer they were made with")
    layers = [name if keeps_attention(i, share) else name.replace("attention", layer)
              for i, name in enumerate(c.layers)]
    return dataclasses.replace(c, layers=layers, **shape)


def input_rows(mixer):
    """The parts of a state-space mixer's in_proj by name, as views of its weight, (rows, d_model)."""
    w = mixer.in_proj.weight
    if hasattr(mixer, "x_proj"):  # Mamba: B, C and dt come from x
        return dict(zip("xz", w.chunk(2)))
    d, gn = mixer.sizes[0], mixer.groups * mixer.n
    return dict(zip(("z", "x", "B", "C", "dt"), w.split([d, d, gn, gn, mixer.heads])))


SOURCE = {"x": "v_proj", "B": "k_proj", "C": "q_proj"}  # the map


@torch.no_grad()
def copy_attention(mixer, attention):
    """V -> x, K -> B, Q -> C, O -> out_proj; a key or value head shared by r queries is repeated r times in a row.

    What is new in Mamba-2 starts near linear attention: the convolution passes the present through, D = 0, dt = 0.1.
    """
    for name, rows in input_rows(mixer).items():
        if name in SOURCE:
            heads = getattr(attention, SOURCE[name]).weight.unflatten(0, (-1, attention.size))  # (heads, size, d_model)
            rows.copy_(heads.repeat_interleave(attention.heads // len(heads), dim=0).flatten(0, 1))
    mixer.out_proj.weight.copy_(attention.out_proj.weight)
    if hasattr(mixer, "dt_bias"):
        mixer.conv1d.weight.zero_()[..., -1] = 1
        mixer.D.zero_()
        mixer.dt_bias.fill_(inverse_softplus(torch.tensor(0.1)))
        if mixer.conv1d.bias is not None:
            mixer.conv1d.bias.zero_()


def replaced(student, other):
    """Indices of the layers that are attention in the other model and not in the student."""
    kinds = enumerate(zip(student.config.layers, other.config.layers))
    return [i for i, (s, o) in kinds if o.startswith("attention") and not s.startswith("attention")]


def make_student(source, layer, share, init):
    """source with attention replaced where it is not kept: its weights wherever they fit, unless init is scratch."""
    student = LM(student_config(source.config, layer, share)).to(source.embedding.weight)
    if init == "scratch":
        return student
    new = replaced(student, source)
    gone = tuple(f"layers.{i}.mixer." for i in new)
    student.load_state_dict({k: w for k, w in source.state_dict().items() if not k.startswith(gone)}, strict=False)
    for i in new if init == "attention" else ():
        copy_attention(student.layers[i].mixer, source.layers[i].mixer)
    return student


# ---------------------------------------------------------------------------------------------------------------------
# Stages: which parameters train, and the table that says so
#
# align    new mixers   each learns its attention layer's output, both reading what the teacher's layer reads: a first
#                       stage of our own, since layers do not wait for each other and the student needs no MLP, no head
# mixers   new mixers   the released stage 1: --kl 0.1 --ce 1 --pseudo FILE, on text that the teacher wrote
# all      everything   end to end; stepwise where --student has more attention than --keep_attention leaves
#
# The bar shows the stage's loss, and train_bpb in log.jsonl is that over ln 2; val_bpb is the student's own.


def freeze(student, stage, mixers):
    """requires_grad for what the stage trains: everything, or the mixers of these layers."""
    trained = tuple(f"layers.{i}.mixer." for i in mixers)
    for name, p in student.named_parameters():
        p.requires_grad_(stage == "all" or name.startswith(trained))


def inventory(student, new, init):
    """Rows (part, its parameters, copied or new, trained or frozen) that add up to the student."""
    rows = {}

    def add(part, count, copied, p):
        key = part, "copied" if copied and init != "scratch" else "new", "trained" if p.requires_grad else "frozen"
        rows[key] = rows.get(key, 0) + count

    for name, p in student.named_parameters():
        if ".mixer." not in name:
            add("MLP" if ".mlp." in name else "embedding, norms, head", p.numel(), True, p)
            continue
        _, i, _, kind, *_ = name.split(".")
        mixer, old = student.layers[int(i)].mixer, int(i) not in new
        if hasattr(mixer, "q_proj"):
            add("attention", p.numel(), True, p)
        elif kind == "out_proj":
            add("O -> out_proj", p.numel(), old or init == "attention", p)
        else:
            parts = input_rows(mixer) if kind == "in_proj" else {kind: p}
            rest = "z, B, C, dt, A, D, convolution" if hasattr(mixer, "x_proj") else "z, dt, A, D, convolution, norm"
            for part, w in parts.items():
                known = part in SOURCE
                label = f"{SOURCE[part][0].upper()} -> {part}" if known else rest
                add(label, w.numel(), old or known and init == "attention", p)
    return [(part, count, origin, fate) for (part, origin, fate), count in rows.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Losses, in nats a position. The released code adds up a window's positions and divides by windows alone: its KL begins
# at 20,000, and a weight means something else for every window length. Here everything is a mean over positions.


class _Match(torch.autograd.Function):
    """kl KL(q || p) + reverse_kl KL(p || q) - ce log p[target],   p = softmax(student), q = softmax(teacher).

    The reverse divergence is M1's (2504.10449). student, teacher (b, l, v), targets (b, l) -> a number. Value and
    gradient in one pass over each window: with r = log p - log q, and in the student's logits,
        d KL(q || p) = p - q,     d KL(p || q) = p (r - KL(p || q)),     -d log p[target] = p - onehot(target).
    One tensor of the size of the logits is kept for backward, where autograd would keep five.
    """

    @staticmethod
    def forward(ctx, student, teacher, targets, kl, reverse_kl, ce):
        gradient, loss = torch.empty_like(student), 0.0
        wide = torch.promote_types(student.dtype, torch.float32)
        for i, target in enumerate(targets[..., None]):
            log_p = torch.log_softmax(student[i], -1, dtype=wide)  # (l, v)
            p = log_p.exp()
            g = p * (kl + ce)
            if ce:
                loss = loss - ce * log_p.gather(-1, target).sum()
                g.scatter_add_(-1, target, torch.full_like(target, -ce, dtype=wide))
            if kl or reverse_kl:
                log_q = torch.log_softmax(teacher[i], -1, dtype=wide)
                r = log_p - log_q
                if kl:
                    q = log_q.exp()
                    loss = loss - kl * torch.dot(q.flatten(), r.flatten())
                    g.sub_(q, alpha=kl)
                if reverse_kl:
                    each = (p * r).sum(-1, keepdim=True)
                    loss = loss + reverse_kl * each.sum()
                    g.addcmul_(p, r - each, value=reverse_kl)
            gradient[i] = g / targets.numel()
        ctx.save_for_backward(gradient)
        return loss / targets.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        return dloss * ctx.saved_tensors[0], None, None, None, None, None


match = _Match.apply


def align_loss(student, layers, read, wanted):
    """The mean over layers of |mixer(norm(x)) - y|^2 / |y|^2: y is the attention layer's answer to what it read."""
    each = [(student.layers[i].mixer(x)[0] - y).square().mean() / y.square().mean()
            for i, x, y in zip(layers, read, wanted)]
    return torch.stack(each).mean()


def dpo_loss(chosen, rejected, chosen_reference, rejected_reference, beta=0.1):
    """-log sigmoid(beta (log pi/pi_ref (chosen) - log pi/pi_ref (rejected))): DPO (Rafailov et al. 2023, equation 7).

    The paper's third stage. Each argument is log-probabilities (b,) of whole answers; the paper writes the teacher as
    reference, its code takes the student as it was before this stage.
    """
    margin = (chosen - chosen_reference) - (rejected - rejected_reference)
    return -F.logsigmoid(beta * margin).mean()


def make_loss(c, teacher, mixers):
    """loss_of(student, read, targets) for train.fit: the teacher reads first, without a trace for gradients."""
    needed, seen = c.stage == "align" or c.kl or c.reverse_kl, []
    if c.stage == "align":
        for i in mixers:
            teacher.layers[i].mixer.register_forward_hook(lambda _, args, answer: seen.append((args[0], answer[0])))

    def loss_of(student, read, targets):
        seen.clear()
        with torch.inference_mode():
            wanted = teacher(read)[0] if needed else None
        if c.stage == "align":  # a copy of what was read: gradients must not keep a tensor made in inference mode
            return align_loss(student, mixers, [x.clone() for x, _ in seen], [y for _, y in seen])
        return match(student(read)[0], wanted, targets, c.kl, c.reverse_kl, c.ce)

    return loss_of


# ---------------------------------------------------------------------------------------------------------------------
# The script

GLANCE = 100_000  # bytes of the validation split that teacher and student are held against before the first step


def check_distillation(c):
    for name, known in (("layer", ("mamba2", "mamba")), ("init", ("attention", "random", "scratch")),
                        ("stage", ("align", "mixers", "all"))):
        if getattr(c, name) not in known:
            raise UserError(f"--{name} {getattr(c, name)} is not one of {', '.join(known)}")
    if not 0 <= c.keep_attention <= 1:
        raise UserError(f"--keep_attention {c.keep_attention} is not in [0, 1]")
    if not (min(c.kl, c.reverse_kl, c.ce) >= 0 and 0 < c.kl + c.reverse_kl + c.ce < math.inf):
        raise UserError(f"--kl {c.kl} --reverse_kl {c.reverse_kl} --ce {c.ce}: weights are 0 or more, and not all 0")


def load_causal(name, path, device, dtype):
    """The LM that the flag --name gives, to read from and not to train."""
    model, _ = load(path, device)
    if not isinstance(model, LM):
        raise UserError(f"--{name} {path} holds a {type(model).__name__}, expected a causal LM")
    return model.to(dtype).requires_grad_(False)


def load_teacher(path, device, dtype):
    teacher = load_causal("teacher", path, device, dtype)
    kinds = ", ".join(sorted(set(teacher.config.layers)))
    if "attention" not in kinds:
        raise UserError(f"--teacher {path} has no attention layer but {kinds}; "
                              "train one: python train.py --layer attention --out out/attention")
    return teacher


def load_source(path, teacher, device, dtype):
    """The student of an earlier stage, which must fit its teacher but for the mixers."""
    source = load_causal("student", path, device, dtype)
    ours, theirs = ({"n_layer": len(m.layers), **vars(m.config)} for m in (source, teacher))
    for name in ("n_layer", "vocab", "d_model", "n_head"):
        if ours[name] != theirs[name]:
            raise UserError(f"--student {path} has {name} {ours[name]}, the teacher {theirs[name]}")
    return source


def load_text(name, vocab):
    """Bytes, or token ids where the teacher reads more kinds of them than bytes are."""
    return load_corpus(name) if vocab == 256 else load_tokens(name, vocab)


@script
def main(argv):
    c, given = parse(Flags, argv, "Distil a transformer into a state-space or hybrid model.")
    c, resumed = open_run(c, given, LIFELONG)
    check(c)
    check_distillation(c)
    where = rank, world, device = join_processes(pick_device(c.device))
    if c.stage == "align" and world > 1:
        raise UserError("--stage align runs in one process; start it without torchrun")
    dtype, _ = pick_dtype(c.dtype, device)
    teacher = load_teacher(c.teacher, device, dtype)
    corpus = load_text(c.data, teacher.config.vocab)
    if c.pseudo:
        text = load_text(c.pseudo, teacher.config.vocab).train
        corpus = corpus._replace(train=text, note=f"trains on {c.pseudo} instead")
    torch.manual_seed(c.seed)
    source = teacher if resumed or not c.student else load_source(c.student, teacher, device, dtype)
    student, extra = resumed or (make_student(source, c.layer, c.keep_attention, c.init), {})
    mixers = replaced(student, teacher)
    if c.stage != "all" and not mixers:
        raise UserError(f"--stage {c.stage} trains new mixers, and --keep_attention {c.keep_attention} leaves none")
    freeze(student, c.stage, mixers)
    if rank == 0 and not resumed:
        show(c, teacher, student, replaced(student, source), corpus)
    return fit(c, where, student, extra, corpus, make_loss(c, teacher, mixers), "distill.py")


def show(c, teacher, student, new, corpus):
    """The table of parameters, and how far the student is from its teacher before the first step."""
    kept = [str(i) for i, layer in enumerate(student.config.layers) if layer.startswith("attention")]
    print(f"student     attention stays in layers {', '.join(kept) or 'none'} of {len(student.layers)}; "
          f"--stage {c.stage}")
    for part, count, origin, fate in inventory(student, new, c.init):
        print(f"            {part:40}{count:>12,}  {origin:8}{fate}")
    glance = corpus.val[:GLANCE]
    t, s = (evaluate(model, glance, c.seq_len, c.batch_size)[0] for model in (teacher, student))
    teacher.eval()
    print(f"beginning   teacher {t:.4f}, student {s:.4f} bits per byte of the first {len(glance):,} to validate")


if __name__ == "__main__":
    sys.exit(main())
