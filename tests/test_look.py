"""tests/look.py, the model on one page (tests/one_page.py), and the weights in assets/."""
import math

import pytest
import torch

import model as model_module
from conftest import close
from model import LM, Config, load, save
from sample import SHIPPED, main as write_on
from scan import ssd
from tests.look import look, main, table
from tests.one_page import write
from train import surprise

TEXT = b"a = f(b)\n\"1\" A\n"


def make(**sizes):
    torch.manual_seed(0)
    model = LM(Config(("mamba2",) * 2, d_model=12, d_state=5, head_dim=4, tie=False, **sizes)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("groups", [1, 2])
def test_look_shows_what_ssd_was_given_and_its_matrix_gives_what_ssd_gave(groups, monkeypatch):
    """y = (L * C B^T) dt x + D x (Dao and Gu 2024)."""
    calls = []

    def noting(*args, upto):
        y, h = ssd(*args, upto=upto)
        calls.append((args, y))
        return y, h

    monkeypatch.setattr(model_module, "ssd", noting)
    layers = look(make(n_group=groups), TEXT)
    assert len(layers) == len(calls) == 2 and model_module.ssd is noting
    for layer, ((x, dt, A, B, C, D, h0), y) in zip(layers, calls):
        for shown, given in zip(layer, (x[0], dt[0], A, B[0], C[0]), strict=True):
            assert torch.equal(shown, given)
        u = layer.dt[..., None] * layer.x  # (l, nh, p)
        close(torch.einsum("hij,jhp->ihp", layer.matrix, u) + D[:, None] * layer.x, y[0])
        close(layer.L[:, 7, 4], layer.decay[5:8].prod(0))  # what is left of byte 4 at byte 7
        close(layer.decay.log2().mean(0) * layer.half_life, -torch.ones_like(layer.half_life))


def test_the_table_shows_erasure_by_kind_of_byte_and_the_last_line():
    """A head that forgets at once erases 100 %, dt 1 is '@'; both by hand, in two lines of text."""
    layer = look(make(), TEXT)[0]
    dt = torch.full_like(layer.dt, 0.01)
    dt[-2:] = 1  # of the A and of the newline after it
    layer = layer._replace(dt=dt, A=torch.tensor([-1e9, *[-1.0] * 5]).double())
    _, names, first, second, *_ = table([layer], TEXT)
    assert names.split() == "layer head half gone after newline space a-z A-Z 0-9 ()[]{} quote \"1\" A".split()
    assert first.split() == "0 0 0.0 bytes 100 100 100 100 100 100 100 @".split() and first.endswith("    @")
    assert second.split()[4:11] == "32 1 1 63 1 1 1".split()


def test_the_page_writes_what_sample_writes(tmp_path, capsysbinary):
    """tests/one_page.py, in numpy, against sample.py --temperature 0, from random weights and from the shipped ones."""
    save(tmp_path / "best.pt", make())
    for path in (tmp_path / "best.pt", SHIPPED):
        flags = "--prompt def --bytes 50 --temperature 0 --raw --dtype float64 --device cpu".split()
        assert write_on([*flags, "--ckpt", str(path)]) == 0
        text = capsysbinary.readouterr().out
        assert write(path, b"def", 50) == text and len(set(text)) > 10


def test_the_shipped_weights_load_and_score():
    """In half precision, at most 2 MB; float32 once loaded. Bits per byte of what no corpus has."""
    assert SHIPPED.stat().st_size <= 2_000_000
    model, extra = load(SHIPPED)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and extra["flags"]["data"] == "python"
    text = b"\ndef area(width, height):\n    return width * height\n"
    read = torch.tensor([[*text]])
    bits = surprise(model(read[:, :-1])[0], read[:, 1:]).item() / math.log(2)
    assert abs(bits - 2.0825) < 0.001


def test_sample_and_look_work_before_any_training(tmp_path, monkeypatch, capfd):
    """By the shipped weights, which they say; by out/mamba2 as soon as a run has saved there."""
    monkeypatch.chdir(tmp_path)
    assert write_on(["--prompt", "def ", "--bytes", "5", "--device", "cpu"]) == 0
    assert main(["--text", "def f"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("def ") and err == 2 * "no out/mamba2 yet; this is assets/mamba2.pt, a run that is shipped\n"
    assert len(out.splitlines()) > 36
    save(tmp_path / "out" / "mamba2" / "best.pt", make())
    assert main(["--text", "def f"]) == 0
    out, err = capfd.readouterr()
    assert err == "" and len(out.splitlines()) == 2 + 2 * 6
    (tmp_path / "out" / "mamba2" / "best.pt").unlink()
    assert write_on(["--bytes", "1"]) == 0  # train.py has made its folder, and saved nothing yet
    assert capfd.readouterr().err.startswith("no out/mamba2 yet; ")


def test_a_model_without_mamba2_or_bytes_is_one_line(tmp_path, capsys):
    for config in (Config(("mamba",), d_model=12), Config(("mamba2",), d_model=12, head_dim=4, vocab=300)):
        save(tmp_path / "best.pt", LM(config))
        assert main(["--ckpt", str(tmp_path)]) == 2
        assert "is no model of bytes with a layer of mamba2" in capsys.readouterr().err
