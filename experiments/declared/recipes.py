"""How each paper trains and samples its network on ImageNet, with the source of each value.

Steps are optimiser steps. A guidance scale is that of null + scale (conditional - null), whatever
the paper's notation. If a paper and its code leave a value open, that of the common recipe stands
here, and the source says so.

Three things are left out everywhere: dropout inside networks; fp16, which bf16 replaces; and TF32,
under which several authors trained what is fp32 here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.engine.specs.rows import Method
from experiments.engine.specs.spec import (
    Backbone,
    Data,
    Diffusion,
    Recipe,
    Sampler,
    Tokenizer,
)

EPOCH = 1_281_167  # images
COMMON = Recipe(steps=400_000, batch=256)


def guided(scale: float, channels: int | None = 3, **sampler: Any) -> Sampler:
    """Return a sampler that guides some of the channels, or all of them for None."""
    return Sampler(scale=scale, channels=channels, **sampler)


# ---- DiT's method and those that follow it


def iddpm(steps: int, scale: float, source: str, **recipe: Any) -> Method:
    """Return DiT's method.

    It has linear betas, a learned variance and 250 ancestral steps. Three of four channels are
    guided.
    """
    return Method(Diffusion(), replace(COMMON, steps=steps, **recipe), guided(scale), source)


DIT = iddpm(7_000_000, 1.5, "DiT's paper and code")
DIT_512 = iddpm(3_000_000, 1.5, "DiT's paper and code")
DICO_XL = iddpm(3_750_000, 1.4, "DiCo's paper, Table 6, and code")
DICO_XL_512 = iddpm(
    3_000_000,
    1.4,
    "DiCo's paper, Tables 2 and 6; it gives no scale at 512, so that at 256 is taken",
)
DICO_H = iddpm(
    1_000_000,
    1.4,
    "DiCo's paper, Table 6, not in its code; it gives no scale, so DiCo-XL's is taken",
    batch=1024,
    lr=2e-4,
    betas=(0.99, 0.99),
    warmup=5000,
)
DIC_H = iddpm(
    400_000,
    1.5,
    "DiC's code, which does not flip images, as the protocol does; steps and scale of the guided "
    "row are not given, so the common steps and DiT's scale are taken",
)
UDIT = iddpm(
    400_000,
    1.5,
    "U-DiT's code, which does not flip images, as the protocol does, and drops its three labels "
    "independently, where one label is dropped here; steps and scale are not given, so the common "
    "steps and DiT's scale are taken",
)
DIG_XL = iddpm(
    1_200_000,
    1.5,
    "DiG's code; the steps are 240 epochs of its published version, by secondary sources",
)
DIFFUSSM = iddpm(
    2_578_125, 1.5, "DiffuSSM's paper: 660M images; it gives no scale, so DiT's is taken"
)
DIFFUSSM_512 = iddpm(
    1_179_688, 1.5, "DiffuSSM's paper: 302M images; it gives no scale, so DiT's is taken"
)
DIS = iddpm(
    400_000,
    1.5,
    "DiS's code; batch and steps of ImageNet are not given, so the code's default batch and the "
    "common steps are taken",
    batch=128,
    warmup=5 * EPOCH // 128,
    decay="cosine",
    lr_min=1e-6,
    grad_clip=1.0,
    drop_path=0.1,
)

# ---- Flows

_SDE = guided(1.5, name="sde")
SIT = Method(
    Diffusion("flow"),
    replace(COMMON, steps=7_000_000),
    _SDE,
    "SiT's paper and code: linear path, velocity, 250 steps of Euler-Maruyama; our steps take one "
    "evaluation, theirs two",
)
SIT_512 = replace(SIT, recipe=replace(COMMON, steps=3_000_000))

DIMSUM = Method(
    Diffusion("flow", path="gvp"),
    Recipe(steps=510 * EPOCH // 704, batch=704, grad_clip=1.0, label_dropout=0.15, drop_path=0.1),
    guided(1.4, None, name="dopri5"),
    "DiMSUM's paper and code: variance-preserving path, velocity, adaptive Dormand-Prince",
)

# ---- U-ViT and DiM
#
# Both predict noise alone, with Stable Diffusion's betas. Their steps are called 1 to 1000, so they
# are guided up to 1000.

_STABLE = Diffusion(betas="stable_diffusion", variance="fixed", first_step=1)
_UVIT = Recipe(
    steps=500_000,
    batch=1024,
    lr=2e-4,
    betas=(0.99, 0.99),
    weight_decay=0.03,
    warmup=5000,
    precision="bf16",
)


def dpm_solver(scale: float) -> Sampler:
    """Return 50 steps of DPM-Solver that guide every channel."""
    return guided(scale, None, name="dpm_solver", num_steps=50, interval=(0, 1001))


_SOLVER = (
    "; its singlestep solver of order 3 is replaced by the multistep solver of order 2, also at 50 "
    "evaluations"
)
UVIT_L = Method(
    _STABLE,
    replace(_UVIT, steps=300_000, label_dropout=0.15),
    dpm_solver(1.4),
    "U-ViT's code" + _SOLVER,
)
UVIT_H = Method(_STABLE, _UVIT, dpm_solver(1.4), "U-ViT's code" + _SOLVER)
UVIT_L_512 = Method(
    _STABLE, replace(_UVIT, label_dropout=0.15), dpm_solver(1.7), "U-ViT's code" + _SOLVER
)
UVIT_H_512 = Method(_STABLE, _UVIT, dpm_solver(1.7), "U-ViT's code" + _SOLVER)

_DIM = replace(_UVIT, steps=625_000, batch=768, eps=1e-15, grad_clip=1.0)
DIM = Method(
    _STABLE, _DIM, dpm_solver(1.4), "DiM's code and its released checkpoint's steps" + _SOLVER
)
DIM_512 = Method(
    _STABLE,
    replace(
        _DIM, steps=64_000, batch=240, lr=1e-4, weight_decay=0.0, warmup=2500, label_dropout=0.15
    ),
    dpm_solver(1.7),
    "DiM's code, which fine-tunes the averaged weights of its 256 model after 425K steps" + _SOLVER,
)
DIM_START = replace(DIM, recipe=replace(_DIM, steps=425_000))


# ---- Systems published beside DiCo
#
# LightningDiT's latents are VA-VAE's, which no protocol has.

DIMR = Method(
    replace(_STABLE, scales=(0.25, 1.0)),
    replace(_UVIT, steps=1_000_000),
    guided(1.4, None, name="dpm_solver_3s", num_steps=250, interval=(0, 1001)),
    "DiMR's code; neither scale nor power of its published scores is in it, so its default, which "
    "is constant, is taken",
)
LIGHTNINGDIT = Method(
    Diffusion("flow", times="logit_normal", direction=1.0),
    Recipe(steps=80_000, batch=1024, lr=2e-4, betas=(0.9, 0.95), precision="bf16"),
    guided(10.0, name="euler", num_steps=249, interval=(0.10, 1.0), shift=0.3),
    "LightningDiT's code, its setting of 64 epochs: 249 steps of Euler between 250 times",
)
FLOWDCN = Method(
    Diffusion("flow"),
    COMMON,
    guided(1.375, None, name="sde", form="half-linear", last_step="euler"),
    "FlowDCN's code: linear path, velocity, 250 steps of its SDE whose last is plain Euler",
)
TERDIT = Method(
    Diffusion(),
    Recipe(steps=1_750_000, batch=256, lr=5e-4, grad_clip=2.0, precision="bf16"),
    guided(1.5),
    "TerDiT's paper and the defaults of its parent's trainer, since its own was not released; the "
    "learning rate falls late in its training, which is left out",
)


def dydit(share: float) -> Method:
    """Return how DyDiT-S is fine-tuned from DiT-S to use a share of its gated work on average.

    The larger sizes have first steps in which the network without gates has a loss too.
    """
    return Method(
        Diffusion(used_share=share),
        replace(COMMON, steps=50_000),
        guided(1.5),
        "DyDiT's paper, by secondary sources, and its code",
    )


# ---- VAR, whose network predicts tokens

# What the tokens of 8x8 digits are: four scales, of which the last has half the pixels a side.
DIGITS_TOKENS = dict(sides=(1, 2, 3, 4), vocabulary=64, channels=8)
DIGITS_TOKENIZER = Tokenizer(
    Backbone(
        "vqvae_ch160",
        DIGITS_TOKENS | dict(image_channels=1, ch=32, ch_mult=(1, 2), res_blocks=1),
    )
)
VAR = Method(
    Diffusion(),
    Recipe(
        steps=333_800,
        batch=768,
        lr=3e-4,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        warmup=6676,
        decay="linear",
        lr_min=3e-5,
        ema=0.0,
        grad_clip=2.0,
        precision="bf16",
    ),
    Sampler("scales", num_steps=4, channels=None),
    "VAR's code for d16, without stochastic depth and without the steps at a constant rate after "
    "the warm-up; tokenizer and number of scales are those of this suite's digits",
    tokenizer=DIGITS_TOKENIZER,
)


# ---- ADM and LDM


def pixels(size: int) -> Data:
    """Return ImageNet in pixels, at ADM's crop and this size.

    The folder imagenet<size>_pixels holds images.npy and labels.npy.
    """
    return Data(f"imagenet{size}_pixels", size, 3, 1000, flip=True)


def adm(
    size: int, classifier_scale: float = 0.0, betas: str = "linear", low_res: int | None = None
) -> Method:
    """Return ADM's method.

    ADM has no null label: a classifier's gradient guides it, at the scale of its README. Estimates
    are clipped to pixels in [-1, 1].
    """
    source = "ADM's code defaults and README; steps and batch are the common ones"
    sampler = Sampler(clip=True, classifier_scale=classifier_scale)
    return Method(
        Diffusion(betas=betas, low_res=low_res),
        replace(COMMON, label_dropout=0.0),
        sampler,
        source,
        pixels(size),
    )


def adm_classifier(betas: str = "linear") -> Method:
    """Return how ADM trains its classifier.

    The classifier sees images as noisy as its base model does. Its last weights guide, not their
    average.
    """
    recipe = replace(
        COMMON,
        steps=300_000,
        lr=3e-4,
        weight_decay=0.05,
        decay="linear",
        ema=0.0,
        label_dropout=0.0,
    )

    return Method(
        Diffusion("classify", betas=betas),
        recipe,
        Sampler(),
        "ADM's README for 128 pixels; the protocol's crop replaces its random crops",
    )


ADM_64 = adm(64, 1.0, "cosine")
ADM_128 = adm(128, 0.5)
ADM_256 = adm(256, 1.0)
ADM_512 = adm(512, 4.0)
ADM_UP_256 = adm(256, low_res=64)
ADM_UP_512 = adm(512, low_res=128)
ADM_CLASSIFIER = adm_classifier()
ADM_CLASSIFIER_64 = adm_classifier("cosine")
LDM_4 = Method(
    Diffusion(betas="ldm_imagenet", variance="fixed"),
    replace(COMMON, steps=178_000, batch=1200),
    guided(1.25, None, name="ddim"),
    "steps and batch of LDM's paper; betas, eps, DDIM at eta 0, unclipped estimates of its code; "
    "the scale by which DiT's paper names the row. Not LDM's are the data (the common latents; "
    "LDM has 64x64x3 of its own VQ autoencoder), label dropout and the rest of the recipe (the "
    "common ones), and the 250 times (they include both ends; LDM's are 1, 5, ..., 997 and end at "
    "the noise of the first step)",
)
