"""README.md is executed: its commands and its Python run, and what it and the pages in tests/ name exists."""
import dataclasses
import io
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

import distill
import sample
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COURSE = (ROOT / "tests" / "course.md").read_text()
ALL = README + (ROOT / "tests" / "README.md").read_text() + COURSE
FLAGS = {"train.py": train.Flags, "sample.py": sample.Flags, "distill.py": distill.Flags}


def commands(script):
    """The arguments of every command line of the README, or of the course, that calls script."""
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", README + COURSE, re.S | re.M)
    lines = [line.split("#")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    calls = [part for line in lines for part in re.split(r"&&|;|\|", line) if re.search(rf"(^|\s){script}\b", part)]
    return [shlex.split(call[call.index(script) + len(script):]) for call in calls]


def test_every_flag_in_the_readme_exists():
    known = {"--" + f.name for flags in FLAGS.values() for f in dataclasses.fields(flags)}
    known |= {"--nproc_per_node", "--quick", "--rounds", "--json", "--help", "--local", "--run", "--text", "--mine"}
    assert {f for f in re.findall(r"(?<![\w-])--[a-z_]\w*", ALL)} <= known


def test_every_file_and_test_in_the_readme_exists():
    names = set(re.findall(r"\b(?:[\w.-]+/)*[\w-]+\.(?:py|svg|json|txt|ini)\b", ALL))
    for name in names - {"input.txt", "me.txt", "my.py", "my_exact.py", "vocab.txt", "config.json", "before.json"}:
        assert (ROOT / name).exists(), name
    for file, test in set(re.findall(r"(tests/\w+\.py)::(\w+)", ALL)):
        assert f"def {test}(" in (ROOT / file).read_text(), test


def test_every_function_that_the_readme_names_stands_in_its_file():
    """The table of where to begin a change: `name` in `file.py`."""
    pairs = re.findall(r"((?:`\w+`(?:, | and )?)+) in `([\w/]+\.py)`", README)
    assert len(pairs) >= 5
    for names, file in pairs:
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(def |class |){name}\b", (ROOT / file).read_text(), re.M), (name, file)


def test_the_front_page_is_short_and_its_python_runs():
    assert len(README.splitlines()) <= 200
    block, = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
    names = {}
    exec(block, names)  # as pasted
    assert names["y"].shape == names["x"].shape and names["more"].shape == (1, 40, 256)


def test_the_programs_of_the_course_run(capsys):
    """The spring swings, and ssd without decay is attention without softmax."""
    spring, attention = re.findall(r"^```python\n(.*?)^```", COURSE, re.S | re.M)
    exec(spring, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 50 and len(set(lines[:5])) == 1 and len(set(lines)) > 10
    exec(attention, {})
    assert float(capsys.readouterr().out[7:-2]) < 1e-5  # tensor(..)


@pytest.mark.parametrize("args", commands("train.py"), ids=" ".join)
def test_training_commands_run(args, tmp_path):
    """Each with sizes cut down, on a small file in place of its corpus."""
    text = tmp_path / "me.txt"
    text.write_bytes(os.urandom(50) * 40)
    assert train.parse(train.Flags, args, "")[0]  # as printed, every flag is known and every value of its type
    small = {"data": text, "out": tmp_path / "run", "steps": 2, "minutes": 0, "d_model": 32, "n_layer": 3, "n_head": 2,
             "seq_len": 8, "batch_size": 2, "device": "cpu", "accumulate": 1}
    if "--bpe" in args:
        small["bpe"] = 4
    if "--init" in args:
        begin = tmp_path / "begin"
        assert train.main([x for k, v in (small | {"out": begin}).items() for x in ("--" + k, str(v))]) == 0
        small = {k: v for k, v in small.items() if k not in ("d_model", "n_layer", "n_head")} | {"init": begin}
    changing = [a for a in args if a in ("--resume", "--eval_only")]
    if changing:  # these need a run to go on with
        assert train.main([x for k, v in small.items() for x in ("--" + k, str(v))]) == 0
        small = {k: v for k, v in small.items() if k in ("out", "steps", "data")} | {"steps": 3}
    cut = [x for k, v in small.items() for x in ("--" + k, str(v))]
    assert train.main([a for a in args if a != "--compile"] + cut) == 0


@pytest.mark.parametrize("args", commands("sample.py"), ids=" ".join)
def test_sampling_commands_run(args, tmp_path, monkeypatch, capsysbinary):
    text = tmp_path / "me.txt"
    text.write_bytes(b"to be or not to be " * 20)
    given = sample.parse(sample.Flags, args, "")[1]
    assert train.main(["--data", str(text), "--out", str(tmp_path / "run"), "--steps", "1", "--d_model", "32",
                       "--objective", "mask" if "fill" in given else "next",
                       "--n_layer", "1", "--seq_len", "8", "--batch_size", "2", "--device", "cpu"]) == 0
    cut = ["--ckpt", str(tmp_path / "run"), "--bytes", "3", "--device", "cpu"]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"to be")))
    cut += ["--draft", str(tmp_path / "run")] if given.get("draft", "ngram") != "ngram" else []
    assert sample.main([a for a in args if a != "--compile"] + cut) == 0


@pytest.mark.parametrize("args", commands("distill.py"), ids=" ".join)
def test_distilling_commands_run(args, tmp_path):
    """Each on a small teacher in place of its own, and as if it were the first stage."""
    text = tmp_path / "me.txt"
    text.write_bytes(b"to be or not to be " * 20)
    small = {"data": text, "steps": 1, "seq_len": 8, "batch_size": 2, "device": "cpu"}
    cut = [x for k, v in small.items() for x in ("--" + k, str(v))]
    assert train.main([*"--layer attention --d_model 16 --n_layer 8 --n_head 2 --out".split(), str(tmp_path / "run"),
                       *cut]) == 0
    given = distill.parse(distill.Flags, args, "")[1]
    cut += ["--teacher", str(tmp_path / "run"), "--out", str(tmp_path / "student"), "--student", ""]
    assert distill.main(args + cut + (["--pseudo", str(text)] if "pseudo" in given else [])) == 0
