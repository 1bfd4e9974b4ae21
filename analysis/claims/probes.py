"""The rules for claims about where attention looks and which channels are active, from probe records. No torch.

At the claim's scale where its own checkpoints (or trainings on ImageNet) were probed, else on digits, over every training seed with a record.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from analysis.claims.finding import MEASURED, NOT_YET, REDUCED, Finding, direction
from analysis.probes.declared import Probe, declared
from analysis.query import ReferenceStore
from experiments.ablation import TABLE_3, TABLE_4
from experiments.declared.protocols import DIGITS, IMAGENET256
from experiments.engine.records.store import Record
from experiments.engine.reporting.efficiency.claims import Claim
from experiments.engine.reporting.lookup import REFERENCE_SEEDS
from experiments.engine.reporting.statistics import pooled, reach

NAMED = {
    "DiTTransformer2DModel": "DiT-XL/2-512",
    "PixArtTransformer2DModel": "PixArt-alpha-512",
    "FluxTransformer2DModel": "FLUX.1-dev",
}


def attention(claim: Claim, store: ReferenceStore) -> Finding:
    """Attention's mass within one token over that of uniform attention: of the named checkpoints, else of every softmax network probed on digits."""
    if named := _named(store):
        ratios = {name: _near(record) for name, record in named.items()}
        missing = sorted(set(NAMED.values()) - set(named))
        verdict = _verdict(
            [1 if ratio > 1 else -1 for ratio in ratios.values()], single=True
        ).removesuffix(", one seed") + f", {len(named)} of {len(NAMED)} checkpoints" * bool(missing)
        basis = (
            f"attention of {', '.join(named)}, mean over layers and heads: mass on near tokens over the uniform value"
            + f"; not probed: {', '.join(missing)}" * bool(missing)
        )
        return Finding(
            MEASURED,
            ", ".join(f"{ratio:.2f}" for ratio in ratios.values()),
            verdict,
            basis,
            "one checkpoint each, none",
            tuple(named.values()),
        )
    groups = {
        row.label: _of_seeds(
            [declared("locality", row, DIGITS, seed) for seed in REFERENCE_SEEDS],
            store,
            "attention",
        )
        for row in TABLE_3.rows
        if row.backbone
    }
    groups = {label: records for label, records in groups.items() if records}
    if not groups:
        return Finding(
            NOT_YET, "", "open", "needs the named checkpoints at 512; no probe record is committed"
        )
    judged = [
        _beside_zero([_near(record) - 1 for record in records], len(groups))
        for records in groups.values()
    ]
    distances = ", ".join(
        f"{statistics.fmean(record.values['attention']['distance'] for record in records):.2f}"
        for records in groups.values()
    )
    basis = f"attention of {', '.join(groups)} on digits, mean over layers and heads: mass on near tokens over the uniform value; mean distance {distances} of the uniform one. The named checkpoints were not probed"
    value, error = (
        ", ".join(f"{1 + mean:.2f}" for mean, _, _ in judged),
        _error([(1 + mean, width) for mean, width, _ in judged]),
    )
    return Finding(
        REDUCED,
        value,
        _verdict([sign for _, _, sign in judged], single=None in (width for _, width, _ in judged)),
        basis,
        error,
        tuple(record for records in groups.values() for record in records),
    )


def channels(claim: Claim, store: ReferenceStore) -> Finding:
    """Near-dead channels and effective rank of the last layer's mixer, with CCA less without: of our trainings on ImageNet, else on digits."""
    for protocol, evidence in ((IMAGENET256, MEASURED), (DIGITS, REDUCED)):
        pairs = [
            [
                store.reference.latest(declared("channels", TABLE_4.row(label), protocol, seed))
                for label in ("DiCo-S", "w/o CCA")
            ]
            for seed in REFERENCE_SEEDS
        ]
        if pairs := [pair for pair in pairs if None not in pair]:
            break
    else:
        return Finding(NOT_YET, "", "open", "no probe record is committed")
    names = ("near_dead", "relative_rank")
    (dead, width, more_dead), (_, _, more_rank) = (
        _beside_zero([pair[0].values[name] - pair[1].values[name] for pair in pairs], 2)
        for name in names
    )
    shares, ranks = (
        [statistics.fmean(pair[side].values[name] for pair in pairs) for side in (0, 1)]
        for name in names
    )
    basis = f"DiCo-S and w/o CCA on {protocol.name}: share of near-dead channels {shares[0]:.2f} and {shares[1]:.2f}; effective rank over channels {ranks[0]:.2f} and {ranks[1]:.2f}"
    return Finding(
        evidence,
        f"{dead:+.2f} near-dead",
        _verdict([-more_dead, more_rank], single=width is None),
        basis,
        _error([(dead, width)]),
        tuple(record for pair in pairs for record in pair),
    )


def _named(store: ReferenceStore) -> dict[str, Record]:
    """The newest locality record of each checkpoint that the claim names: of diffusers' class, or of DiT's own file at 512."""
    found = {}
    for records in store.reference.by_id().values():
        spec, values = records[-1].spec, records[-1].values
        name = NAMED.get(spec.get("model", "")) if records[-1].kind == "diffuserslocality" else None
        if (
            records[-1].kind == "locality"
            and spec.get("weights")
            and (spec["train"]["backbone"]["name"], spec["train"]["data"]["size"])
            == ("dit_xl_2", 64)
        ):
            name = "DiT-XL/2-512"
        if name and "attention" in values:
            found[name] = records[-1]
    store.note(list(found.values()))
    return dict(sorted(found.items()))


def _of_seeds(probes: Sequence[Probe], store: ReferenceStore, kind: str) -> list[Record]:
    found = (store.reference.latest(probe) for probe in probes)
    return [record for record in found if record is not None and kind in record.values]


def _near(record: Record) -> float:
    return record.values["attention"]["near"] / record.values["attention"]["near_uniform"]


def _beside_zero(values: Sequence[float], comparisons: int) -> tuple[float, float | None, int]:
    """Mean, half of its 95 % interval over all comparisons (Student; None for a single value) and its sign, 0 within that."""
    mean, spread = (
        statistics.fmean(values),
        pooled("value", [[{"value": value} for value in values]]),
    )
    width = reach(spread, 2 * len(values), 2 * len(values), comparisons) if spread else None
    return mean, width, 0 if abs(mean) <= (width or 0.0) else 1 if mean > 0 else -1


def _error(found: Sequence[tuple[float, float | None]]) -> str:
    return (
        "one seed, none"
        if None in (width for _, width in found)
        else "95 %: "
        + ", ".join(f"{mean - width:.2f} to {mean + width:.2f}" for mean, width in found)
    )


def _verdict(signs: Sequence[int], single: bool) -> str:
    """Of parts that the claim says are positive; `single` where no spread over trainings is known."""
    if {1, -1} <= set(signs):
        words = "mixed"
    else:
        words = direction(signs).replace("reproduced", "same direction" if single else "reproduced")
    return words + ", one seed" * single
