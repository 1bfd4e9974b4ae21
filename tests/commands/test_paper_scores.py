"""The paper's scores beside ours: of the same network, under the same guidance, or none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from backbones import list_backbones
from experiments.declared.checkpoints import nearest_row
from experiments.declared.paper_scores import PAPERS, lines_beside_paper
from experiments.declared.protocols import PROTOCOLS
from experiments.engine.records.store import Store
from experiments.engine.specs.spec import Backbone, Checkpoint, Evaluate, Sampler
from experiments.engine.specs.stages import evaluate_stage
from experiments.main_results import TABLE_1, TABLES

# FID as the paper prints it, guided and unguided, by network and side: of Tables 1 and 2, and what
# Tables 8 and 9 alone have.
PAPER = {
    256: {
        "dit_s_2": ("", "68.40"),
        "dit_b_2": ("", "43.47"),
        "dit_l_2": ("", "23.33"),
        "dit_xl_2": ("2.27", "19.47"),
        "dic_s": ("", "58.68"),
        "dic_b": ("", "32.33"),
        "dic_xl": ("", "13.11"),
        "dic_h": ("2.25", ""),
        "dig_s_2": ("", "62.06"),
        "dig_b_2": ("", "39.50"),
        "dig_l_2": ("", "22.90"),
        "dig_xl_2": ("2.07", "18.53"),
        "dico_s": ("", "49.97"),
        "dico_b": ("", "27.20"),
        "dico_l": ("", "13.66"),
        "dico_xl": ("2.05", "11.67"),
        "dico_h": ("1.90", ""),
        "ldm_4": ("3.95", ""),
        "uvit_l_2": ("3.40", ""),
        "uvit_h_2": ("2.29", ""),
        "sit_xl_2": ("2.06", ""),
        "dim_h": ("2.21", ""),
        "dis_h_2": ("2.10", ""),
        "diffussm_xl": ("2.28", ""),
        "dimsum_l_2": ("2.11", ""),
    },
    512: {
        "dit_xl_2": ("3.04", "12.03"),
        "dico_xl": ("2.53", "7.48"),
        "sit_xl_2": ("2.62", ""),
        "uvit_l_4": ("4.67", ""),
        "uvit_h_4": ("4.05", ""),
        "dim_h": ("3.78", ""),
        "dis_h_2": ("2.88", ""),
        "diffussm_xl": ("3.41", ""),
    },
}
SYSTEMS = {
    256: ({"adm_base_64", "adm_up_256", "adm_classifier_64"}, "3.94"),
    512: ({"adm_base_128", "adm_up_512", "adm_classifier_128"}, "3.85"),
}
SCORED = {
    "num": 50_000,
    "fid": 2.1,
    "fid_se": 0.01,
    "is": 280.0,
    "is_se": float("nan"),
    "sfid": 4.0,
    "warnings": ["careful"],
}
OTHERWISE = "drawn otherwise than its own recipe says: "


def lines_of(name: str, side: int, guided: bool) -> list[str]:
    """The lines that are printed of a checkpoint of this network, sampled at this size."""
    protocol = PROTOCOLS[f"imagenet{side}"]
    sampler = replace(protocol.sampler, scale=1.5 if guided else 1.0)
    checkpoint = Checkpoint(Backbone(name), protocol.data, "0" * 64)
    spec = Evaluate(checkpoint, sampler, 50_000, "inception")
    return lines_beside_paper(SCORED, name, spec, Store(), TABLES)


def note_among(lines: list[str]) -> str:
    """The line that says which row of the paper stands beside ours, or why there is none."""
    (note,) = [line for line in lines if line.startswith(("  paper: ", "  the paper has "))]
    return note


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("side", PAPER)
@pytest.mark.parametrize("name", list_backbones())
def test_every_network_finds_the_papers_value_under_its_own_guidance_and_no_other(
    name: str, side: int, guided: bool
):
    with_guidance, without = PAPER[side].get(name, ("", ""))
    fid, other = (with_guidance, without) if guided else (without, with_guidance)
    systems, system_fid = SYSTEMS[side]
    guidance = "guided" if guided else "unguided"

    # The first line is FID, and the warnings stand at the end.
    lines = lines_of(name, side, guided)
    assert lines[0].endswith(f"2.1000 ± 0.0100   paper {fid}" if fid else "2.1000 ± 0.0100")
    assert lines[-1] == "  warning: careful"

    note = note_among(lines)
    if fid:
        assert note.startswith("  paper: arXiv:2505.11196v1 Table ")
        assert note.endswith(f", {guidance}")
    elif name in systems:
        assert "only within a system of" in note
        assert f": FID-50K {system_fid}, " in note
    elif other:
        assert f"no {guidance} row of this network, only" in note
    else:
        assert note == "  the paper has no such row"


@pytest.mark.parametrize("side", PAPER)
def test_every_published_system_with_a_network_is_among_them(side: int):
    """No row of a network is left out of the list that the test above reads."""
    tables = [TABLES[number] for number in PAPERS[f"imagenet{side}"]]
    rows = [row for table in tables for row in table.rows]
    names = {row.backbone.name for row in rows if row.backbone}
    systems, _ = SYSTEMS[side]
    assert names - systems == set(PAPER[side])


@pytest.mark.parametrize(
    "side, steps", [(512, "3,000,000 training steps"), (256, "400,000 training steps")]
)
def test_the_longest_training_stands_beside_ours(side: int, steps: str):
    assert f"{steps}, unguided" in "\n".join(lines_of("dico_xl", side, guided=False))


def test_what_was_drawn_otherwise_than_in_its_own_paper_is_said():
    own_scale = f"{OTHERWISE}scale 1.5, not 1.4 (--protocol imagenet256_own"
    assert own_scale in "\n".join(lines_of("dico_xl", 256, guided=True))
    own_sampler = f"{OTHERWISE}name ancestral, not sde"
    assert own_sampler in "\n".join(lines_of("sit_xl_2", 512, guided=True))
    assert OTHERWISE not in "\n".join(lines_of("dit_xl_2", 256, guided=True))


def test_the_note_of_a_row_stands_beside_its_score():
    assert "a reconstruction" in "\n".join(lines_of("diffussm_xl", 256, guided=True))


def test_scores_on_a_classifiers_features_bear_their_own_names_and_no_published_value():
    values = {
        "num": 50_000,
        "fd_cifar_classifier": 3.25,
        "fd_cifar_classifier_se": 0.5,
        "precision_cifar_classifier": 0.75,
    }

    # The paper has no score by another classifier.
    data = PROTOCOLS["cifar10_classifier"].data
    checkpoint = Checkpoint(Backbone("dico_xl"), data, "0" * 64)
    spec = Evaluate(checkpoint, Sampler(), 50_000, "cifar_classifier")
    assert lines_beside_paper(values, "dico_xl", spec, Store(), TABLES) == [
        "  fd_cifar_classifier 3.2500 ± 0.5000",
        "  precision_cifar_classifier 0.7500",
        "  the paper has no such row",
    ]


def test_guidance_is_that_of_the_images_and_not_of_the_protocol():
    """The row of the paper is guided, and the protocol of own recipes is not."""
    own = PROTOCOLS["imagenet256_own"]
    assert own.sampler.scale == 1
    spec = evaluate_stage(TABLE_1.row("DiCo-XL (w/ CFG)"), own, 0)
    text = "\n".join(lines_beside_paper(SCORED, "dico_xl", spec, Store(), TABLES))
    assert "unguided" not in text
    assert "FID-50K" in text
    assert "2.1000 ± 0.0100   paper 2.05" in text
    assert "paper 282.17" in text
    assert "sFID-50K       4.0000\n" in text


@pytest.mark.parametrize("side", PAPER)
def test_the_nearest_row_of_a_network_is_its_guided_one(side: int):
    row = nearest_row("dico_xl", PROTOCOLS[f"imagenet{side}_own"], TABLES)
    assert row.method.sampler.scale > 1
