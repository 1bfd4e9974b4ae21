"""Load what a set of images is sampled with: the trained networks, and the decoder of latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import backbones
from experiments.engine.autoregressive.objective import refuse_autoregressive
from experiments.engine.autoregressive.scales import ScaleSystem
from experiments.engine.data.locate import folder_of, has_manifest, read_manifest, vae_source
from experiments.engine.diffusion.cascade import System
from experiments.engine.numerics.cuda_graphs import accelerate, require_gpu
from experiments.engine.runtime.context import RunContext
from experiments.engine.specs.latent_space import space_of
from experiments.engine.specs.spec import Checkpoint, Data, Evaluate, Train, is_latent
from experiments.engine.texts.tables import give_captions
from experiments.engine.training.averages import load_power_average
from experiments.engine.training.networks import build, load_ema
from experiments.engine.training.next_scale.tokens import load_tokenizer

ROUGH = 0.1  # error of a rebuilt profile from which records warn
PIXELS = {"name": "none: pixels"}  # the identity of the decoder that does nothing


class Decoder(NamedTuple):
    """What turns samples into images.

    decode: samples (n, C, h, w) -> images (n, 1 or 3, H, W) in [-1, 1].
    identity: what decides its bits, as records keep it.
    """

    decode: Callable[[Tensor], Tensor]
    identity: dict[str, Any]


class Networks(NamedTuple):
    """What samples: a network or a system.

    network: it, in eval mode.
    key: the key under which its weights lie in their file.
    warnings: what a record must say of these weights.
    """

    network: nn.Module
    key: str
    warnings: tuple[str, ...] = ()


def load_networks(spec: Evaluate, context: RunContext) -> Networks:
    """Load the networks of a spec in eval mode.

    They are the EMA network of the finished run, or all networks of a system, or the published
    network whose file the resources name. A spec with the default key takes a published file's
    weights from where such files usually keep them.
    """
    resources = context.resources
    warnings: list[str] = []
    if resources.graphs:
        require_gpu(context.device)
    if isinstance(spec.train, Checkpoint):
        refuse_autoregressive(spec.train.backbone.name)
        if spec.average is not None:
            raise ValueError(
                "a published checkpoint holds one average; only a training of this suite that "
                "declares power_snapshots is rebuilt under another length"
            )
        assert resources.checkpoint is not None, "a published checkpoint needs its file"
        model = build(spec.train.backbone, 0, context.device)
        give_captions(model, spec.train.data)
        key = None if spec.train.key == Checkpoint.key else spec.train.key
        taken = backbones.load_fitted(model, resources.checkpoint, key, warn=warnings.append)
        if taken.changes():
            warnings.append(f"the weights are of another size than the samples: {taken.changes()}")
        network = accelerate(model.eval(), resources.compile)
        return Networks(network, taken.key, tuple(warnings))

    base = _load_average(spec.train, spec.average, context, warnings)
    if spec.train.tokenizer:
        return _with_tokenizer(spec.train, base, context, warnings)
    base = accelerate(base, resources.compile)
    if spec.classifier is None and spec.upsampler is None:
        return Networks(base, "ema", tuple(warnings))
    classifier = _load_part(spec.classifier, context, warnings)
    upsampler = _load_part(spec.upsampler, context, warnings)
    system = System(base, classifier, upsampler).eval()
    return Networks(system, "ema", tuple(warnings))


def _with_tokenizer(
    training: Train, network: nn.Module, context: RunContext, warnings: list[str]
) -> Networks:
    """Join a network that predicts tokens with its tokenizer; their weights are digested as one."""
    if context.resources.compile:
        raise ValueError(
            "scales differ in size, and each would be compiled anew: leave out --compile"
        )
    trained = load_tokenizer(training, context.folder.parent, context.device)
    system = ScaleSystem(network, trained.network, identity=trained.identity).eval()
    return Networks(system, "ema", tuple(warnings))


def _load_average(
    training: Train, width: float | None, context: RunContext, warnings: list[str]
) -> nn.Module:
    """Load the averaged network of a training, rebuilt from stored averages if a width is given."""
    if width is None:
        return load_ema(training, context.folder, context.device, warnings.append)
    model = build(training.backbone, training.seed, context.device)
    rebuilt = load_power_average(model, training, context.folder, width, warnings.append)
    if rebuilt.error > ROUGH:
        warnings.append(
            f"the average of relative width {width:g} is rebuilt with {rebuilt.error:.0%} of error "
            f"in its profile from {training.recipe.power_snapshots} snapshots; store more"
        )
    return model.eval()


def _load_part(
    training: Train | None, context: RunContext, warnings: list[str]
) -> nn.Module | None:
    """Load another network of a system, whose run lies beside the base model's."""
    if training is None:
        return None
    folder = context.folder_of(training)
    return load_ema(training, folder, context.device, warnings.append)


def load_decoder(data: Data, device: torch.device) -> Decoder:
    """Load the decoder of a set: the VAE for latents, none for pixels.

    Raises:
        ValueError: the VAE is not the one of the latents, which the set declares and its manifest
            names if it is on this machine.
    """
    if not is_latent(data):
        return Decoder(lambda x: x, PIXELS)
    from experiments.engine.data.autoencoder import load_autoencoder, require_latents_of

    vae = load_autoencoder(vae_source(), device)
    folder = folder_of(data)
    encoder = read_manifest(folder, data)["vae"]["encoder"] if has_manifest(data) else data.vae
    if encoder not in ("sd-vae-ft", vae.encoder):
        raise ValueError(
            f"set {folder.name} holds latents of another VAE (encoder {encoder}) than $DICO_VAE "
            f"names ({Path(vae_source()).name}, encoder {vae.encoder})"
        )
    require_latents_of(data, vae, vae_source())
    vae.space = space_of(data)
    identity: dict[str, Any] = {"name": vae.name, "sha256": vae.weights, "dtype": "fp32"}
    identity |= vae.space.describe()
    if vae.warnings:
        identity["warnings"] = list(vae.warnings)
    return Decoder(vae.decode, identity)


def decoder_warnings(data: Data, decoder: dict[str, Any]) -> list[str]:
    """Return what was noted of a decoder's weights, and whether it may be another than a set's.

    The hash of the VAE, the set's declaration or a manifest of its latents can say so.

    Args:
        data: the set.
        decoder: the decoder's identity.
    """
    noted: list[str] = decoder.get("warnings", [])
    if not is_latent(data) or data.vae != "sd-vae-ft" or has_manifest(data):
        return noted
    from experiments.engine.data.autoencoder import PUBLISHED

    if decoder["name"] in PUBLISHED:
        return noted
    return [
        *noted,
        f"decoded with an unknown VAE (weights {decoder['sha256']}), which is not known to be "
        f"{' or '.join(PUBLISHED)}; no latents of {data.name} are here to compare it with",
    ]


decoder_of = load_decoder  # the name by which scripts outside this project call it
