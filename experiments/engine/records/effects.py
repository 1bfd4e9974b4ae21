"""How far a score moves if a field of the manifest differs, with the source of each size.

Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effect:
    """The known effect of a field."""

    # Sizes as published, on ImageNet's FID unless another score is named; '' if none is known.
    size: str
    # Where the size was published or measured.
    source: str


UNKNOWN = Effect("", "")

# By the beginning of the field's name; the longest that fits counts.
EFFECTS = {
    "measure.num": Effect(
        "FID is biased by c / N: +2.75 at 10K against 50K where FID-50K is 9.3, +3.0 where it "
        "is 3.0; recall rises too",
        "baofff/U-ViT#14, facebookresearch/DiT#94",
    ),
    "measure.guidance.scale": Effect(
        "2.27 at 1.5 against 9.6 without, DiT-XL/2; a scale of 0.4 in U-ViT's formula is 1.4 here",
        "facebookresearch/DiT#8, baofff/U-ViT#14",
    ),
    "measure.guidance.channels": Effect(
        "three of four channels at scale 1 + x are about four at 1 + 0.75 x: FID 2.27 at 1.5, "
        "2.23 at 1.375",
        "facebookresearch/DiT PR#12",
    ),
    "measure.guidance.interval": Effect(
        "FID 1.45 against 1.35 at low FID",
        "LightningDiT#37, #88",
    ),
    "measure.guidance.classifier": Effect(
        "10.94 without, 4.59 with a classifier that guides (ADM at 256)",
        "arXiv:2105.05233",
    ),
    "measure.upsampling": Effect(
        "4.59 by one guided network, 3.94 by a smaller one and an upsampler (ADM at 256); 7.72 "
        "and 3.85 at 512",
        "openai/guided-diffusion README",
    ),
    "measure.sampler": Effect(
        "ODE 9.5 against SDE 8.3 (SiT-XL, unguided), 34.7 to 36.5 against 33.0 (B/2); eta 0 "
        "against 1: 3.31 against 3.54 (LDM)",
        "willisma/SiT#31, CompVis/latent-diffusion#262",
    ),
    "measure.sampler.name": Effect(
        "ODE 9.5 against SDE 8.3 (SiT-XL, unguided), 34.7 to 36.5 against 33.0 (B/2); on MS-COCO "
        "6.05 by 50 Euler steps against 5.30 by 250 of the SDE (MMDiT)",
        "willisma/SiT#31, arXiv:2410.06940 by secondary sources",
    ),
    "measure.nfe": Effect(
        "counted network evaluations, not steps: see the sampler",
        "willisma/SiT#31",
    ),
    "measure.labels.policy": Effect(
        "balanced labels lower FID-50K by about 0.1 (in simulation: 12 % of the bias, 25 to 35 "
        "% of the deviation); on MS-COCO several captions of an image raise FID against one, by an "
        "unpublished amount",
        "RAE README; a simulated mixture of 100 classes; baofff/U-ViT",
    ),
    "measure.captions": Effect(
        "other captions, another text encoder or another null caption: another task, no size is "
        "published",
        "baofff/U-ViT, sihyun-yu/REPA",
    ),
    "measure.selection": Effect(
        "U-ViT scores the best of 20 checkpoints by FID-10K, which lowers FID by an unpublished "
        "amount",
        "baofff/U-ViT",
    ),
    "measure.labels.order": Effect(
        "IS over blocks of 5000 collapses where a class follows itself (2.84 against 9.42); of "
        "whole sets nothing else changes",
        "a simulated file in ADM's evaluator",
    ),
    "measure.labels": Effect(
        "as the label policy: about 0.1 of FID-50K at most",
        "RAE README",
    ),
    "measure.seed": Effect(
        "a coefficient of variation of about 0.4 %: 0.01 at FID 2, 0.2 at FID 50",
        "arXiv:2606.20536",
    ),
    "measure.precision": Effect(
        "fp32 torch 2.21 against 2.27 in JAX (DiT); bf16 1.26 against 1.13 (RAE)",
        "facebookresearch/DiT README, RAE#50",
    ),
    "measure.flags": Effect(
        "as precision: hundredths of FID",
        "facebookresearch/DiT README",
    ),
    "measure.decoder": Effect(
        "ft-mse 2.30 against ft-ema 2.27, original 2.46; a wrong normalisation costs tens of FID",
        "DiT appendix, LightningDiT#34",
    ),
    "measure.decoder.scale": Effect(
        "of MS-COCO: 0.2301 (U-ViT) is the inverse deviation of its latents, 0.18215 (REPA) that "
        "of Stable Diffusion's; networks see other levels of noise, no size is published",
        "baofff/U-ViT, sihyun-yu/REPA",
    ),
    "measure.quantiser": Effect(
        "truncating 255 (x + 1) / 2 lowers the mean by 0.49 grey levels and changes 49 % of "
        "the pixels",
        "computed for every level",
    ),
    "measure.image": Effect(
        "resizing twice or JPEG changes FID by several units on some sets",
        "arXiv:2104.11222",
    ),
    "measure.extractor": Effect(
        "another Inception (torchvision's, JAX's) gives incomparable FIDs: 13.7 against 53.7; "
        "the digits' classifier trained under four instruction sets, fd_digits of 12.6 to 12.9 "
        "for one set of images",
        "pytorch/torcheval#192; measured by ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY",
    ),
    "measure.extractor.dinov2.resize": Effect(
        "PIL's rounded resizing (dgm-eval) and torch's (EDM2, here): 'almost the same results' by "
        "EDM2's authors, who give no size",
        "NVlabs/edm2, calculate_metrics.py",
    ),
    "measure.extractor.dinov2.positions": Effect(
        "DINOv2's own resampling (EDM2, here) against timm's, which antialiases and has no offset: "
        "other features, no size published",
        "facebookresearch/dinov2 and timm",
    ),
    "measure.reference": Effect(
        "another reference: 7.03 where the paper has 1.26; validation against training images, "
        "7.6; on MS-COCO, training images lower FID by about 0.1",
        "MCG-NJU/DDT#7, guided-diffusion#14, LAFITE's authors",
    ),
    "measure.reference.crop": Effect(
        "zero-shot scores on MS-COCO squash images to squares and store JPEG; no size is published",
        "Nota-NetsPresso/BK-SDM",
    ),
    "measure.neighbours": Effect(
        "ADM's half precision raises precision by 0.0005 to 0.0015 and recall by 0.001 to "
        "0.003; both depend on the two counts",
        "ADM README against ADM-evaluation-suite-pytorch",
    ),
    "measure.neighbours.density_ball": Effect(
        "density and coverage alone: density of a set against itself is 1 by open balls and "
        "1.33 by closed ones (k 3), which this suite used first",
        "arXiv:2002.09797 and its authors' code",
    ),
    "measure.versions": Effect(
        "below the sampling error, as far as known; FID at d = 2048 agrees to 1e-5 between "
        "root algorithms",
        "computed against scipy's sqrtm",
    ),
    "run.batch": Effect(
        "rounding: each image has its own seed here; where seeds follow processes and batches, "
        "1.34 on 16 GPUs against 1.39 on 4; 16.97 to 17.16 by the batch (BK-SDM on MS-COCO)",
        "tzco/Diffusion-wo-CFG#2, Nota-NetsPresso/BK-SDM",
    ),
    "model.key": Effect(
        "EMA against raw weights: 6.06 against 8.1",
        "MeanFlow#12",
    ),
    "model.seed": Effect(
        "another training: a coefficient of variation of 1 to 2 %, 0.03 at FID 2.05, 0.65 at 50; "
        "on MS-COCO 5.86 where 6.05 is published (MMDiT, by another group)",
        "arXiv:2606.20536, secondary sources",
    ),
    "model.recipe": Effect(
        "steps, batch or learning rate: 79.6 where 68.4 is published (DiT-S/2), 167.5 against "
        "153.6 (S/8)",
        "facebookresearch/DiT#122, #21",
    ),
    "model.data.flip": Effect(
        "said to be negligible",
        "REPA#19",
    ),
    "model": Effect(
        "another model: this is the difference under study",
        "",
    ),
}


def effect_of(field: str) -> Effect:
    """Return the known effect of a field of a manifest."""
    prefixes = [prefix for prefix in EFFECTS if field == prefix or field.startswith(f"{prefix}.")]
    return EFFECTS[max(prefixes, key=len)] if prefixes else UNKNOWN
