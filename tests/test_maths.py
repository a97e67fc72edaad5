"""The maths grader: equal answers, hostile answers, and worker processes that hang, die, lie or flood."""

import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import maths
from runs import UserError
from safety import Unscored


@pytest.fixture(autouse=True)
def no_worker_is_left():
    yield
    workers = [worker.process for worker in maths._workers if worker.process]
    maths.close()
    assert all(process.poll() is not None for process in workers)


def fake(monkeypatch, body: str) -> None:
    """Workers that say they are ready and then run `body` for each line of questions."""
    maths.close()
    loop = "import sys, time\nprint('ready', flush=True)\nfor line in sys.stdin:\n    "
    monkeypatch.setattr(maths, "COMMAND", [sys.executable, "-c", loop + body])


STATED = {  # whole answers to which 34 is the gold one
    True: [
        "so \\boxed{34}", "\\boxed{33} no, \\boxed{34}", "Answer: 33, so \\boxed{34}", "$\\boxed 34$", "$\\boxed {34}$",
        "$\\fbox{34}$", "Answer: 34", "Final Answer: 34", "**Final Answer:** $34$", "**Final Answer**: 34.",
        "The final answer is 34.", "So the final answer is $34$. I hope it is correct.", "The answer is 34.",
        "### Answer: 34", "Answer:\n34", "**Answer:**\n\n\\[\n34\n\\]", "Answer：34", "Answer：３４",
        "Answer: \\(34\\)", "Answer: 33\nAnswer: 34", "✅ Final Answer: **34**", "# Final Answer\n\n**34**",
        "So answer is \\(34\\).", "Hence answer is $34$", "Thus the answer is: 34", "so the answer is:\n\\[\n34\n\\]",
        "The answer is \\[34\\]", "The correct answer is 34.", "**The answer is** 34", "#### 34", "#### $34\n",
    ],
    False: [
        "\\boxed{34} no, \\boxed{33}", "\\boxed{33} or \\boxed{34} or \\boxed{35}", "Answer: 34\nAnswer: 33", "34",
        "answer is 34", "The answer isn't 34", "The wrong answer is 34", "#### Step 34", "answer is $33$, not $34$",
        "Answer: 33 or 34", "The final answer is 34, but wait, it is 33", "The answer is not 34.", "it is 34",
        "\\boxed{34", "\\boxed{}", "\\boxed{\\frac{34}{}}", "\\boxed{)}", "",
        None,  # the thinking never ended
    ],
}  # fmt: skip


def rows_of(line: str) -> list[tuple[str, str, bool]]:
    """(answer, gold, whether it is right) of a line of golds.txt: gold == right ; right != wrong ; wrong."""
    gold, _, rest = line.partition(" == ")
    right, wrong = (texts.split(" ; ") for texts in rest.split(" != "))
    return [(f"\\boxed{{{text}}}", gold, text in right) for text in right + wrong]


def test_answers_are_compared_as_mathematics():
    """No wrong acceptance, no wrong refusal."""
    lines = Path(__file__).with_name("golds.txt").read_text(encoding="utf-8").splitlines()[1:]
    rows = [row for line in lines for row in rows_of(line)]
    rows += [(text, "34", want) for want, texts in STATED.items() for text in texts]
    verdicts = maths.grade([(text, gold) for text, gold, _ in rows], seconds=60)
    wrong = [(row, verdict) for row, verdict in zip(rows, verdicts, strict=True) if verdict is not row[2]]
    assert wrong == [] and len(lines) >= 70 and len(rows) >= 360


HOSTILE = {
    "tower": "9^{9^{9^9}}",
    "braces": "{" * 900 + "1" + "}" * 900,
    "fractions": "\\frac{1}{" * 180 + "1" + "}" * 180,
    "many braces": "{" * 20_000 + "1" + "}" * 20_000,
    "10 MB": "1+" * 5_000_000 + "1",
    "rewrites": "√(" * 900,
    "blanks": "\\left" + " " * 1900,
    "digits": "1 000" * 390,
    "cases": "x<1 or " * 250 + "x>9",
    "set-builder": "\\{x|" * 390,
}


def test_a_hostile_answer_is_never_scored_and_stops_nobody_else():
    pairs = [pair for text in HOSTILE.values() for pair in ((f"\\boxed{{{text}}}", "7"), ("\\boxed{7.0}", "7"))]
    maths.grade(pairs[1:2])  # start a worker, so that the limit below is on answers alone
    begun = time.monotonic()
    verdicts = maths.grade(pairs, seconds=1.0)
    assert time.monotonic() - begun < 60
    assert verdicts[1::2] == [True] * len(HOSTILE)
    assert all(verdict is False or isinstance(verdict, Unscored) for verdict in verdicts[::2])
    assert Unscored("maths_timeout") in verdicts


def test_no_answer_runs_as_code(tmp_path):
    mark = tmp_path / "owned"
    for code in (f"__import__('os').system('touch {mark}')", f"open('{mark}','w')", f"\\text{{open('{mark}','w')}}"):
        assert maths.grade([(f"\\boxed{{{code}}}", "42"), (f"Answer: {code}", "42")]) in ([False, False],)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("time.sleep(60)", "maths_timeout"),
        ("sys.exit(3)", "maths_crash"),
        ("sys.stdout.write('x' * 10**7); sys.stdout.flush()", "maths_crash"),
        ("print('right wrong', flush=True)", "maths_crash"),
        ("print('error', flush=True)", "maths_error"),
        ("print('gold', flush=True)", "maths_gold"),
    ],
)
def test_a_worker_that_misbehaves_gives_no_score(monkeypatch, body, reason):
    fake(monkeypatch, body)
    assert maths.grade([("\\boxed{1}", "2"), ("\\boxed{2}", "2")], seconds=0.5) == [Unscored(reason), True]


def test_one_worker_dies_and_the_others_do_not_notice(monkeypatch):
    ends = "sys.exit() if 'bad' in line else time.sleep(60) if 'slow' in line else print('right', flush=True)"
    fake(monkeypatch, ends)
    answers = ["a", "bad", "b", "slow", "c", "bad", "d"]
    verdicts = maths.grade([(f"\\boxed{{{answer}}}", "x") for answer in answers], seconds=0.5)
    assert [v is True for v in verdicts] == [answer in "abcd" for answer in answers]


def test_no_key_reaches_a_worker(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    fake(monkeypatch, "import os; print('wrong' if any('KEY' in name for name in os.environ) else 'right', flush=True)")
    assert maths.grade([("\\boxed{1}", "2")]) == [True]


def test_workers_are_kept_between_calls_and_replaced_after_a_kill(monkeypatch):
    fake(monkeypatch, "time.sleep(60) if 'slow' in line else print('right', flush=True)")
    monkeypatch.setattr(maths, "_workers", maths._workers[:1])  # one for all

    def grade(answer):
        verdict = maths.grade([(f"\\boxed{{{answer}}}", "x")], seconds=0.5)
        return verdict, maths._workers[0].process

    (_, first), (_, second) = grade("a"), grade("b")
    assert first is second and first.poll() is None
    assert grade("slow") == ([Unscored("maths_timeout")], None) and first.poll() is not None
    verdict, third = grade("c")
    assert verdict == [True] and third.pid != first.pid


def test_a_hanging_worker_ends_itself_when_its_parent_is_gone():
    worker = subprocess.Popen(maths.COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdout.readline() == b"ready\n"
    worker.stdin.write(b'["9^{9^{9^9}}", "7", 0.1]\n')
    worker.stdin.close()  # as when the parent was killed
    assert worker.wait(timeout=20) == -signal.SIGALRM


def test_an_idle_worker_ends_with_its_parent():
    code = """import maths, os
print(maths.grade([("\\\\boxed{1.0}", "1")]))
print(*[worker.process.pid for worker in maths._workers if worker.process], flush=True)
os.kill(os.getpid(), 9)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("[True]"), done.stderr
    stat = Path(f"/proc/{done.stdout.split()[-1]}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":  # nobody waits for it
            return
        time.sleep(0.05)
    raise AssertionError("the worker is still there")


def test_without_math_verify_the_user_is_told_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else find(name))
    with pytest.raises(UserError, match="pip install -r requirements-extra.txt"):
        maths.grade([("\\boxed{1.0}", "1")])
    assert maths.grade([("\\boxed{1}", "1"), ("no", "1")]) == [True, False]  # what needs no algebra needs no package
