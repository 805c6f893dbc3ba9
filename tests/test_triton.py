"""Section 6 of scan.py against the naive recurrence in float64: on a GPU, or without one in Triton's interpreter; and
its kernels compiled ahead of time for GPUs that need not be there."""
import functools
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import GPU

import scan as module
from scan import selective_scan
from test_scan import F64, values_and_gradients

triton = pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if GPU else "cpu"
if DEVICE == "cpu" and isinstance(module._walk, triton.JITFunction):
    pytest.skip("no GPU, and TRITON_INTERPRET=1 was not set first", allow_module_level=True)

F16 = torch.float16
BF16 = torch.bfloat16
F32 = torch.float32
TOLERANCE = {F64: 1e-10, F32: 2e-6, BF16: 1e-2, F16: 2e-3}
NAMES = "y h_last dx ddt dA dB dC dD dh0".split()


@pytest.fixture(autouse=True)
def quick_calls(monkeypatch):
    """The interpreter patches the language in every call, half of its time. Here once per kernel."""
    from triton.runtime.interpreter import InterpretedFunction
    if hasattr(InterpretedFunction, "rewrite"):  # in other versions it is only slow
        monkeypatch.setattr(module, "core", triton.language.core, raising=False)
        monkeypatch.setattr(InterpretedFunction, "__call__",
                            lambda f, *args, **kwargs: f.rewrite()(*args, **kwargs))


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh memory holds NaN, so that a number nobody wrote, or read too early, shows."""
    def poisoned(f):
        return lambda *args, **kwargs: f(*args, **kwargs).fill_(math.nan)
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def pieces(monkeypatch, request):
    """Sequences are cut into so many pieces."""
    monkeypatch.setattr(module, "_pieces", lambda b, l, d, n, device: request.param)


def inputs(l, n=5, b=2, d=3, dtype=F64, dt=0.5, A=3.0):
    """x, dt, A, B, C, D, h0 of a selective scan; dt and -A uniform up to the sizes given."""
    torch.manual_seed(l)
    shapes = (b, l, d), (b, l, n), (b, l, n), (d,), (b, d, n)
    x, B, C, D, h0 = (torch.randn(shape, dtype=F64) for shape in shapes)
    dt = dt * torch.rand(b, l, d, dtype=F64)
    A = -A * torch.rand(d, n, dtype=F64)
    return [t.to(DEVICE, dtype) for t in (x, dt, A, B, C, D, h0)]


kernels = functools.partial(selective_scan, impl="triton")
naive = functools.partial(selective_scan, impl="naive")


def check(tensors, tolerance=None, f=lambda scan, *tensors: scan(*tensors)):
    """The kernels against the loop in float64: the relative norm of every difference."""
    got = values_and_gradients(lambda *t: f(kernels, *t), tensors)
    want = values_and_gradients(lambda *t: f(naive, *t), [t.double() for t in tensors])
    for name, g, w in zip(NAMES, got, want):
        error = (g.double() - w).norm().item()
        limit = (tolerance or TOLERANCE[tensors[0].dtype]) * w.norm().item()
        assert error <= limit + 1e-30, (name, error)
    return got


# Agreement


@pytest.mark.parametrize("l, pieces", [(1, 1), (2, 1), (3, 1), (7, 1), (8, 1), (31, 1), (64, 4),
                                       (100, 1), (257, 1)], indirect=["pieces"])
def test_kernels_agree_with_the_recurrence_for_every_length(l, pieces):
    """y, h_last and seven gradients; chunks have 16 steps."""
    check(inputs(l, b=1 if l > 31 else 2))


@pytest.mark.parametrize("n, d, tiles", [(1, 3, 1), (3, 131, 2), (16, 31, 1), (20, 67, 5), (64, 17, 3)])
def test_any_number_of_states_and_channels(n, d, tiles):
    """Beyond n and d tiles are masked; dB and dC come in a part per tile."""
    assert module._constants(d, n)[1] == tiles
    check(inputs(5, n, d=d))


def test_wider_states_are_refused():
    with pytest.raises(RuntimeError, match='1 to 64 states .*, not 65; use impl="chunked"$'):
        kernels(*inputs(2, n=65, b=1, d=1))


def test_without_d_and_without_an_initial_state():
    check(inputs(4)[:5])


@pytest.mark.parametrize("dtypes, state", [
    ([F32] * 7, F32), ([BF16] * 7, F32), ([F16] * 7, F32),
    ([BF16, F32, F32, BF16, F16, F32, BF16], F32),
    ([F32, F32, F64, BF16, F32, F32, F32], F64)])
def test_dtypes_may_be_narrow_and_differ(dtypes, state):
    """y and gradients have the dtype of their input; the state is float32, or float64 beside any such input."""
    tensors = [t.to(dtype) for t, dtype in zip(inputs(20, b=1), dtypes, strict=True)]
    y, h, *gradients = check(tensors, max(TOLERANCE[dtype] for dtype in dtypes))
    assert y.dtype == dtypes[0] and h.dtype == state
    assert [g.dtype for g in gradients] == dtypes


def test_inputs_need_not_be_contiguous():
    """Transposed, strided and expanded views, made inside so that the gradients' leaves stay plain."""
    def views(scan, *tensors):
        x, dt, *rest = (torch.stack([t, t], -1)[..., 0] if t.ndim == 1 else t.mT.contiguous().mT
                        for t in tensors)
        views = x[:, :1].expand_as(x), dt, *rest
        assert not any(view.is_contiguous() for view in views)
        return scan(*views)
    check(inputs(7), f=views)


def test_gradients_through_one_output_alone():
    check(inputs(4), f=lambda scan, *tensors: scan(*tensors)[:1])
    check(inputs(4)[:4], f=lambda scan, x, dt, A, B: scan(x, dt, A, B, B.detach())[1:])


def test_a_batch_may_be_empty():
    y, h, *gradients = values_and_gradients(kernels, inputs(4, b=0))
    assert y.shape == (0, 4, 3) and h.shape == (0, 3, 5)
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("pieces", [2], indirect=True)
def test_the_last_state_keeps_nothing_else_in_memory(pieces):
    """Also where a transpose is no copy, for one state or one channel."""
    for n, d in ((5, 3), (1, 3), (5, 1)):
        _, h = kernels(*inputs(32, n, b=1, d=d))
        assert h.is_contiguous() and h.untyped_storage().nbytes() == h.nbytes


# Extremes


def test_a_step_of_length_zero_changes_nothing():
    x, dt, A, B, C, D, h0 = inputs(9, dtype=F32)
    assert torch.equal(kernels(x, torch.zeros_like(dt), A, B, C, D, h0)[1], h0)


@pytest.mark.parametrize("dt, A",
                         [(20.0, 1e4), (1e-3, 1e4), (20.0, 1e-8), (0.5, 0.0)])
@pytest.mark.parametrize("pieces", [2], indirect=True)
def test_decays_from_one_to_zero(dt, A, pieces):
    """dt A down to -200,000, where a decay is 0, and up to -1e-7, where it rounds to 1."""
    check(inputs(32, b=1, dtype=F32, dt=dt, A=A), 1e-5)


@pytest.mark.parametrize("pieces", [3], indirect=True)
def test_a_slowly_forgetting_state_forgets(pieces):
    """A decay of 0.999 over 48 steps of bfloat16 inputs, under autocast: bfloat16 would round it to 1."""
    x = torch.zeros(1, 48, 1, dtype=BF16, device=DEVICE)
    A = torch.tensor([[math.log(0.999)]], device=DEVICE)
    one = torch.ones(1, 48, 1, device=DEVICE)
    with torch.autocast(DEVICE, BF16):
        _, h = kernels(x, one, A, one, one, None, one[:, :1])
    assert h.dtype == F32 and abs(h.item() - 0.999**48) < 1e-5


# What surrounds the kernels


def test_a_sequence_is_cut_where_programs_are_few(monkeypatch):
    """In halves, while programs are fewer than 2 per multiprocessor and a piece is whole chunks."""
    gpu = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    device = torch.device("cuda")
    for sizes, want in (((1, 65536, 1024, 16), 16), ((8, 2048, 1536, 16), 1), ((1, 100, 64, 16), 1),
                        ((1, 96, 64, 16), 2), ((1, 65536, 1024, 64), 4)):
        assert module._pieces(*sizes, device) == want, sizes


@pytest.mark.parametrize("pieces", [2], indirect=True)
def test_two_runs_give_the_same_bits(pieces):
    """Sums over programs are written in parts and added in one order; there are no atomics."""
    first, second = (values_and_gradients(kernels, inputs(32, b=1, dtype=F32)) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_torch_compile_runs_the_kernels_as_they_are():
    """Its graph ends before them and another begins behind; the bits are the same."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: [2 * out for out in kernels(*t)], backend="eager")
    got, want = (values_and_gradients(f, inputs(4))
                 for f in (compiled, lambda *t: [2 * out for out in kernels(*t)]))
    assert all(map(torch.equal, got, want))


def test_everything_else_works_without_triton(monkeypatch):
    """The file loads, auto works, and the error says what is missing and what to do."""
    monkeypatch.setitem(sys.modules, "triton", None)  # an import of it raises
    spec = importlib.util.spec_from_file_location("without_triton", module.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    torch.testing.assert_close(copy.selective_scan(*inputs(3)), naive(*inputs(3)))
    with pytest.raises(RuntimeError, match='impl="triton" cannot run: Triton does not import '
                                           r'\(.*triton.*\); use impl="chunked"$'):
        copy.selective_scan(*inputs(3), impl="triton")


# Compiled ahead of time

COMPILE = r"""
import json, pathlib, re, subprocess, sys
import torch, triton, scan
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

cubin = pathlib.Path(sys.argv[1]) / "kernel.cubin"
cuobjdump = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
narrow = "x dt B C y dy dx ddt".split()  # dB and dC are in parts, in float32

def build(kernel, sm, dtype, n, **constants):
    constants |= scan._constants(1536, n)[0]
    def kind(p):
        if p.name in constants: return "constexpr"
        if p.do_not_specialize: return "i32"
        return "*" + (dtype if p.name in narrow else "fp32")
    signature = {p.name: kind(p) for p in kernel.params}
    aligned = {(i,): [["tt.divisibility", 16]]
               for i, k in enumerate(signature.values()) if k[0] == "*"}
    source = ASTSource(kernel, signature, constants, aligned)
    options = dict(num_warps=1, enable_fp_fusion=True)
    asm = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options).asm
    cubin.write_bytes(asm["cubin"])
    usage = subprocess.check_output([cuobjdump, "-res-usage", cubin], text=True)
    return {"local": [int(size) for size in re.findall(r"(?:LOCAL|STACK):(\d+)", usage)],
            "short": re.findall(r"tt.addptr .*: !tt.ptr<\w+>, i32", asm["ttir"]),
            "integers": [name for name, k in signature.items() if k == "i32"],
            "exponentials": asm["ptx"].count("ex2.approx"), "ahead": "cp.async" in asm["ptx"]}

out = {}
for sm, dtype, n in (80, "bf16", 64), (90, "bf16", 16), (90, "fp32", 16):
    out[f"walk {dtype} {n} {sm}"] = build(scan._walk, sm, dtype, n, FULL=True, BACK=False)
    out[f"walk back {dtype} {n} {sm}"] = build(scan._walk_back, sm, dtype, n)
for back in (False, True):
    out[f"carry {back}"] = build(scan._walk, 90, "fp32", 16, FULL=False, BACK=back,
                                 C=None, D=None, y=None, starts=None)
x = torch.ones(1, 4, 2)
try: scan.selective_scan(x, x, -x[0, :2], x, x, impl="triton")
except RuntimeError as e: error = str(e)
print(json.dumps([error, out]))
"""


@pytest.fixture(scope="module")
def built(building):
    """The error without a GPU, and what kernels compiled for two GPUs are like."""
    from triton.compiler import ASTSource
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    if "constexprs" not in ASTSource.__init__.__code__.co_varnames:
        pytest.skip("the compiler of this Triton takes other arguments")
    if not all((tools / tool).exists() for tool in ("ptxas", "cuobjdump")):
        pytest.skip("this Triton does not carry ptxas and cuobjdump")
    out, error = building.communicate()
    assert building.returncode == 0, error
    return json.loads(out.splitlines()[-1])


def test_without_a_gpu_the_error_names_the_interpreter(built):
    assert "on cpu it needs TRITON_INTERPRET=1 in the environment" in built[0]
    assert built[0].endswith('; use impl="chunked"')


def test_kernels_compile_ahead_of_time_without_spilling(built):
    """For compute capabilities 8.0 and 9.0; no thread has a byte of local memory."""
    assert len(built[1]) == 8
    for name, kernel in built[1].items():
        assert kernel["local"] == [0, 0], name


def test_offsets_are_64_bits_and_no_length_compiles_anew(built):
    """A row's number times d may pass 2^31; batch and length are plain integers, 1 and 16 among them."""
    for name, kernel in built[1].items():
        assert not kernel["short"], (name, kernel["short"])
        assert kernel["integers"] == ["l"]


def test_a_walk_takes_one_exponential_per_state_and_step(built):
    """For 16 states, of 16 numbers a thread; backward walks twice. And rows are fetched ahead."""
    for name, kernel in built[1].items():
        assert kernel["ahead"], name
        assert " 64 " in name or kernel["exponentials"] == (32 if "back" in name else 16), name
