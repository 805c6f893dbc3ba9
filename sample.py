"""Let a trained model write: python sample.py --ckpt out/mamba2 --prompt "def ".

A state-space model keeps a state of constant size, so it writes for ever in constant memory; attention keeps a cache of
its last window. An encoder fills holes, from both sides: python sample.py --ckpt out/mask --fill "The goal of life is ____."
"""
import codecs
import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data.wordpiece import read_vocabulary
from model import ConfigError, Encoder, load
from train import MASK, flag, parse, pick_device, pick_dtype, run_script

PREFILL = 2048  # bytes of the prompt read at a time: bounds the memory, not the result


@dataclass
class Flags:
    ckpt: str = flag("out/mamba2", "a checkpoint: a run's folder, or a published one's; models of tokens take and give ids")
    prompt: str = flag("", "text to go on from; empty begins as after a newline")
    prompt_file: str = flag("", "the same from a file, any bytes; - is standard input")
    bytes: int = flag(500, "how many to write")
    fill: str = flag("", "text whose underscores an encoder fills, a byte each; if it has none, --bytes of them follow it; "
                     "with BiGS's released weights a word for each run of them")
    steps: int = flag(0, "fill in so many rounds, equally many bytes in each; 0 is a byte a round")
    temperature: float = flag(0.8, "0 always takes the likeliest byte, 1 samples from the model as it is")
    top_k: int = flag(0, "sample from the k likeliest bytes only; 0 is all")
    top_p: float = flag(1.0, "sample from the fewest bytes that together reach this probability")
    seed: int = flag(1, "the same seed writes the same bytes")
    batch: int = flag(1, "how many texts; more than one are printed when all are done")
    raw: bool = flag(False, "write the exact bytes; without it what is not UTF-8 is shown as U+FFFD")
    crlf: bool = flag(False, "lines end in CR LF inside the model, in LF outside: for the PG19 models of MambaByte")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; auto takes the best there is")
    dtype: str = flag("auto", "float32, bfloat16 or float64; auto is bfloat16 on CUDA, else float32")
    compile: bool = flag(False, "torch.compile the step: up to a minute to start, then two to three times the speed")


def filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The law to sample from, as probabilities (..., v): softmax(logits / temperature), cut down and normed again.

    top_k keeps the k likeliest, then top_p the fewest that reach p together (Holtzman et al. 2020).
    Temperature 0 puts everything on the likeliest, the first one in a tie. Logits (..., v), computed in float32 or wider.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # the largest is 0, so nothing overflows
    if 0 < top_k < logits.shape[-1]:
        order = logits.argsort(dim=-1, descending=True, stable=True)  # exactly k are kept, also in a tie
        logits = logits.scatter(-1, order[..., top_k:], -torch.inf)
    probabilities = torch.softmax(logits, -1)
    if top_p < 1:
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        beyond = ranked.cumsum(-1) - ranked >= top_p  # those before it reach p already
        probabilities = probabilities.scatter(-1, order, ranked.masked_fill(beyond, 0))
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


@torch.inference_mode()
def prefill(model, tokens):
    """Read tokens (b, l) piece by piece: the logits after the last, (b, v), and the state."""
    state = None
    for piece in tokens.split(PREFILL, dim=1):
        logits, state = model(piece, state)
    return logits[:, -1], state


@torch.inference_mode()
def generate(model, tokens, count, law, generator=None, step=None):
    """Yields count further tokens, each (b,), after the prompt tokens (b, l >= 1); law maps logits to probabilities.

    step is what reads one token, the model itself unless a compiled one is given.
    """
    step = model if step is None else step
    logits, state = prefill(model, tokens)
    for i in range(count):
        token = torch.multinomial(law(logits), 1, generator=generator)  # (b, 1)
        yield token[:, 0]
        if i + 1 < count:
            logits, state = step(token, state)
            logits = logits[:, -1]


@torch.inference_mode()
def unmask(model, tokens, steps, law, generator=None, likeliest=False):
    """Tokens (b, l) with their MASKs filled, equally many in every row, in `steps` rounds of equal shares; 0 is a byte a round.

    A round draws every masked byte, each as if it were the only one, and keeps its share: at random places, which with a
    byte a round is the chain rule in a random order that masked diffusion learns, or where the model is surest (MaskGIT,
    Chang et al. 2022). Fewer rounds are faster, and bytes kept in one round know nothing of each other.
    """
    left = int((tokens[0] == MASK).sum())
    for rounds in tqdm(range(min(steps or left, left), 0, -1), desc="filling", leave=False, disable=None):
        logits = model(tokens)[0][..., :MASK]  # (b, l, 256)
        drawn = torch.multinomial(law(logits).flatten(0, 1), 1, generator=generator).view_as(tokens)
        score = (torch.softmax(logits, -1).amax(-1) if likeliest else
                 torch.rand(tokens.shape, generator=generator, device=tokens.device))
        keep = -(-left // rounds)
        places = score.masked_fill(tokens != MASK, -1).topk(keep, dim=1).indices  # (b, keep)
        tokens = tokens.scatter(1, places, drawn.gather(1, places))
        left -= keep
    return tokens


@torch.inference_mode()
def compile_step(model, token):
    """The model compiled for one token at a time; ConfigError where there is no compiler for it."""
    print("compiling", file=sys.stderr)
    step = torch.compile(model)
    try:
        step(token, model(token)[1])
    except Exception as e:  # torch has a class of its own for every compiler that may be missing
        raise ConfigError(f"--compile does not work here ({str(e).strip().splitlines()[0]}); run without it") from e
    return step


class Writer:
    """Bytes to a stream as soon as they can be shown: exactly, or as UTF-8 with complete characters only."""

    def __init__(self, stream, raw):
        self.stream, self.raw = stream, raw
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, data, final=False):
        if not self.raw:
            data = self.decoder.decode(data, final).encode()
        self.stream.write(data)
        self.stream.flush()


def read_prompt(c):
    """The prompt's bytes, from --prompt, a file or standard input."""
    if c.prompt and c.prompt_file:
        raise ConfigError("--prompt and --prompt_file exclude each other; give one")
    if not c.prompt_file:
        return c.prompt.encode("utf-8", "surrogateescape")
    try:
        if c.prompt_file == "-":
            return sys.stdin.buffer.read()
        with open(c.prompt_file, "rb") as f:
            return f.read()
    except OSError as e:
        raise ConfigError(f"--prompt_file {c.prompt_file} cannot be read: {e.strerror}") from e


def read_holes(c):
    """The tokens of --fill: its bytes, with MASK for an underscore."""
    text = c.fill.encode("utf-8", "surrogateescape")
    return [MASK if byte == ord("_") else byte for byte in (text if b"_" in text else text + b"_" * c.bytes)]


@torch.inference_mode()
def fill_words(model, words, text, cast, most=5):
    """Prints the text with the likeliest word in each hole, a run of underscores or [MASK], and what else was likely.

    For BiGS's released weights: they were trained on texts padded to the last position, and padding flows back into them.
    """
    ids = words.encode(re.sub("_+", "[MASK]", text))
    pad, mask = words.ids["[PAD]"], words.ids["[MASK]"]
    longest = model.config.n_position or len(ids)
    if len(ids) > longest or mask not in ids or model.config.vocab != len(words.pieces):
        raise ConfigError(f"--fill: {len(ids)} tokens with {ids.count(mask)} holes and {len(words.pieces):,} words, expected at "
                          f"most {longest}, at least 1 and {model.config.vocab:,}")
    tokens = torch.tensor([ids + [pad] * (longest - len(ids))], device=next(model.parameters()).device)
    with cast:
        law = torch.softmax(model(tokens)[0][0].float(), -1)  # (l, v)
    best = [law[i].topk(min(most, law.shape[1])) for i, token in enumerate(ids) if token == mask]
    for top in best:
        ids[ids.index(mask)] = top.indices[0].item()
    print(" ".join(words.pieces[i] for i in ids[1:-1]).replace(" ##", ""))
    for top in best:
        print("    " + ", ".join(f"{words.pieces[i]} {p:.4f}" for p, i in zip(top.values.tolist(), top.indices.tolist())))
    return 0


def encode(prompt, vocab, crlf):
    """What the model reads: the prompt's bytes, or where it knows more symbols than bytes, the ids that stand in it."""
    if vocab <= 256:
        return list((prompt or b"\n").replace(b"\n", b"\r\n" if crlf else b"\n"))
    try:
        ids = [int(word) for word in prompt.split()]
    except ValueError:
        ids = []
    if not ids or not 0 <= min(ids) <= max(ids) < vocab:
        raise ConfigError(f"the model reads tokens, not bytes: --prompt takes their ids, from 0 to {vocab - 1}, and spaces")
    return ids


def decode(tokens, vocab, crlf):
    """What the reader sees of tokens: encode's opposite."""
    if vocab > 256:
        return b"".join(b" %d" % token for token in tokens)
    return bytes(tokens).replace(b"\r", b"") if crlf else bytes(tokens)


def check(c):
    if c.fill and (c.prompt or c.prompt_file):
        raise ConfigError("--fill and --prompt exclude each other; what is known stands in --fill, before and after the holes")
    if c.steps < 0:
        raise ConfigError(f"--steps {c.steps} is not a number from 0 up")
    for name in ("bytes", "batch"):
        if getattr(c, name) < 1:
            raise ConfigError(f"--{name} {getattr(c, name)} is not positive")
    if not 0 <= c.temperature < float("inf"):
        raise ConfigError(f"--temperature {c.temperature} is not a number from 0 up")
    if not -2**63 <= c.seed < 2**63:
        raise ConfigError(f"--seed {c.seed} does not fit in 64 bits")
    if c.top_k < 0 or not 0 < c.top_p <= 1:
        raise ConfigError(f"--top_k {c.top_k} must be 0 or more, --top_p {c.top_p} in (0, 1]")


def run(argv):
    c, _ = parse(Flags, argv, "Let a trained model write on from a prompt.")
    check(c)
    device = pick_device(c.device)
    dtype, cast = pick_dtype(c.dtype, device)
    model, extra = load(c.ckpt, device)
    model.to(dtype)
    if isinstance(model, Encoder) != bool(c.fill):
        raise ConfigError(f"{c.ckpt} is a causal model, which cannot fill holes; leave --fill out" if c.fill else
                          f"{c.ckpt} is an encoder, which fills holes; give it --fill TEXT with an underscore for each byte")
    if c.fill and extra.get("layout") == "bigs":
        folder = Path(c.ckpt) if Path(c.ckpt).is_dir() else Path(c.ckpt).parent
        return fill_words(model, read_vocabulary(folder / "vocab.txt"), c.fill, cast)
    prompt = read_prompt(c)
    if not model.recurrent and not c.fill:
        print(f"attention keeps a cache of {f'its last {model.config.window}' if model.config.window else 'all'} positions",
              file=sys.stderr)
    tokens = torch.tensor([read_holes(c) if c.fill else encode(prompt, model.config.vocab, c.crlf)] * c.batch, device=device)
    generator = torch.Generator(device).manual_seed(c.seed)

    def law(logits):
        return filter_logits(logits, c.temperature, c.top_k, c.top_p)

    try:
        with cast:
            if c.fill:
                write(unmask(model, tokens, c.steps, law, generator, c.temperature == 0).unbind(1), b"", c)
                return 0
            step = compile_step(model, tokens[:, :1]) if c.compile else model
            write(generate(model, tokens, c.bytes, law, generator, step), prompt, c,
                  functools.partial(decode, vocab=model.config.vocab, crlf=c.crlf))
    except (KeyboardInterrupt, BrokenPipeError) as e:  # Ctrl-C, or a reader such as head that has seen enough
        sys.stdout = None if isinstance(e, BrokenPipeError) else sys.stdout  # nothing is left to flush it into
        return 130
    return 0


def write(stream, prompt, c, show=bytes):
    """One text as it comes; several one after the other when all are done."""
    out, end = sys.stdout.buffer, b"" if c.raw else b"\n"
    if c.batch == 1:
        writer = Writer(out, c.raw)
        writer.write(prompt)
        for token in stream:
            writer.write(show(token.tolist()))
        return writer.write(end, final=True)
    texts = torch.stack([token.cpu() for token in tqdm(stream, total=c.bytes, disable=None)], dim=1)
    for i, text in enumerate(texts.tolist()):
        heading = b"" if c.raw else f"--- {i + 1} of {c.batch}\n".encode()
        Writer(out, c.raw).write(heading + prompt + show(text) + end, final=True)


def main(argv=None):
    return run_script(run, argv)


if __name__ == "__main__":
    sys.exit(main())
