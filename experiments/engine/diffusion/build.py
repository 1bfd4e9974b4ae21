"""From a declared diffusion to the object that the trainer and the samplers ask."""

import torch

from experiments.engine.diffusion.cascade import NoisyClassification, Upsampling
from experiments.engine.diffusion.flow import PATHS, Flow
from experiments.engine.diffusion.iddpm import BETAS, IDDPM
from experiments.engine.specs.spec import Diffusion

DiffusionProcess = IDDPM | Flow


def build_diffusion(spec: Diffusion) -> DiffusionProcess:
    """What has `draw_times` and `losses`; ValueError lists what is known."""
    _require("diffusion", spec.name, ("iddpm", "classify", "flow"))
    if spec.name == "flow":
        _require("path", spec.path, PATHS)
        return Flow(spec.path)
    _require("betas", spec.betas, BETAS)
    _require("variance", spec.variance, ("learned", "fixed"))
    timesteps = torch.arange(spec.first_step, spec.first_step + spec.num_steps)
    kind = NoisyClassification if spec.name == "classify" else Upsampling if spec.low_res else IDDPM
    made = kind(BETAS[spec.betas](spec.num_steps), timesteps, learned=spec.variance == "learned")
    if spec.low_res:
        made.low_res = spec.low_res
    return made


def _require(what: str, name: str, known: object) -> None:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")
