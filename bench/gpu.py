"""What ten minutes of a GPU should tell, in one command.

    python -m bench.gpu --out bench/results/gpu-h100.json --minutes 9
    python -m bench.gpu --stage kernels --stage decode      these only; each keeps its time on the clock
    python -m bench.gpu --toy                               toy shapes on the CPU (the tests run it)

Every stage is a process of its own that must end by its time on the clock; one that ends early leaves its time to the
next. Each row goes to --out as it comes, and what fails is a row, a stage over its limit too, so that whatever stops
the command, everything measured before it is there. The exit is 1 where a row tells of a failure.

    device    versions; bandwidth of a copy; a product of 8192^3
    tests     the tests that need a GPU
    kernels   ours, the plain code, torch's own, and the candidates for other defaults (bench.kernels)
    decode    replays of the decode step's graph against the memory's limit; top-p, LoRA; the gap to the trainer
    sft       steps of 16k packed tokens, every weight and LoRA: tokens a second, MFU
    grpo      a whole step of ours; the same step of ours and of TRL (bench.grpo)
"""

import argparse
import gc
import json
import os
import platform
import queue
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path

import runs

ROOT = Path(__file__).parents[1]
SHARDS = (  # files and names of the tests that need a GPU
    ("tests/test_kernels_gpu.py", "test_attention"),
    ("tests/test_kernels_gpu.py", "not test_attention"),
    ("tests/test_engine.py", "graphs or gpu or devices"),
)
STEPS = 3  # of SFT, the first of which is not timed
REPEATS = 4  # readings of a decode step, which is replayed `look` times for each


# ------------------------------------------------------------------------------------------------- stages
def attempt(given: dict, measure) -> dict:
    """given and what `measure` returns; or why that failed, so that a stage goes on."""
    try:
        return given | measure()
    except Exception as failure:
        return given | {"error": f"{type(failure).__name__}: {failure}"[:500]}


def forget(toy: bool) -> None:
    """Free what an earlier measurement of this process has held on the GPU, and its peak."""
    gc.collect()
    if not toy:
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def device(toy: bool) -> Iterator[dict]:
    import torch

    from bench import engine as bench

    row = {"python": platform.python_version(), "torch": torch.__version__}
    installed = {found.metadata["Name"]: found.version for found in metadata.distributions()}
    row |= {name: installed.get(name, "none") for name in ("triton", "transformers", "trl", "datasets", "liger_kernel")}
    if not toy:
        row |= {"device": torch.cuda.get_device_name(), "gib": torch.cuda.mem_get_info()[1] / 2**30}
    yield row
    where, width, dtype = ("cpu", 128, torch.float32) if toy else ("cuda", 8192, torch.bfloat16)
    yield attempt({}, lambda: {"copy_gb_per_s": bench.bandwidth(where, 4 if toy else 2048) / 1e9})

    def product():
        a = torch.randn(width, width, device=where, dtype=dtype)
        seconds = min(bench.timed(lambda: a @ a, where) for _ in range(10))
        return {"width": width, "tflops": 2 * width**3 / seconds / 1e12}

    yield attempt({}, product)


def tests(toy: bool) -> Iterator[dict]:
    """A row a test, and another with the reason where it failed; the shards run beside each other."""
    lines = queue.Queue()
    for number, (file, names) in enumerate(SHARDS):
        threading.Thread(target=run_tests, args=(number, file, names, toy, lines), daemon=True).start()
    running = len(SHARDS)
    while running:
        line = lines.get()
        if isinstance(line, dict):
            running -= 1
            yield line
        elif found := re.search(r"(PASSED|FAILED|ERROR|SKIPPED).*", line):
            name = re.search(r"tests/\S+::\S+|$", line)[0]
            failed = found[1] in ("FAILED", "ERROR")
            yield {"test": name, "outcome": found[1].lower()} | ({"error": found[0][-500:]} if failed else {})


def run_tests(number: int, file: str, names: str, toy: bool, lines: queue.Queue) -> None:
    """Put pytest's lines and, last, a row for the shard."""
    words = [sys.executable, "-m", "pytest", "-v", "--tb=line", "-p", "no:cacheprovider", file, "-k", names]
    hidden = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if toy else {})
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=hidden) as process:
        for line in process.stdout:
            lines.put(line)
    lines.put({"shard": number} | ({"error": f"pytest: exit {process.returncode}"} if process.returncode else {}))


def kernels(toy: bool) -> Iterator[dict]:
    from bench import kernels as bench

    providers = ("ours", "torch", "torch native", "candidates")
    for row in bench.rows(bench.CASES, providers, "cpu" if toy else "cuda", toy, repeats=2):
        failed = row["note"] if row["note"].startswith("failed") else ""
        row |= {"relative_error": row["error"], "error": failed}
        yield {key: value for key, value in row.items() if value != ""}


def decode(toy: bool) -> Iterator[dict]:
    import torch

    import model
    from bench import engine as bench

    where, dtype = ("cpu", torch.float32) if toy else ("cuda", torch.bfloat16)
    raw = bench.R1_DISTILL_1_5B | (bench.TOY if toy else {})
    transformer, speeds = bench.random_model(raw, where, dtype), bench.measured_speeds(where, 4 if toy else 2048)
    sizes, contexts = ((1, 3), (70,)) if toy else ((1, 64, 256), (512, 4096))
    cells = [(rows, context, "sample", False) for context in contexts for rows in sizes]
    last = sizes[-1], contexts[0]
    cells += [(*last, "top_p", False), (*last, "greedy", False), (*last, "sample", True)]
    for rows, context, mode, lora in cells:
        if lora:
            model.add_lora(transformer, 16, 32)
            transformer.requires_grad_(False)  # the pairs, too
        given = {"rows": rows, "context": context, "mode": mode, "lora": lora}
        yield attempt(given, partial(replayed, transformer, rows, context, mode, where, speeds))
    del transformer
    prompts, new = (2, 8) if toy else (32, 256)
    gap = partial(bench.sampler_trainer_gap, raw, where, dtype, prompts, new)
    yield attempt({"gap": "sampler and trainer, nats"}, gap)


def replayed(transformer, rows: int, context: int, mode: str, where: str, speeds: dict) -> dict:
    """Milliseconds of a decode step with `context` cached tokens in every row, which nobody has prefilled."""
    import numpy as np
    import torch

    import engine
    from bench import engine as bench

    room = context + 16 * (REPEATS + 2)
    sampler = engine.Engine(transformer, (), max_rows=rows, max_context=room)
    pages = sampler.pages_a_row
    if sampler.pages <= rows * pages:
        return {"error": f"the cache has {sampler.pages} pages, too few for all rows"}
    with torch.inference_mode():
        sampler._open(1.0, 0.95)
        for arena in (sampler.cache.k_LPSKD, sampler.cache.v_LPSKD):
            arena.zero_()
        host = np.zeros((sampler.prepare(rows, mode), len(engine.COLUMNS) + pages), dtype=np.int64)
        host[:rows, : len(engine.COLUMNS)] = [(0, context, key, 0, 2**30, True) for key in range(rows)]
        host[:rows, len(engine.COLUMNS) :] = 1 + np.arange(rows * pages).reshape(rows, pages)
        sampler.state.load(torch.from_numpy(host))
        readings = [bench.timed(lambda: sampler.advance(sampler.look), where) for _ in range(REPEATS + 1)][1:]
    seconds = statistics.median(readings) / sampler.look
    limit = bench.step_limit(transformer, rows, context + sampler.look * (1 + REPEATS / 2), **speeds)
    sampler.close()
    return {"ms_a_step": seconds * 1e3, "limit_ms": limit * 1e3, "share_of_limit": limit / seconds}


def sft(toy: bool) -> Iterator[dict]:
    for lora_r in (0, 16):
        yield attempt({"lora_r": lora_r}, partial(sft_steps, lora_r, toy))


def sft_steps(lora_r: int, toy: bool) -> dict:
    import torch

    import model
    import train_sft
    import trainers
    from bench import engine as bench

    where, dtype = ("cpu", torch.float32) if toy else ("cuda", torch.bfloat16)
    forget(toy)
    raw, documents, length = bench.R1_DISTILL_1_5B | (bench.TOY if toy else {}), 8, 32 if toy else 2048
    with tempfile.TemporaryDirectory() as folder:
        runs.write_json(Path(folder) / "config.json", raw)
        config = train_sft.Config(model=folder, lora_r=lora_r, micro_tokens=documents * length)
        free = trainers.free_memory(where)
        plan = trainers.plan_memory(config, dtype, free, longest=length, rows=train_sft.VALIDATION_SAMPLES)
    transformer = bench.random_model(raw, where, dtype if lora_r else torch.float32).requires_grad_(True)
    if lora_r:
        model.add_lora(transformer, lora_r, 2 * lora_r)
    trainee = trainers.Trainee(transformer, dtype, train_sft.BETAS, train_sft.WEIGHT_DECAY)
    drawn = torch.randint(0, transformer.config.vocab_size, (documents, length)).tolist()
    examples = [train_sft.Example({}, ids, [False] + [True] * (length - 1)) for ids in drawn]  # all that `mfu` counts
    step = partial(train_sft.optimizer_step, transformer, trainee, examples, 1e-6, plan)
    seconds = statistics.median([bench.timed(step, where) for _ in range(STEPS)][1:])
    speed = documents * length / seconds
    device = torch.cuda.get_device_name() if not toy else ""
    used = mfu(transformer, bool(lora_r), speed, device)
    return {"tokens_per_s": speed, **used, "peak_gib": trainers.peak_memory(), "plan": str(plan)}


def mfu(transformer, lora: bool, tokens_per_s: float, device: str) -> dict:
    """{"mfu": share of the dense bf16 peak that products with weights reach} on a known GPU, else nothing: 6 FLOPs a
    parameter and token, 4 where the weights get no gradient."""
    from bench.engine import used_parameters
    from bench.kernels import PEAKS

    peaks = [tflops * 1e12 for name, (tflops, _) in PEAKS.items() if name in device]
    return {"mfu": (4 if lora else 6) * used_parameters(transformer) * tokens_per_s / peaks[0]} if peaks else {}


def grpo(toy: bool) -> Iterator[dict]:
    """TRL's only step is not warmed up: on a GPU a second one would take as long as all other stages."""
    from bench import grpo as bench

    with tempfile.TemporaryDirectory() as folder:
        size = {"prompts": 4, "group": 4, "micro": 8} if toy else {"prompts": 8, "micro": 4}
        both = bench.Config(**size, tiny=toy, device="cpu" if toy else "cuda", steps=2, warm=1, folder=folder)
        bench.write_model(both, both.device, folder)
        forget(toy)
        cases = [("ours", both), ("trl", bench.replace(both, steps=1, warm=0))]
        cases += [] if toy else [("ours", bench.replace(both, prompts=64))]
        for side, config in cases:
            given = {"side": side, "answers": config.prompts * config.group, "warm": config.warm}
            yield attempt(given, partial(bench.in_its_own_process, config, side))


STAGES = {"device": device, "tests": tests, "kernels": kernels, "decode": decode, "sft": sft, "grpo": grpo}
ENDS = {"device": 30, "tests": 120, "kernels": 240, "decode": 345, "sft": 420, "grpo": 530}  # seconds of 540


# ------------------------------------------------------------------------------------------------- processes
def in_its_own_process(name: str, toy: bool, limit: float) -> Iterator[dict]:
    """The rows of a stage as it prints them; the last one says if it failed or was stopped."""
    words = [sys.executable, "-m", "bench.gpu", "--only", name, *(["--toy"] if toy else [])]
    stopped = threading.Event()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, start_new_session=True
        )

        def stop():
            stopped.set()
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started

        clock = threading.Timer(max(limit, 0.0), stop)
        clock.start()
        try:
            for line in process.stdout:
                yield json.loads(line)
            code = process.wait()
            errors.seek(0)
            if stopped.is_set():
                yield {"error": f"over its limit of {limit:.0f} s"}
            elif code:
                yield {"error": (errors.read().strip() or f"exit {code}")[-1000:]}
        finally:
            clock.cancel()
            if process.poll() is None:
                stop()


def print_rows(name: str, toy: bool) -> None:
    """A JSON row a line; whatever else is printed goes to stderr."""
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for row in STAGES[name](toy):
        print(json.dumps(row), file=rows, flush=True)


def shown(row: dict) -> str:
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="JSON file that gets every row as it comes")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole command")
    parser.add_argument("--stage", choices=list(STAGES), action="append", help="only this stage (may be repeated)")
    parser.add_argument("--toy", action="store_true", help="toy shapes on the CPU")
    parser.add_argument("--only", choices=list(STAGES), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.only:
        print_rows(options.only, options.toy)
        return 0
    begun, rows, scale = time.monotonic(), [], options.minutes / 9
    for name in options.stage or STAGES:
        for row in in_its_own_process(name, options.toy, ENDS[name] * scale - (time.monotonic() - begun)):
            seconds = round(time.monotonic() - begun, 1)
            rows.append({"stage": name, "at": seconds, **row})
            print(shown(rows[-1]), flush=True)
            if options.out:
                runs.write_json(Path(options.out), {"toy": options.toy, "minutes": options.minutes, "rows": rows})
    failures = [row for row in rows if "error" in row]
    print(f"{len(rows)} rows, {len(failures)} of them failures, {time.monotonic() - begun:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
