"""Let a trained model write: python sample.py --ckpt out/mamba2 --prompt "def ".

A state-space model writes without end in constant memory, since its state has one size; attention without a window
keeps a cache that grows. An encoder fills holes: python sample.py --ckpt out/mask --fill "The goal of life is ____."
In order: the distribution, generating, filling, speculative sampling, its drafters, the script. Letters: b texts, l
positions, v tokens of the vocabulary, k guesses, p and q distributions of the next token. An argument `distribution` is
a function from logits (..., v) to probabilities (..., v), filter_logits with its flags.
"""
import math
import os
import sys
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.bpe import BPE
from data.corpus import load_corpus
from data.files import UserError, require
from data.ngrams import NgramCounts, copied
from data.vocabulary import show, vocabulary_of
from model import MASK, load
from train import flag, parse, pick_device, pick_dtype, script

COUNTED = 2**24  # last bytes of a corpus that `--draft counts` reads: 500 MB while being sorted
PREFILL = 2048  # tokens of a prompt read at a time, to save memory: as if all were read at once
SHIPPED = Path(__file__).parent / "assets" / "mamba2.pt"

# ---------------------------------------------------------------------------------------------------------------------
# 1. The distribution to sample from


def filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The probabilities softmax(logits / temperature), cut down to the likeliest tokens and normalized again.

    top_k keeps so many of the likeliest, then top_p the fewest that reach so much together (Holtzman et al. 2020).
    Temperature 0 puts all on the likeliest, the first in a tie. Logits and probabilities (..., v), computed in float32
    or wider.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    highest = logits.amax(-1, keepdim=True)
    require(highest.isfinite().all(), "the model's logits are not finite; "
            "take an earlier checkpoint")
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    logits = (logits - highest) / max(temperature, 1e-30)  # the largest is 0: no overflow
    if 0 < top_k < logits.shape[-1]:
        order = logits.argsort(dim=-1, descending=True, stable=True)  # keeps exactly k in a tie
        logits = logits.scatter(-1, order[..., top_k:], -torch.inf)
    probabilities = torch.softmax(logits, -1)
    if top_p < 1:
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked  # the mass of the likelier ones
        ranked = ranked.masked_fill(before >= top_p, 0)
        probabilities = probabilities.scatter(-1, order, ranked)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


# ---------------------------------------------------------------------------------------------------------------------
# 2. Generating


@torch.no_grad()
def prefill(model, tokens, state=None):
    """Read tokens (b, l >= 1) in chunks: the logits after the last, (b, v), and the state."""
    for chunk in tokens.split(PREFILL, dim=1):
        logits, state = model(chunk, state, last=True)
    return logits[:, -1], state


@torch.inference_mode()
def generate(model, tokens, count, distribution, generator=None, step=None):
    """Yields a list of b tokens, count times, after the prompts (b, l >= 1). step is the same function as model,
    perhaps compiled."""
    step = model if step is None else step
    logits, state = prefill(model, tokens)
    for i in range(count):
        if i > 0:
            logits, state = step(token, state)
            logits = logits[:, -1]
        token = torch.multinomial(distribution(logits), 1, generator=generator)  # (b, 1)
        yield token[:, 0].tolist()


@torch.inference_mode()
def compiled_step(model, token):
    """model by torch.compile, which compiles at its first call: make that now, for tokens like token (b, 1), so that an
    error comes before the text. (Attention's growing cache makes it compile once more after the first token.)"""
    print("compiling", file=sys.stderr)
    step = torch.compile(model)
    # contiguous, as drawn tokens are: another stride would compile anew
    token = token.clone(memory_format=torch.contiguous_format)
    try:
        step(token, model(token)[1])
    except Exception as e:  # torch has a class for every compiler that may be missing
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"--compile does not work here ({reason}); run without it") from e
    return step


# ---------------------------------------------------------------------------------------------------------------------
# 3. Filling


@torch.inference_mode()
def unmask(model, tokens, rounds, distribution, generator=None, mask=MASK, likeliest=False):
    """Tokens (b, l) with their masks, equally many per row, filled in rounds of shares that differ by one at most;
    with rounds = 0 each round fills one.

    A round draws a token for every hole from what is visible before it, and keeps a share of them. At random places,
    one per round, this is the chain rule in a random order, which masked diffusion learns. With likeliest it keeps
    those where the model is surest, in the spirit of MaskGIT (Chang et al. 2022). Tokens that are kept in one round
    know nothing of each other: more rounds are slower and better.
    """
    left = int((tokens[0] == mask).sum())
    require(bool(((tokens == mask).sum(1) == left).all()), "rows to fill need equally many holes")
    rounds = min(rounds or left, left)
    for remaining in tqdm(range(rounds, 0, -1), desc="filling", leave=False, disable=None):
        logits = model(tokens)[0]  # (b, l, v)
        logits[..., mask] = -torch.inf  # no mask is filled with a mask
        rows = distribution(logits).flatten(0, 1)  # (b l, v)
        drawn = torch.multinomial(rows, 1, generator=generator).view_as(tokens)
        if likeliest:
            score = torch.softmax(logits, -1).amax(-1)  # (b, l)
        else:
            score = torch.rand(tokens.shape, generator=generator, device=tokens.device)
        share = math.ceil(left / remaining)
        places = score.masked_fill(tokens != mask, -1).topk(share, dim=1).indices  # (b, share)
        tokens = tokens.scatter(1, places, drawn.gather(1, places))
        left -= share
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# 4. Speculative sampling: a cheap drafter guesses k tokens, and one call of the model judges them all
#
#     text, seen, state = the prompt, its length - 1, and the model's state after text[:seen]   (its last token is read
#                         with the guesses, since the distribution of the first guess comes out there)
#     until the text is long enough:                                                                   (a round)
#         guesses, q      = the drafter's: tokens that may follow text, and the distributions that it drew them from
#         logits, state   = one call reads text[seen:] + guesses; the state has read text[seen:] alone
#         p               = the model's distributions of each guess and of the token after the last guess
#         chance, instead = exact(p, q, guesses)
#         accepted        = how many guesses pass in a row, if guess i passes with probability chance[i]
#         seen, text      = len(text), text + guesses[:accepted] + a token drawn from instead[accepted], or from p after
#                           the last guess
#
# Invariant: the state has read text[:seen], and seen < len(text). No state of the model that is kept has read a guess,
# so nothing is rolled back. The next call reads accepted guesses again.
#
#                       seen        len(text)
#     | r e t u r n _ s | e l f .   | n a m e s                text = "return_self.", guesses "names"
#     | the state       | one call of the model reads these
#                             p of    n a m e s *              that of n comes out where the model reads "."
#     | r e t u r n _ s   e l f .   | n a m i |                the next round, if "nam" is accepted and "i" drawn
#                                   seen      len(text)


def exact(p, q, onehot):
    """Accept a guess with min(1, p/q), else draw from (p - q)+, normalized (Leviathan et al. 2023; Chen et al. 2023).

    p, q, onehot (n, v) for n guesses: the model's distributions, the drafter's, and a one at each guess. Returns chance
    (n,): guess i passes with chance[i] if all before it passed; and instead (n, v): where guess i is the first that
    does not pass, its token is drawn from instead[i].

    Proof that a token has the distribution p if its guess was drawn from q: it comes by acceptance with q min(1, p/q) =
    min(p, q). A refusal has the probability 1 - sum min(p, q) = sum (p - q)+, where ( )+ is the positive part, since p
    = min(p, q) + (p - q)+ sums to 1; the token is then drawn from (p - q)+ / sum (p - q)+, which gives (p - q)+.
    Together that is p. A guess that nobody drew is one drawn from q = onehot: it passes with its p, and instead is p
    without it. Where p = q but for rounding, (p - q)+ may be 0 everywhere, yet the guess be refused: instead is p
    there.

    Arrays are torch's, or numpy's of fractions with which the tests enumerate all outcomes.
    """
    chance = ((p * onehot).sum(-1) / (q * onehot).sum(-1)).clip(max=1)
    rest = (p - q).clip(min=0)
    rest = rest + p * (rest.sum(-1, keepdims=True) == 0)
    return chance, rest / rest.sum(-1, keepdims=True)


@torch.inference_mode()
def speculate(model, tokens, count, distribution, drafter, k, generator=None, rounds=None):
    """Yields the count tokens that follow one text (1, l >= 1) as generate does, in the same distribution.

    rounds, a list, receives (guessed, accepted) of every round.

    Cost: if each guess passes with probability alpha, a round adds 1 + alpha + .. + alpha^k tokens on average
    (Leviathan et al. 2023, equation 1) for k steps of the drafter and one call of the model. That call is not free: for
    12 layers of Mamba-2, d_model 160, on two CPU cores, 9 to 17 bytes took 2.1 to 2.4 times as long as one.
    """
    text = tokens[0].tolist()
    target = len(text) + count
    seen = len(text) - 1
    state = prefill(model, tokens[:, :seen])[1] if seen else None
    drafter.start()
    while len(text) < target:
        guesses = []
        q = None
        useful = min(k, target - len(text) - 1)  # the last token needs no guess
        if useful:
            guesses, q = drafter.draft(text, useful, distribution, generator)
        n = len(guesses)
        unread = len(text) - seen
        window = tokens.new_tensor([text[seen:] + guesses])  # (1, unread + n)
        logits, state = model(window, state, upto=unread)
        p = distribution(logits[0, unread - 1:])  # (n + 1, v): from where the last of text is read
        onehot = F.one_hot(window[0, unread:], p.shape[1]).to(p)  # (n, v)
        chance, instead = exact(p[:n], onehot if q is None else q.to(p), onehot)
        passed = torch.bernoulli(chance, generator=generator)
        accepted = int(passed.cumprod(0).sum())  # 1 1 0 1 are two in a row
        choices = torch.cat([instead, p[n:]])
        token = torch.multinomial(choices[accepted], 1, generator=generator).item()
        seen = len(text)
        text += [*guesses[:accepted], token]
        if rounds is not None:
            rounds.append((n, accepted))
        for written in text[seen:target]:
            yield [written]


# ---------------------------------------------------------------------------------------------------------------------
# 5. Drafters: two models and two that have none


class Drafter:
    """draft(text, k, distribution, generator) -> guesses, q. text is a list of ids, guesses a list of n ids that may
    follow it: n is k at most, or the bytes that k words add. q (n, v) are the distributions that they were drawn from,
    each given those before it, or None if nothing was drawn. The text grows from call to call until start() begins
    another text."""

    def start(self):
        pass


def read(model, text, state=None):
    """prefill for one text, a list of tokens."""
    return prefill(model, torch.tensor([text], device=model.embedding.weight.device), state)


class ByteDrafter(Drafter):
    """A smaller model of the same tokens. It keeps the states between its guesses and goes back to the last good one.

    Between two calls the text grows by the accepted guesses and one more token. A state that has read j guesses is kept
    under the old length + j. Where that is less than the new length, j guesses were accepted, so the state is good, and
    the one that has read most is taken.
    """

    def __init__(self, model):
        self.model = model

    def start(self):
        self.states = {0: None}  # tokens read -> state

    def draft(self, text, k, distribution, generator):
        length = max(n for n in self.states if n < len(text))
        logits, state = read(self.model, text[length:], self.states[length])
        self.states = {len(text): state}
        guesses = []
        q = []
        for i in range(k):
            if i > 0:
                logits, state = prefill(self.model, guesses[-1], state)
                self.states[len(text) + i] = state
            q.append(distribution(logits))  # (1, v)
            guesses.append(torch.multinomial(q[-1], 1, generator=generator))
        return torch.cat(guesses, dim=1)[0].tolist(), torch.cat(q)


class SubwordDrafter(Drafter):
    """A model over byte-pair words (MambaByte, 2401.13660): k words are about 3 k guesses, in k calls.

    The text may end inside a word, and its words may not be those that were guessed. So the state goes back to where a
    piece began: a run of letters, of signs or of white space (data/bpe.py). No merge crosses a piece's ends, so what
    comes later does not change the words before it. (As in ByteDrafter, a state that has read a refused guess is kept
    under the new length or more, and there no piece of the text begins.) The text from there on is encoded anew, all of
    its words but the last are read, and the next word is drawn among those that begin with the last. Exactness asks
    only that each byte was drawn from its row of q, given all that was drawn before it; reveal gives that row. (Whether
    a word ends is drawn before its next byte, and judged by nobody: it only decides how many guesses there are.) For
    example, with the words ab, abc, abcd and all bytes:

        text           a b c d x a b     one piece, so the state goes back to that after 0 bytes
        encoded        abcd x ab         abcd x is read: the state after 5 bytes, and the logits of the next word
        first word     abc               drawn among ab, abc and abcd, in proportion to their probabilities
        guessed        c                 with q(c) = 1, because abc and abcd both go on with c
        second word    x                 drawn from the state after abcd x abc, 8 bytes, and guessed with q(x)
        states kept    0, 5, 8           bytes read, the first where a piece begins
        c is refused   a b c d x a b q   5 and 8 begin no piece of this text: back to 0, as above
    """

    def __init__(self, model):
        self.model = model
        self.bpe = BPE(model.config.merges)
        self.order = torch.tensor(self.bpe.order)

    def start(self):
        # bytes of text read -> (logits, state); the newline is there for logits before the first byte
        self.states = {0: read(self.model, [ord("\n")])}

    def draft(self, text, k, distribution, generator):
        length, before, prefix = self.bpe.resume(bytes(text), list(self.states))
        logits, state = self.states[length]
        # its first key is a place where a piece begins, as resume wants
        self.states = {length: (logits, state)}
        if before:
            logits, state = read(self.model, before, state)
        self.states[len(text) - len(prefix)] = logits, state
        guesses = b""
        q = []
        for i in range(k):
            if i > 0:
                logits, state = read(self.model, [drawn], state)
                self.states[len(text) + len(guesses)] = logits, state
            first, end = self.bpe.span(prefix)
            logits = logits[0, self.order]
            logits[:first] = logits[end:] = -torch.inf
            of_words = distribution(logits)
            drawn = self.bpe.order[torch.multinomial(of_words, 1, generator=generator).item()]
            word = self.bpe.words[drawn]
            revealed = self.bpe.reveal(of_words.cpu().double().numpy(), word, len(prefix))
            q.append(torch.from_numpy(revealed))  # (bytes that the word adds, 256)
            guesses += word[len(prefix):]
            prefix = b""
        return list(guesses), torch.cat(q)


class CopyDrafter(Drafter):
    """No model: guesses what followed earlier in the text (prompt lookup)."""

    def draft(self, text, k, distribution, generator):
        return list(copied(bytes(text), k)), None


class CountDrafter(Drafter):
    """No model either: draws from the n-gram counts of a corpus."""

    def __init__(self, corpus, device="cpu"):
        self.counts = NgramCounts(corpus)
        self.device = device

    def draft(self, text, k, distribution, generator):
        recent = text[-8:]
        q = []
        for _ in range(k):
            counted = torch.from_numpy(self.counts.predict(bytes(recent[-8:])))
            q.append(distribution(counted.log().to(self.device, torch.float32)))  # as logits
            recent.append(torch.multinomial(q[-1], 1, generator=generator).item())
        return recent[-k:], torch.stack(q)


# ---------------------------------------------------------------------------------------------------------------------
# 6. The script


@dataclass
class Flags:
    ckpt: str = flag("", "a checkpoint: a run's folder, or a published one's (default: "
                     "out/mamba2, or assets/mamba2.pt where that does not exist yet)")
    prompt: str = flag("", "text, or ids for a model of tokens; - is standard input")
    bytes: int = flag(500, "how many to write (tokens, if the model reads those)", low=1)
    fill: str = flag("", "text whose underscores an encoder fills, one byte each; without any, "
                     "--bytes of them follow it; with BiGS's weights one word per run of them")
    rounds: int = flag(0, "fill in so many rounds of equal shares; 0 is one hole per round", low=0)
    temperature: float = flag(0.8, "0 takes the likeliest, 1 samples from the model as is", low=0)
    top_k: int = flag(0, "sample from the k likeliest only; 0 is all", low=0)
    top_p: float = flag(1.0, "sample from the fewest that have this together", low=1e-9, high=1)
    seed: int = flag(1, "the same seed and flags write the same bytes", low=0)
    batch: int = flag(1, "texts; several are shown when all are done", low=1, high=2**16)
    raw: bool = flag(False, "the exact bytes; without it U+FFFD stands for what is not UTF-8")
    crlf: bool = flag(False, "CR LF inside the model, LF outside: for MambaByte's PG19 models")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; auto takes the best there is")
    dtype: str = flag("auto", "auto: bfloat16 on a GPU from compute capability 8.0, else float32",
                      one_of=("auto", "float32", "bfloat16", "float64"))
    draft: str = flag("", "what guesses ahead: a checkpoint of bytes or words, ngram (copies from "
                      "the text) or counts (draws from n-grams of --ckpt's corpus)")
    k: int = flag(8, "guesses per round, in words if the drafter reads words", low=1)
    stats: bool = flag(False, "what --draft brought, beside plain writing, on stderr")
    compile: bool = flag(False, "torch.compile: slow to start, then two to five times as fast")


def check(c):
    """The rules between flags."""
    require(not c.fill or not c.prompt, "--fill and --prompt exclude each other; leave one out")
    require(not c.fill or not (c.crlf or c.compile), "--crlf and --compile are for --prompt")
    require(c.draft or not c.stats, "--stats is for --draft; leave it out")
    require(sys.stdin or c.prompt != "-", "standard input is closed; give --prompt TEXT")
    require(not c.draft or not (c.fill or c.compile or c.batch > 1), "--draft speculates on one "
            "text; leave out --fill, --compile and --batch")


def first_ckpt():
    """The default --ckpt: the run that train.py makes by default, or before that the same one as it is shipped."""
    path = Path("out/mamba2")
    if [*path.glob("*.pt")] or not SHIPPED.exists():
        return str(path)
    print(f"no {path} yet; this is assets/{SHIPPED.name}, a run that is shipped", file=sys.stderr)
    return str(SHIPPED)


def make_drafter(c, vocab, data, device, dtype):
    """The drafter that --draft names, for a model of vocab tokens that was trained on data."""
    require(vocab == 256 or c.draft not in ("ngram", "counts"), f"--draft {c.draft} guesses "
            f"bytes; {c.ckpt} reads tokens; draft by a model")
    if c.draft == "ngram":
        return CopyDrafter()
    if c.draft == "counts":
        require(data, f"--draft counts: {c.ckpt} does not say its corpus; try --draft ngram")
        try:
            corpus = load_corpus(data).train[-COUNTED:]
        except UserError as e:
            raise UserError(f"--draft counts reads what {c.ckpt} was trained on: {e}") from e
        print(f"sorting {len(corpus):,} bytes of {data}, the last ones", file=sys.stderr)
        return CountDrafter(corpus, device)
    require(Path(c.draft).exists(), f"--draft {c.draft}: no such checkpoint; without one: "
            "ngram, counts")
    drafter = load(c.draft, device)[0].to(dtype)
    config = drafter.config
    fits = not config.block and vocab == (256 if config.merges else config.vocab)
    require(fits, f"--draft {c.draft} has a vocabulary of {config.vocab}, the model {vocab}; "
            "take a causal model of the same, or for bytes one of train.py --bpe")
    return SubwordDrafter(drafter) if config.merges else ByteDrafter(drafter)


def report(rounds, seconds, plain):
    """What speculation brought, on stderr, and its seconds beside those that the plain stream takes."""
    began = time.perf_counter()
    written = len(list(plain))
    plain_seconds = time.perf_counter() - began
    guessed, accepted = (sum(numbers) for numbers in zip(*rounds))
    print(f"{written / len(rounds):.2f} tokens per call of the model, {len(rounds)} calls; "
          f"{accepted} of {guessed} guesses accepted\n"
          f"{seconds:.2f} s, plain writing {plain_seconds:.2f} s: "
          f"{plain_seconds / seconds:.2f} times as fast", file=sys.stderr)


@script
def main(argv):
    c, _ = parse(Flags, argv, "Let a trained model write on from a prompt.")
    check(c)
    c.ckpt = c.ckpt or first_ckpt()
    device = pick_device(c.device)
    dtype, cast = pick_dtype(c.dtype, device)
    model, extra = load(c.ckpt, device)
    model.to(dtype)
    config = model.config
    vocabulary = vocabulary_of(c.ckpt, config, extra.get("layout"), c.fill, c.crlf)
    if c.draft:
        data = extra.get("flags", {}).get("data")
        drafter = make_drafter(c, config.vocab, data, device, dtype)
    prompt = sys.stdin.buffer.read() if c.prompt == "-" else os.fsencode(c.prompt)
    ids = vocabulary.holes(os.fsencode(c.fill), c.bytes) if c.fill else vocabulary.encode(prompt)
    tokens = torch.tensor([ids], device=device).repeat(c.batch, 1)
    generator = torch.Generator(device).manual_seed(c.seed)
    rounds = []

    def distribution(logits):
        return filter_logits(logits, c.temperature, c.top_k, c.top_p)

    def plain():
        step = compiled_step(model, tokens[:, :1]) if c.compile else model
        return generate(model, tokens, c.bytes, distribution, generator, step)

    with cast:
        if c.fill:
            filled = unmask(model, tokens, c.rounds, distribution, generator,
                            vocabulary.mask, likeliest=c.temperature == 0)
            texts = [[vocabulary.decode(text)] for text in filled.tolist()]
        elif c.batch > 1:
            steps = tqdm(plain(), total=c.bytes, disable=None)  # of c.batch tokens each
            texts = [[prompt + vocabulary.decode(text)] for text in zip(*steps)]
        else:
            stream = plain() if not c.draft else speculate(
                model, tokens, c.bytes, distribution, drafter, c.k, generator, rounds)
            texts = [chain([prompt], map(vocabulary.decode, stream))]
        began = time.perf_counter()
        show(texts, c.raw)
        if c.stats:
            report(rounds, time.perf_counter() - began, plain())
    return 0


if __name__ == "__main__":
    sys.exit(main())
