"""How each paper trains and samples its network on ImageNet: what a row's own protocol runs, and where it was said.

Steps are optimiser steps. A guidance scale is that of null + scale (conditional - null), whatever the paper's notation.
Where a paper and its code leave something open, the common recipe's value stands here and the source says so. Left out
everywhere: dropout in the networks, fp16, for which bf16 stands, and TF32, under which several trained
what here is fp32.
"""

from __future__ import annotations

from dataclasses import replace

from experiments.engine.specs.rows import Method
from experiments.engine.specs.spec import Data, Diffusion, Recipe, Sampler

EPOCH = 1_281_167  # images
COMMON = Recipe(steps=400_000, batch=256)


def guided(scale: float, channels: int | None = 3, **sampler: object) -> Sampler:
    return Sampler(scale=scale, channels=channels, **sampler)


def iddpm(steps: int, scale: float, source: str, **recipe: object) -> Method:
    """DiT's: linear betas, learned variance, 250 ancestral steps, three of four channels guided."""
    return Method(Diffusion(), replace(COMMON, steps=steps, **recipe), guided(scale), source)


DIT = iddpm(7_000_000, 1.5, "DiT's paper and code")
DIT_512 = iddpm(3_000_000, 1.5, "DiT's paper and code")
DICO_XL = iddpm(3_750_000, 1.4, "DiCo's paper, Table 6, and code")
DICO_XL_512 = iddpm(
    3_000_000,
    1.4,
    "DiCo's paper, Tables 2 and 6; its scale at 512 is not said, that at 256 is taken",
)
DICO_H = iddpm(
    1_000_000,
    1.4,
    "DiCo's paper, Table 6, not in its code; the scale is not said, DiCo-XL's is taken",
    batch=1024,
    lr=2e-4,
    betas=(0.99, 0.99),
    warmup=5000,
)
DIC_H = iddpm(
    400_000,
    1.5,
    "DiC's code, which does not flip, as the protocol does; steps and scale of the guided row are not said, the common steps and DiT's scale are taken",
)
UDIT = iddpm(
    400_000,
    1.5,
    "U-DiT's code, which does not flip, as the protocol does, and drops its three labels independently, here one; steps and scale are not said, the common steps and DiT's scale are taken",
)
DIG_XL = iddpm(
    1_200_000,
    1.5,
    "DiG's code; the steps are the 240 epochs of its published version, by secondary sources",
)
DIFFUSSM = iddpm(
    2_578_125, 1.5, "DiffuSSM's paper: 660M images; the scale is not said, DiT's is taken"
)
DIFFUSSM_512 = iddpm(
    1_179_688, 1.5, "DiffuSSM's paper: 302M images; the scale is not said, DiT's is taken"
)
DIS = iddpm(
    400_000, 1.5, "DiS's code; ImageNet's batch and steps are not said, the code's default batch and the common steps are taken",
    batch=128, warmup=5 * EPOCH // 128, decay="cosine", lr_min=1e-6, grad_clip=1.0, drop_path=0.1,
)  # fmt: skip

_SDE = guided(1.5, name="sde")
SIT = Method(
    Diffusion("flow"),
    replace(COMMON, steps=7_000_000),
    _SDE,
    "SiT's paper and code: linear path, velocity, 250-step Euler-Maruyama; our steps take one evaluation, theirs two",
)
SIT_512 = replace(SIT, recipe=replace(COMMON, steps=3_000_000))

DIMSUM = Method(
    Diffusion("flow", path="gvp"),
    Recipe(steps=510 * EPOCH // 704, batch=704, grad_clip=1.0, label_dropout=0.15, drop_path=0.1),
    guided(1.4, None, name="dopri5"),
    "DiMSUM's paper and code: variance-preserving path, velocity, adaptive Dormand-Prince",
)

# U-ViT's and DiM's: noise alone, Stable Diffusion's betas, steps called 1 to 1000, and so guided up to 1000.
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
    return guided(scale, None, name="dpm_solver", num_steps=50, interval=(0, 1001))


_SOLVER = "; its singlestep solver of order 3 is replaced by the multistep one of order 2, also at 50 evaluations"
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


def pixels(size: int) -> Data:
    """ImageNet at ADM's crop and this size: a folder imagenet<size>_pixels of images.npy and labels.npy."""
    return Data(f"imagenet{size}_pixels", size, 3, 1000, flip=True)


def adm(
    size: int, classifier_scale: float = 0.0, betas: str = "linear", low_res: int | None = None
) -> Method:
    """ADM has no null label: it is guided by a classifier's gradient, at the scale of its README; estimates are clipped to pixels in [-1, 1]."""
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
    """On images as noisy as those that its base model sees; its last weights guide, not their average."""
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
        "ADM's README, for 128 pixels; its random crops are the protocol's crop here",
    )


ADM_64, ADM_128, ADM_256, ADM_512 = (
    adm(64, 1.0, "cosine"),
    adm(128, 0.5),
    adm(256, 1.0),
    adm(512, 4.0),
)
ADM_UP_256, ADM_UP_512 = adm(256, low_res=64), adm(512, low_res=128)
ADM_CLASSIFIER, ADM_CLASSIFIER_64 = adm_classifier(), adm_classifier("cosine")
LDM_4 = Method(
    Diffusion(betas="ldm_imagenet", variance="fixed"),
    replace(COMMON, steps=178_000, batch=1200),
    guided(1.25, None, name="ddim"),
    "LDM's paper: steps and batch; its code: betas, eps, DDIM at eta 0, estimates unclipped; the scale as DiT's paper names the row. Not LDM's: the data, which are the common latents where LDM has "
    "64x64x3 of its own VQ autoencoder; label dropout and the rest of the recipe, the common ones; the 250 times, which take both ends in where LDM's are 1, 5, ..., 997 and end at the first step's noise",
)
