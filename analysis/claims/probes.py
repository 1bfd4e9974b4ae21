"""Verdicts on where attention looks and which channels are active, from probe records. No torch.

At the claim's scale if its own checkpoints, or trainings on ImageNet, were probed; otherwise on
digits, over every training seed with a record.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.claims.finding import (
    Evidence,
    Finding,
    judge_direction,
    open_finding,
    sign_of,
)
from analysis.probes.declared import Probe, declared
from analysis.query import ReferenceStore
from experiments.ablation import TABLE_3, TABLE_4
from experiments.declared.protocols import DIGITS, IMAGENET256
from experiments.engine.records.store import Record
from experiments.engine.reporting.efficiency.claims import Claim
from experiments.engine.reporting.lookup import REFERENCE_SEEDS
from experiments.engine.reporting.statistics import noise_bound, pool_spread
from experiments.engine.reporting.verdict import Judgement, Qualifier, Verdict

# By diffusers' class, the checkpoint that the claim names.
CHECKPOINTS = {
    "DiTTransformer2DModel": "DiT-XL/2-512",
    "PixArtTransformer2DModel": "PixArt-alpha-512",
    "FluxTransformer2DModel": "FLUX.1-dev",
}


@dataclass(frozen=True)
class SeedMean:
    """A mean over training seeds."""

    value: float
    # half of its 95 % interval over all comparisons (Student); None for a single seed
    width: float | None

    @property
    def sign(self) -> int:
        """1 or -1, and 0 if the interval holds zero."""
        return sign_of(self.value, self.width or 0.0)


def _seed_mean(values: Sequence[float], comparisons: int) -> SeedMean:
    spread = pool_spread("value", [[{"value": value} for value in values]])
    width = None
    if spread:
        width = noise_bound(spread, 2 * len(values), 2 * len(values), comparisons)
    return SeedMean(statistics.fmean(values), width)


def judge_attention(claim: Claim, store: ReferenceStore) -> Finding:
    """Attention's mass within one token over that of uniform attention.

    Of the named checkpoints, and otherwise of every softmax network probed on digits.
    """
    checkpoints = _checkpoint_records(store)
    if checkpoints:
        return _judge_checkpoints(checkpoints)
    probed = _digits_records(store)
    if not probed:
        return open_finding("needs the named checkpoints at 512; no probe record is committed")

    # how far above the uniform value the mass near a token is
    excesses = [
        _seed_mean([_near_ratio(record) - 1 for record in records], len(probed))
        for records in probed.values()
    ]
    distances = ", ".join(f"{_mean_distance(records):.2f}" for records in probed.values())
    ratios = [SeedMean(1 + excess.value, excess.width) for excess in excesses]
    has_single = any(excess.width is None for excess in excesses)
    return Finding(
        Evidence.REDUCED,
        ", ".join(f"{ratio.value:.2f}" for ratio in ratios),
        _judge_signs([excess.sign for excess in excesses], has_single),
        f"attention of {', '.join(probed)} on digits, mean over layers and heads: mass on near "
        f"tokens over the uniform value; mean distance {distances} of the uniform one. The named "
        "checkpoints were not probed",
        _describe_error(ratios),
        not has_single,
        tuple(record for records in probed.values() for record in records),
    )


def _judge_checkpoints(checkpoints: dict[str, Record]) -> Finding:
    ratios = {name: _near_ratio(record) for name, record in checkpoints.items()}
    missing = sorted(set(CHECKPOINTS.values()) - set(checkpoints))
    signs = [1 if ratio > 1 else -1 for ratio in ratios.values()]
    judgement = _judge_parts(signs, has_single=True)

    # A checkpoint that nobody probed qualifies the judgement.
    not_probed = ""
    if missing:
        judgement = judgement.qualified(f"{len(checkpoints)} of {len(CHECKPOINTS)} checkpoints")
        not_probed = f"; not probed: {', '.join(missing)}"

    return Finding(
        Evidence.MEASURED,
        ", ".join(f"{ratio:.2f}" for ratio in ratios.values()),
        judgement,
        f"attention of {', '.join(checkpoints)}, mean over layers and heads: mass on near tokens "
        f"over the uniform value{not_probed}",
        "one checkpoint each, none",
        records=tuple(checkpoints.values()),
    )


def _checkpoint_records(store: ReferenceStore) -> dict[str, Record]:
    """The newest locality record of each named checkpoint, of diffusers or of DiT's own file."""
    records = {}
    for group in store.reference.by_id().values():
        record = group[-1]
        name = _checkpoint_name(record)
        if name and "attention" in record.values:
            records[name] = record
    store.note(list(records.values()))
    return dict(sorted(records.items()))


def _checkpoint_name(record: Record) -> str | None:
    spec = record.spec
    if record.kind == "diffuserslocality":
        return CHECKPOINTS.get(spec.get("model", ""))
    if record.kind == "locality" and spec.get("weights"):
        network, size = spec["train"]["backbone"]["name"], spec["train"]["data"]["size"]
        if (network, size) == ("dit_xl_2", 64):
            return CHECKPOINTS["DiTTransformer2DModel"]
    return None


def _digits_records(store: ReferenceStore) -> dict[str, list[Record]]:
    """The attention of Table 3's networks on digits, by label."""
    groups = {}
    for row in TABLE_3.rows:
        if row.backbone:
            probes = [declared("locality", row, DIGITS, seed) for seed in REFERENCE_SEEDS]
            records = _of_seeds(probes, store, "attention")
            if records:
                groups[row.label] = records
    return groups


def _of_seeds(probes: Sequence[Probe], store: ReferenceStore, key: str) -> list[Record]:
    """The records of probes that measured a key."""
    records = (store.reference.latest(probe) for probe in probes)
    return [record for record in records if record is not None and key in record.values]


def _near_ratio(record: Record) -> float:
    attention = record.values["attention"]
    return attention["near"] / attention["near_uniform"]


def _mean_distance(records: Sequence[Record]) -> float:
    return statistics.fmean(record.values["attention"]["distance"] for record in records)


def judge_channels(claim: Claim, store: ReferenceStore) -> Finding:
    """Near-dead channels and effective rank of the last layer's mixer, with CCA and without.

    Of our trainings on ImageNet, and otherwise on digits.
    """
    for protocol, evidence in ((IMAGENET256, Evidence.MEASURED), (DIGITS, Evidence.REDUCED)):
        pairs = []
        for seed in REFERENCE_SEEDS:
            full, without = (
                store.reference.latest(declared("channels", TABLE_4.row(label), protocol, seed))
                for label in ("DiCo-S", "w/o CCA")
            )
            if full and without:
                pairs.append((full, without))
        if pairs:
            return _judge_channel_pairs(pairs, evidence, protocol.name)
    return open_finding("no probe record is committed")


def _judge_channel_pairs(
    pairs: Sequence[tuple[Record, Record]], evidence: Evidence, protocol: str
) -> Finding:
    """With CCA fewer channels are near dead, and the rank is higher, says the claim."""
    dead, rank = (
        _seed_mean([full.values[name] - without.values[name] for full, without in pairs], 2)
        for name in ("near_dead", "relative_rank")
    )

    # The printed shares are means over seeds, and the judgement is on their paired differences.
    full_dead, full_rank = _means_of([full for full, _ in pairs])
    without_dead, without_rank = _means_of([without for _, without in pairs])
    return Finding(
        evidence,
        f"{dead.value:+.2f} near-dead",
        _judge_signs([-dead.sign, rank.sign], dead.width is None),
        f"DiCo-S and w/o CCA on {protocol}: share of near-dead channels {full_dead:.2f} and "
        f"{without_dead:.2f}; effective rank over channels {full_rank:.2f} and {without_rank:.2f}",
        _describe_error([dead]),
        dead.width is not None,
        tuple(record for pair in pairs for record in pair),
    )


def _means_of(records: Sequence[Record]) -> tuple[float, float]:
    """The mean share of near-dead channels and the mean relative rank."""
    dead = statistics.fmean(record.values["near_dead"] for record in records)
    rank = statistics.fmean(record.values["relative_rank"] for record in records)
    return dead, rank


def _describe_error(means: Sequence[SeedMean]) -> str:
    if any(mean.width is None for mean in means):
        return "one seed, none"
    ranges = [
        f"{mean.value - (mean.width or 0):.2f} to {mean.value + (mean.width or 0):.2f}"
        for mean in means
    ]
    return f"95 %: {', '.join(ranges)}"


def _judge_signs(signs: Sequence[int], has_single: bool) -> Judgement:
    """The verdict on parts that the claim says are positive.

    Args:
        signs: of the parts.
        has_single: whether a part has one training seed, so that no spread is known.
    """
    judgement = _judge_parts(signs, has_single)
    return judgement.qualified(Qualifier.ONE_SEED) if has_single else judgement


def _judge_parts(signs: Sequence[int], has_single: bool) -> Judgement:
    if {1, -1} <= set(signs):
        return Judgement(Verdict.MIXED)
    judgement = judge_direction(signs)
    if judgement.verdict is Verdict.REPRODUCED and has_single:
        return Judgement(Verdict.SAME_DIRECTION)
    return judgement
