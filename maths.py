"""Whether a mathematical answer equals the gold one, decided by math-verify in worker processes that can be killed.

A model's answer is hostile: `9^{9^{9^9}}` computes for ever, deep nesting overflows the stack, and the library hands
text to SymPy's parser. So it runs in a process of its own with limits on time and memory, no keys in its environment,
and a one-word protocol: an answer and a gold one a line in, "right" or "wrong" out. Whatever else happens to a worker,
it is killed and replaced, and the other answers do not notice.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from threading import Lock

import safety
from runs import UserError
from safety import Unscored

COMMAND = [sys.executable, str(Path(__file__))]
ENVIRONMENT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH")  # all that a worker sees: no keys
START_SECONDS = 120  # to import SymPy on a busy machine
MEMORY_BYTES = 4 << 30
ANSWER_CHARS = 2000  # a longer answer is wrong; two of this length fit into a pipe, so writing them never blocks
VERDICTS = {b"right\n": True, b"wrong\n": False, b"gold\n": Unscored("maths_gold"), b"error\n": Unscored("maths_error")}


class Worker:
    """One process, started at its first question and again after it was killed."""

    process = None

    def ask(self, answer: str, gold: str, seconds: float) -> bool | Unscored:
        """A crash is tried again: its memory may have been full of other answers."""
        verdict = self.attempt(answer, gold, seconds)
        return self.attempt(answer, gold, seconds) if verdict == Unscored("maths_crash") else verdict

    def attempt(self, answer: str, gold: str, seconds: float) -> bool | Unscored:
        if self.process is None and self.start() != b"ready\n":
            self.kill()
            return Unscored("maths_no_worker")
        with contextlib.suppress(BrokenPipeError):  # it has died, and the reply says so
            self.process.stdin.write(json.dumps([answer, gold, seconds]).encode() + b"\n")
        reply = self.reply(seconds)
        if reply not in VERDICTS:
            self.kill()
        return VERDICTS.get(reply, Unscored("maths_timeout" if reply is None else "maths_crash"))

    def start(self) -> bytes | None:
        kept = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "bufsize": 0}
        self.process = subprocess.Popen(COMMAND, **pipes, env=kept, start_new_session=True)
        return self.reply(START_SECONDS)

    def reply(self, seconds: float) -> bytes | None:
        """One word and a line break; b"" where the process has died, None where the time ran out."""
        return self.process.stdout.read(32) if wait([self.process.stdout], seconds) else None

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()  # closes the pipes
            self.process = None


_workers, _lock = (Worker(), Worker()), Lock()  # kept between calls; one call at a time


@atexit.register
def close() -> None:
    """Kill every worker; the next question starts a new one."""
    for worker in _workers:
        worker.kill()


def grade(pairs: list[tuple[str | None, str]], seconds: float = 5.0) -> list[bool | Unscored]:
    """Whether each (answer text, gold answer) agree; Unscored where the grader failed, never a guess.

    Of the whole text after the thinking counts what it states (`safety.final_answer`); one that states nothing is
    wrong. `seconds` limits each comparison. Raises UserError where math-verify is not installed.
    """
    stated = [safety.final_answer(text or "") for text, _ in pairs]
    verdicts: list = [said == gold.strip() for said, (_, gold) in zip(stated, pairs, strict=True)]
    unclear = [i for i, said in enumerate(stated) if said and not verdicts[i] and len(said) <= ANSWER_CHARS]
    if unclear and importlib.util.find_spec("math_verify") is None:
        raise UserError("grading maths needs math-verify: pip install -r requirements-extra.txt")

    rest = iter(unclear)  # each worker takes the next one as soon as it is free

    def work(worker: Worker) -> None:
        for i in rest:
            verdicts[i] = worker.ask(stated[i], pairs[i][1][:ANSWER_CHARS], seconds)

    with _lock, ThreadPoolExecutor(len(_workers)) as threads:
        list(threads.map(work, _workers))
    return verdicts


# ------------------------------------------------------------------------------------------------- inside a worker
def normal(char: str) -> str:
    return unicodedata.normalize("NFKC", char)


REWRITES = {  # what math-verify does not read -> what it reads
    "[²³]": lambda m: "^" + normal(m[0]),
    "[¼-¾⅐-⅞]": lambda m: "\\frac{{{}}}{{{}}}".format(*normal(m[0]).split("⁄")),
    "[！-～]": lambda m: normal(m[0]),  # full-width
    r"(?![0-9])\d": lambda m: str(int(m[0])),  # Arabic, Devanagari, ...
    r"(?:√|\\?\bsqrt)\s*(?:\(((?:[^()]|\([^()]*\))*)\)|(\d+|[a-z]\b))": lambda m: f"\\sqrt{{{m[1] or m[2]}}}",
    r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})(?![\w.])": r"\1\\cdot10^{\2}",  # 1e3
    "–": "-",
    r"[€£¥]|\b(?:dollars?|euros?)\b": "",
    r"(?<!\d)\d{1,3}(?:(?:\\[,;: ]|~| )\d{3})+(?!\d)": lambda m: re.sub(r"\D", "", m[0]),  # 10\,000
    "[~≈]": " ",
    "∞": r"\\infty ",
    r"\\varnothing(?![a-z])|∅": r"\\emptyset",
    r"°|\\degree(?![a-z])": r"^\\circ",
    r"\\(?:text|mathrm|mbox)\{\s*(\d+)\s*\}": r"\1",  # 52_{\text{8}}
    r"\((\d+)\)_": r"\1_",  # (52)_8
    # {x | x > 2}, over the real numbers
    r"\A\s*(?:\\left)?\\\{\s*[a-z]\s*(?:\\in\s*\\mathbb\s*\{?R\}?)?\s*(?:\\,)?\s*(?:\\middle\||\\mid|\||:)(?:\\,)?"
    r"(.*?)(?:\\right)?\\\}\s*\Z": r"\1",
}
BASE = re.compile(r"(?<=\d)_\{?\s*(\d+)")
OR = re.compile(r"\\text\s*\{\s*or\s*\}|\\lor(?![a-z])|\bor\b")


def rewritten(text: str) -> str:
    for pattern, replacement in REWRITES.items():
        text = re.sub(pattern, replacement, text)
    return text


def read(text: str) -> list:
    """What a text may mean to math-verify: expressions and strings; [] for nothing."""
    from math_verify import parse
    from sympy import Union
    from sympy.logic.boolalg import Boolean

    found = parse(f"\\boxed{{{text}}}", parsing_timeout=None, raise_on_error=True)
    cases = [parse(f"\\boxed{{{case}}}", parsing_timeout=None)[:1] for case in OR.split(text)]
    if len(cases) > 1 and all(case and isinstance(case[0], Boolean) for case in cases):  # x < 1 or x > 3
        with contextlib.suppress(NotImplementedError):  # inequalities that SymPy cannot solve
            found.append(Union(*(case[0].as_set() for case in cases)))
    return found


def compare(answer: str, gold: str) -> str:
    """right, wrong; gold: math-verify cannot read the gold answer; error: it gave up. Its own clocks are off."""
    from math_verify import verify

    try:
        texts = [rewritten(text) for text in (gold, answer)]
        wanted, given = map(read, texts)
        bases = [set(BASE.findall(text)) for text in texts]  # math-verify reads 52_8 as 52
        if not wanted:
            return "gold"
        same = verify(wanted, given, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)
        return "right" if same and (not all(bases) or bases[0] == bases[1]) else "wrong"
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
