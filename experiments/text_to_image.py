"""Run, plan or print networks that read text: `experiments/text_to_image.py --table v2-3`.

Table v2-3 is the paper's second version's, on MS-COCO. Its rows, and U-Nets of published systems
beside them, are trained and scored under a protocol of captions: by default `digits_text`, whose
captions name and place two digits, with three seeds. Under `digits_text_minilm` the captions are
states of a frozen sentence encoder, which `prepare.py captions` makes. Published numbers stand in
columns of their own. Table `distillation` has U-Nets that learn from a larger one, beside the same
ones alone.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

# The code is this file's tree, whatever the current folder and PYTHONPATH offer.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.declared.protocols import CAPTIONED
from experiments.engine.choices import Choices
from experiments.engine.cli import run_command, run_table
from experiments.engine.data.captioned import grammar
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import Backbone, Cost

# ---- Notes of rows

RECONSTRUCTED = (
    "a reconstruction, since the paper says neither size nor recipe; counted at DiCo-L's sizes, "
    "whose Gflops without text are MMDiT's to 0.5 %"
)
OWN_SETTING = "30K samples by 50 steps of DPM-Solver, by its paper"
SDE = "250 steps of the SDE, by REPA's paper; the rows of U-ViT have another sampler"
TRAINING_IMAGES = "scored against the training images, by its authors"

# ---- Small networks: words of a small vocabulary, whose encoder is trained along

WORDS: dict[str, Any] = dict(
    context_tokens=grammar.TOKENS, context_dim=64, vocabulary=len(grammar.WORDS) + 2
)
DICO: dict[str, Any] = WORDS | dict(dim=16, depths=(1, 1, 1, 1, 1))
UVIT: dict[str, Any] = WORDS | dict(dim=64, depth=4, heads=4)
SD: dict[str, Any] = WORDS | dict(dim=32, multipliers=(1, 2, 2), depths=(1, 1, 0), heads=2)
SDXL: dict[str, Any] = WORDS | dict(
    dim=32, multipliers=(1, 2, 2), depths=(0, 1, 3), head_dim=32, pooled_dim=None
)


def published(label: str, note: str = "") -> Row:
    """Return a row of published numbers alone."""
    return Row(label, None, published=label, note=note)


def trained(label: str, name: str, small: dict[str, Any], note: str = "", *, size: int = 32) -> Row:
    """Return a row that is counted as published, at a side of its latent, and trained small."""
    network = Backbone(name)
    costs = (Cost(network, size, 4, 1000),)
    return Row(label, network, small, label, note=note, costs=costs, heavy=True)


def beside(label: str, name: str, small: dict[str, Any], size: int) -> Row:
    """Return a row of a U-Net that the paper's table does not have."""
    note = f"not in the paper's table; counted at {size}x{size}x4"
    return replace(trained(label, name, small, note, size=size), published=None)


TABLE_V2_3 = Table(
    number="v2-3",
    title="Text to image on MS-COCO 256x256",
    source="DiCo paper, version 2, Table 3",
    published="tablev2-3.csv",
    key=("model",),
    rows=(
        *map(published, ("AttnGAN", "DM-GAN", "VQ-Diffusion", "DF-GAN", "XMC-GAN", "Frido")),
        published("LAFITE", TRAINING_IMAGES),
        published("U-Net", OWN_SETTING),
        trained("U-ViT-S/2", "uvit_s_2_t2i", UVIT, OWN_SETTING),
        trained("U-ViT-S/2 (Deep)", "uvit_s_2_deep_t2i", UVIT | dict(depth=6), OWN_SETTING),
        trained("MMDiT", "mmdit_t2i", WORDS | dict(depth=2), SDE),
        published("MMDiT + REPA", SDE),
        trained("DiCo-CrossAttn", "dico_cross_l_t2i", DICO | dict(head_dim=16), RECONSTRUCTED),
        trained("DiCo-DWC", "dico_dwc_l_t2i", DICO, RECONSTRUCTED),
        beside("SD 1.x", "sd_1", SD, 64),
        beside("BK-SDM-Base", "bk_sdm_base", SD, 64),
        beside("BK-SDM-Small", "bk_sdm_small", SD, 64),
        beside("BK-SDM-Tiny", "bk_sdm_tiny", SD | dict(multipliers=(1, 2), depths=(1, 1)), 64),
        beside("SDXL", "sdxl", SDXL, 128),
        beside("KOALA-1B", "koala_1b", SDXL | dict(depths=(0, 1, 2)), 128),
        beside("KOALA-700M", "koala_700m", SDXL | dict(depths=(0, 1, 1)), 128),
    ),
    timed=False,
    against="DiCo-CrossAttn",
    conditions="MS-COCO 256, samplers differ",
)

# ---- Students of a small U-Net, beside the same networks without a teacher

RULE = "by BK-SDM's loss; starts from the parts of the teacher that it keeps"
KOALA = (
    "by KOALA's loss, a reconstruction, since its training code was never published: the features "
    "are outputs of self-attention"
)
TEACHER = beside("SD 1.x (teacher)", "sd_1", SD, 64)


def student(label: str, like: str, mimics: str, note: str) -> Row:
    """Return a row of Table v2-3 that learns from the teacher."""
    row = replace(TABLE_V2_3.row(like), label=label, note=note)
    return replace(row, teacher=TEACHER, mimics=mimics)


def alone(like: str) -> Row:
    """Return a row of Table v2-3 under a label that says it has no teacher."""
    return replace(TABLE_V2_3.row(like), label=f"{like} (from scratch)")


TABLE_DISTILLATION = Table(
    number="distillation",
    title="Small U-Nets that learn from a larger one",
    source="this suite; BK-SDM's and KOALA's rules",
    rows=(
        TEACHER,
        alone("BK-SDM-Base"),
        student("BK-SDM-Base (distilled)", "BK-SDM-Base", "blocks", RULE),
        student("BK-SDM-Base (self-attention)", "BK-SDM-Base", "self_attention", KOALA),
        alone("BK-SDM-Small"),
        student("BK-SDM-Small (distilled)", "BK-SDM-Small", "blocks", RULE),
    ),
    timed=False,
)
TABLES = {table.number: table for table in (TABLE_V2_3, TABLE_DISTILLATION)}
CHOICES = Choices(TABLES, CAPTIONED, protocol="digits_text", seeds=(0, 1, 2))

if __name__ == "__main__":
    raise SystemExit(run_command(lambda: run_table(CHOICES, __doc__)))
