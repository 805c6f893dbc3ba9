"""Vocabularies and statistics of text: bytes, ids, byte pairs as a trie, n-grams; and what a person sees of them."""
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from data.bpe import BPE, learn_merges
from data.corpus import load_corpus
from data.files import UserError
from data.ngrams import NgramCounts, copied
from data.vocabulary import Bytes, Ids, show
from model import MASK, load


class Words(BPE):
    """A vocabulary of any words, as a trie."""

    def __init__(self, words):
        self.words, self.sorted = words, sorted(words)
        self.order = [words.index(word) for word in self.sorted]


TRIE = Words([b"a", b"b", b"ab", b"ba", b"aab"])  # prefixes of each other, and several ways to write a text
TEXT = "aé€😀z\n".encode()  # characters of one to four bytes


def test_crlf_is_inside_the_model_only():
    crlf, plain = Bytes(crlf=True), Bytes()
    assert crlf.encode(b"a\nb") == crlf.encode(b"a\r\nb") == list(b"a\r\nb") and crlf.encode(b"") == list(b"\r\n")
    assert crlf.decode(list(b"a\r\nb")) == b"a\nb" and plain.decode(list(b"a\r\n")) == b"a\r\n"


def test_holes_are_the_masks_that_an_encoder_learned():
    words = Bytes()
    assert words.mask == MASK and words.holes(b"a_b", 9) == [97, MASK, 98] and words.holes(b"a", 2) == [97, MASK, MASK]


def test_ids_come_back():
    ids = Ids(65)
    assert ids.encode(b" 64 0\n7") == [64, 0, 7] and ids.decode([64, 0, 7]) == b" 64 0 7"
    for prompt in (b"", b"65", b"-1", b"1.5", b"a", b"9" * 5000):
        with pytest.raises(UserError, match="from 0 to 64"):
            ids.encode(prompt)


def test_any_bytes_come_back():
    words = BPE(learn_merges(b"the cat and the hat, " * 9 + bytes(range(256)) * 2, 30))
    for text in (b"", b"a", bytes(range(256)) * 3, b"\xff" * 400, b"\0\n \t" * 50, TEXT * 9):
        tokens = words.encode(text)
        assert b"".join(words.words[i] for i in tokens) == text and tokens.max(initial=0) < 286
        assert BPE().encode(text).tolist() == list(text)


def test_merges_are_the_most_frequent_pairs_of_what_is_left_and_apply_in_that_order():
    """Sennrich et al. 2016, figure 1's words: e s, es t, l o, lo w, then the pair of the new word."""
    words = BPE(learn_merges(b" low" * 5 + b" lower" * 2 + b" newest" * 6 + b" widest" * 3, 4))
    assert words.words[256:258] == [b"es", b"est"] and len(words.encode(b"newest")) == 4
    assert BPE(learn_merges(b"abab abab", 1)).words[256] == b"ab"
    words = BPE([(98, 99), (97, 98), (97, 256)])  # bc, ab, abc
    assert words.encode(b"abc").tolist() == [258] and words.encode(b"ab").tolist() == [257]
    for count in (0, 70000, 50):
        with pytest.raises(UserError, match=f"--bpe {count}"):
            learn_merges(b"abcabc", count)


def test_no_merge_crosses_a_cut_and_no_word_is_long():
    words = BPE(learn_merges(b"x = y + 1\n" * 200 + b"a" * 3000 + b"!" * 3000, 14)).words
    assert max(map(len, words)) <= 25 and not any(b"= y" in w or b"x =" in w for w in words)


def test_training_on_words_reports_bits_per_byte_and_keeps_the_merges(tmp_path, capsys):
    text, run = tmp_path / "text", tmp_path / "run"
    text.write_bytes(b"".join(b"the %d cats sat on mat %x. " % (i * i, i**3) for i in range(500)))
    flags = "--d_model 16 --n_layer 1 --head_dim 8 --seq_len 32 --bpe 40 --steps 3".split()
    assert train.main([*flags, "--data", str(text), "--out", str(run)]) == 0
    model, _ = load(run)
    assert len(model.config.merges) == 40 and model.config.vocab == 296
    words, val = BPE(model.config.merges), load_corpus(str(text)).val
    tokens = words.encode(val)
    assert b"".join(words.words[i] for i in tokens) == val.tobytes() and len(tokens) < len(val) / 2
    logits, _ = model(torch.tensor([[10, *tokens[:-1].tolist()]]))
    nats = F.cross_entropy(logits[0], torch.tensor(tokens.astype(int)), reduction="sum").item()
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert last["val_bpb_carried"] == pytest.approx(nats / math.log(2) / len(val), rel=1e-5)
    assert last["bytes"] > 3 * 4 * 32
    assert train.main(["--eval_only", "--out", str(run)]) == 0
    assert train.main(["--resume", "--steps", "4", "--out", str(run)]) == 0
    assert f"{last['val_bpb']:.4f}" in capsys.readouterr().out


def test_a_trie_knows_what_goes_on_after_a_prefix():
    for prefix in (b"", b"a", b"ab", b"aab", b"c"):
        assert TRIE.sorted[slice(*TRIE.span(prefix))] == [w for w in TRIE.sorted if w.startswith(prefix)]


def test_revealing_what_is_left_of_a_word():
    """The docstring's two words, a and ab: b is certain once the word goes on; a word that is all known shows nothing."""
    words = Words([b"a", b"ab"])
    q = np.array([0.3, 0.7])
    np.testing.assert_allclose(words.reveal(q, b"ab")[[0, 1], [97, 98]], [1, 1], rtol=1e-15)
    np.testing.assert_allclose(words.reveal(q, b"ab", known=1)[:, 98], [1], rtol=1e-15)
    assert words.reveal(q, b"ab", known=2).shape == (0, 256)
    np.testing.assert_allclose(words.reveal(q * [0, 1], b"ab", 1)[:, 98], [1], rtol=1e-15)


def test_the_longest_suffix_is_copied_from_where_it_occurred_last():
    """By hand, and against the plain search through every position."""
    assert copied(b"the cat sat. the cat lay, the cat", 4) == b" lay" and copied(b"", 4) == b""
    g = np.random.default_rng(0)
    for _ in range(50):
        text = bytes(g.integers(97, 100, 60).tolist())
        ends = [(n, i) for i in range(1, 60) for n in range(3, i + 1) if text[i - n:i] == text[-n:]]
        best = max(ends, default=None)  # the longest, then the last
        assert copied(text, 5) == (text[best[1]:best[1] + 5] if best else b"")


def test_counts_are_those_of_the_corpus():
    """b"aabaaab" by hand: "aa" leads to b, a, b and "baaa" to b; no other context of 4 or 8 bytes here occurs in it."""
    counts, prior = NgramCounts(list(b"aabaaab")), np.full(256, 1 / 256)
    after_aa = (20 * prior + np.bincount([98, 97, 98], minlength=256)) / 23
    after_baaa = (20 * after_aa + np.bincount([98], minlength=256)) / 21
    for context, want in ((b"aa", after_aa), (b"xxaa", after_aa), (b"abaaa", after_baaa), (b"xxabbaaa", after_baaa),
                          (b"a", prior), (b"", prior)):
        np.testing.assert_allclose(counts.predict(context), want)
    np.testing.assert_allclose(NgramCounts([]).predict(b"abcdefgh"), prior)


@pytest.mark.parametrize("raw", [True, False])
def test_every_piece_is_flushed_before_the_next_is_asked_for(raw, monkeypatch):
    class Stream(io.BytesIO):
        def flush(self):
            self.flushed = self.getvalue()

    def pieces():
        for i in range(128):
            yield bytes([i])
            assert stream.flushed == bytes(range(i + 1))

    stream = Stream()
    monkeypatch.setattr("sys.stdout", SimpleNamespace(buffer=stream))
    show([pieces()], raw)
    assert stream.flushed == bytes(range(128)) + b"\n" * (not raw)
