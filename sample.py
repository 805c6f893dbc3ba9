"""Let a trained model write: python sample.py --ckpt out/mamba2 --prompt "def ".

A state-space model keeps a state of constant size, so it writes for ever in constant memory; attention caches its last
window. An encoder fills holes, from both sides: python sample.py --ckpt out/mask --fill "The goal of life is ____."
In order: the law one samples from, writing byte by byte, filling, speculative sampling, the script.
"""
import codecs
import functools
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.bpe import BPE
from data.corpus import load_corpus
from data.files import UserError
from data.wordpiece import read_vocabulary
from model import KEEP_BY_ROW, MASK, Encoder, load
from train import flag, parse, pick_device, pick_dtype, script

PREFILL = 2048  # bytes of the prompt read at a time: bounds the memory, not the result


@dataclass
class Flags:
    ckpt: str = flag("out/mamba2", "a checkpoint: a run's folder, or a published one's; "
                     "models of tokens take and give ids")
    prompt: str = flag("", "text to go on from; empty begins as after a newline")
    prompt_file: str = flag("", "the same from a file, any bytes; - is standard input")
    bytes: int = flag(500, "how many to write")
    fill: str = flag("", "text whose underscores an encoder fills, a byte each; if it has none, --bytes of them "
                     "follow it; with BiGS's released weights a word for each run of them")
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
    draft: str = flag("", "what guesses ahead: a checkpoint of bytes or words; or from the corpus of --ckpt, without a "
                      "model, counts, which draws, or ngram, which copies; the law stays --ckpt's")
    k: int = flag(8, "bytes to guess at a time, or words if the drafter reads words")
    rule: str = flag("exact", "what decides on a guess: exact, point_mass, or top_beta, which changes the law")
    beta: int = flag(3, "top_beta accepts a byte among the beta likeliest")
    to_boundary: bool = flag(False, "after a refusal write single bytes up to the next white space, as MambaByte does")
    stats: bool = flag(False, "what was accepted, what it cost, and the time of plain writing, on stderr")
    compile: bool = flag(False, "torch.compile the step: up to a minute to start, then two to three times the speed")


def filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The law to sample from, as probabilities (..., v): softmax(logits / temperature), cut down and normed again.

    top_k keeps the k likeliest, then top_p the fewest that reach p together (Holtzman et al. 2020).
    Temperature 0 puts everything on the likeliest, the first in a tie. Logits (..., v), computed in float32 or wider.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # the largest is 0: nothing overflows
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
def prefill(model, tokens, state=None):
    """Read tokens (b, l) in pieces: the logits after the last, (b, v), or None if there are none, and the state."""
    if tokens.shape[1] == 0:
        return None, state
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
    """Tokens (b, l) with their MASKs, equally many a row, filled in `steps` rounds of equal shares; 0: a byte a round.

    A round draws every masked byte, each as if it were the only one, and keeps its share: at random places, which with
    a byte a round is the chain rule in a random order that masked diffusion learns, or where the model is surest
    (MaskGIT, Chang et al. 2022). Fewer rounds are faster, and bytes kept in one round know nothing of each other.
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
    """The model compiled for one token at a time; UserError where there is no compiler for it."""
    print("compiling", file=sys.stderr)
    step = torch.compile(model)
    try:
        token = token.clone(memory_format=torch.contiguous_format)  # as every byte drawn will be, or it compiles again
        step(token, model(token)[1])
    except Exception as e:  # torch has a class of its own for every compiler that may be missing
        raise UserError(f"--compile does not work here ({str(e).strip().splitlines()[0]}); run without it") from e
    return step


@torch.inference_mode()
def capture_step(step, token, state):
    """One token's step recorded as a CUDA graph: its kernels follow one another without Python, and with the same bits.

    The state lives in buffers of the graph's own: a call overwrites the state and logits that the last one returned,
    and copies in a state that came from elsewhere. Under autocast, call it within the context it was captured in, which
    keeps the narrowed weights.
    """
    token, own = token.clone(), tuple(type(s)(*(t.clone() for t in s)) for s in state)

    def copy_in(state):
        torch._foreach_copy_([t for s in own for t in s], [t for s in state for t in s])

    def advance():
        logits, state = step(token, own)
        copy_in(state)
        return logits

    with torch.cuda.device_of(token):  # streams are of the current device, which need not be the model's
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what libraries set up in their first calls must not be recorded
            for _ in range(3):
                advance()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = advance()

    def captured(next_token, state):
        if state is not own:
            copy_in(state)
        token.copy_(next_token)
        graph.replay()
        return logits, own

    return captured


# ---------------------------------------------------------------------------------------------------------------------
# Speculative sampling: a cheap drafter guesses k bytes, one call of the model looks at all of them
#
# A call that reads k bytes costs little more than one that reads a single byte, so whatever is accepted is nearly free.
# The rules below decide on guesses such that the text follows the model's own law exactly, whatever the drafter does.
# They take arrays of any kind that calculates, torch or numpy, with a row for every guess and one more, which stands
# for the byte after the last guess: p (.., k+1, v) are the model's laws, hot marks the guessed bytes by ones, q are the
# laws that the guesses were drawn from. A guess that is not there, like that last one, is a row of zeros in hot and q.
# The answer is each guess's chance of being accepted if those before it were, and the laws of the byte that takes the
# place of the first one refused.


def exact(p, q, hot, scores=None):
    """Accept with min(1, p/q), else draw from (p - q)+ normed (Leviathan et al. 2023; Chen et al. 2023).

    The byte's law is p, for any p and q, provided each guess was drawn from its q, given those before it: what is
    accepted brings min(p, q), what is not (1 - sum min(p, q)) (p - q)+ / sum (p - q)+ = (p - q)+, together p. With
    q = 0 nothing is accepted and p is left, so the byte after the last guess needs no rule of its own.
    """
    p_b, q_b = (p * hot).sum(-1), (q * hot).sum(-1)
    left = (p - q).clip(min=0)
    total = left.sum(-1)[..., None]  # 0 if q = p: then nothing is refused, and rounding must not divide by it
    return (p_b / (q_b + (q_b == 0))).clip(max=1), (left + p * (total == 0)) / (total + (total == 0))


def point_mass(p, q, hot, scores=None):
    """Accept the guess b with p(b), else draw from p without b: exact, wherever the guesses come from; q is ignored.

    It is the rule above for a drafter that puts all its mass on what it guessed.
    """
    return exact(p, hot, hot)


def top_beta(p, q, hot, scores, beta=3):
    """Accept every guess among the beta highest scores, ties in its favour (MambaByte 2024): NOT exact for beta > 1.

    All that is sure is that each byte is among the beta likeliest; inside that set guesses have the drafter's law. With
    beta = 1 and p at temperature 0 it is the greedy text, whatever is guessed. Scores (.., k+1, v): the model's logits.
    """
    rank = (scores > (scores * hot).sum(-1)[..., None]).sum(-1)
    return (rank < beta) * hot.sum(-1), p


def reveal(q, branches):
    """The laws (n, 256) of a word's bytes, one after the other, when the word is drawn from q: `exact` takes them as q.

    q is the law of all words, in the order of their bytes; branches (n, 257) say for each prefix of the word which ones
    go on with byte b: from branches[b] to branches[b + 1]. A byte has their mass over that of all words longer than the
    prefix. That the word does not end here is the drafter's own draw, made before the byte's: it cannot bias the text.
    """
    mass = np.diff(np.concatenate([[0], np.cumsum(q)])[branches], axis=1)
    return mass / mass.sum(1, keepdims=True)


RULES = {"exact": exact, "point_mass": point_mass, "top_beta": top_beta}


def read(model, text, start, end, ahead, state):
    """One call brings the state from text[:start] to text[:end] and looks at `ahead` guesses behind it, row by row.

    Returns logits (b, ahead + 1, v) for the bytes from end on, and the state after text[:end]. Guesses leave no trace
    in the state, so nothing is rolled back: what came true is read again by the next call, as in the Mamba in the Llama
    (Wang et al. 2024, section 4), but from its bytes, not from inputs kept in every layer.
    """
    lag = [e - s for s, e in zip(start, end)]
    width = max(lag) + ahead
    window = torch.stack([row[s:s + width] for row, s in zip(text, start)])
    keep = torch.tensor(lag, device=text.device) if len(set(lag)) > 1 else lag[0] if ahead else None
    logits, state = model(window, state, keep)
    return torch.stack([row[n - 1:n + ahead] for row, n in zip(logits, lag)]), state


class ByteDrafter:
    """A smaller model of the same bytes, which draws its guesses from the same kind of law.

    It goes byte by byte, so the states at all k positions exist anyway, and is put back by taking the one it needs.
    """

    def __init__(self, model):
        self.model, self.states = model, None

    def draft(self, text, end, k, law, generator):
        """Guesses (b, k) for text[end:], and the laws (b, k, v) that they were drawn from; end is a list, by row."""
        if self.states is None:
            start, state = [e - 1 for e in end], prefill(self.model, text[:, :end[0] - 1])[1]
        else:
            true = [min(e - s, len(self.states)) - 1 for s, e in zip(self.end, end)]
            start, state = [s + n for s, n in zip(self.end, true)], pick(self.states, true)
        logits, state = read(self.model, text, start, end, 0, state)
        self.states, self.end, guesses, laws = [state], end, [], []
        for i in range(k):
            laws.append(law(logits[:, -1]))
            guesses.append(torch.multinomial(laws[-1], 1, generator=generator))
            if i + 1 < k:
                logits, state = self.model(guesses[-1], state)
                self.states.append(state)
        return torch.cat([text[:, :0], *guesses], dim=1), torch.stack(laws, dim=1) if laws else None


def pick(states, index):
    """The state that holds row i of states[index[i]] for every row i."""
    if len(index) == 1:
        return states[index[0]]
    return tuple(type(layers[0])(*(torch.stack([t[i][row] for row, i in enumerate(index)]) for t in zip(*layers)))
                 for layers in zip(*states))


class SubwordDrafter:
    """A model over byte-pair words (MambaByte 2024): k words make about 3 k guesses, in k calls, not 3 k. Batch 1.

    After a refusal the text may end inside a word, and the words guessed before may not be those that the text has now.
    So the state goes back to where a piece began, what follows is encoded anew, all of its words but the last are read,
    and the next word is drawn among those that begin with the last.
    """

    def __init__(self, model, words):
        self.model, self.words, self.states = model, words, None
        self.order = torch.tensor(words.order)

    def draft(self, text, end, k, law, generator):
        """Guesses (1, n) for text[0, end[0]:], the bytes of k words, and their laws (1, n, 256)."""
        end = end[0]
        if self.states is None:  # (bytes read, logits, state) where a piece began, and before every word from there on
            self.states = [(0, *prefill(self.model, text.new_tensor([[10]])))]  # a text begins as after a newline
        first = self.states[0][0]
        cuts = self.words.cuts(bytes(text[0, first:end].tolist()))
        self.states = [s for s in self.states if s[0] - first in cuts][-1:]
        seen, logits, state = self.states[0]
        rest = self.words.encode(bytes(text[0, seen:end].tolist())).tolist()
        if rest[:-1]:
            logits, state = prefill(self.model, text.new_tensor([rest[:-1]]), state)
        prefix, guesses, laws = self.words.words[rest[-1]], b"", []
        seen = end - len(prefix)
        self.states.append((seen, logits, state))
        for i in range(k):
            word, q = self.draw(logits, prefix, law, generator)
            new, seen = self.words.words[word], seen + len(self.words.words[word])
            branches = [self.words.branches(new[:n]) for n in range(len(prefix), len(new))]
            if branches:  # not if the word is what the text ends with already
                laws.append(reveal(q, np.stack(branches)))
            guesses, prefix = guesses + new[len(prefix):], b""
            if i + 1 < k:
                logits, state = prefill(self.model, text.new_tensor([[word]]), state)
                self.states.append((seen, logits, state))
        q = torch.from_numpy(np.concatenate(laws)).to(text.device, logits.dtype)[None] if laws else None
        return text.new_tensor([list(guesses)]), q

    def draw(self, logits, prefix, law, generator):
        """A word that begins with prefix, and the law of all words in order that it was drawn from."""
        first, last = self.words.span(prefix)
        few = law(logits[:, self.order[first:last]])  # (1, last - first)
        q = np.zeros(len(self.words.order))
        q[first:last] = few[0].double().cpu().numpy()
        return self.words.order[first + torch.multinomial(few, 1, generator=generator).item()], q


class NgramDrafter:
    """No model: guesses what followed the text's longest suffix, earlier in the text or in a corpus (prompt lookup).

    The corpus's positions are sorted by the 8 bytes before each, the nearest first: where the text's own last 8 bytes
    belong, the two neighbours share the longest suffix with it.
    """

    def __init__(self, corpus=b"", shortest=3):
        self.corpus, self.shortest, self.texts = bytes(corpus), shortest, None
        data, before = np.frombuffer(self.corpus, np.uint8), np.zeros(len(self.corpus) + 1, np.uint64)
        for j in range(8):  # before[i]: bytes i-1, i-2, .. i-8, the nearest highest
            before[j + 1:] |= data[:len(data) - j].astype(np.uint64) << np.uint64(56 - 8 * j)
        self.order = np.argsort(before, kind="stable")
        self.sorted = before[self.order]

    def draft(self, text, end, k, law, generator):
        """Guesses (b, k), -1 where there is none; they have no law."""
        if self.texts is None:
            self.texts, self.end = [b""] * len(end), [0] * len(end)
        for i, e in enumerate(end):
            self.texts[i] += bytes(text[i, self.end[i]:e].tolist())
        self.end = end
        found = [self.continuation(t, k) for t in self.texts]
        n = max(map(len, found))
        guesses = [list(f) + [-1] * (n - len(f)) for f in found]
        return torch.tensor(guesses, dtype=torch.long, device=text.device).reshape(len(end), n), None

    def continuation(self, text, k):
        """Up to k bytes that followed the longest match, in the corpus or, if as long, earlier in the text."""
        where = np.searchsorted(self.sorted, key(text), side="right")
        length, guess = self.shortest - 1, b""
        for i in self.order[max(0, where - 1):where + 1]:
            n = common_suffix(self.corpus[max(0, i - 32):i], text[-32:])
            if n > length and i < len(self.corpus):
                length, guess = n, self.corpus[i:i + k]
        for n in range(min(32, len(text) - 1), max(length, self.shortest) - 1, -1):
            i = text.rfind(text[-n:], 0, len(text) - 1)
            if i >= 0:
                return text[i + n:i + n + k]
        return guess


class CountDrafter(NgramDrafter):
    """No model either: draws from an n-gram law, counts of what followed the last bytes in the corpus.

    p_n = (counts + 20 p_m) / (all counts + 20) for the last n = 2, 4 and 8 bytes, m being the length before n, and p_0
    having all bytes alike: a Dirichlet prior (MacKay and Peto 1995). Of 500 places or more every second, third, ..
    counts, between 250 and 500 of them.
    """

    def __init__(self, corpus):
        super().__init__(corpus)
        self.following = np.frombuffer(self.corpus + b"\n", np.uint8)[self.order]  # after the last byte a line ends

    def draft(self, text, end, k, law, generator):
        """Guesses (b, k), and the laws (b, k, 256) that they were drawn from."""
        last, guesses, laws = [bytes(t[max(0, e - 8):e].tolist()) for t, e in zip(text, end)], [], []
        for _ in range(k):
            p = torch.from_numpy(np.stack([self.predict(t) for t in last])).to(text.device, torch.float32)
            laws.append(law(p.log()))
            guesses.append(torch.multinomial(laws[-1], 1, generator=generator))
            last = [(t + bytes(byte))[-8:] for t, byte in zip(last, guesses[-1].tolist())]
        return torch.cat([text[:, :0], *guesses], dim=1), torch.stack(laws, dim=1) if laws else None

    def predict(self, last):
        """The law (256,) of the byte after the last ones."""
        place, p = key(last), np.full(256, 1 / 256)
        further = np.array([2 ** (64 - 8 * n) - 1 for n in (2, 4, 8) if n <= len(last)], np.uint64)  # not in the n
        first = np.searchsorted(self.sorted, place & ~further)
        stop = np.searchsorted(self.sorted, place | further, side="right")
        for i, j in zip(first, stop):
            counts = np.bincount(self.following[i:j:(j - i) // 500 + 1], minlength=256)
            p = (counts + 20 * p) / (counts.sum() + 20)
        return p


WITHOUT_MODEL = {"ngram": NgramDrafter, "counts": CountDrafter}


def key(text):
    """The last 8 bytes as a number, the nearest highest: texts sort by their suffixes."""
    return np.uint64(int.from_bytes(text[-8:][::-1].ljust(8, b"\0"), "big"))


def common_suffix(a, b):
    """How many bytes at their ends are the same."""
    n = 0
    while n < min(len(a), len(b)) and a[-n - 1] == b[-n - 1]:
        n += 1
    return n


@dataclass
class Stats:
    """What a speculation did: (guessed, accepted) of every row in every round, calls of the model, and seconds."""
    rounds: list = field(default_factory=list)
    calls: int = 0
    drafting: float = 0.0
    verifying: float = 0.0

    def acceptance(self):
        """By position: how often a guess that was looked at, those before it being accepted, was accepted too."""
        longest = max((guessed for guessed, _ in self.rounds), default=0)
        looked = [sum(guessed > i and accepted >= i for guessed, accepted in self.rounds) for i in range(longest)]
        return [sum(accepted > i for _, accepted in self.rounds) / n for i, n in enumerate(looked) if n]

    def report(self, count, plain):
        """A few lines, for the seconds that plain writing of the same count of bytes takes."""
        seconds = self.drafting + self.verifying
        written = sum(accepted + 1 for _, accepted in self.rounds)
        return (f"{written / len(self.rounds):.2f} bytes per call of the model, {self.calls} calls\n"
                f"accepted by position: {' '.join(f'{a:.2f}' for a in self.acceptance())}\n"
                f"drafting {self.drafting:.2f} s, verifying {self.verifying:.2f} s, {count / seconds:,.0f} bytes/s; "
                f"plain {plain:.2f} s, {count / plain:,.0f} bytes/s: {plain / seconds:.2f} times as fast")


@torch.inference_mode()
def speculate(model, tokens, count, law, drafter, k, rule=exact, generator=None, stats=None, to_boundary=False):
    """What generate yields, and in the same law if the rule is exact, in fewer calls of the model.

    Rows accept different numbers of guesses: each has a text of its own length, and a state that covers its text up to
    what the last round added. Rows that are done early go on for the others' sake; nobody sees that. to_boundary, at
    batch 1: no guesses from a refusal to the next white space.
    """
    b, l = tokens.shape
    stats = stats or Stats()
    text, v = F.pad(tokens, (0, count)), torch.arange(model.config.vocab, device=tokens.device)
    state = prefill(model, tokens[:, :-1])[1]
    start, end, shown, refused = [l - 1] * b, [l] * b, l, False
    while shown < l + count:
        began = time.perf_counter()
        left = l + count - min(end) - 1  # the last byte needs no guess
        guesses, q = drafter.draft(text, end, 0 if refused else min(k, left), law, generator)
        n, drafted = guesses.shape[1], time.perf_counter()
        if (room := max(end) + max(e - s for s, e in zip(start, end)) + n + 1) > text.shape[1]:
            text = F.pad(text, (0, room))
        for row, e, guess in zip(text, end, guesses.clamp(min=0)):
            row[e:e + n] = guess
        logits, state = read(model, text, start, end, n, state)
        p = law(logits)  # (b, n + 1, v)
        hot = (F.pad(guesses, (0, 1), value=-1)[..., None] == v).to(p.dtype)
        q = hot if q is None else F.pad(q, (0, 0, 0, 1))  # without a law of their own the guesses are certain
        chance, after = rule(p, q, hot, logits)
        true = torch.bernoulli(chance, generator=generator).cumprod(1).sum(1).long()  # (b,) accepted
        byte = torch.multinomial(after[torch.arange(b, device=v.device), true], 1, generator=generator)
        accepted = true.tolist()  # all that the host needs to know
        start, end = end, [e + a + 1 for e, a in zip(end, accepted)]
        for row, e, t in zip(text, end, byte):
            row[e - 1:e] = t
        if to_boundary:
            refused = (refused or accepted[0] < n) and byte.item() not in b" \n"
        stats.rounds += [(n, a) for a in accepted]
        stats.calls += 1
        stats.drafting += drafted - began
        stats.verifying += time.perf_counter() - drafted
        yield from text[:, shown:min(min(end), l + count)].unbind(1)
        shown = max(shown, min(end))


# ---------------------------------------------------------------------------------------------------------------------
# The script


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
        raise UserError("--prompt and --prompt_file exclude each other; give one")
    if not c.prompt_file:
        return c.prompt.encode("utf-8", "surrogateescape")
    try:
        if c.prompt_file == "-":
            return sys.stdin.buffer.read()
        with open(c.prompt_file, "rb") as f:
            return f.read()
    except OSError as e:
        raise UserError(f"--prompt_file {c.prompt_file} cannot be read: {e.strerror}") from e


def read_holes(c):
    """The tokens of --fill: its bytes, with MASK for an underscore."""
    text = c.fill.encode("utf-8", "surrogateescape")
    return [MASK if byte == ord("_") else byte for byte in (text if b"_" in text else text + b"_" * c.bytes)]


@torch.inference_mode()
def fill_words(model, words, text, cast, most=5):
    """Prints the text with the likeliest word in each hole, a run of underscores or [MASK], and what else was likely.

    For BiGS's released weights, trained on texts padded to the last position: padding flows back into them.
    """
    ids = words.encode(re.sub("_+", "[MASK]", text))
    pad, mask = words.ids["[PAD]"], words.ids["[MASK]"]
    longest = model.config.n_position or len(ids)
    if len(words.pieces) != model.config.vocab:
        raise UserError(f"vocab.txt has {len(words.pieces):,} pieces, the model {model.config.vocab:,}; "
                          "take the one that was published with it")
    if mask not in ids:
        raise UserError("--fill has no hole; write ____ where a word is missing")
    if len(ids) > longest:
        raise UserError(f"--fill is {len(ids)} tokens, the model reads at most {longest}; shorten it")
    tokens = torch.tensor([ids + [pad] * (longest - len(ids))], device=next(model.parameters()).device)
    with cast:
        law = torch.softmax(model(tokens)[0][0].float(), -1)  # (l, v)
    best = [law[i].topk(min(most, law.shape[1])) for i, token in enumerate(ids) if token == mask]
    for top in best:
        ids[ids.index(mask)] = top.indices[0].item()
    print(" ".join(words.pieces[i] for i in ids[1:-1]).replace(" ##", ""))
    for top in best:
        print("    " + ", ".join(f"{words.pieces[i]} {p:.4f}"
                                 for p, i in zip(top.values.tolist(), top.indices.tolist())))
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
        raise UserError("the model reads tokens, not bytes: "
                          f"--prompt takes their ids, from 0 to {vocab - 1}, and spaces")
    return ids


def decode(tokens, vocab, crlf):
    """What the reader sees of tokens: encode's opposite."""
    if vocab > 256:
        return b"".join(b" %d" % token for token in tokens)
    return bytes(tokens).replace(b"\r", b"") if crlf else bytes(tokens)


def check(c):
    if c.fill and (c.prompt or c.prompt_file):
        raise UserError("--fill and --prompt exclude each other; "
                          "what is known stands in --fill, before and after the holes")
    if c.steps < 0:
        raise UserError(f"--steps {c.steps} is not a number from 0 up")
    for name in ("bytes", "batch"):
        if getattr(c, name) < 1:
            raise UserError(f"--{name} {getattr(c, name)} is not positive")
    if not 0 <= c.temperature < float("inf"):
        raise UserError(f"--temperature {c.temperature} is not a number from 0 up")
    if not -2**63 <= c.seed < 2**63:
        raise UserError(f"--seed {c.seed} does not fit in 64 bits")
    if c.k < 1 or c.beta < 1:
        raise UserError(f"--k {c.k} and --beta {c.beta} must be 1 or more")
    if c.draft and (c.compile or c.fill):
        raise UserError(f"--draft and --{'compile' if c.compile else 'fill'} exclude each other")
    if c.to_boundary and c.batch > 1:
        raise UserError(f"--to_boundary takes --batch 1, not {c.batch}")
    if c.rule not in RULES:
        raise UserError(f"--rule {c.rule} is not one of {', '.join(RULES)}")
    if c.top_k < 0 or not 0 < c.top_p <= 1:
        raise UserError(f"--top_k {c.top_k} must be 0 or more, --top_p {c.top_p} in (0, 1]")


@script
def main(argv):
    c, _ = parse(Flags, argv, "Let a trained model write on from a prompt.")
    check(c)
    device = pick_device(c.device)
    dtype, cast = pick_dtype(c.dtype, device)
    model, extra = load(c.ckpt, device)
    model.to(dtype)
    if isinstance(model, Encoder) != bool(c.fill):
        raise UserError(f"{c.ckpt} is a causal model, which cannot fill holes; leave --fill out" if c.fill else
                          f"{c.ckpt} is an encoder, which fills holes; "
                          "give it --fill TEXT with an underscore for each byte")
    if c.fill and extra.get("layout") == "bigs":
        folder = Path(c.ckpt) if Path(c.ckpt).is_dir() else Path(c.ckpt).parent
        return fill_words(model, read_vocabulary(folder / "vocab.txt"), c.fill, cast)
    if extra.get("merges"):
        raise UserError(f"--ckpt {c.ckpt} reads words, so it can only draft: --ckpt MODEL_OF_BYTES --draft {c.ckpt}")
    began = time.perf_counter()
    drafter = make_drafter(c, model, extra, device, dtype) if c.draft else None
    if c.draft and c.stats:
        print(f"{c.draft} ready after {time.perf_counter() - began:.1f} s", file=sys.stderr)
    prompt = read_prompt(c)
    if not model.recurrent and not c.fill:
        print("attention keeps a cache of "
              f"{f'its last {model.config.window}' if model.config.window else 'all'} positions", file=sys.stderr)
    tokens = torch.tensor([read_holes(c) if c.fill else encode(prompt, model.config.vocab, c.crlf)] * c.batch,
                          device=device)
    generator = torch.Generator(device).manual_seed(c.seed)
    show = functools.partial(decode, vocab=model.config.vocab, crlf=c.crlf)

    def law(logits):
        return filter_logits(logits, c.temperature, c.top_k, c.top_p)

    try:
        with cast:
            if c.fill:
                write(unmask(model, tokens, c.steps, law, generator, c.temperature == 0).unbind(1), b"", c)
                return 0
            if c.draft:
                write_speculated(model, tokens, law, generator, prompt, c, drafter, show)
                return 0
            step = compile_step(model, tokens[:, :1]) if c.compile else model
            if device.type == "cuda" and model.recurrent:
                step = capture_step(step, tokens[:, :1], model(tokens[:, :1])[1])
            write(generate(model, tokens, c.bytes, law, generator, step), prompt, c, show)
    except (KeyboardInterrupt, BrokenPipeError) as e:  # Ctrl-C, or a reader such as head that has seen enough
        sys.stdout = None if isinstance(e, BrokenPipeError) else sys.stdout  # nothing is left to flush it into
        return 130
    return 0


def check_rows(path, model, batch):
    """UserError if a state of the model cannot keep a different number of bytes in each row."""
    kinds = model.config.kinds
    if batch > 1 and not kinds <= KEEP_BY_ROW:
        raise UserError(f"--batch {batch} with --draft needs layers of mamba or mamba2, whose rows may keep "
                          f"different numbers of bytes; {path} has {', '.join(sorted(kinds))}; use --batch 1")


def make_drafter(c, model, extra, device, dtype):
    """What --draft names: a checkpoint, or ngram or counts, over the corpus that the model was trained on."""
    check_rows(c.ckpt, model, c.batch)
    if c.draft not in WITHOUT_MODEL and not Path(c.draft).exists():
        raise UserError(f"--draft {c.draft}: no such checkpoint; without one there are {', '.join(WITHOUT_MODEL)}")
    drafter, own = (None, {}) if c.draft in WITHOUT_MODEL else load(c.draft, device)
    if model.config.vocab > 256 and (drafter is None or own.get("merges")):
        raise UserError(f"--draft {c.draft} guesses bytes; {c.ckpt} reads tokens, "
                          "so draft with a model of the same tokens")
    if drafter is None:
        name = extra.get("flags", {}).get("data")
        if not name and c.draft == "counts":
            raise UserError(f"--draft counts: {c.ckpt} does not say what it was trained on; try --draft ngram")
        try:
            return WITHOUT_MODEL[c.draft](load_corpus(name).train if name else b"")
        except UserError as e:
            raise UserError(f"--draft {c.draft} reads what {c.ckpt} was trained on: {e}") from e
    drafter.to(dtype)
    if own.get("merges"):
        if c.batch > 1:
            raise UserError(f"--batch {c.batch}: {c.draft} drafts words, which takes --batch 1")
        return SubwordDrafter(drafter, BPE(own["merges"]))
    if drafter.config.vocab != model.config.vocab:
        raise UserError(f"--draft {c.draft} has a vocabulary of {drafter.config.vocab}, {c.ckpt} one of "
                          f"{model.config.vocab}; they must be the same, or the drafter's made by train.py --bpe")
    check_rows(c.draft, drafter, c.batch)
    return ByteDrafter(drafter)


def write_speculated(model, tokens, law, generator, prompt, c, drafter, show):
    """What the drafter guesses and the model decides; with --stats also what it took, and plain writing beside it."""
    rule = functools.partial(top_beta, beta=c.beta) if c.rule == "top_beta" else RULES[c.rule]
    if c.rule == "top_beta" and c.beta > 1:
        print(f"--rule top_beta: this text does not follow the model's law; each byte is among the {c.beta} likeliest",
              file=sys.stderr)
    stats = Stats()
    write(speculate(model, tokens, c.bytes, law, drafter, c.k, rule, generator, stats, c.to_boundary), prompt, c, show)
    if c.stats:
        began = time.perf_counter()
        for _ in generate(model, tokens, c.bytes, law, generator):
            pass
        print(stats.report(c.bytes * c.batch, time.perf_counter() - began), file=sys.stderr)


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


if __name__ == "__main__":
    sys.exit(main())
