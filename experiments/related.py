"""Print the systems around the DiCo paper: `experiments/related.py --table related`.

Tables v2-11 to v2-13 are new in the second version of the paper; their networks are counted and
timed. Table `related` has the systems that were published beside DiCo, which are counted by the
same rule. None of these is trained: small networks of theirs are.

Table `alignment` is of this suite: six networks with and without REPA's alignment, paired by seed.
`experiments/related.py --table alignment --protocol cifar10_16 --seeds 0 1 2` trains and scores it.

Table `related-small` trains small networks of the same systems. `experiments/campaign.py --table
related-small` tunes, trains and scores them on digits.

Table `autoregressive` trains a small VAR beside networks that predict noise:
`experiments/related.py --table autoregressive --protocol digits_long`.

`experiments/efficiency.py --table related-speed` times these small networks.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The code is this file's tree, whatever the current folder and PYTHONPATH offer.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataclasses import replace

from experiments.ablation import DICO_S, SMALL_DIT, TABLE_3
from experiments.declared import recipes
from experiments.declared.protocols import PROTOCOLS
from experiments.declared.systems import latent, scales
from experiments.engine.cli import main
from experiments.engine.reporting.efficiency.savings import small_cost
from experiments.engine.specs.alignment import Alignment
from experiments.engine.specs.rows import FineTuning, Method, Row, Table
from experiments.engine.specs.spec import Backbone, Cost
from experiments.engine.specs.stages import Protocol
from experiments.main_results import DIG_XL, NOISE, SIT_XL, UVIT_L, VELOCITY

# ---- Notes of rows

GATED = (
    "its published Gflops are what a trained network spent on average; counted are DiT's operators "
    "with all gates on, and the routers"
)
TERNARY_NOTE = "ternary weights save memory, and no multiply-accumulates"
OTHER_LATENTS = (
    "counted at 16x16x32: its latents are VA-VAE's, so its scores are of another protocol than "
    "those of rows on the common latents"
)
NOT_MET = (
    "the published 4.4 Gflops are not met: the linear layers of its authors' code alone are 4.80"
)
IN_FLOWDCN = (
    "a reconstruction: the Conv Module in place of FlowDCN's sampling, all else as FlowDCN-S/2. It "
    "meets the published 4.6 Gflops, and has 0.6 % fewer parameters than the published 31.3M"
)
UNKNOWN = "no configuration is published"


def counted(
    label: str,
    name: str,
    note: str = "",
    *,
    size: int = 32,
    channels: int = 4,
    heavy: bool = True,
) -> Row:
    """Return a row whose registered network is counted at a size of its input."""
    network = Backbone(name)
    costs = (Cost(network, size, channels, 1000),)
    return Row(label, network, {}, label, note=note, costs=costs, heavy=heavy)


def _in_flowdcn(label: str, mixer: str) -> Row:
    """Return FlowDCN-S/2 with another mixer."""
    network = Backbone("flowdcn_s_2", dict(mixer=mixer))
    costs = (Cost(network, 32, 4, 1000),)
    return Row(label, network, {}, label, note=IN_FLOWDCN, costs=costs)


def version_2(number: int, title: str, rows: tuple[Row, ...], conditions: str) -> Table:
    """Return a table of the second version of the paper."""
    return Table(
        number=f"v2-{number}",
        title=title,
        source=f"DiCo paper, version 2, Table {number}",
        published=f"tablev2-{number}.csv",
        key=("model",),
        rows=rows,
        counts_only=True,
        conditions=conditions,
    )


TABLE_V2_11 = version_2(
    11,
    "ImageNet 1024x1024",
    (counted("DiT-S/2", "dit_s_2", size=128), counted("DiCo-S", "dico_s", size=128)),
    "ImageNet 1024, 400K steps",
)
TABLE_V2_12 = version_2(
    12,
    "FlowDCN's isotropic setting",
    (
        counted("SiT-S/2", "sit_s_2", heavy=False),
        counted("FlowDCN-S/2", "flowdcn_s_2", NOT_MET, heavy=False),
        _in_flowdcn("DiCo's Conv Module", "conv"),
    ),
    "ImageNet 256, 400K steps",
)
TABLE_V2_13 = version_2(
    13,
    "LightningDiT's setting",
    (
        counted("REPA", "sit_xl_2"),
        counted("LightningDiT", "lightningdit_xl_1", OTHER_LATENTS, size=16, channels=32),
        Row("DiCo", None, {}, "DiCo", UNKNOWN),
    ),
    "ImageNet 256, 800 epochs, guided",
)
RELATED = Table(
    number="related",
    title="Systems published beside DiCo, ImageNet 256x256",
    source="their papers",
    published="tablerelated.csv",
    key=("model",),
    rows=(
        counted("DiMR-XL/2R", "dimr_xl_2r"),
        counted("DiMR-G/2R", "dimr_g_2r"),
        counted(
            "LightningDiT-XL/1 (64 epochs)",
            "lightningdit_xl_1",
            OTHER_LATENTS,
            size=16,
            channels=32,
        ),
        counted(
            "LightningDiT-XL/1 (800 epochs)",
            "lightningdit_xl_1",
            OTHER_LATENTS,
            size=16,
            channels=32,
        ),
        counted("FlowDCN-XL/2", "flowdcn_xl_2"),
        counted("DyDiT-XL/2 (0.7)", "dydit_xl_2", GATED),
        counted("DyDiT-XL/2 (0.5)", "dydit_xl_2", GATED),
        counted("TerDiT-600M", "terdit_600m", TERNARY_NOTE),
        counted("TerDiT-4.2B", "terdit_4_2b", TERNARY_NOTE),
    ),
    counts_only=True,
    timed=False,
    conditions="ImageNet 256, guided",
)

# ---- Small networks of these systems
#
# Their sizes are not matched, so the table ranks no system. What it compares are rows that continue
# or change one network: DyDiT with its dense parent and its control, TerDiT's alphas with theirs.

# Six heads, because a gate more is on for good: of three heads, two gates would be left.
DENSE = Backbone("dit_s_2", SMALL_DIT | dict(heads=6))
DYNAMIC = Backbone("dydit_s_2", SMALL_DIT | dict(heads=6))
LIGHTNING = Backbone("lightningdit_b_2", SMALL_DIT)
DIMR = Backbone(
    "dimr_xl_2r",
    dict(dims=(64, 32), hidden=(128, 64), depths=(5, 3), heads=4, kernel_sizes=(3,)),
)
FLOWDCN = Backbone("flowdcn_s_2", dict(dim=96, depth=4, groups=3))
TUNED_SHARE = 1 / 4

PARENT = "DyDiT's parent, which its rows continue"
DYNAMIC_NOTE = (
    "continues the averaged network of its parent for a quarter of the protocol's steps; its "
    "lambda is the share of the gated work that it is to use on average"
)
CONTROL = "the control that DyDiT's paper lacks: as many further steps of DiT, without gates"
ONE_CHANNEL = (
    "without the loss of the velocity's direction, whose gradient is 0 for a single channel"
)
ALPHAS = {
    "normal": "alphas start from N(0, 1), as in the released code",
    "absmean": "alphas start from the mean size of their layer's weights, this suite's cure",
}

DIT_PARENT = Row(
    "DiT", Backbone("dit_s_2"), DENSE, note=PARENT, method=recipes.DIT, costs=latent("dit_s_2", 32)
)


def tuned(label: str, name: str, small: Backbone, method: Method, note: str) -> Row:
    """Return a row that continues the small DiT under every protocol."""
    return Row(
        label,
        Backbone(name),
        small,
        note=note,
        method=method,
        costs=latent(name, 32),
        heavy=True,
        tuning=FineTuning(DIT_PARENT, TUNED_SHARE),
    )


def dynamic(share: float) -> Row:
    """Return the row of DyDiT that is to use a share of its gated work."""
    label = f"DyDiT, lambda {share:g}"
    row = tuned(label, "dydit_s_2", DYNAMIC, recipes.dydit(share), DYNAMIC_NOTE)
    return replace(row, published=f"DyDiT-S ({share:g})")


def ternary(label: str, note: str, **options: object) -> Row:
    """Return a row of TerDiT with options of its ternary layers."""
    large = Backbone("terdit_600m", options)
    # Where alpha starts changes no count.
    counted = large if "ternary" in options else Backbone("terdit_600m")
    return Row(
        label,
        large,
        SMALL_DIT,
        note=note,
        method=recipes.TERDIT,
        costs=(Cost(counted, 32, 4, 1000),),
        heavy=True,
    )


def _without_direction(method: Method) -> Method:
    return replace(method, diffusion=replace(method.diffusion, direction=0.0))


RELATED_SMALL = Table(
    number="related-small",
    title="Small networks of systems published beside DiCo",
    source="this suite",
    published="tablerelated-small.csv",
    key=("model",),
    rows=(
        DIT_PARENT,
        tuned("DiT, tuned on", "dit_s_2", DENSE, recipes.DIT, CONTROL),
        *(dynamic(share) for share in (0.7, 0.5, 0.3)),
        *(ternary(f"TerDiT, alpha {alpha}", note, alpha=alpha) for alpha, note in ALPHAS.items()),
        ternary("TerDiT, full precision", "the control of the ternary rows", ternary=False),
        Row(
            "DiMR",
            Backbone("dimr_xl_2r"),
            DIMR,
            note=NOISE,
            method=recipes.DIMR,
            costs=latent("dimr_xl_2r", 32),
            heavy=True,
        ),
        Row(
            "LightningDiT",
            Backbone("lightningdit_b_2"),
            LIGHTNING,
            note=f"{VELOCITY}; {ONE_CHANNEL}",
            method=_without_direction(recipes.LIGHTNINGDIT),
            costs=latent("lightningdit_b_2", 16, 32),
            heavy=True,
        ),
        Row(
            "FlowDCN",
            Backbone("flowdcn_s_2"),
            FLOWDCN,
            note=VELOCITY,
            method=recipes.FLOWDCN,
            costs=latent("flowdcn_s_2", 32),
            heavy=True,
        ),
    ),
    timed=False,
    conditions="ImageNet 256, guided",
)
# The rows that others start from, which are tuned and trained first.
PARENTS = replace(RELATED_SMALL, rows=(DIT_PARENT,))

# ---- Ternary weights as they are stored


def stored(label: str, name: str, has_published: bool, **form: object) -> Row:
    """Return a row whose network is loaded in a form of its weights."""
    row = replace(counted(label, name), backbone=Backbone(name, form))
    return row if has_published else replace(row, published=None)


TERNARY = Table(
    number="ternary",
    title="What packing ternary weights saves",
    source="their paper",
    published="tableternary.csv",
    key=("model",),
    rows=(
        stored("TerDiT-600M (full precision)", "terdit_600m", False, ternary=False),
        stored("TerDiT-600M (packed)", "terdit_600m", False, packed=True),
        stored("TerDiT-4.2B (full precision)", "terdit_4_2b", True, ternary=False),
        stored("TerDiT-4.2B (packed)", "terdit_4_2b", True, packed=True),
    ),
    counts_only=True,
)

# ---- A network that predicts tokens, beside networks that predict noise

VAR_NOTE = (
    "predicts the tokens of a small VQVAE, which each machine trains once and whose errors are in "
    "the scores. A step of its sampling is a scale. It predicts no noise, so it has no held-out "
    "loss; the cross-entropy of held-out tokens stands in a column of its own"
)
AUTOREGRESSIVE = Table(
    number="autoregressive",
    title="A network that predicts tokens scale by scale",
    source="this suite",
    rows=(
        replace(DICO_S, published=None),
        replace(TABLE_3.row("DiT (iso.)"), published=None),
        Row(
            "VAR",
            Backbone("var_d16"),
            Backbone("var_d16", recipes.DIGITS_TOKENS | dict(depth=2, dim=64, heads=4)),
            note=VAR_NOTE,
            method=recipes.VAR,
            costs=scales("var_d16", 16),
            heavy=True,
        ),
    ),
)

# ---- The speed of these small networks


def as_trained(row: Row, protocol: Protocol) -> Row:
    """Return a row whose system is the small network, at the protocol's images."""
    cost = small_cost(row, protocol)
    return replace(row, backbone=cost.backbone, costs=(cost,), published=None, heavy=False)


# What gates save has a table of its own, and where alphas start costs nothing.
TIMED_SMALL = (
    DIT_PARENT,
    RELATED_SMALL.row("TerDiT, alpha absmean"),
    RELATED_SMALL.row("TerDiT, full precision"),
    RELATED_SMALL.row("DiMR"),
    RELATED_SMALL.row("LightningDiT"),
    RELATED_SMALL.row("FlowDCN"),
    AUTOREGRESSIVE.row("VAR"),
)
SMALL_SPEED = Table(
    number="related-speed",
    title="Speed of small networks of systems published beside DiCo",
    source="this suite, networks and images of digits_long",
    rows=tuple(as_trained(row, PROTOCOLS["digits_long"]) for row in TIMED_SMALL),
)

# ---- Alignment with the features of an encoder

# The suite's classifier of CIFAR-10, by its file.
CIFAR_JUDGE = "e97f0a9c337b47fad76512d1b2e7d905004d8c2f63656a2b09401780c89a8ae7"
# Above which a projection stands in each network: after about a third of it, where 8x8 places are.
ALIGNED_ROWS = (
    (TABLE_3.row("DiT (iso.)"), "blocks.2"),
    (SIT_XL, "blocks.1"),
    (DICO_S, "encoder_level_2.0"),
    (UVIT_L, "in_blocks.1"),
    (DIG_XL, "blocks.0"),
    (TABLE_3.row("DiCo (iso.)"), "blocks.1"),
)


def pair(row: Row, block: str) -> tuple[Row, Row]:
    """Return a row as it is, and with alignment after a block of its shrunk network."""
    plain = replace(row, published=None)
    alignment = Alignment(block, CIFAR_JUDGE, hidden=256)
    note = f"aligned after {block} with the CIFAR-10 classifier's features, at weight 0.5"
    return plain, replace(plain, label=f"{row.label} + REPA", alignment=alignment, note=note)


ALIGNMENT = Table(
    number="alignment",
    title="With and without representation alignment",
    source="this suite, with the loss of REPA (arXiv:2410.06940)",
    rows=tuple(row for row, block in ALIGNED_ROWS for row in pair(row, block)),
    timed=False,
)

TABLES = {table.number: table for table in (TABLE_V2_11, TABLE_V2_12, TABLE_V2_13, RELATED)}

if __name__ == "__main__":
    trained = {table.number: table for table in (RELATED_SMALL, AUTOREGRESSIVE, ALIGNMENT)}
    raise SystemExit(main(TABLES | trained, PROTOCOLS, __doc__))
