"""How many kernels the model starts: the counts are those of the snapshot, and one more kernel is noticed."""

import json

import pytest
import torch

import model
from bench import launches

SNAPSHOT = json.loads(launches.SNAPSHOT.read_text())


def layer(count, which, lora=False):
    return (count(2, lora)[which] - count(1, lora)[which]).total()


@pytest.mark.skipif(
    not torch.__version__.startswith(SNAPSHOT["torch"]), reason=f"counted with torch {SNAPSHOT['torch']}"
)
def test_the_counts_are_those_of_the_snapshot(tmp_path, capsys):
    """Renew it with  python -m bench.launches --json bench/results/launches.json"""
    launches.main(["--json", str(tmp_path / "counts.json")])
    assert json.loads((tmp_path / "counts.json").read_text()) == SNAPSHOT
    assert "rms_norm_forward_kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("count", "which", "more"), [(launches.decode, 0, 1), (launches.train, 0, 1), (launches.train, 1, 1)]
)
def test_one_more_kernel_in_a_layer_is_counted(monkeypatch, count, which, more):
    before, forward = layer(count, which), model.MLP.forward
    monkeypatch.setattr(model.MLP, "forward", lambda self, x_TH: 2 * forward(self, x_TH))
    assert layer(count, which) == before + more


def test_views_and_allocations_start_nothing_and_a_copy_does():
    with launches.counting() as counter:
        x = torch.empty(4, 6)
        x.T.flatten(0, 0)[1:].unsqueeze(0).view(5, 4), torch.empty_like(x), x.contiguous(), x.float()
        assert not counter.counts
        x.T.contiguous(), torch.nn.functional.pad(x, (0, 2)), x.masked_fill(x == 0, 1)
        assert counter.counts == {"clone": 1, "constant_pad_nd": 2, "eq": 1, "masked_fill": 2}
        counter.counts.clear()
        torch.addmm(torch.empty(4), x, x.T), torch.addmm(y := torch.empty(4, 4), x, x.T), y.addmm_(x, x.T)
    assert counter.counts == {"addmm": 1 + 2 + 1}


def test_reading_a_value_back_to_the_host_is_an_error():
    with launches.counting(), pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(3).sum().item()
