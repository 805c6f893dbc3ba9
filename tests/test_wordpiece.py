"""WordPiece, and BiGS's released weights filling words."""
import random

import pytest
import torch

from data.files import UserError
from data.wordpiece import SPECIAL, WordPiece, read_vocabulary, split_words
from model import Config, save
from sample import main
from test_checkpoints import make

PIECES = [*SPECIAL, *("the goal of life is happiness un ##aff ##able ##s run ! , . - ' a b c e 1 "
                      "##a ##b ##e ##1 中").split()]


def pieces(text):
    words = WordPiece(PIECES)
    return [PIECES[i] for i in words.encode(text)][1:-1]


def test_words_are_the_longest_pieces_they_begin_with():
    assert pieces("Unaffable goals") == ["un", "##aff", "##able", "goal", "##s"]
    assert pieces("goalx life") == ["[UNK]", "life"] and pieces("") == []
    assert pieces("a" * 100) == ["a"] + ["##a"] * 99 and pieces("a" * 101) == ["[UNK]"]


def test_accents_case_marks_and_chinese():
    text = "Élan, a-b\u00a0中c\x07\u200b!"
    assert split_words(text) == ["elan", ",", "a", "-", "b", "中", "c", "!"]
    assert pieces("THE [MASK]-[MASK], É") == ["the", "[MASK]", "-", "[MASK]", ",", "e"]


def test_wordpiece_equals_berts(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    peer, ours = transformers.BertTokenizer.from_pretrained(tmp_path), read_vocabulary(tmp_path / "vocab.txt")
    rng = random.Random(0)
    parts = ["the", "goal", "unaffable", "[MASK]", "runs", "[SEP]",
             *"abcABC éÉ中文ßİ,.!-'$^12\t\n\u00a0\u200b\u0301\ufffd\x07 e\u3000“”["]
    for _ in range(1000):
        text = "".join(rng.choices(parts, k=rng.randrange(12)))
        assert ours.encode(text) == peer(text).input_ids, text


def test_a_vocabulary_that_is_none_is_a_one_line_error(tmp_path):
    path = tmp_path / "vocab.txt"
    for data, why in ((b"the\n", "vocabulary lacks"), (b"\xff\xfe\n", "vocab.txt is needed")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=why):
            read_vocabulary(path)


def test_bigs_fills_words(tmp_path, capsys):
    """Temperature 0: the word is the likeliest of the model's distribution on the padded text."""
    model = make(Config(("s4d",), block="gated", d_model=8, vocab=len(PIECES), d_state=4, expand=3,
                        norm="layer", norm_eps=1e-12, n_position=16))
    save(tmp_path, model, "bigs")
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES))
    assert main(["--ckpt", str(tmp_path), "--fill", "The goal of life is ____.", "--temperature", "0"]) == 0
    filled = capsys.readouterr().out.removesuffix("\n")
    ids = WordPiece(PIECES).encode("the goal of life is [MASK].")
    with torch.no_grad():
        logits = model(torch.tensor([ids + [0] * (16 - len(ids))]))[0][0, 6]
    logits[ids[6]] = -torch.inf  # a mask is no answer
    likeliest = PIECES[logits.argmax()]
    assert likeliest not in SPECIAL and filled == f"the goal of life is {likeliest} .".replace(" ##", "")

    def refused(text):
        assert main(["--ckpt", str(tmp_path), "--fill", text]) == 2
        return capsys.readouterr().err

    assert "--fill has no hole; write ____" in refused("no hole")
    assert "--fill is 22 tokens, the model reads at most 16" in refused("_ " * 20)
    (tmp_path / "vocab.txt").write_text("\n".join([*PIECES, "more"]))
    assert f"vocab.txt has {len(PIECES) + 1} pieces, the model {len(PIECES)}" in refused("_")
    (tmp_path / "vocab.txt").unlink()
    assert "vocab.txt is needed" in refused("_")
