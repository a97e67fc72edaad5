"""What the kernels compile to, without a GPU: every configuration that a launcher can choose, for sm_80, sm_89, sm_90.

    python -m bench.compiled            compile, check, compare with the snapshot; exit 1 if anything is off
    python -m bench.compiled --write    compile, check, renew bench/results/compiled.json
    python -m bench.compiled --arch sm_100      print one architecture only

The launchers themselves run, on tensors without data, with a recorder in the place of `dispatch.launch`; so what is
compiled here is what they would launch. Checked for each: no register spill, shared memory within the device, tensor
core instructions where there is a product of 16-bit operands, vector or asynchronous loads, no fp64 instruction. The
candidates of bench.kernels, which no launcher chooses yet, are compiled for Hopper and marked by their names.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import namedtuple
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.kernels import CANDIDATES
from engine import State
from kernels import dispatch

# the functions of the package hide the modules of the same names
ATTENTION, DECODE, HEAD, NORM, ROPE, SAMPLE, SWIGLU = (
    sys.modules[f"kernels.{name}"]
    for name in ("attention", "decode_attention", "linear_logp", "rms_norm", "rope", "sample", "swiglu")
)
SNAPSHOT = Path(__file__).parent / "results" / "compiled.json"
ARCHITECTURES = ("sm_80", "sm_89", "sm_90")
SHARED_LIMIT = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448}  # bytes a block
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TYPES = DTYPES | {torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"}

Launch = namedtuple("Launch", "name kernel args meta")


# ---------------------------------------------------------------------------------------------- what launchers choose
@contextmanager
def recording(arch, launches):
    """Launchers believe that they run on `arch`; their launches go to the list."""
    saved = dispatch.architecture, dispatch.processors, dispatch.launch
    dispatch.architecture = lambda device: "sm_90" if arch == "sm_100" else arch
    dispatch.processors = lambda device: 132
    dispatch.launch = lambda kernel, programs, *args, **meta: launches.append((kernel, args, meta))
    try:
        yield
    finally:
        dispatch.architecture, dispatch.processors, dispatch.launch = saved


def launches(arch, dtypes=tuple(DTYPES), dims=(64, 128), widths=(128, 1024, 2048, 4096, 8192)):
    """All launches of all launchers, named kernel/dtype/configuration, each configuration once."""
    found = {}
    for dtype in dtypes:
        cases = [(f"d{dim}", partial(_heads, dtype, dim)) for dim in dims]
        cases += [(f"w{width}", partial(_norms, dtype, width)) for width in widths]
        cases += [("even", partial(_head, dtype, 4096)), ("ragged", partial(_head, dtype, 2064))]
        cases += [("", partial(_gate, dtype))]
        cases += [("", partial(_draw, mode)) for mode in ("greedy", "top_p") if dtype == torch.float32]
        for label, case in cases:
            for kernel, args, meta in recorded(arch, case):
                flags = [f.lower() for f in ("ADD", "NORM", "CACHE", "GREEDY") if meta.get(f)]
                name = "/".join(filter(None, [kernel.__name__.strip("_"), DTYPES[dtype], label, *flags]))
                found.setdefault(name, Launch(name, kernel, args, meta))
    return list(found.values()) + (candidates(arch) if arch == "sm_90" else [])


def candidates(arch):
    """The launches that the candidates of bench.kernels change, in bf16, as kernel/candidate/its name."""
    chosen = []
    for name, candidate in CANDIDATES.items():
        case = (
            partial(_heads, torch.bfloat16, 128)
            if candidate.op == "attention"
            else partial(_head, torch.bfloat16, 4096)
        )
        with candidate.applied():
            changed = [launch for launch in recorded(arch, case) if launch[0].__name__ == candidate.kernel]
        chosen += [Launch(f"{candidate.kernel.strip('_')}/candidate/{name}", *launch) for launch in changed]
    return chosen


def recorded(arch, case):
    """(kernel, arguments, meta) of everything that a function launches."""
    found = []
    with recording(arch, found):
        case()
    return found


def _empty(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


def _heads(dtype, dim, tokens=8192, heads=32, kv_heads=8, rows=64, pages=128):
    q, k, v = (_empty(tokens, h, dim, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    cu_seqlens = _empty(17, dtype=torch.int32)
    plan = [_empty(512, dtype=torch.int32)] * 6
    o, lse = ATTENTION.launch_forward(q, k, v, cu_seqlens, plan)
    ATTENTION.launch_backward(o, q, k, v, o, lse, cu_seqlens, plan)
    angles, weight = _empty(tokens, dim, dtype=torch.float32), _empty(dim, dtype=dtype)
    qkv = _empty(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    for norms in (None, (weight, weight, 1e-6)):
        ROPE.launch(qkv, angles, angles, heads, norms)
        ROPE.launch(qkv[:rows], angles[:rows], angles[:rows], heads, norms, (_empty(rows, dtype=torch.int64), k, v))
        ROPE.launch_backward(q, k, v, qkv if norms else None, angles, angles, norms)
    arena = _empty(rows * pages, DECODE.PAGE, kv_heads, dim, dtype=dtype)
    table, lengths = _empty(rows, pages, dtype=torch.int32), _empty(rows, dtype=torch.int32)
    DECODE.launch(q[:rows], arena, arena, table, lengths)


def _norms(dtype, width):
    x, weight = _empty(8192, width, dtype=dtype), _empty(width, dtype=dtype)
    for residual in (None, x):
        out, s, rstd = NORM.launch_forward(x, weight, 1e-6, residual)
        NORM.launch_backward(out, residual, s, weight, rstd)


def _head(dtype, width, tokens=8192, vocab=151_936):
    y = _empty(tokens, dtype=torch.int64)
    vectors = HEAD.launch_score(_empty(tokens, width, dtype=dtype), _empty(vocab, width, dtype=dtype), y, 0.6)
    z = _empty(HEAD.CHUNK, vocab, dtype=dtype if HEAD.NARROW else torch.float32)
    HEAD.launch_dlogits(z, dtype, y, *vectors, vectors[0], 0.6)


def _gate(dtype):
    gate_up = _empty(8192, 2 * 12288, dtype=dtype)
    SWIGLU.launch_backward(SWIGLU.launch_forward(gate_up), gate_up)


def _draw(mode, rows=256, vocab=151_936):
    state = State(rows, 1, 16, {0}, "meta")
    logits = _empty(rows, vocab, dtype=torch.float32)
    SAMPLE.launch(logits, state.first(rows), state.step, state.eos_E, state.knobs, mode)


# ------------------------------------------------------------------------------------------------ compile and inspect
def compile_launch(launch, arch):
    """The compiled kernel of one launch, specialised as Triton's own launcher would."""
    signature, constants, attributes = {}, {}, {}
    values = dict(zip(launch.kernel.arg_names[: len(launch.args)], launch.args, strict=True)) | launch.meta
    for i, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        signature[parameter.name] = kind = "constexpr" if parameter.is_constexpr else _type(value)
        if kind == "constexpr":
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {k: v for k, v in launch.meta.items() if k in ("num_warps", "num_stages")}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", int(arch[3:]), 32), options=options)


def _type(value):
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if hasattr(value, "block_shape"):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    return "constexpr" if value is None or value == 1 else "i32"


def inspect(compiled):
    """Figures of one compiled kernel."""
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": usage["REG"],
        "spill": usage["STACK"] + usage["LOCAL"],
        "shared": compiled.metadata.shared,
        "tensor_core": len(re.findall(r"\bwgmma\.mma_async|\bmma\.sync|tcgen05\.mma", ptx)),
        "wide_loads": len(re.findall(r"ld\.global\.v[24]|ld\.global\.[^ ]*\.v[24]|cp\.async", ptx)),
        "fp64": len(re.findall(r"\.f64", ptx)),
    }


def faults(launch, arch, figures):
    """What is wrong with one compiled kernel, as sentences; empty if nothing is."""
    product = "tl.dot" in launch.kernel.src or "_logits(" in launch.kernel.src
    found = []
    if figures["spill"]:
        found.append(f"{figures['spill']} bytes of registers spill")
    if figures["shared"] > SHARED_LIMIT[arch]:
        found.append(f"shared memory {figures['shared']} exceeds {SHARED_LIMIT[arch]}")
    if product and "/fp32" not in launch.name and not figures["tensor_core"]:
        found.append("a product without tensor cores")
    if not figures["wide_loads"] and not re.search("combine|greedy", launch.name):
        found.append("no vector or asynchronous load")
    if figures["fp64"]:
        found.append(f"{figures['fp64']} fp64 instructions")
    return found


def measure(arch, chosen):
    """{name: figures}, [fault sentences] for one architecture."""
    table, wrong = {}, []
    for launch in chosen:
        table[launch.name] = inspect(compile_launch(launch, arch))
        wrong += [f"{arch} {launch.name}: {fault}" for fault in faults(launch, arch, table[launch.name])]
    return table, wrong


def difference(old, new):
    """Lines that say how two tables {arch: {name: figures}} differ."""
    rows = {(arch, name) for table in (old, new) for arch in table for name in table[arch]}
    pairs = ((row, old.get(row[0], {}).get(row[1]), new.get(row[0], {}).get(row[1])) for row in sorted(rows))
    return [f"{arch} {name}: {a} -> {b}" for (arch, name), a, b in pairs if a != b]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="renew the snapshot")
    parser.add_argument("--arch", choices=list(SHARED_LIMIT), help="print this architecture only")
    options = parser.parse_args()
    tables, wrong = {}, []
    for arch in [options.arch] if options.arch else ARCHITECTURES:
        tables[arch], found = measure(arch, launches(arch))
        wrong += found
        for name, figures in tables[arch].items():
            print(f"{arch} {name:55}", *(f"{key} {value}" for key, value in figures.items()))
    if options.write and not options.arch:
        SNAPSHOT.write_text(json.dumps({"triton": triton.__version__, "kernels": tables}, indent=1) + "\n")
    snapshot = json.loads(SNAPSHOT.read_text())
    if not options.arch and snapshot["triton"] == triton.__version__:
        wrong += difference(snapshot["kernels"], tables)
    print(*wrong, sep="\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
