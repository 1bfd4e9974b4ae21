"""Run and print Tables 3, 4 and 5 of the DiCo paper: `python experiments/ablation.py --table 4`.

The authors published no code of their ablations. Sizes are reconstructed from the two rounded
numbers that the paper prints per row. Every count of Tables 3 and 4 is within 0.5 % (parameters)
and 1 % (Gflops) of the paper's. If another size fits the printed digits exactly, it is declared
beside the table as `<row> (alt)`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The code is this file's tree, whatever the current folder and PYTHONPATH offer.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shlex
from collections.abc import Sequence
from typing import Any

from experiments.declared.protocols import PROTOCOLS
from experiments.engine.cli import main
from experiments.engine.records.code import own_code
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import Backbone
from experiments.engine.specs.stages import Protocol

# What shrinks a network on small protocols: U-shaped, isotropic, and isotropic with heads.
SMALL_U = dict(dim=24, depths=(2, 1, 1, 1, 1))
SMALL_ISO = dict(dim=64, depth=6)
SMALL_DIT = dict(dim=96, depth=4, heads=3)


# What brings shrunk networks to the paper's ratio of Gflops to DiCo-S, within 3 %, by the side of
# their input. The paper adjusts depths and widths too. Parameters follow as nearly as they can.
# Options by the side of the input.
Matched = dict[int, dict[str, Any]]
NARROW_U = dict(dim=20, depths=(1, 1, 2, 1, 1))


def narrow_u(mlp_ratio: float, **options: object) -> dict[str, Any]:
    """Return the narrower U-shape whose attention and MLP cost what DiCo-S's blocks cost."""
    return NARROW_U | dict(mlp_ratio=mlp_ratio) | options


MATCHED_SELF: Matched = {8: narrow_u(2.75), 16: narrow_u(2.75, dim=16, depths=(1, 1, 4, 1, 1))}
MATCHED_MDTA: Matched = {8: narrow_u(2.75), 16: narrow_u(2.75)}
MATCHED_WINDOW: Matched = {8: narrow_u(3.5), 16: narrow_u(4.0)}
MATCHED_LINEAR: Matched = {8: narrow_u(3.5), 16: narrow_u(3.5)}
MATCHED_DIT: Matched = {8: dict(dim=60, depth=8), 16: dict(dim=60, depth=8)}
MATCHED_DIT_SKIP: Matched = {
    8: dict(dim=60, depth=8),
    16: dict(dim=60, depth=8, mlp_ratio=4.25),
}
MATCHED_ISO: Matched = {8: dict(mlp_ratio=5.75), 16: dict(mlp_ratio=7.0)}
MATCHED_ISO_SKIP: Matched = {16: dict(mlp_ratio=7.0)}


def u_shape(mixer: str = "conv", **options: object) -> Backbone:
    """Return DiCo's U-shape with a mixer."""
    return Backbone("hourglass", dict(mixer=mixer, **options))


def conv(**mixer_options: object) -> Backbone:
    """Return DiCo with other options of its convolutional mixer."""
    return u_shape(mixer_options=mixer_options)


DICO_S = Row("DiCo-S", Backbone("dico_s"), SMALL_U, "DiCo-S")
DIT_U = u_shape("softmax", dim=96, depths=(6, 2, 12, 2, 1), heads=(3, 6, 12, 6, 6), position=True)
HEADS_U = dict(heads=(2, 4, 8, 4, 4))
ISO_SKIP = dict(dim=256, depth=24, mlp_ratio=6.0, mixer="conv", skips=True)

TABLE_3 = Table(
    number=3,
    title="Architectural design",
    source="DiCo paper, Table 3",
    published="table3.csv",
    key=("model", "structure"),
    rows=(
        Row(
            "DiT (iso.)",
            Backbone("dit_s_2"),
            SMALL_DIT,
            "DiT isotropic",
            matched=MATCHED_DIT,
        ),
        Row(
            "DiCo (iso.)",
            Backbone("isotropic", dict(dim=256, depth=24, mlp_ratio=6.0, mixer="conv")),
            SMALL_ISO,
            "DiCo isotropic",
            matched=MATCHED_ISO,
        ),
        Row(
            "DiT (iso.&skip)",
            Backbone(
                "isotropic",
                dict(
                    dim=384,
                    depth=12,
                    mlp_ratio=4.0,
                    mixer="softmax",
                    mixer_options=dict(heads=6),
                    skips=True,
                    gelu="tanh",
                ),
            ),
            dict(dim=96, depth=4, mixer_options=dict(heads=3)),
            "DiT isotropic+skip",
            matched=MATCHED_DIT_SKIP,
        ),
        Row(
            "DiCo (iso.&skip)",
            Backbone("isotropic", ISO_SKIP),
            SMALL_ISO,
            "DiCo isotropic+skip",
            matched=MATCHED_ISO_SKIP,
        ),
        Row("DiT (U-shape)", DIT_U, SMALL_U | HEADS_U, "DiT u-shape", matched=MATCHED_SELF),
        Row("DiCo (U-shape)", Backbone("dico_s"), SMALL_U, "DiCo u-shape"),
    ),
    outside=(
        Row(
            "DiT (U-shape) (alt)",
            u_shape(
                "softmax",
                dim=112,
                depths=(2, 2, 6, 2, 1),
                mlp_ratio=4.0,
                heads=(4, 8, 16, 8, 8),
                position=True,
            ),
            SMALL_U | HEADS_U,
            "DiT u-shape",
        ),
    ),
)

WINDOWED = dict(dim=128, depths=(4, 4, 4, 4, 2))
MIRRORED_HEADS = (4, 8, 16, 8, 4)

TABLE_4 = Table(
    number=4,
    title="Components of DiCo",
    source="DiCo paper, Table 4",
    published="table4.csv",
    key=("variant",),
    rows=(
        DICO_S,
        Row("GELU->ReLU", conv(activation="relu"), SMALL_U, "GELU -> ReLU"),
        Row("DWC 5x5", conv(kernel=5), SMALL_U, "3x3 -> 5x5 DWC"),
        Row("DWC 7x7", conv(kernel=7), SMALL_U, "3x3 -> 7x7 DWC"),
        Row(
            "w/o CCA",
            u_shape(mixer_options=dict(channel="none"), depths=(6, 3, 5, 3, 4)),
            SMALL_U,
            "w/o CCA",
        ),
        Row(
            "CCA->SE",
            u_shape(mixer_options=dict(channel="se", reduction=8), depths=(3, 5, 4, 5, 4)),
            SMALL_U,
            "CCA -> SE module",
        ),
        Row(
            "CCA->Channel Self-Attn",
            u_shape(
                mixer_options=dict(channel="mdta"),
                dim=96,
                depths=(3, 7, 8, 7, 4),
                heads=(2, 4, 8, 4, 4),
            ),
            SMALL_U | HEADS_U,
            "CCA -> Channel Self-Attn",
            matched=MATCHED_MDTA,
        ),
        Row(
            "CM->Self-Attn",
            DIT_U,
            SMALL_U | HEADS_U,
            "CM -> Self-Attn",
            matched=MATCHED_SELF,
            note="the same network as DiT (U-shape) of Table 3",
        ),
        Row(
            "CM->Window Attn",
            u_shape("window", **WINDOWED, heads=(4, 8, 16, 8, 8), mixer_options=dict(window=8)),
            SMALL_U | HEADS_U | dict(mixer_options=dict(window=4)),
            "CM -> Window Attn",
            matched=MATCHED_WINDOW,
        ),
        Row(
            "CM->Focused Linear Attn",
            u_shape("focused_linear", **WINDOWED, heads=MIRRORED_HEADS),
            SMALL_U | HEADS_U,
            "CM -> Focused Linear Attn",
            matched=MATCHED_LINEAR,
        ),
        Row(
            "CM->Agent Attn",
            u_shape("agent", **WINDOWED, heads=MIRRORED_HEADS, mixer_options=dict(agents=16)),
            SMALL_U | HEADS_U | dict(mixer_options=dict(agents=4)),
            "CM -> Agent Attn",
            matched=MATCHED_LINEAR,
        ),
    ),
    outside=(
        Row(
            "w/o CCA (alt)",
            u_shape(mixer_options=dict(channel="none"), depths=(2, 3, 5, 3, 5)),
            SMALL_U,
            "w/o CCA",
        ),
        Row(
            "CCA->SE (alt)",
            u_shape(mixer_options=dict(channel="se", reduction=8), depths=(7, 5, 4, 5, 3)),
            SMALL_U,
            "CCA -> SE module",
        ),
        Row(
            "CCA->Channel Self-Attn (alt)",
            u_shape(
                mixer_options=dict(channel="mdta", project=True),
                dim=96,
                depths=(3, 3, 9, 3, 5),
                heads=(8, 8, 8, 8, 8),
            ),
            SMALL_U | HEADS_U,
            "CCA -> Channel Self-Attn",
        ),
        Row(
            "CM->Window Attn (alt)",
            u_shape(
                "window",
                dim=96,
                depths=(2, 1, 11, 1, 8),
                heads=(3, 6, 12, 6, 6),
                mixer_options=dict(window=8),
            ),
            SMALL_U | HEADS_U | dict(mixer_options=dict(window=4)),
            "CM -> Window Attn",
        ),
        Row(
            "CM->Focused Linear Attn (alt)",
            u_shape(
                "focused_linear",
                dim=96,
                depths=(6, 5, 8, 5, 6),
                heads=(8, 8, 8, 8, 8),
                mixer_options=dict(position=True),
            ),
            SMALL_U | HEADS_U,
            "CM -> Focused Linear Attn",
        ),
        Row(
            "CM->Agent Attn (alt)",
            u_shape(
                "agent",
                dim=112,
                depths=(5, 5, 6, 5, 3),
                heads=(4, 8, 16, 8, 8),
                mixer_options=dict(agents=16, biases=False),
            ),
            SMALL_U | HEADS_U | dict(mixer_options=dict(agents=4, biases=False)),
            "CM -> Agent Attn",
        ),
        Row(
            "CM->Global-Regional Attn",
            u_shape("global_regional", **WINDOWED, heads=(4, 8, 16, 8, 8)),
            SMALL_U | HEADS_U | dict(mixer_options=dict(window=4, pool=2)),
            None,
            note="a reconstruction of A-SDM's mixer (arXiv:2312.15516, a withdrawn paper)",
        ),
    ),
)

TABLE_5 = Table(
    number=5,
    title="Architecture variants of DiCo",
    source="DiCo paper, Table 5",
    published="table5.csv",
    key=("model",),
    rows=tuple(
        Row(f"DiCo-{size.upper()}", Backbone(f"dico_{size}"), {}, f"DiCo-{size.upper()}")
        for size in ("s", "b", "l", "xl", "h")
    ),
    counts_only=True,
    timed=False,
)

TABLES = {table.number: table for table in (TABLE_3, TABLE_4, TABLE_5)}


def train_command(
    table: Table,
    labels: Sequence[str],
    protocol: Protocol,
    seed: int,
    results: Path | None = None,
) -> str:
    """Return the command that trains rows of any table, in a results folder if one is named."""
    script = "ablation.py" if table.number in TABLES else "main_results.py"
    if isinstance(table.number, str):
        script = "related.py"
    if protocol.data.captions:
        script = "text_to_image.py"
    study = own_code().study
    if study:
        script = f"run.py {shlex.quote(str(study.path))}"
    rows = " ".join(f'"{label}"' for label in labels)
    command = (
        f"python experiments/{script} --table {table.number} --rows {rows} "
        f"--protocol {protocol.name} --seeds {seed}"
    )
    return f"{command} --results {shlex.quote(str(results))}" if results else command


if __name__ == "__main__":
    raise SystemExit(main(TABLES, PROTOCOLS, __doc__))
