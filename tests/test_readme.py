"""README.md is executed: its commands and its Python run, and what the pages name exists."""
import dataclasses
import io
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
    """The arguments of the commands of README and course that call script, each once."""
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", README + COURSE, re.S | re.M)
    text = re.sub(r"#.*| --out \S+", "", "".join(blocks).replace("\\\n", " "))
    calls = re.findall(rf"(?:^|\s){script}\b([^&;|\n]*)", text, re.M)
    return [shlex.split(call) for call in dict.fromkeys(call.strip() for call in calls)]


def flags(**values):
    return [word for name, value in values.items() for word in ("--" + name, str(value))]


SMALL = {"steps": 1, "seq_len": 8, "batch_size": 2, "device": "cpu"}


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
def test_training_commands_run(args, corpus, tmp_path):
    """Each with sizes cut down, on a small file in place of its corpus."""
    assert train.parse(train.Flags, args, "")[0]  # as printed, every value is of its type
    small = SMALL | {"data": corpus, "out": tmp_path / "run", "minutes": 0}
    sizes = {"d_model": 32, "n_layer": 3, "n_head": 2} | ({"bpe": 4} if "--bpe" in args else {})
    if "--resume" in args or "--eval_only" in args:  # these need a run to go on with
        assert train.main(flags(**small, **sizes)) == 0
        small = {"out": tmp_path / "run", "steps": 2, "data": corpus}
        sizes = {}
    assert train.main(args + flags(**small, **sizes)) == 0


@pytest.mark.parametrize("args", commands("sample.py"), ids=" ".join)
def test_sampling_commands_run(args, corpus, tmp_path, monkeypatch, capsysbinary):
    given = sample.parse(sample.Flags, args, "")[1]
    run = tmp_path / "run"
    small = flags(**SMALL, data=corpus, out=run, d_model=32, n_layer=1)
    assert train.main(small + ["--objective", "mask" if "fill" in given else "next"]) == 0
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"to be")))
    draft = {"draft": run} if given.get("draft", "").startswith("out/") else {}
    assert sample.main(args + flags(ckpt=run, bytes=3, device="cpu", **draft)) == 0


@pytest.mark.parametrize("args", commands("distill.py"), ids=" ".join)
def test_distilling_commands_run(args, corpus, tmp_path):
    """Each on a small teacher in place of its own."""
    run = tmp_path / "run"
    attention = flags(layer="attention", d_model=16, n_layer=8, n_head=2)
    assert train.main(attention + flags(**SMALL, data=corpus, out=run)) == 0
    student = tmp_path / "student"
    assert distill.main(args + flags(**SMALL, data=corpus, teacher=run, out=student)) == 0
