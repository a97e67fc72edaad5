"""What the kernels compile to for GPUs that are not here: no spill, memory that fits, tensor cores, wide loads."""

import json

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed on this platform")
from bench import compiled  # noqa: E402
from bench.kernels import CANDIDATES  # noqa: E402

SNAPSHOT = json.loads(compiled.SNAPSHOT.read_text())
same_triton = pytest.mark.skipif(
    triton.__version__ != SNAPSHOT["triton"], reason=f"the snapshot is for triton {SNAPSHOT['triton']}"
)


@same_triton
def test_heaviest_kernels_on_hopper_and_ampere():
    """The ones closest to the limits; the slow test compiles the rest."""
    for arch, names in (
        ("sm_90", ("attention_forward_kernel/bf16/d128", "attention_dkdv_kernel/bf16/d128", "score_kernel/bf16/even")),
        (
            "sm_89",
            ("attention_forward_kernel/bf16/d128", "decode_kernel/bf16/d128", "rms_norm_backward_kernel/bf16/w4096"),
        ),
    ):
        chosen = [launch for launch in compiled.launches(arch, dtypes=(torch.bfloat16,)) if launch.name in names]
        assert len(chosen) == len(names)
        table, faults = compiled.measure(arch, chosen)
        assert not faults
        assert table == {name: SNAPSHOT["kernels"][arch][name] for name in table}


def test_the_snapshot_knows_every_launch():
    """Cheap: which configurations exist, without compiling them."""
    for arch in compiled.ARCHITECTURES:
        assert {launch.name for launch in compiled.launches(arch)} == set(SNAPSHOT["kernels"][arch])
    candidates = {name.rpartition("/candidate/")[2] for name in SNAPSHOT["kernels"]["sm_90"] if "/candidate/" in name}
    assert candidates == set(CANDIDATES)


def test_the_snapshot_has_no_fault():
    for arch in compiled.ARCHITECTURES:
        for launch in compiled.launches(arch):
            assert not compiled.faults(launch, arch, SNAPSHOT["kernels"][arch][launch.name]), (arch, launch.name)


def test_faults_are_found():
    launch = next(item for item in compiled.launches("sm_89") if item.name == "decode_kernel/bf16/d64")
    good = SNAPSHOT["kernels"]["sm_89"][launch.name]
    assert compiled.faults(launch, "sm_89", good) == []
    for bad in ({"spill": 8}, {"shared": 101_377}, {"tensor_core": 0}, {"wide_loads": 0}, {"fp64": 1}):
        assert len(compiled.faults(launch, "sm_89", good | bad)) == 1, bad
    assert compiled.difference({"a": {"k": good}}, {"a": {"k": good | {"spill": 8}}})


@pytest.mark.slow
@same_triton
@pytest.mark.parametrize("arch", compiled.ARCHITECTURES)
def test_every_configuration(arch):
    table, faults = compiled.measure(arch, compiled.launches(arch))
    assert not faults
    assert not compiled.difference({arch: SNAPSHOT["kernels"][arch]}, {arch: table})
