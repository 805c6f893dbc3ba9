"""Tests are made of tiny tensors: a second thread costs more to wake than it brings. And where there is no GPU that
Triton compiles for, it interprets its kernels, if it is told so before scan.py imports it."""
import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data.files import UserError

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it, and train.py then does
for name in {"SIGTERM", "SIGHUP"} & {*dir(signal)}:
    signal.signal(getattr(signal, name), signal.SIG_DFL)
GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)  # Triton compiles for it
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")


def pytest_addoption(parser):
    parser.addoption("--mine", metavar="FILE", help="grade the exercises in FILE (--mine=FILE)")


def pytest_configure(config):
    """With --mine: theirs in the place of ours, the files with their tests alone, and an end at the first failure."""
    if path := config.getoption("--mine"):
        import exercise
        try:
            config.mine, undo = exercise.take(path)
        except UserError as e:
            raise pytest.UsageError(str(e)) from e
        config.add_cleanup(undo)
        files = {exercise.EXERCISES[name].tests_in for name in config.mine}
        config.args = [str(Path(__file__).parent / f"{file}.py") for file in sorted(files)]
        config.option.maxfail = 1
        config.option.tbstyle = "short"
        config.option.reportchars = "N"  # no summary: it says everything again


def pytest_collection_modifyitems(config, items):
    if mine := getattr(config, "mine", None):
        import exercise
        items[:] = [item for name in mine for item in exercise.grading(name, items)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With --mine the claim that fails stands below the numbers."""
    report = yield
    if report.failed and getattr(item.config, "mine", None):
        report.sections.append(("what is claimed", inspect.getdoc(item.obj)))
    return report


@pytest.fixture(scope="session", autouse=True)
def building(request, tmp_path_factory):
    """The process that compiles the kernels for tests/test_triton.py, without the interpreter. It takes a while, so it
    runs beside the tests before them."""
    if not any("built" in item.fixturenames for item in request.session.items):
        return (yield)
    from test_triton import COMPILE
    folder = str(tmp_path_factory.mktemp("triton"))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": folder, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, folder]
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield process
        process.kill()


def close(actual, expected, tol=1e-10, name="result"):
    """Equal up to tol, absolutely or relatively; if not, the message begins with the two numbers farthest apart."""
    __tracebackhide__ = True

    def tell(message):
        if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
            return f"{name}: {message}"
        farthest = (actual - expected).abs().argmax()
        at = tuple(i.item() for i in torch.unravel_index(farthest, actual.shape))
        where = f"{name}{[*at]}" if at else name
        return f"{where} is {actual[at].item():.6g}, expected {expected[at].item():.6g}\n{message}"

    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol, msg=tell)


def all_close(actual, expected, names, tol=1e-10):
    """close for outputs and gradients, one after the other, by their names; of the last ones some may be left out."""
    __tracebackhide__ = True
    names = names.split()
    assert len(actual) == len(expected) <= len(names)
    for name, a, e in zip(names, actual, expected):
        close(a, e, tol, name)


class Operations(TorchDispatchMode):
    """Notes torch's operations as pairs of a name and of how many numbers it gives."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.calls.append((func.overloadpacket.__name__, out.numel()))
        return out


@pytest.fixture
def corpus(tmp_path):
    """A file of 1,000 bytes; its last 100 validate."""
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"".join(b"%d squared is %d\n" % (i, i * i) for i in range(100))[:1000])
    return path


class Code:
    """Pickles as a call of open: what a malicious checkpoint would do, with something worse than open."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
