"""The kernels of scan.py, section 6, against the naive recurrence in float64: on a GPU if there is one, else
interpreted; and compiled ahead of time for GPUs that need not be there.

Chunks have 8 steps here instead of 64, so that short sequences have several, a remainder and carries.
"""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import scan as module
from model import causal_conv
from scan import scan, selective_scan
from test_scan import values_and_gradients

triton = pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and isinstance(module._forward_kernel, triton.JITFunction):
    pytest.skip("no GPU, and TRITON_INTERPRET=1 was not set before Triton was imported", allow_module_level=True)

F32, F64 = torch.float32, torch.float64
WHOLE, CUT = 1, 1000  # programs that fill the device: with few the length stays whole, with many it is cut
TOLERANCE = {F64: 1e-10, F32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NAMES = "y h_last dx ddt dA dB dC dD dh0".split()


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    sizes = module._sizes
    monkeypatch.setattr(module, "_sizes", lambda *args: sizes(*args) | {"CHUNK": 8})


@pytest.fixture(autouse=True)
def quick_calls(monkeypatch):
    """The interpreter patches the language in every call, half of its time. Here once a kernel, tl.core with it."""
    from triton.runtime.interpreter import InterpretedFunction
    if hasattr(InterpretedFunction, "rewrite"):  # in other versions it is only slow
        monkeypatch.setattr(module, "core", triton.language.core, raising=False)
        monkeypatch.setattr(InterpretedFunction, "__call__", lambda f, *args, **kwargs: f.rewrite()(*args, **kwargs))


@pytest.fixture
def fill(monkeypatch, request):
    monkeypatch.setattr(module, "_fill", lambda device: request.param)


@pytest.fixture
def poison(monkeypatch):
    """Fresh memory holds NaN, so that an element nobody wrote, or read too early, shows."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(math.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(math.nan))


def inputs(l, n=5, b=2, d=3, dtype=F64, dt=0.5, A=3.0):
    """x, dt, A, B, C, D, h0 of a selective scan; dt and -A uniform up to the sizes given."""
    torch.manual_seed(l)
    x, B, C, D, h0 = (torch.randn(*s, dtype=F64) for s in ((b, l, d), (b, l, n), (b, l, n), (d,), (b, d, n)))
    dt, A = dt * torch.rand(b, l, d, dtype=F64), -A * torch.rand(d, n, dtype=F64)
    return [t.to(DEVICE, dtype) for t in (x, dt, A, B, C, D, h0)]


def check(tensors, tolerance=None):
    """Values and gradients of the kernels against the naive path in float64, relative, in the norm of each tensor."""
    got = values_and_gradients(lambda *t: selective_scan(*t, impl="triton"), tensors)
    want = values_and_gradients(lambda *t: selective_scan(*t, impl="naive"), [t.double() for t in tensors])
    for name, g, w in zip(NAMES, got, want):
        error = (g.double() - w).norm().item()
        assert error <= (tolerance or TOLERANCE[tensors[0].dtype]) * w.norm().item() + 1e-30, (name, error)
    return got


# Agreement


@pytest.mark.parametrize("l, fill", [(1, CUT), (2, WHOLE), (7, CUT), (8, WHOLE), (19, WHOLE), (31, CUT)],
                         indirect=["fill"])
def test_kernels_agree_with_the_recurrence_for_every_length(l, fill, poison):
    """Values and all gradients in float64, through y and h_last; 31 steps are four chunks of which one is short."""
    check(inputs(l))


@pytest.mark.parametrize("n", [1, 3, 16, 20])
def test_any_number_of_states(n, poison):
    """Those that are no power of two are masked."""
    check(inputs(9, n, b=1))


def test_the_widest_state_runs_and_a_wider_one_is_refused(monkeypatch):
    x, dt, A, B, C, D, h0 = inputs(2, n=257, b=1, d=1)
    y, _ = selective_scan(x, dt, A[:, :256], B[..., :256], C[..., :256], D, impl="triton")
    torch.testing.assert_close(y, selective_scan(x, dt, A[:, :256], B[..., :256], C[..., :256], D, impl="naive")[0])
    with pytest.raises(ValueError, match='1 to 256 states a channel, not 257; use impl="chunked"'):
        selective_scan(x, dt, A, B, C, impl="triton")
    monkeypatch.setattr(module, "takes_triton", lambda impl, x: True)  # as on a GPU: auto finds a way
    torch.testing.assert_close(selective_scan(x, dt, A, B, C)[0], selective_scan(x, dt, A, B, C, impl="naive")[0])


@pytest.mark.parametrize("d", [67, 131])
def test_many_channels_are_several_blocks_and_groups(d, poison):
    """64 channels of 3 states are a tile, 128 a group: the parts of dB and dC come from two blocks, or two groups."""
    check(inputs(3, n=3, b=1, d=d))


def test_without_d_and_without_an_initial_state(poison):
    check(inputs(9)[:5])


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16])
def test_narrow_inputs_are_widened_in_registers(dtype, poison):
    """y and gradients have their input's dtype, the state float32."""
    tensors = inputs(9, b=1, dtype=dtype)
    y, h, *grads = check(tensors)
    assert y.dtype == dtype and h.dtype == F32 and all(g.dtype == t.dtype for g, t in zip(grads, tensors))


def test_gradients_through_one_output_alone():
    tensors = inputs(4)
    for i in (0, 1):
        got, want = ([torch.autograd.grad(selective_scan(*leaves, impl=impl)[i].sum(), leaves[:4])
                      for leaves in [[t.clone().requires_grad_() for t in tensors]]][0] for impl in ("triton", "naive"))
        for g, w in zip(got, want):
            torch.testing.assert_close(g, w)


def test_inputs_that_are_not_contiguous():
    """Transposed and strided views, made inside so that the gradients' leaves stay plain."""
    def strided(impl):
        def f(*tensors):
            views = [torch.stack([t, t], -1)[..., 0] if t.ndim == 1 else t.mT.contiguous().mT for t in tensors]
            assert not any(v.is_contiguous() for v in views)
            return selective_scan(*views, impl=impl)
        return f
    got, want = (values_and_gradients(strided(impl), inputs(7)) for impl in ("triton", "naive"))
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w)


# Extremes


def test_a_step_of_length_zero_changes_nothing():
    x, dt, A, B, C, D, h0 = inputs(9, dtype=F32)
    _, h = selective_scan(x, torch.zeros_like(dt), A, B, C, D, h0, impl="triton")
    assert torch.equal(h, h0)


@pytest.mark.parametrize("dt, A", [(20.0, 3.0), (20.0, 1e4), (1e-3, 1e4), (20.0, 1e-8), (0.5, 0.0)])
@pytest.mark.parametrize("fill", [CUT], indirect=True)
def test_decays_from_one_to_zero(dt, A, fill, poison):
    """dt A down to -200,000, where a decay is 0, and up to -1e-7, where it rounds to 1."""
    check(inputs(9, b=1, dtype=F32, dt=dt, A=A), 1e-5)


@pytest.mark.parametrize("fill", [WHOLE, CUT], indirect=True)
def test_a_slowly_forgetting_state_forgets(fill):
    """A decay of 0.999 over 40 steps of bfloat16 inputs, under autocast: bfloat16 would round it to 1."""
    x = torch.zeros(1, 40, 1, dtype=torch.bfloat16, device=DEVICE)
    A, one = torch.tensor([[math.log(0.999)]], device=DEVICE), torch.ones(1, 40, 1, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        _, h = selective_scan(x, one, A, one, one, h0=one[:, :1], impl="triton")
    assert h.dtype == F32 and abs(h.item() - 0.999**40) < 1e-5


# The plain scan


@pytest.mark.parametrize("l, fill", [(1, CUT), (7, WHOLE), (65, WHOLE), (130, CUT)], indirect=["fill"])
def test_plain_scan_agrees_for_every_length(l, fill, poison):
    """130 steps are three chunks, whose ends and decays are a scan of three steps; a broadcasts."""
    torch.manual_seed(l)
    a, x, h0 = torch.rand(2, l, 1, 5, dtype=F64), torch.randn(2, l, 3, 5, dtype=F64), torch.randn(2, 3, 5, dtype=F64)
    tensors = [t.to(DEVICE) for t in (a, x, h0)][:2 if l == 7 else 3]
    got, want = (values_and_gradients(lambda *t: scan(*t, impl=impl), tensors) for impl in ("triton", "naive"))
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


# The convolution beside the scan


@pytest.mark.parametrize("l, k, d, dtype", [(1, 4, 3, F64), (2, 4, 3, F64), (17, 4, 131, F64), (70, 2, 3, F64),
                                            (9, 1, 3, F64), (20, 4, 5, F32), (20, 4, 5, torch.bfloat16)])
@pytest.mark.parametrize("fill", [CUT], indirect=True)
def test_the_convolution_agrees_with_conv1d(l, k, d, dtype, fill, poison):
    """Values and all gradients; 17 steps are three programs, 131 channels two blocks, 70 steps two parts of dtaps."""
    torch.manual_seed(l)
    x, taps, bias = (torch.randn(*s, dtype=F64).to(DEVICE, dtype) for s in ((2, l + k - 1, d), (k, d), (d,)))
    got = values_and_gradients(module.triton_conv, [x, taps, bias])
    want = values_and_gradients(lambda x, taps, bias: F.conv1d(x.mT, taps.T[:, None], bias, groups=d).mT,
                                [t.double() for t in (x, taps, bias)])
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype and (g.double() - w).norm() <= TOLERANCE[dtype] * w.norm()


def test_a_model_takes_the_kernels_convolution_where_there_is_a_gpu(monkeypatch):
    """As on a GPU: causal_conv with the kernels, narrow inputs widened in registers, is causal_conv without them."""
    x, weight, bias, tail = (torch.randn(s, device=DEVICE) for s in ((2, 40, 6), (6, 1, 4), (6,), (2, 3, 6)))
    for x_, tail_ in ((x, tail), (x.bfloat16(), None)):
        want, after = causal_conv(x_.cpu(), weight.cpu(), bias.cpu(), tail_ if tail_ is None else tail_.cpu())
        with monkeypatch.context() as patch:
            patch.setattr("model.takes_triton", lambda impl, x: True)
            got, after_ = causal_conv(x_, weight, bias, tail_)
        torch.testing.assert_close(got.cpu(), want)
        assert torch.equal(after_.cpu(), after) and got.dtype == F32


# What surrounds the kernels


@pytest.mark.parametrize("fill", [CUT], indirect=True)
def test_two_runs_give_the_same_bits(fill):
    """Sums over programs are written in parts and added in a fixed order: no atomics, gradients included."""
    tensors = inputs(9, dtype=F32)
    first, second = (values_and_gradients(lambda *t: selective_scan(*t, impl="triton"), tensors) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_torch_compile_keeps_the_graph_whole():
    """One graph, forward and backward, and the same bits. (aot_eager: traced like inductor's, but run as it is.)"""
    tensors = inputs(4)

    def both(*t):
        y, h = selective_scan(*t, impl="triton")
        return scan(torch.sigmoid(y), y, impl="triton"), h

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, values_and_gradients(compiled, tensors), values_and_gradients(both, tensors)))


def test_torch_compile_makes_one_more_graph_for_every_other_batch():
    """Of 2, 3 and 4 sequences the third batch finds the second's graph."""
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(lambda *t: selective_scan(*t, impl="triton"), fullgraph=True, backend=graphs)
    for b in (2, 3, 4):
        compiled(*inputs(2, b=b))
    assert graphs.frame_count == 2


def test_operators_keep_their_contract():
    """torch.library.opcheck: schemas, and shapes where there is no data."""
    x, dt, A, B, C, D, h0 = inputs(3)
    A, h0, kept = A.mT.contiguous(), h0.mT.contiguous(), torch.zeros(2, 2, 5, 3, dtype=F64, device=DEVICE)
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(module._selective_forward, (x, dt, A, B, C, D, h0), test_utils=checks)
    torch.library.opcheck(module._selective_backward, (x, dt, A, B, C, D, kept, x, h0), test_utils=checks)
    torch.library.opcheck(module._triton_scan, (dt, x, x[:, 0].contiguous()), test_utils=checks)
    taps, bias = A[:2].contiguous(), A[2].contiguous()
    torch.library.opcheck(module._conv, (x, taps, bias, 2, 0, F32), test_utils=checks)
    torch.library.opcheck(module._conv_taps, (x, x[:, 1:].contiguous(), taps), test_utils=checks)


def test_errors_name_the_reason_and_the_way_out(monkeypatch):
    x, dt, A, B, C, D, h0 = inputs(3)
    with pytest.raises(RuntimeError, match='real numbers; use impl="chunked"'):
        scan(x.to(torch.complex128), x, impl="triton")
    monkeypatch.setattr(module, "triton", None)
    monkeypatch.setattr(module, "no_triton", "No module named 'triton'", raising=False)
    with pytest.raises(RuntimeError, match="selective_scan.*does not import.*No module named 'triton'.*chunked"):
        selective_scan(x, dt, A, B, C, impl="triton")


def start(code, *arguments, **environment):
    """A Python of its own, without the interpreter; what it prints last is JSON."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.Popen(command, cwd=Path(module.__file__).parent, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def finish(process):
    out, error = process.communicate()
    assert process.returncode == 0, error
    return json.loads(out.splitlines()[-1])


def test_everything_else_works_without_triton():
    """triton hidden: scan.py loads, auto works, and asking for the kernels says what is missing."""
    error = finish(start("""
import json, sys
sys.modules["triton"] = None
import torch, scan
x = torch.ones(1, 4, 2)
scan.selective_scan(x, x, -x[0, :2], x, x)
try: scan.scan(x, x, impl="triton")
except RuntimeError as e: print(json.dumps(str(e)))
"""))
    assert error.startswith('scan: impl="triton" cannot run: Triton does not import')
    assert error.endswith('use impl="chunked"')


# Compiled ahead of time

COMPILE = """
import collections, json, pathlib, re, subprocess, sys
import torch, triton, scan
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

tools, folder = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin", pathlib.Path(sys.argv[1])
wide = "A D ends total kept starts behind store dB dC dD taps bias parts".split()

def loops(sass):
    # for each innermost loop that computes exponentials, how many of which instruction
    code, labels, found = [], {}, []
    for line in sass.splitlines():
        if m := re.match(r"(\\.L_x_\\d+):", line):
            labels[m[1]] = len(code)
        if m := re.search(r"/\\*[0-9a-f]{4,}\\*/ +(?:@!?U?P\\w+ +)?([A-Z][A-Z0-9_.]*)(.*)", line):
            code.append("EX2" if m[1] == "MUFU.EX2" else m[1].split(".")[0])
            target = re.search(r"\\.L_x_\\d+", m[2]) if m[1] == "BRA" else None
            if target and target[0] in labels:
                found.append((labels[target[0]], len(code)))
    inner = [(i, j) for i, j in found if not any(i <= p and q <= j and (p, q) != (i, j) for p, q in found)]
    return [c for c in (collections.Counter(code[i:j]) for i, j in inner) if c["EX2"]]

def build(kernel, sm, dtype="fp32", **sizes):
    def kind(p):
        if p.name in sizes: return "constexpr"
        if p.name in ("l", "size", "rows", "first") or p.name == "b" and kernel is scan._backward_kernel: return "i32"
        return "*fp32" if p.name in wide else "*" + dtype
    signature = {p.name: kind(p) for p in kernel.params}
    aligned = [signature[p.name][0] == "*" and not p.do_not_specialize_on_alignment for p in kernel.params]
    attrs = {(i,): [["tt.divisibility", 16]] for i, yes in enumerate(aligned) if yes}
    source = ASTSource(kernel, signature, sizes, attrs)
    asm = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=dict(num_warps=1)).asm
    (folder / "kernel.cubin").write_bytes(asm["cubin"])
    show = lambda *a: subprocess.run([*a, folder / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    usage = {k: int(v) for k, v in re.findall(r"(REG|LOCAL|STACK):(\\d+)", show(tools / "cuobjdump", "-res-usage"))}
    target = re.search(r"\\.target (\\w+)", asm["ptx"])[1]
    return dict(usage, target=target, loops=loops(show(tools / "nvdisasm", "-c")))

out, forward, backward = {}, scan._sizes(1536, 16, 512), scan._sizes(1536, 16, 256)
for sm in (80, 90):
    out[f"forward {sm}"] = build(scan._forward_kernel, sm, **forward)
    out[f"backward {sm}"] = build(scan._backward_kernel, sm, BLOCKS=8, **backward)
out["ends 90"] = build(scan._ends_kernel, 90, BACK=True, **forward)
out["backward, bfloat16 90"] = build(scan._backward_kernel, 90, "bf16", BLOCKS=8, **backward)
out["forward, n = 256, bfloat16 90"] = build(scan._forward_kernel, 90, "bf16", **scan._sizes(1536, 256, 512))
out["backward, n = 64 80"] = build(scan._backward_kernel, 80, BLOCKS=64, **scan._sizes(1536, 64, 256))
for sm in (80, 90):
    out[f"convolution {sm}"] = build(scan._conv_kernel, sm, d=1536, k=4, BLOCK=128, ROWS=8)
    out[f"convolution, taps {sm}"] = build(scan._conv_taps_kernel, sm, "bf16", d=1536, k=4, BLOCK=128, ROWS=8)
x = torch.ones(1, 4, 2)
try: scan.selective_scan(x, x, -x[0, :2], x, x, impl="triton")
except RuntimeError as e: out["error"] = str(e)
print(json.dumps(out))
"""


@pytest.fixture(scope="module", autouse=True)
def building(request, tmp_path_factory):
    """A process that compiles while the tests before those of its kernels run."""
    if not any("built" in item.fixturenames for item in request.session.items):
        return (yield)
    folder = str(tmp_path_factory.mktemp("triton"))
    with start(COMPILE, folder, TRITON_CACHE_DIR=folder, CUDA_VISIBLE_DEVICES="") as process:
        yield process
        process.kill()


@pytest.fixture(scope="module")
def built(building):
    """Kernels compiled for two GPUs that need not be there, and disassembled."""
    from triton.compiler import ASTSource
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    if "constexprs" not in ASTSource.__init__.__code__.co_varnames:
        pytest.skip("this Triton's compiler takes other arguments")
    if not all((tools / tool).exists() for tool in ("ptxas", "cuobjdump", "nvdisasm")):
        pytest.skip("this Triton does not carry ptxas, cuobjdump and nvdisasm")
    return finish(building)


def test_without_a_gpu_the_error_names_the_interpreter(built):
    assert "tensors are on cpu" in built["error"]
    assert built["error"].endswith('TRITON_INTERPRET=1 in the environment from the start; use impl="chunked"')


def test_kernels_compile_ahead_of_time_without_spilling(built):
    """PTX and machine code for compute capabilities 8.0 and 9.0; no thread has a byte of local memory."""
    for name, kernel in built.items():
        if name != "error":
            assert kernel["target"].startswith("sm_" + name[-2:]) and kernel["REG"] <= 255
            assert "convolution" in name or kernel["loops"]
            assert not any("STL" in loop or "LDL" in loop for loop in kernel["loops"]), name
            assert kernel["LOCAL"] == kernel["STACK"] == 0, name


@pytest.mark.parametrize("sm", [80, 90])
def test_machine_code_is_near_the_floor(built, sm):
    """n = 16: instructions beside the floor, one exponential a state and step in every walk, and none twice.

    An exponential keeps a scheduler's special function unit for 8 clocks; other instructions issue one a clock
    meanwhile, so that up to 8 beside it are free. Forward has 16 states a thread and 4 steps a loop, backward 8 and 4.
    """
    loop, = built[f"forward {sm}"]["loops"]
    assert loop["EX2"] == 64 and sum(loop.values()) <= 9 * 64
    assert loop["LDG"] == 4 * (2 + 2 * 16 // 4)  # a step loads x, dt, and B and C 16 bytes at a time
    walk, back = built[f"backward {sm}"]["loops"]
    assert walk["EX2"] == back["EX2"] == 32
    assert sum(walk.values()) <= 8 * 32 and sum(back.values()) <= 36 * 32
