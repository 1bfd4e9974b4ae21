"""Build the diffusion that a spec declares, for training and for sampling."""

from __future__ import annotations

from collections.abc import Collection

import torch

from experiments.engine.diffusion.cascade import NoisyClassification, Upsampling
from experiments.engine.diffusion.flow import DRAWS, PATHS, Flow
from experiments.engine.diffusion.iddpm import BETAS, IDDPM
from experiments.engine.diffusion.objectives import Gated, MultiScale
from experiments.engine.specs.spec import Diffusion

DiffusionProcess = IDDPM | Flow


def build_diffusion(spec: Diffusion) -> DiffusionProcess:
    """Build a diffusion; it has `draw_times` and `losses`.

    Raises:
        ValueError: a word of the spec is unknown; the message lists the known ones.
    """
    _require_known("diffusion", spec.name, ("iddpm", "classify", "flow"))
    if spec.name == "flow":
        _require_known("path", spec.path, PATHS)
        _require_known("times", spec.times, DRAWS)
        return Flow(spec.path, spec.times, spec.direction)

    _require_known("betas", spec.betas, BETAS)
    _require_known("variance", spec.variance, ("learned", "fixed"))
    betas = BETAS[spec.betas](spec.num_steps)
    timesteps = torch.arange(spec.first_step, spec.first_step + spec.num_steps)
    learned = spec.variance == "learned"

    # A classifier and an upsampler share the schedule and differ in their loss.
    if spec.name == "classify":
        return NoisyClassification(betas, timesteps, learned)
    if spec.low_res:
        return Upsampling(betas, timesteps, learned, low_res=spec.low_res)
    if spec.used_share is not None:
        return Gated(betas, timesteps, spec.used_share, spec.share_steps, spec.complete_steps)
    if spec.scales:
        return MultiScale(betas, timesteps, spec.scales)
    return IDDPM(betas, timesteps, learned)


def _require_known(field: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f"unknown {field} {name!r}; known: {', '.join(known)}")
