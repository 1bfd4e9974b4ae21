"""What claims about attention and channels are found to be, from made-up probe records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from analysis.claims import probes as claims_probes
from analysis.probes.declared import DiffusersLocality, Probe, declared
from analysis.query import ReferenceStore
from experiments.ablation import TABLE_3, TABLE_4
from experiments.declared.protocols import DIGITS, IMAGENET256, IMAGENET512
from experiments.engine.records.store import Store
from experiments.engine.specs.spec import Backbone
from experiments.engine.specs.stages import Protocol
from tests.support.references import commit_records

PROVENANCE = {
    "device": "cpu",
    "torch": "2",
    "dirty": False,
    "precision_flags": {},
    "weights_sha256": "1",
}
FLUX = DiffusersLocality("FluxTransformer2DModel", "ab")
PIXART = DiffusersLocality("PixArtTransformer2DModel", "ab")


Probed = tuple[Probe | DiffusersLocality, dict[str, object]]


def sources(folder: Path, *probed: Probed) -> ReferenceStore:
    """Commit a record of every probe with its values."""
    store = Store(folder)
    for probe, values in probed:
        store.append(probe, "done", values, PROVENANCE)
    return commit_records(folder)


def looks(near: float, uniform: float = 0.25) -> dict[str, object]:
    return {"attention": {"near": near, "near_uniform": uniform, "distance": 0.9}}


def digits(label: str, seed: int) -> Probe:
    return declared("locality", TABLE_3.row(label), DIGITS, seed)


@pytest.mark.parametrize("iso, skip, verdict, error", [
    ((0.30, 0.31, 0.32), (), "reproduced", "95 %: 1.14 to 1.34"),
    ((0.30, 0.31, 0.32), (0.20, 0.21, 0.22), "mixed", None),
    ((0.24, 0.25, 0.27), (), "not resolved", None),
    ((0.30, 0.31, 0.32), (0.24, 0.25, 0.27), "same direction, 1 of 2 resolved", None),
    ((0.30,), (), "same direction, one seed", "one seed, none"),
    ((0.20,), (), "against the claim, one seed", "one seed, none"),
])  # fmt: skip
def test_attention_is_judged_over_networks_and_seeds(
    tmp_path: Path, iso: tuple[float, ...], skip: tuple[float, ...], verdict: str, error: str | None
):
    """Attention is local if its share nearby, over the uniform one, is above 1 beyond the seeds."""
    probed = []
    for label, values in (("DiT (iso.)", iso), ("DiT (U-shape)", skip)):
        for seed, near in enumerate(values):
            probed.append((digits(label, seed), looks(near)))
    finding = claims_probes.judge_attention({}, sources(tmp_path, *probed))

    # Networks on digits are not the claim's.
    assert finding.evidence.value == "measured at reduced scale"
    assert str(finding.judgement) == verdict
    assert len(finding.records) == len(iso) + len(skip)
    assert error in (None, finding.error)
    assert "The named checkpoints were not probed" in finding.basis


def test_the_named_checkpoints_are_what_is_judged_when_they_were_probed(tmp_path: Path):
    """Probes of the claim's checkpoints outrank those of networks on digits."""
    dit = replace(declared("locality", TABLE_3.baseline, IMAGENET512, 0), weights="ab")
    dit = replace(dit, train=replace(dit.train, backbone=Backbone("dit_xl_2", dict(input_size=64))))

    # All three checkpoints, beside a network on digits.
    committed = sources(
        tmp_path,
        (digits("DiT (iso.)", 0), looks(0.2)),
        (FLUX, looks(0.5)),
        (PIXART, looks(0.3)),
        (dit, looks(0.4)),
    )
    finding = claims_probes.judge_attention({}, committed)
    assert finding.evidence.value == "measured here"
    assert finding.value == "1.60, 2.00, 1.20"
    assert str(finding.judgement) == "same direction"
    assert len(finding.records) == 3

    # One of them alone.
    (tmp_path / "one").mkdir()
    finding = claims_probes.judge_attention({}, sources(tmp_path / "one", (FLUX, looks(0.2))))
    assert str(finding.judgement) == "against the claim, 1 of 3 checkpoints"
    assert finding.basis.endswith("not probed: DiT-XL/2-512, PixArt-alpha-512")


def test_nothing_probed_is_open(tmp_path: Path):
    (tmp_path / "reference").mkdir()
    for rule in (claims_probes.judge_attention, claims_probes.judge_channels):
        assert rule({}, ReferenceStore(tmp_path)).evidence.value == "not yet"
        assert str(rule({}, ReferenceStore(tmp_path)).judgement) == "open"


@pytest.mark.parametrize(
    "protocol, evidence", [(DIGITS, "measured at reduced scale"), (IMAGENET256, "measured here")]
)
def test_channels_are_judged_with_the_spread_over_seeds(
    tmp_path: Path, protocol: Protocol, evidence: str
):
    """The difference in near-dead channels has the error of its seeds."""
    # DiCo-S varies by a hundredth per seed, and without CCA nothing varies.
    probed = []
    for seed in range(3):
        with_cca = {"near_dead": 0.10 + 0.01 * seed, "relative_rank": 0.5}
        without = {"near_dead": 0.20, "relative_rank": 0.3}
        for label, values in (("DiCo-S", with_cca), ("w/o CCA", without)):
            probed.append((declared("channels", TABLE_4.row(label), protocol, seed), values))
    finding = claims_probes.judge_channels({}, sources(tmp_path, *probed))

    # The claim's scale is ImageNet.
    assert finding.evidence.value == evidence
    assert str(finding.judgement) == "reproduced"
    assert finding.value == "-0.09 near-dead"
    assert finding.error == "95 %: -0.13 to -0.05"
    assert len(finding.records) == 6
    assert protocol.name in finding.basis
