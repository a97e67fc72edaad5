"""Every op of kernels/ beside its rivals, in one run and one table.

    python -m bench.kernels                       on a GPU: real shapes, bfloat16; on a CPU: toy shapes, float32
    python -m bench.kernels --toy                 toy shapes on the CPU, wherever it runs
    python -m bench.kernels --op attention        some ops only (repeat the flag); likewise --provider ours
    python -m bench.kernels --out FILE.csv        also write the table, row by row

Providers: ours; torch (the plain code that the op replaces); torch.compile of it; torch's own fused op, where there is
one; Liger; TRL's chunked loss; candidates, which are ours with other settings: defaults change by measurement only.
What cannot run here or fails says why in place of figures: no cell is ever an estimate. The exit is 1 where ours fails.
Columns: median of the runs with the 20 % and 80 % quantiles, TFLOP/s or GB/s counted from the op's definition (not from
what an implementation executes), share of the device's peak, peak memory on top of the inputs, and the largest error
against fp32 (of the outputs, or of the gradients where there is a backward), relative to the largest value. On a CPU
torch.compile generates no code: there the table only shows that everything still runs.
"""

import argparse
import csv
import datetime
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from unittest import mock

import torch
import torch.nn.functional as F

import kernels

PEAKS = {"H200": (989, 4800), "H100": (989, 3350), "A100": (312, 2039), "RTX 4090": (165, 1008)}  # bf16 TFLOP/s, GB/s
CHUNK_OF_TRL = 32_768  # words a tile, as its trainers set it
COLUMNS = ("op", "shape", "pass", "provider", "ms", "ms_20", "ms_80", "rate", "unit")
COLUMNS += ("peak_share", "memory_gib", "error", "note")
PROVIDERS = ("ours", "torch", "torch.compile", "torch native", "Liger", "TRL", "candidates")


@dataclass
class Case:
    """One op at one shape. `work` is TFLOP or GB of one run; `truth` is measured against, on the inputs in fp32."""

    op: str
    shape: str
    passes: str  # "forward", "backward" or "forward+backward"
    unit: str
    work: float
    inputs: list
    providers: dict[str, Callable | str]  # a function of the inputs, or why there is none
    truth: Callable

    @cached_property
    def exact(self) -> list | str:
        """What a step should return, worked out once: the plain code in fp32, on the same values; or why it cannot."""
        inputs = [
            t.detach().float().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in self.inputs
        ]
        try:
            return [t.detach() for t in prepare(self.truth, inputs, self.passes)()]
        except RuntimeError as failure:  # too little memory, as a rule
            return f"no error is known: fp32 {reason(failure)}"


# ------------------------------------------------------------------------------------------------------- candidates
@dataclass(frozen=True)
class Candidate:
    """Settings of one of our kernels that may be faster than its defaults; bench.compiled has what they compile to."""

    op: str
    passes: str
    kernel: str  # what is compiled otherwise
    settings: tuple  # (module, name, value); a dict as value is laid over the module's own
    hopper: bool = False

    def applied(self) -> ExitStack:
        """A context in which launchers choose them."""
        stack = ExitStack()
        for module, name, value in self.settings:
            laid_over = isinstance(value, dict)
            patch = (
                mock.patch.dict(getattr(module, name), value) if laid_over else mock.patch.object(module, name, value)
            )
            stack.enter_context(patch)
        return stack


ATTENTION, HEAD = sys.modules["kernels.attention"], sys.modules["kernels.linear_logp"]


def tile(kernel, *sizes):
    """Queries, keys, warps and stages of an attention kernel at head dim 128 on Hopper."""
    return ((ATTENTION, "TILES", {("sm_90", kernel): ATTENTION.TILES["sm_90", kernel] | {128: sizes}}),)


FORWARD, DKDV = "_attention_forward_kernel", "_attention_dkdv_kernel"
CANDIDATES = {
    "128x128x8x2": Candidate("attention", "forward", FORWARD, tile("forward", 128, 128, 8, 2), hopper=True),
    "128x128x8x3": Candidate("attention", "forward", FORWARD, tile("forward", 128, 128, 8, 3), hopper=True),
    "dkdv 32x128x8x3": Candidate("attention", "backward", DKDV, tile("dkdv", 32, 128, 8, 3), hopper=True),
    "grouped": Candidate("scoring", "forward", "_score_kernel", ((HEAD, "GROUP", 16),)),
    "chunk 4096, narrow": Candidate(
        "head", "forward+backward", "_dlogits_kernel", ((HEAD, "CHUNK", 4096), (HEAD, "NARROW", True))
    ),
}


def with_candidates(case, device):
    """The case, its candidates among the providers."""
    other = device != "cpu" and torch.cuda.get_device_capability()[0] not in (9, 10)
    chosen = {name: c for name, c in CANDIDATES.items() if (c.op, c.passes) == (case.op, case.passes)}
    more = {name: "is for Hopper" if c.hopper and other else case.providers["ours"] for name, c in chosen.items()}
    return replace(case, providers=case.providers | more)


# ---------------------------------------------------------------------------------------------------------- the ops
def head_cases(device, dtype, toy):
    tokens, width, vocab = (64, 32, 500) if toy else (8192, 4096, 151_936)
    x, w = torch.randn(tokens, width), torch.randn(vocab, width) / width**0.5
    y = torch.randint(vocab, (tokens,)).to(device)
    shape, gemm = f"T={tokens} H={width} V={vocab}", 2 * tokens * width * vocab / 1e12

    def plain(x, w):
        return F.cross_entropy((x @ w.T).float(), y)

    def ours(x, w):
        return -kernels.linear_logp(x, w, y)[0].mean()

    losses = {
        "ours": ours,
        "torch": plain,
        "torch.compile": compiled(plain, device),
        "torch native": native_head(y),
        "Liger": liger("fused_linear_cross_entropy", lambda f: lambda x, w: f(x, w, y), device),
        "TRL": trl_head(y, entropy=False),
    }

    def logp_entropy(x, w):
        logp_TV = (x @ w.T).float().log_softmax(-1)
        return logp_TV.gather(1, y[:, None]).squeeze(1), -(logp_TV.exp() * logp_TV).sum(-1)

    scores = {
        "ours": lambda x, w: kernels.linear_logp(x, w, y),
        "torch": logp_entropy,
        "torch.compile": compiled(logp_entropy, device),
        "torch native": "has no per-token log-probability with entropy",
        "Liger": "has no portable op with entropy",
        "TRL": trl_head(y, entropy=True),
    }

    def leaves(head_trains=True, gradients=True):
        a, b = x.to(device, dtype), w.to(device, dtype)
        return [a.requires_grad_(gradients), b.requires_grad_(gradients and head_trains)]

    both = "forward+backward"
    yield Case("head", shape, both, "TFLOP/s", 3 * gemm, leaves(), losses, plain)
    yield Case("head, frozen", shape, both, "TFLOP/s", 2 * gemm, leaves(head_trains=False), losses, plain)
    yield Case("scoring", shape, "forward", "TFLOP/s", gemm, leaves(gradients=False), scores, logp_entropy)


def compiled(function, device):
    return torch.compile(function, backend="aot_eager" if device == "cpu" else "inductor")


def native_head(y):
    if not hasattr(F, "linear_cross_entropy"):
        return "not in this torch"
    options = torch.nn.modules.LinearCrossEntropyOptions()
    return lambda x, w: F.linear_cross_entropy(x, w, y, options=options)


def trl_head(y, entropy):
    try:
        chunked = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    except (ImportError, AttributeError):
        return "not in this TRL"

    def run(x, w):
        outputs = ("entropy",) if entropy else ()
        logp, entropies, *_ = chunked.apply(x, w, None, y, 1.0, CHUNK_OF_TRL, None, 1.0, outputs)
        return (logp, entropies) if entropy else -logp.mean()

    return run


def liger(name, bind, device):
    """Liger's function `liger_<name>`, bound to a case's constants; its kernels exist for GPUs only."""
    if device == "cpu":
        return "needs a GPU"
    try:
        return bind(getattr(importlib.import_module("liger_kernel.transformers.functional"), f"liger_{name}"))
    except (ImportError, AttributeError):
        return "not in this Liger"


def attention_cases(device, dtype, toy):
    heads, kv_heads, dim = (4, 2, 64) if toy else (32, 8, 128)
    for lengths in [[20, 40]] if toy else [[8192], [4096] * 4, [700, 90, 2500, 1300, 400, 3202]]:
        tokens = sum(lengths)
        q, k, v = (torch.randn(tokens, h, dim, device=device).to(dtype) for h in (heads, kv_heads, kv_heads))
        cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(device)
        longest, reference = max(lengths), sys.modules["kernels.attention"].reference
        plain = partial(reference, cu_seqlens=cu_seqlens)
        providers = {
            "ours": partial(kernels.attention, cu_seqlens=cu_seqlens, max_len=longest),
            "torch": plain,
            "torch.compile": "the loop over documents recompiles for every packing",
            "torch native": native_attention(cu_seqlens, longest, device),
            "Liger": "has none",
            "TRL": "has none",
        }
        work = sum(2 * n * n * heads * dim for n in lengths) / 1e12
        label = f"{len(lengths)} documents T={tokens} H={heads}/{kv_heads} D={dim}"
        for passes, factor in (("forward", 1), ("backward", 2.5)):
            inputs = [t.clone().requires_grad_(passes != "forward") for t in (q, k, v)]
            yield Case("attention", label, passes, "TFLOP/s", factor * work, inputs, providers, plain)


def native_attention(cu_seqlens, longest, device):
    if device == "cpu":
        return "needs a GPU"
    try:
        varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return "not in this torch"
    return lambda q, k, v: varlen(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0), enable_gqa=True
    )


def decode_cases(device, dtype, toy):
    heads, kv_heads, dim = (4, 2, 64) if toy else (32, 8, 128)
    for rows, context in [(3, 100)] if toy else [(64, 2048), (64, 8192), (8, 2048)]:
        pages = -(-context // 64)
        table = torch.randperm(rows * pages, device=device).view(rows, pages).int()
        arenas = [torch.randn(rows * pages, 64, kv_heads, dim, device=device, dtype=dtype) for _ in "kv"]
        lengths = torch.full((rows,), context, dtype=torch.int32, device=device)
        inputs = [torch.randn(rows, heads, dim, device=device, dtype=dtype), *arenas, table, lengths]
        reference = sys.modules["kernels.decode_attention"].reference
        providers = {
            "ours": kernels.decode_attention,
            "torch": reference,
            "torch.compile": "rows are grouped by length on the host",
            "torch native": native_decode(rows, context, device),
            "Liger": "has none",
            "TRL": "has none",
        }
        work = 2 * rows * context * kv_heads * dim * dtype.itemsize / 1e9
        label = f"B={rows} n={context} H={heads}/{kv_heads} D={dim}"
        yield Case("decode", label, "forward", "GB/s", work, inputs, providers, reference)


def native_decode(rows, context, device):
    if device == "cpu":
        return "needs a GPU"
    try:
        varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return "not in this torch"
    each = torch.arange(rows + 1, dtype=torch.int32, device=device)
    return lambda q, k, v, table, lengths: varlen(
        q, k, v, each, None, 1, context, enable_gqa=True, seqused_k=lengths, block_table=table
    )


def bandwidth_cases(device, dtype, toy):
    """RMSNorm with and without residual, RoPE, SwiGLU: forward and forward+backward."""
    tokens, width, inner, heads, kv_heads, dim = (64, 48, 96, 4, 2, 64) if toy else (8192, 4096, 12288, 32, 8, 128)
    x, residual, weight = (torch.randn(s, device=device) for s in ((tokens, width), (tokens, width), width))
    gate_up = torch.randn(tokens, 2 * inner, device=device)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, device=device)
    cos, sin = torch.randn(2, tokens, dim // 2, device=device).repeat(1, 1, 2)
    norm, rope, swiglu = (sys.modules[f"kernels.{name}"].reference for name in ("rms_norm", "rope", "swiglu"))
    add = lambda f: lambda x, r, w: f(x, w, 1e-6, r)  # noqa: E731
    turn = lambda f: lambda qkv: f(qkv, heads, cos, sin)  # noqa: E731
    none = "has none"
    ops = [  # op, shape, inputs, bytes read and written an element: forward, both; ours, plain, native, Liger
        ("rms_norm", f"T={tokens} H={width}", (x, weight), 2 * x.numel(), 5 * x.numel(),
         lambda x, w: kernels.rms_norm(x, w, 1e-6), lambda x, w: norm(x, w, 1e-6),
         lambda x, w: F.rms_norm(x, (width,), w, 1e-6),
         liger("rms_norm", lambda f: lambda x, w: f(x, w, 1e-6, 0.0, "llama", False), device)),
        ("rms_norm, residual", f"T={tokens} H={width}", (x, residual, weight), 4 * x.numel(), 8 * x.numel(),
         add(kernels.rms_norm), add(norm), none,
         liger("fused_add_rms_norm", lambda f: lambda x, r, w: f(x, r, w, 1e-6, 0.0, "llama", False), device)),
        ("rope", f"T={tokens} H={heads}/{kv_heads} D={dim}", (qkv,), 2 * qkv.numel(),
         4 * qkv.numel(), turn(kernels.rope), turn(rope), none, liger("rope", liger_rope(heads, cos, sin), device)),
        ("swiglu", f"T={tokens} I={inner}", (gate_up,), 3 * gate_up.numel() // 2, 4 * gate_up.numel(), kernels.swiglu,
         swiglu, none, liger("swiglu", lambda f: lambda x: f(*x.chunk(2, dim=-1)), device)),
    ]  # fmt: skip
    for op, shape, inputs, forward, both, ours, plain, native, other in ops:
        providers = {"ours": ours, "torch": plain, "torch.compile": compiled(plain, device), "torch native": native}
        providers |= {"Liger": other, "TRL": none}
        for passes, elements in (("forward", forward), ("forward+backward", both)):
            leaves = [t.to(dtype).clone().requires_grad_(passes != "forward") for t in inputs]
            yield Case(op, shape, passes, "GB/s", elements * dtype.itemsize / 1e9, leaves, providers, plain)


def liger_rope(heads, cos, sin):
    """Liger wants [1,H,T,D] and turns q and k in place: it gets copies of the layout, as its callers have it."""

    def bind(f):
        def run(qkv):
            joint = qkv.unflatten(1, (-1, cos.shape[1]))
            kv_heads = (joint.shape[1] - heads) // 2
            q, k, v = (t.transpose(0, 1)[None] for t in joint.split((heads, kv_heads, kv_heads), dim=1))
            q, k = f(q.clone(), k.clone(), cos[None], sin[None])
            return tuple(t[0].transpose(0, 1) for t in (q, k, v))

        return run

    return bind


CASES = {"head": head_cases, "attention": attention_cases, "decode": decode_cases, "bandwidth": bandwidth_cases}


# -------------------------------------------------------------------------------------------------------- measuring
def rows(ops, providers, device, toy, repeats=5):
    """The rows of the table as they are measured; what fails is a row, too."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for op in ops:
        try:
            for case in CASES[op](device, dtype, toy):
                case = with_candidates(case, device)
                for provider in case.providers:
                    if ("candidates" if provider in CANDIDATES else provider) in providers:
                        yield measure(case, provider, device, repeats)
        except Exception as failure:  # of the inputs
            yield dict.fromkeys(COLUMNS, "") | {"op": op, "provider": "ours", "note": f"failed: {reason(failure)}"}


def reason(failure):
    return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:100]}"


def measure(case, provider, device, repeats):
    """One row of the table, as a dict over COLUMNS."""
    row = dict.fromkeys(COLUMNS, "") | {"op": case.op, "shape": case.shape, "pass": case.passes, "provider": provider}
    function = case.providers[provider]
    if isinstance(function, str):
        return row | {"note": function}
    try:
        with CANDIDATES[provider].applied() if provider in CANDIDATES else nullcontext():
            step = prepare(function, case.inputs, case.passes)
            error = worst(step(), case.exact)  # the first run also compiles what there is to compile
            memory = peak_memory(step, device)
            low, median, high = timings(step, device, repeats)
    except Exception as failure:
        return row | {"note": f"failed: {reason(failure)}"}
    rate = case.work / (median / 1e3)
    row |= {"ms": median, "ms_20": low, "ms_80": high, "rate": rate, "unit": case.unit}
    row |= {"note": error} if isinstance(error, str) else {"error": error}
    return row | {"memory_gib": memory, "peak_share": share_of_peak(rate, case.unit, device)}


def prepare(function, inputs, passes):
    """A function without arguments that runs the wanted passes; it returns outputs (forward) or gradients (else)."""
    leaves = [t for t in inputs if t.requires_grad]

    def outputs():
        out = function(*inputs)
        return out if isinstance(out, tuple) else (out,)

    def gradients(out, keep):
        return torch.autograd.grad(out, leaves, [torch.ones_like(o) for o in out], retain_graph=keep)

    if passes == "forward":
        return outputs
    if passes == "backward":
        return partial(gradients, outputs(), keep=True)
    return lambda: gradients(outputs(), keep=False)


def worst(results, exact):
    """The largest error, relative to the largest value of its tensor; or why there is none."""
    if isinstance(exact, str):
        return exact
    pairs = [(a.detach().float(), b) for a, b in zip(results, exact, strict=True)]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def timings(step, device, repeats):
    """20 %, 50 % and 80 % quantiles in ms; on a GPU the L2 cache is emptied between runs."""
    if device != "cpu":
        import triton.testing

        return triton.testing.do_bench(step, warmup=100, rep=repeats * 100, quantiles=[0.2, 0.5, 0.8])
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    return torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()


def peak_memory(step, device):
    """GiB that a run needs on top of what lies there before it (gradients included); nothing on a CPU."""
    if device == "cpu":
        return ""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def share_of_peak(rate, unit, device):
    if device == "cpu":
        return ""
    name = torch.cuda.get_device_name()
    peak = next((peaks for key, peaks in PEAKS.items() if key in name), None)
    return "" if peak is None else rate / peak[unit == "GB/s"]


# ----------------------------------------------------------------------------------------------------------- output
def show(row):
    figures = row["note"]
    if row["ms"] != "":
        share = f"{row['peak_share']:6.1%}" if row["peak_share"] != "" else "     -"
        memory = f"{row['memory_gib']:6.2f} GiB" if row["memory_gib"] != "" else "         -"
        error = row["note"] or f"error {row['error']:.1e}"
        figures = (
            f"{row['ms']:9.3f} ms ({row['ms_20']:.3f}-{row['ms_80']:.3f}) {row['rate']:9.3g} {row['unit']:7} "
            f"{share} {memory} {error}"
        )
    print(f"{row['op']:19} {row['shape']:42} {row['pass']:17} {row['provider']:18} {figures}", flush=True)


def origin(device):
    """What a figure is worth nothing without: device, versions, commit, day."""
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if device != "cpu" else "CPU"
    return f"{name}; torch {torch.__version__}; triton {triton}; commit {commit}; {datetime.date.today()}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=list(CASES), action="append", help="only this op (may be repeated)")
    parser.add_argument("--provider", choices=PROVIDERS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--toy", action="store_true", help="toy shapes on the CPU, where there is a GPU, too")
    parser.add_argument("--out", help="also write the table to this CSV file")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not options.toy else "cpu"
    torch.manual_seed(0)
    print(origin(device))
    failed = False
    with open(options.out or os.devnull, "w", newline="") as file:
        file.write(f"# {origin(device)}\n")
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows(options.op or CASES, options.provider or PROVIDERS, device, toy=device == "cpu"):
            writer.writerow(row)
            file.flush()
            show(row)
            failed |= row["provider"] == "ours" and row["note"].startswith("failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
