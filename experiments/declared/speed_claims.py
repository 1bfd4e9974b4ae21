"""The timings and counts behind the paper's claims about speed and Gflops. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from experiments.declared.families import family_of, size_of
from experiments.declared.systems import SYSTEMS, TORCHPROFILE, latent, system
from experiments.declared.timings import MODES, figure_3, in_mode
from experiments.engine.jobs.job import Job
from experiments.engine.reporting.efficiency.claims import Claim
from experiments.engine.reporting.efficiency.predictions import CLAIMS, Declared
from experiments.engine.specs.spec import FACTOR, Backbone, Cost, Timing

# Images per batch at 256 pixels, and at more.
BATCHES = {"cpu": (4, 1), "cuda": (64, 16)}

# The paper compares with a DiS-XL that its authors never described.
NOT_DESCRIBED = {"dis_xl"}

# The counted systems of claims: those of all tables, and those of the second version's alone.
IN_FLOWDCN = (Cost(Backbone("flowdcn_s_2", dict(mixer="conv")), 32, 4, 1000),)
COUNTED = (
    *SYSTEMS,
    system("DiT-S/2", 1024, latent("dit_s_2", 128), TORCHPROFILE),
    system("DiCo-S", 1024, latent("dico_s", 128), TORCHPROFILE),
    system("SiT-S/2", 256, latent("sit_s_2", 32), TORCHPROFILE),
    system("FlowDCN-S/2", 256, latent("flowdcn_s_2", 32), TORCHPROFILE),
    system("DiCo's Conv Module", 256, IN_FLOWDCN, TORCHPROFILE),
)


@dataclass(frozen=True)
class SmallNetworks:
    """Size S of the two families of a claim, at the claim's resolution on a CPU."""

    # Names of the families.
    families: tuple[str, str]
    # The two networks timed in turn.
    pair: Timing
    # Each network timed alone, as Figure 3 has it.
    alone: tuple[Timing, Timing]


def claim_stages(claim: Claim, device: str) -> list[Timing]:
    """Return the two networks of a claim, timed in turn in every mode; none if one is unknown."""
    subject, size = _network(claim["subject"])
    baseline, _ = _network(claim["baseline"])
    if {subject, baseline} & NOT_DESCRIBED:
        return []
    return _in_turn(subject, baseline, size, device)


def _in_turn(subject: str, baseline: str, size: int, device: str) -> list[Timing]:
    at_256_pixels, larger = BATCHES[device]
    batch = at_256_pixels if size == 32 else larger
    stage = Timing(Backbone(subject), size, 4, 1000, batch, device, baseline=Backbone(baseline))
    return [in_mode(stage, mode) for mode in MODES[device]]


def predicted(claims: Iterable[Claim]) -> list[Declared]:
    """Return what is predicted of the networks of all claims: their forward passes, each once."""
    declared: dict[str, Declared] = {}
    for claim in claims:
        if claim["metric"] != "throughput":
            continue
        for stage in claim_stages(claim, "cuda"):
            assert stage.baseline, stage
            alone = replace(stage, baseline=None)
            for name, timed in (
                (claim["subject"], alone),
                (claim["baseline"], replace(alone, backbone=stage.baseline)),
            ):
                row = declared.setdefault(name, Declared(CLAIMS, name, "forward", {}))
                row.stages[stage.precision] = timed
    return list(declared.values())


def _network(name: str) -> tuple[str, int]:
    """Return a network and the side of its latent: DiT-XL/2@256 gives dit_xl_2 and 32."""
    label, _, resolution = name.partition("@")
    return label.lower().replace("-", "_").replace("/", "_"), int(resolution) // FACTOR


def jobs(claims: Iterable[Claim], device: str) -> tuple[Job, ...]:
    """Return one job per pair of networks. Large ones take minutes on a CPU and are left out."""
    pairs: dict[str, Job] = {}
    for claim in claims:
        if claim["metric"] != "throughput":
            continue
        stages = claim_stages(claim, device)
        if stages and (device == "cuda" or not _is_large(stages[0].backbone)):
            label = f"{claim['subject']} and {claim['baseline']}"
            pairs.setdefault(str(stages), Job(label, tuple(stages)))
    return tuple(pairs.values())


def _is_large(backbone: Backbone) -> bool:
    return size_of(backbone.name) in ("xl", "h")


def small_networks(claim: Claim) -> SmallNetworks | None:
    """Return the small networks of a claim's families, or None if Figure 3 has not both."""
    subject, baseline = (claim[side].partition("-")[0] for side in ("subject", "baseline"))
    size = int(claim["subject"].rpartition("@")[2]) // FACTOR
    stages = [stage for stage in figure_3("cpu") if stage.size == size]
    by_family = {family_of(stage.backbone.name): stage for stage in stages}
    if not {subject.lower(), baseline.lower()} <= set(by_family):
        return None
    first, second = by_family[subject.lower()], by_family[baseline.lower()]
    (pair,) = _in_turn(first.backbone.name, second.backbone.name, size, "cpu")
    return SmallNetworks((subject, baseline), pair, (first, second))
