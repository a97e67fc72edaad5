"""bench/kernels.py runs here on toy shapes, so that it cannot rot."""

import csv
import sys

import pytest
import torch

from bench import kernels as bench


def run(monkeypatch, tmp_path, *words):
    out = tmp_path / "table.csv"
    if words:  # --toy takes the CPU where there is a GPU, too; the peers of the whole table compile and ask the same
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["bench.kernels", "--toy", *words, "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    origin, *table = out.read_text().splitlines()
    assert origin.startswith("# CPU;") and torch.__version__ in origin
    return list(csv.DictReader(table)), ended.value.code


@pytest.mark.parametrize(
    "words", [["--op", "attention", "--op", "decode"], pytest.param([], marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_the_table_has_a_figure_or_a_reason_for_everyone(monkeypatch, tmp_path, words):
    rows, code = run(monkeypatch, tmp_path, *words)
    assert code == 0
    for op, shape, passes in {(row["op"], row["shape"], row["pass"]) for row in rows}:
        named = [r["provider"] for r in rows if (r["op"], r["shape"], r["pass"]) == (op, shape, passes)]
        candidates = {name for name, c in bench.CANDIDATES.items() if (c.op, c.passes) == (op, passes)}
        assert sorted(named) == sorted({*bench.PROVIDERS, *candidates} - {"candidates"})
    for row in rows:
        assert bool(row["note"]) != bool(row["ms"]), row
        assert "failed" not in row["note"], row
        if row["ms"]:
            assert float(row["ms_20"]) <= float(row["ms"]) <= float(row["ms_80"]) and float(row["error"]) < 1e-4
    assert all(row["ms"] for row in rows if row["provider"] in ("ours", "torch", *bench.CANDIDATES))


def case(ours, truth=torch.exp, passes="forward", **others):
    x = torch.ones(3, requires_grad=passes != "forward")
    return bench.Case("op", "3", passes, "GB/s", 1.0, [x], {"ours": ours, **others}, truth)


def test_what_fails_becomes_a_row_and_the_rest_is_measured(monkeypatch, tmp_path):
    def broken(*arguments):
        raise RuntimeError("no such thing\nand more")

    calls = []
    truth = lambda x: calls.append(x) or x.exp()  # noqa: E731
    cases = {"a": broken, "b": lambda *_: [case(broken, truth, TRL=torch.exp, Liger=torch.exp)]}
    monkeypatch.setattr(bench, "CASES", cases)
    rows, code = run(monkeypatch, tmp_path, "--op", "a", "--op", "b", "--provider", "ours", "--provider", "TRL")
    measured = [(r["op"], r["provider"], bool(r["ms"])) for r in rows]
    assert measured == [("a", "ours", False), ("op", "ours", False), ("op", "TRL", True)]
    assert rows[0]["note"] == rows[1]["note"] == "failed: RuntimeError: no such thing" and code == 1
    assert len(calls) == 1  # not once a provider
    row = bench.measure(case(torch.exp, broken), "ours", "cpu", 1)
    assert row["ms"] and row["note"] == "no error is known: fp32 RuntimeError: no such thing" and row["error"] == ""


def test_gradients_are_what_a_backward_pass_is_judged_by():
    doubled = case(lambda x: 2 * x.square(), torch.square, "backward")
    assert bench.measure(doubled, "ours", "cpu", 1)["error"] == 1.0  # gradient 4 instead of 2


def test_a_candidate_is_in_force_while_it_is_measured_and_no_longer():
    for name, candidate in bench.CANDIDATES.items():
        before = [dict(v) if isinstance(v, dict) else v for v in (getattr(m, n) for m, n, _ in candidate.settings)]
        with candidate.applied():
            within = [getattr(m, n) for m, n, _ in candidate.settings]
            assert all(a != b for a, b in zip(within, before, strict=True)), name
        assert [getattr(m, n) for m, n, _ in candidate.settings] == before, name
