"""Whether a mathematical answer equals the gold one, decided by math-verify in worker processes that can be killed.

A model's answer is hostile: `9^{9^{9^9}}` computes for ever, deep nesting overflows the stack, and the library hands
text to SymPy's parser. So it runs here, in a process of its own with limits on time and memory, no keys in its
environment, and a one-word protocol: an answer and a gold one a line in, "right" or "wrong" out. Whatever else happens
to a worker, it is killed and replaced, and the other answers do not notice.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import runs
import safety
from safety import Unscored

COMMAND = [sys.executable, str(Path(__file__))]
ENVIRONMENT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH")  # all that a worker sees: no keys
START_SECONDS = 120  # to import SymPy on a busy machine
MEMORY_BYTES = 4 << 30
LINE_BYTES = 32  # of a worker's reply; a longer one is a flood


class Worker:
    """One process, started at its first question and again after it was killed."""

    def __init__(self):
        self.process = None

    def ask(self, answer: str, gold: str, seconds: float) -> bool | Unscored:
        if self.process is None and self.start() != b"ready\n":
            self.kill()
            return Unscored("maths_no_worker")
        question = json.dumps([answer, gold, seconds]).encode() + b"\n"
        reply = self.exchange(question, seconds)
        if reply in (b"right\n", b"wrong\n"):
            return reply == b"right\n"
        reason = {b"gold\n": "maths_gold", b"error\n": "maths_error", None: "maths_timeout"}.get(reply, "maths_crash")
        if reason in ("maths_timeout", "maths_crash"):
            self.kill()
        return Unscored(reason)

    def start(self) -> bytes | None:
        kept = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(COMMAND, **pipes, env=kept, start_new_session=True)
        return self.exchange(b"", START_SECONDS)

    def exchange(self, question: bytes, seconds: float) -> bytes | None:
        """The reply's line; None where the time ran out, b"" where the worker died."""
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), self.process.kill()))
        timer.start()
        try:
            self.process.stdin.write(question)
            self.process.stdin.flush()
            reply = self.process.stdout.readline(LINE_BYTES)
        except OSError:  # it died while it was being asked
            reply = b""
        timer.cancel()
        return None if late.is_set() else reply

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            with contextlib.suppress(OSError):  # a question that it never read
                self.process.stdin.close()
            self.process = None


class Pool:
    """Workers that are kept between calls; one that nobody has asked yet costs nothing."""

    def __init__(self, workers: int):
        self.workers = [Worker() for _ in range(workers)]
        self.idle: SimpleQueue = SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)

    def ask(self, answer: str, gold: str, seconds: float) -> bool | Unscored:
        worker = self.idle.get()
        try:
            verdict = worker.ask(answer, gold, seconds)
            if verdict == Unscored("maths_crash"):  # its memory may have been full of earlier answers
                verdict = worker.ask(answer, gold, seconds)
            return verdict
        finally:
            self.idle.put(worker)

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()


_pools: dict[int, Pool] = {}


def close() -> None:
    """Kill every worker; the next call starts new ones."""
    while _pools:
        _pools.popitem()[1].close()


atexit.register(close)


def grade(pairs: list[tuple[str | None, str]], seconds: float = 5.0, workers: int = 2) -> list[bool | Unscored]:
    """Whether each (answer text, gold answer) agree; Unscored where the grader failed, never a guess.

    The answer is the whole text after the thinking: its last \\boxed{...} or "Answer:" line counts, and one without
    either is wrong. `seconds` limits each comparison. Raises UserError where math-verify is not installed.
    """
    stated = [safety.final_answer(text or "") for text, _ in pairs]
    verdicts: list = [said == gold.strip() for said, (_, gold) in zip(stated, pairs, strict=True)]
    unclear = [i for i, said in enumerate(stated) if said and not verdicts[i]]
    if not unclear:
        return verdicts
    if importlib.util.find_spec("math_verify") is None:
        raise runs.UserError("grading maths needs math-verify: pip install -r requirements-extra.txt")
    pool = _pools.setdefault(workers, Pool(workers))
    with ThreadPoolExecutor(workers) as threads:
        asked = threads.map(lambda i: pool.ask(stated[i], pairs[i][1], seconds), unclear)
        for i, verdict in zip(unclear, asked, strict=True):
            verdicts[i] = verdict
    return verdicts


# ------------------------------------------------------------------------------------------------- inside a worker


def compare(answer: str, gold: str) -> str:
    """right, wrong; gold: math-verify cannot read the gold answer; error: it gave up. Its own clocks are off."""
    from math_verify import parse, verify

    try:
        wanted, given = (parse(f"\\boxed{{{t}}}", parsing_timeout=None, raise_on_error=True) for t in (gold, answer))
        if not wanted:
            return "gold"
        return "right" if verify(wanted, given, timeout_seconds=None, raise_on_error=True) else "wrong"
    except Exception:  # whatever SymPy raises on hostile text; the word says that there was no verdict
        return "error"


def serve() -> None:
    """Answer line by line. The alarm kills this process even where its parent is gone and it computes in C."""
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no reply
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    compare("1", "1")
    replies.write(b"ready\n")
    for line in sys.stdin.buffer:
        answer, gold, seconds = json.loads(line)
        signal.alarm(int(seconds) + 2)
        word = compare(answer, gold)
        signal.alarm(0)
        replies.write(word.encode() + b"\n")


if __name__ == "__main__":
    serve()
