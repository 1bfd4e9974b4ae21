"""Run and print Tables 1, 2, 8 and 9 of the DiCo paper: `experiments/main_results.py --table 1`.

A row whose network is known can be run. The other rows hold published numbers alone. On small
protocols all sizes of a family are one small network (ADM-U is three). The default is digits_whole,
under which the committed scores are; `--protocol digits_long` trains longer and scores on images
that no training saw. `--protocol imagenet256_own` trains and samples each system as its own paper
does.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The code is this file's tree, whatever the current folder and PYTHONPATH offer.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataclasses import replace
from typing import Any

from experiments.ablation import SMALL_DIT, SMALL_U
from experiments.declared import recipes
from experiments.declared.protocols import PROTOCOLS
from experiments.declared.systems import ADM_U_COSTS_256, ADM_U_COSTS_512, latent, scales
from experiments.engine.choices import Choices
from experiments.engine.cli import run_command, run_table
from experiments.engine.specs.rows import Method, Row, Table
from experiments.engine.specs.spec import Backbone, Cost

# ---- One network per family for small protocols

DIT = Backbone("dit_s_2", SMALL_DIT)
SIT = Backbone("sit_s_2", SMALL_DIT)
DICO = Backbone("dico_s", SMALL_U)
DIC = Backbone("dic_s", dict(dim=24, depths=(2, 1, 1, 1, 2)))
DIG = Backbone("dig_s_2", SMALL_DIT)
UVIT = Backbone("uvit_l_2", SMALL_DIT)
DIM = Backbone("dim_l", dict(dim=32, depth=5))
DIS = Backbone("dis_s_2", dict(dim=48, depth=2))
DIMSUM = Backbone("dimsum_l_2", dict(dim=48, depth=4, heads=3, fusion_heads=2, attention_every=2))
DIFFUSSM = Backbone("diffussm_xl", dict(dim=64, depth=4, states=16))
ADM = Backbone(
    "adm_base_64",
    dict(dim=32, multipliers=(1, 2), num_res_blocks=1, attention_at=(4,), head_dim=32),
)
ADM_UP = Backbone(
    "adm_up_256",
    dict(dim=32, multipliers=(1, 2), num_res_blocks=1, attention_at=(4,), heads=None, head_dim=32),
)
ADM_CLASSIFIER = Backbone(
    "adm_classifier_64",
    dict(dim=32, multipliers=(1, 2), num_res_blocks=1, attention_at=(4, 2), head_dim=32),
)
UDIT = Backbone("udit_s", dict(dim=24, depths=(1, 1, 1, 1, 1), heads=2))
LDM = Backbone(
    "ldm_4", dict(dim=32, multipliers=(1, 2), num_res_blocks=1, attention_at=(2,), context_dim=32)
)

# ---- Notes of rows

CASCADE = (
    "a base model, which a classifier of noisy images guides, and an upsampler. Counted are one "
    "step of each, without the classifier. In pixels all three are trained, on digits from 4x4 to "
    "8x8; on a protocol's latents the base model alone is trained, unguided"
)
UNGUIDED = "not in the paper: the base model of ADM-U alone on a protocol's data"
GUIDED = "not in the paper; ADM's single network, guided by a classifier of noisy images"
PIXELS = (
    "published on latents of its own, at which it is timed; it is trained on a protocol's data "
    "like all others"
)
BY_SCALES = "draws tokens scale by scale and is counted here, not trained"
VELOCITY = "predicts a velocity and has its own objective and sampler under every protocol"
NOISE = "predicts the noise alone and has its own schedule and sampler under every protocol"
NOT_PUBLISHED = (
    "not in the paper; on 8x8 digits its innermost attention sees single tokens, whose softmax is 1"
)
RECONSTRUCTION = (
    "a reconstruction: no code was published, and no variant meets the published counts at both "
    "resolutions"
)

# ---- Parts of rows


def row(
    label: str,
    name: str,
    small: Backbone,
    method: Method | None = None,
    note: str = "",
    **options: Any,
) -> Row:
    """Return a row that the paper publishes under its label, and that is heavy on a CPU.

    Args:
        name: of the registered network.
        small: the family's network on small protocols.
        options: further fields of the row.
    """
    fields: dict[str, Any] = {"published": label, "heavy": True} | options
    return Row(label, Backbone(name), small, note=note, method=method, **fields)


def classifier(size: int, method: Method = recipes.ADM_CLASSIFIER) -> Row:
    return Row(
        f"ADM's classifier at {size}",
        Backbone(f"adm_classifier_{size}"),
        ADM_CLASSIFIER,
        None,
        method=method,
    )


def upsampler(size: int, method: Method) -> Row:
    return Row(
        f"ADM's upsampler to {size}", Backbone(f"adm_up_{size}"), ADM_UP, None, method=method
    )


def adm_alone(size: int, method: Method) -> Row:
    """Return ADM's base model alone, without the other networks of ADM-U."""
    return Row(
        f"ADM-{size}",
        Backbone(f"adm_base_{size}"),
        ADM,
        None,
        UNGUIDED,
        method,
        latent(f"adm_base_{size}", size, 3),
        heavy=True,
    )


def adm_guided(size: int, method: Method) -> Row:
    return Row(
        "ADM-G",
        Backbone(f"adm_{size}"),
        ADM,
        None,
        GUIDED,
        method,
        latent(f"adm_{size}", size, 3),
        heavy=True,
        classifier=classifier(size),
    )


def at_512(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Return rows whose network sees a 64 x 64 latent."""
    return tuple(
        r if r.costs or not r.backbone else replace(r, costs=(Cost(r.backbone, 64, 4, 1000),))
        for r in rows
    )


def published(*models: str) -> tuple[Row, ...]:
    """Return rows of systems that hold published numbers alone."""
    return tuple(Row(model, None, {}, model) for model in models)


def counted(label: str, costs: tuple[Cost, ...]) -> Row:
    """Return a row whose network is counted, and neither trained nor scored."""
    return Row(label, None, {}, label, BY_SCALES, costs=costs)


def scale(size: str, *, heavy: bool, cfg: str = "no", without: str = "") -> tuple[Row, ...]:
    """Return one size of DiT, DiC, DiG and DiCo after 400K steps of the common recipe."""
    families = (
        ("DiT", "/2", "dit_{}_2", DIT),
        ("DiC", "", "dic_{}", DIC),
        ("DiG", "/2", "dig_{}_2", DIG),
        ("DiCo", "", "dico_{}", DICO),
    )

    return tuple(
        row(
            f"{family}-{size}{patch}",
            name.format(size.lower()),
            small,
            published=f"{family}-{size}{patch} 400000 {cfg}",
            heavy=heavy,
        )
        for family, patch, name, small in families
        if family != without
    )


DIT_XL = row("DiT-XL/2", "dit_xl_2", DIT, recipes.DIT)
DIG_XL = row("DiG-XL/2", "dig_xl_2", DIG, recipes.DIG_XL)
DIC_H = row("DiC-H", "dic_h", DIC, recipes.DIC_H)
DICO_XL = row("DiCo-XL", "dico_xl", DICO, recipes.DICO_XL)
DICO_H = row("DiCo-H", "dico_h", DICO, recipes.DICO_H)
ADM_U = row(
    "ADM-U",
    "adm_base_64",
    ADM,
    recipes.ADM_64,
    CASCADE,
    costs=ADM_U_COSTS_256,
    classifier=classifier(64, recipes.ADM_CLASSIFIER_64),
    upsampler=upsampler(256, recipes.ADM_UP_256),
)
UVIT_L = row("U-ViT-L/2", "uvit_l_2", UVIT, recipes.UVIT_L, NOISE)
UVIT_H = row("U-ViT-H/2", "uvit_h_2", UVIT, recipes.UVIT_H, NOISE)
DIM_H = row("DiM-H", "dim_h", DIM, recipes.DIM, NOISE)
DIS_H = row("DiS-H/2", "dis_h_2", DIS, recipes.DIS)
DIFFUSSM_XL = row(
    "DiffuSSM-XL (reconstruction)",
    "diffussm_xl",
    DIFFUSSM,
    recipes.DIFFUSSM,
    RECONSTRUCTION,
    published="DiffuSSM-XL",
)
DIMSUM_L = row("DiMSUM-L/2", "dimsum_l_2", DIMSUM, recipes.DIMSUM, VELOCITY)
SIT_XL = row("SiT-XL", "sit_xl_2", SIT, recipes.SIT, VELOCITY)


def with_cfg(r: Row) -> Row:
    """Return the guided row of a network that the table also has without guidance."""
    return replace(r, label=f"{r.label} (w/ CFG)", published=f"{r.label} yes")


TABLE_1 = Table(
    number=1,
    title="ImageNet 256x256",
    source="DiCo paper, Table 1",
    published="table1.csv",
    key=("model", "train_steps", "cfg"),
    rows=(
        ADM_U,
        row("LDM-4", "ldm_4", LDM, recipes.LDM_4, PIXELS, costs=latent("ldm_4", 64, 3)),
        UVIT_H,
        DIM_H,
        DIS_H,
        DIFFUSSM_XL,
        DIMSUM_L,
        *scale("S", heavy=False),
        *scale("B", heavy=False),
        *scale("L", heavy=True, without="DiC"),
        *scale("XL", heavy=True),
        *(with_cfg(r) for r in (DIT_XL, DIG_XL, DICO_XL, DIC_H, DICO_H)),
    ),
    outside=(
        *(
            Row(
                f"U-DiT-{size}",
                Backbone(f"udit_{size.lower()}"),
                UDIT,
                None,
                NOT_PUBLISHED,
                recipes.UDIT,
                heavy=size == "L",
            )
            for size in "SBL"
        ),
        adm_alone(64, recipes.ADM_64),
        adm_guided(256, recipes.ADM_256),
    ),
    against="DiT-S/2",
    conditions="ImageNet 256",
)

UVIT_L_512 = row("U-ViT-L/4", "uvit_l_4", UVIT, recipes.UVIT_L_512, NOISE)
UVIT_H_512 = row("U-ViT-H/4", "uvit_h_4", UVIT, recipes.UVIT_H_512, NOISE)
ADM_U_512 = row(
    "ADM-U",
    "adm_base_128",
    ADM,
    recipes.ADM_128,
    CASCADE,
    costs=ADM_U_COSTS_512,
    classifier=classifier(128),
    upsampler=upsampler(512, recipes.ADM_UP_512),
)
OTHERS_512 = (ADM_U_512, UVIT_L_512, UVIT_H_512)
# Tokens that pad a raster line cost what tokens elsewhere cost, so the plain network is counted.
DIM_H_512 = replace(
    DIM_H,
    backbone=Backbone("dim_h", dict(raster_padding=True)),
    method=recipes.DIM_512,
    start=replace(DIM_H, method=recipes.DIM_START),
    costs=latent("dim_h", 64),
)
MAMBA_512 = (DIM_H_512, DIS_H, replace(DIFFUSSM_XL, method=recipes.DIFFUSSM_512))
DIT_XL_512 = replace(DIT_XL, method=recipes.DIT_512)
DICO_XL_512 = replace(DICO_XL, method=recipes.DICO_XL_512)


def after(r: Row, steps: int) -> Row:
    """Return a network without guidance after a number of training steps."""
    assert r.method, "a row without a recipe of its own has no number of steps"
    recipe = replace(r.method.recipe, steps=steps)
    method = replace(r.method, recipe=recipe, sampler=replace(r.method.sampler, scale=1.0))
    return replace(
        r,
        label=f"{r.label}, {steps / 1e6:.1f}M".replace(".0M", "M"),
        published=f"{r.label} {steps} no",
        method=method,
    )


TABLE_2 = Table(
    number=2,
    title="ImageNet 512x512",
    source="DiCo paper, Table 2",
    published="table2.csv",
    key=("model", "train_steps", "cfg"),
    rows=at_512(
        (
            *OTHERS_512,
            *MAMBA_512,
            *(
                after(r, steps)
                for steps in (1_300_000, 3_000_000)
                for r in (DIT_XL_512, DICO_XL_512)
            ),
            *(with_cfg(r) for r in (DIT_XL_512, DICO_XL_512)),
        )
    ),
    outside=(adm_alone(128, recipes.ADM_128), adm_guided(512, recipes.ADM_512)),
    against="DiT-XL/2, 1.3M",
    conditions="ImageNet 512",
)

VAR_SIZES = ("d16", "d20", "d24", "d30")

TABLE_8 = Table(
    number=8,
    title="Generative models on ImageNet 256x256",
    source="DiCo paper, Table 8",
    published="table8.csv",
    key=("model",),
    rows=(
        *published(
            "BigGAN-deep",
            "GigaGAN",
            "StyleGAN-XL",
            "MaskGIT",
            "RCG",
            "TiTok-S-128",
            "VQ-GAN-re",
            "ViTVQ-re",
            "RQTran.-re",
            "LLamaGen-3B",
        ),
        *published("MAR-H", "PAR-3B", "RandAR-XXL"),
        *(counted(f"VAR-{size}", scales(f"var_{size}", 16)) for size in VAR_SIZES),
        ADM_U,
        UVIT_L,
        UVIT_H,
        *published("Simple Diffusion", "VDM++"),
        DIT_XL,
        SIT_XL,
        DIM_H,
        DIS_H,
        DIFFUSSM_XL,
        DIMSUM_L,
        DIG_XL,
        DIC_H,
        DICO_XL,
        DICO_H,
    ),
    timed=False,
    against="DiT-XL/2",
    conditions="ImageNet 256",
)

TABLE_9 = Table(
    number=9,
    title="Generative models on ImageNet 512x512",
    source="DiCo paper, Table 9",
    published="table9.csv",
    key=("model",),
    rows=at_512(
        (
            *published("BigGAN-deep", "StyleGAN-XL", "MaskGIT", "VQ-GAN"),
            counted("VAR-d36-s", scales("var_d36_s", 32)),
            *OTHERS_512,
            *published("Simple Diffusion", "VDM++"),
            DIT_XL_512,
            replace(SIT_XL, method=recipes.SIT_512),
            *MAMBA_512,
            DICO_XL_512,
        )
    ),
    timed=False,
    against="DiT-XL/2",
    conditions="ImageNet 512",
)

TABLES = {table.number: table for table in (TABLE_1, TABLE_2, TABLE_8, TABLE_9)}

CHOICES = Choices(TABLES, PROTOCOLS, protocol="digits_whole")


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: run_table(CHOICES, __doc__)))
