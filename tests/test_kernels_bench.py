"""bench/kernels.py runs here on toy shapes, so that it cannot rot."""

import csv
import subprocess
import sys

import pytest
import torch

from bench import kernels as bench


def run(monkeypatch, tmp_path, *ops):
    out = tmp_path / "table.csv"
    arguments = [part for op in ops for part in ("--op", op)]
    monkeypatch.setattr(sys, "argv", ["bench.kernels", *arguments, "--out", str(out)])
    bench.main()
    origin, *table = out.read_text().splitlines()
    assert origin.startswith("# ") and torch.__version__ in origin
    return list(csv.DictReader(table))


@pytest.mark.parametrize("ops", [["attention", "decode"], pytest.param([], marks=pytest.mark.slow)])
def test_the_table_has_a_figure_or_a_reason_for_everyone(monkeypatch, tmp_path, ops):
    rows = run(monkeypatch, tmp_path, *ops)
    providers = {"ours", "torch", "torch.compile", "torch native", "Liger", "TRL"}
    for case in {(row["op"], row["shape"], row["pass"]) for row in rows}:
        assert {r["provider"] for r in rows if (r["op"], r["shape"], r["pass"]) == case} == providers
    for row in rows:
        assert bool(row["note"]) != bool(row["ms"]), row
        assert "failed" not in row["note"], row
        if row["ms"]:
            assert float(row["ms_20"]) <= float(row["ms"]) <= float(row["ms_80"]) and float(row["error"]) < 1e-4
    assert all(row["ms"] for row in rows if row["provider"] in ("ours", "torch"))


def test_a_rival_that_fails_leaves_its_reason_and_ours_is_an_error():
    def broken(x):
        raise RuntimeError("no such thing\nand more")

    case = bench.Case("op", "1", "forward", "GB/s", 1.0, [torch.ones(1)], {"TRL": broken, "ours": broken}, torch.exp)
    assert bench.measure(case, "TRL", "cpu", 1)["note"] == "failed: RuntimeError: no such thing"
    with pytest.raises(RuntimeError):
        bench.measure(case, "ours", "cpu", 1)


def test_gradients_are_what_a_backward_pass_is_judged_by():
    x = torch.ones(3, requires_grad=True)
    case = bench.Case("op", "3", "backward", "GB/s", 1.0, [x], {"ours": lambda x: 2 * x.square()}, torch.square)
    assert bench.measure(case, "ours", "cpu", 1)["error"] == 1.0  # gradient 4 instead of 2


def test_it_starts_as_a_module():
    done = subprocess.run([sys.executable, "-m", "bench.kernels", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--op" in done.stdout
