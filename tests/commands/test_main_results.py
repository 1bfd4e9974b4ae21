"""Tables 1, 2, 8 and 9: what their rows declare, and which stages follow from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import backbones
from experiments import related
from experiments.ablation import DICO_S
from experiments.declared import recipes
from experiments.declared.families import family_of
from experiments.declared.protocols import (
    DIGITS,
    IMAGENET256,
    IMAGENET256_OWN,
    IMAGENET512,
    PROTOCOLS,
)
from experiments.declared.systems import SYSTEMS
from experiments.engine.jobs.plan import TablePlan
from experiments.engine.records.store import Store
from experiments.engine.specs.rows import Method, Row, Table
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.spec import Cost, Data, Evaluate, spec_id
from experiments.engine.specs.stages import (
    Protocol,
    cost_stages,
    evaluate_stage,
    network,
    timed_rows,
    timing_stage,
    train_stage,
)
from experiments.main_results import (
    ADM_U,
    DIM_H,
    DIMSUM_L,
    DIT_XL,
    SIT_XL,
    TABLE_1,
    TABLE_8,
    TABLES,
    UVIT_H,
)
from tests.support.main_rows import SMALL_ROWS, SMALL_TRAININGS

NETWORKS = [
    pytest.param(table, row, id=f"{table.number} {row.label}")
    for table in TABLES.values()
    for row in table.rows
    if row.backbone
]
METHODS = {name: value for name, value in vars(recipes).items() if isinstance(value, Method)}


# ---- Which rows there are


def test_every_published_diffusion_system_has_a_network_but_two():
    numbers_only = {row.published for row in TABLE_8.rows if row.backbone is None}
    published = Store().published("table8.csv", ("model",))
    diffusion = {model for model, cells in published.items() if cells["type"] == "Diff."}
    assert numbers_only & diffusion == {"Simple Diffusion", "VDM++"}


@pytest.mark.parametrize("number, names", [(8, ["d16", "d20", "d24", "d30"]), (9, ["d36-s"])])
def test_rows_that_draw_scales_are_counted_and_not_run(number: int, names: list[str]):
    """Diffusion's trainings and timings never meet them."""
    table = TABLES[number]
    labels = [f"VAR-{name}" for name in names]
    rows = [row for row in table.rows if row.label.startswith("VAR")]
    assert [row.label for row in rows] == labels
    selection = Selection(table, rows, DIGITS, [0], "cpu")
    assert selection.counted == rows and not selection.runs and not selection.timings
    (job,) = TablePlan(selection).counts()
    assert [stage.backbone.name for stage in job.stages] == [
        label.lower().replace("-", "_") for label in labels
    ]


def test_the_networks_are_of_twelve_families():
    rows = [row for table in TABLES.values() for row in table.rows]
    assert len({family_of(row.backbone.name) for row in rows if row.backbone}) == 12


def test_a_family_is_one_run_on_digits():
    """Eleven families and U-DiT are one network each.

    ADM's are six more: two base models alone and in a cascade, and two networks that are guided at
    a scale each.
    """
    assert len(SMALL_ROWS) == 12 + 6
    small = {row.label for row in TABLE_1.rows if _digits_network(row) == "dit_s_2"}
    assert {"DiT-S/2", "DiT-XL/2 (w/ CFG)"} <= small


def test_adms_bases_and_classifiers_are_trained_apart_where_they_differ():
    """At 4x4 the betas differ between the bases, and between the classifiers.

    The 12 families add two bases and two classifiers each at 4x4 and 8x8, but at 8x8 there is one
    classifier; and there is one upsampler.
    """
    assert len(SMALL_TRAININGS) == 12 + 4 + 2 + 1 + 1


def _digits_network(row: Row) -> str:
    return train_stage(row, DIGITS, 0).backbone.name


def test_dico_on_digits_is_the_baseline_of_table_4():
    row = TABLE_1.row("DiCo-XL (w/ CFG)")
    assert spec_id(evaluate_stage(row, DIGITS, 1)) == spec_id(evaluate_stage(DICO_S, DIGITS, 1))


@pytest.mark.parametrize("table, row", NETWORKS)
def test_counted_systems_are_those_of_the_counts_table(table: Table, row: Row):
    resolution = 512 if table.number in (2, 9) else 256
    systems = [system for system in SYSTEMS if system.resolution == resolution]
    known = {spec_id(cost) for system in systems for cost in system.costs}
    assert {spec_id(cost) for cost in cost_stages(row)} <= known


def test_a_reconstruction_is_marked_in_every_table():
    rows = [row for table in TABLES.values() for row in table.rows]
    published = [row for row in rows if row.published == "DiffuSSM-XL"]
    assert published
    for row in published:
        assert row.label == "DiffuSSM-XL (reconstruction)"
        assert "no code was published" in row.note
    assert [row for row in rows if row.label.startswith("DiffuSSM")] == published


@pytest.mark.parametrize("protocol", [DIGITS, IMAGENET512], ids=lambda protocol: protocol.name)
@pytest.mark.parametrize("row", SMALL_ROWS.values(), ids=lambda row: row.label)
def test_a_network_is_built_at_the_size_of_the_protocol(row: Row, protocol: Protocol):
    """ImageNet at 512, since ADM's network for 512 pixels halves a latent of side 32 too often."""
    backbone = network(row, protocol)
    data = train_stage(row, protocol, 0).data
    with torch.device("meta"):
        model = backbones.build(backbone.name, **backbone.options)
    assert model.in_channels == data.channels
    assert model.num_classes == data.num_classes
    assert backbone.options["input_size"] == data.size


# ---- Recipes


@pytest.mark.parametrize(
    "row, objective, sampler",
    [
        (SIT_XL, "flow", "sde"),
        (DIMSUM_L, "flow", "dopri5"),
        (UVIT_H, "iddpm", "dpm_solver"),
        (DIM_H, "iddpm", "dpm_solver"),
        (ADM_U, "iddpm", "ancestral"),
    ],
    ids=lambda value: value.label if isinstance(value, Row) else value,
)
def test_on_digits_the_common_recipe_has_a_methods_objective(
    row: Row, objective: str, sampler: str
):
    stage = evaluate_stage(row, DIGITS, 0)
    assert stage.train.diffusion.name == objective
    assert stage.sampler.name == sampler
    assert stage.sampler.channels is None
    assert stage.num == DIGITS.num

    # ADM is trained without dropping labels, and clips since it works in pixels.
    recipe = stage.train.recipe
    assert replace(recipe, label_dropout=0.1) == DIGITS.recipe
    assert recipe.label_dropout == (0 if row is ADM_U else 0.1)
    assert stage.sampler.clip == (row is ADM_U)


@pytest.mark.parametrize("row", [SIT_XL, DIMSUM_L, UVIT_H, DIM_H, ADM_U], ids=lambda row: row.label)
def test_under_own_recipes_a_method_keeps_its_recipe_and_sampler(row: Row):
    stage = evaluate_stage(row, IMAGENET256_OWN, 0)
    assert stage.train.recipe == row.method.recipe
    assert stage.sampler == row.method.sampler


def test_a_size_of_dit_has_the_length_of_training_of_the_protocol():
    assert train_stage(DIT_XL, DIGITS, 0) == train_stage(TABLE_1.baseline, DIGITS, 0)
    assert train_stage(DIT_XL, IMAGENET256, 0).recipe.steps == 400_000
    assert train_stage(DIT_XL, IMAGENET256_OWN, 0).recipe.steps == 7_000_000


# Steps, batch, learning rate, dropped labels; sampler, its steps and its scale.
PAPERS_RECIPES = {
    "DICO_H": (1_000_000, 1024, 2e-4, 0.1, "ancestral", 250, 1.4),
    "DICO_XL": (3_750_000, 256, 1e-4, 0.1, "ancestral", 250, 1.4),
    "UVIT_L": (300_000, 1024, 2e-4, 0.15, "dpm_solver", 50, 1.4),
    "UVIT_H_512": (500_000, 1024, 2e-4, 0.1, "dpm_solver", 50, 1.7),
    "DIM": (625_000, 768, 2e-4, 0.1, "dpm_solver", 50, 1.4),
    "DIMSUM": (928_118, 704, 1e-4, 0.15, "dopri5", 250, 1.4),
    "SIT": (7_000_000, 256, 1e-4, 0.1, "sde", 250, 1.5),
}


@pytest.mark.parametrize("name", PAPERS_RECIPES)
def test_recipes_are_those_of_the_papers(name: str):
    """Figures as the papers have them, typed a second time."""
    recipe = METHODS[name].recipe
    sampler = METHODS[name].sampler
    trained = (recipe.steps, recipe.batch, recipe.lr, recipe.label_dropout)
    sampled = (sampler.name, sampler.num_steps, sampler.scale)
    assert (*trained, *sampled) == PAPERS_RECIPES[name]


def test_single_figures_of_recipes_are_those_of_the_papers():
    assert METHODS["ADM_64"].recipe.label_dropout == 0
    sampler = METHODS["LDM_4"].sampler
    assert (sampler.name, sampler.num_steps, sampler.scale) == ("ddim", 250, 1.25)
    assert recipes.DIM.recipe.betas == (0.99, 0.99)
    assert recipes.DIM.recipe.eps == 1e-15
    assert recipes.DIM.recipe.weight_decay == 0.03
    assert recipes.DIM.recipe.grad_clip == 1.0


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_recipe_names_its_source(method: Method):
    assert method.source


# ---- ADM


def adm_u(protocol: str) -> Evaluate:
    """The cascade ADM-U under a protocol."""
    number = 2 if protocol == "imagenet512_own" else 1
    return evaluate_stage(TABLES[number].row("ADM-U"), PROTOCOLS[protocol], 0)


@pytest.mark.parametrize(
    "protocol, sides, betas, scale",
    [
        ("digits", [4, 4, 8], "cosine", 1.0),
        ("imagenet256_own", [64, 64, 256], "cosine", 1.0),
        ("imagenet512_own", [128, 128, 512], "linear", 0.5),
    ],
)
def test_adm_u_is_a_guided_base_and_an_upsampler_in_pixels(
    protocol: str, sides: list[int], betas: str, scale: float
):
    stage = adm_u(protocol)
    assert [training.data.size for training in stage.trainings] == sides
    inputs = [training.backbone.options["input_size"] for training in stage.trainings]
    assert inputs == sides

    # The base and its classifier share the betas.
    assert stage.train.diffusion.betas == betas
    assert stage.classifier.diffusion.betas == betas
    assert stage.classifier.diffusion.name == "classify"
    assert stage.sampler.classifier_scale == scale
    assert stage.sampler.clip

    # The upsampler takes the small image beside its own, and no classifier guides it.
    assert stage.data == stage.upsampler.data
    assert stage.upsampler.diffusion.betas == "linear"
    assert stage.upsampler.diffusion.low_res == sides[0]
    assert stage.upsampler.backbone.options["in_channels"] == 2 * stage.data.channels
    assert stage.upsampling.classifier_scale == 0.0
    assert stage.upsampling.clip


def test_adm_u_at_256_is_made_of_three_published_networks():
    stage = adm_u("imagenet256_own")
    names = [training.backbone.name for training in stage.trainings]
    assert names == ["adm_base_64", "adm_classifier_64", "adm_up_256"]
    assert stage.data == Data("imagenet256_pixels", 256, 3, 1000, flip=True)


def test_on_latents_adm_u_is_its_base_alone():
    stage = adm_u("imagenet256")
    assert stage.trainings == (stage.train,)
    assert stage.sampler.classifier_scale == 0.0
    assert stage.sampler.clip is False

    alone = TABLE_1.row("ADM-64")
    assert evaluate_stage(alone, IMAGENET256, 0) == stage
    base = Cost(alone.backbone, 64, 3, 1000)
    assert cost_stages(alone)[0] == base
    assert cost_stages(ADM_U)[0] == base


@pytest.mark.parametrize("number, side, scale", [(1, 256, 1.0), (2, 512, 4.0)])
def test_adm_g_is_guided_at_the_scale_of_its_size(number: int, side: int, scale: float):
    stage = evaluate_stage(TABLES[number].row("ADM-G"), PROTOCOLS[f"imagenet{side}_own"], 0)
    names = [training.backbone.name for training in stage.trainings]
    assert names == [f"adm_{side}", f"adm_classifier_{side}"]
    assert {training.data.size for training in stage.trainings} == {side}
    assert stage.sampler.classifier_scale == scale


# ---- Timings


def timed_labels(device: str) -> list[str]:
    rows = timed_rows(TABLE_1, TABLE_1.rows, device, named=False)
    return [row.label for row in rows]


def test_heavy_networks_are_timed_on_a_cpu_only_when_they_are_named():
    small = ["DiT-S/2", "DiC-S", "DiG-S/2", "DiCo-S"]
    base = ["DiT-B/2", "DiC-B", "DiG-B/2", "DiCo-B"]
    assert timed_labels("cpu") == [*small, *base]
    assert timed_labels("cuda") == [row.label for row in TABLE_1.rows]
    assert timed_rows(TABLE_1, [DIT_XL], "cpu", named=True) == [DIT_XL]


def test_a_table_without_published_speed_is_not_timed():
    assert timed_rows(TABLE_8, TABLE_8.rows, "cuda", named=True) == []


def test_what_is_only_counted_and_timed_is_timed_at_its_own_latents():
    at_1024 = related.TABLE_V2_11
    stages = [timing_stage(row, at_1024.baseline, "cpu") for row in at_1024.rows]
    assert at_1024.counts_only and [stage.size for stage in stages] == [128, 128]
    assert timed_rows(related.RELATED, related.RELATED.rows, "cuda", named=True) == []

    # LightningDiT's latents are not its baseline's, and DiCo there has no known network.
    table = related.TABLE_V2_13
    timed = timed_rows(table, table.rows, "cpu", named=True)
    assert [row.label for row in timed] == ["REPA", "LightningDiT"]
    stage = timing_stage(timed[1], table.baseline, "cpu")
    assert (stage.size, stage.channels, stage.baseline_input) == (16, 32, (32, 4))


def test_latents_are_timed_at_the_size_of_the_table():
    assert timing_stage(TABLES[2].rows[-1], TABLES[2].baseline, "cuda").size == 64
    assert timing_stage(DIT_XL, TABLE_1.baseline, "cuda").size == 32


@pytest.mark.parametrize(
    "number, side, batch, latent, upsampler",
    [(1, 64, 64, 32, ("adm_up_256", 256)), (2, 128, 16, 64, ("adm_up_512", 512))],
)
def test_a_cascade_is_timed_whole_at_its_own_input(
    number: int, side: int, batch: int, latent: int, upsampler: tuple[str, int]
):
    table = TABLES[number]
    timing = timing_stage(table.row("ADM-U"), table.baseline, "cuda")
    assert timing.size == side
    assert timing.channels == 3
    assert timing.batch == batch
    assert [(part.backbone.name, part.size) for part in timing.parts] == [upsampler]

    # The baseline beside it works on latents.
    assert timing.baseline_input == (latent, 4)


def test_a_row_of_another_latent_is_timed_at_its_own_input():
    ldm = timing_stage(TABLE_1.row("LDM-4"), TABLE_1.baseline, "cpu")
    assert ldm.size == 64
    assert ldm.channels == 3
    assert ldm.baseline_input == (32, 4)
    assert ldm.parts == ()


def test_a_row_of_the_common_latent_shares_the_baselines_input():
    dit = timing_stage(TABLE_1.row("DiT-B/2"), TABLE_1.baseline, "cpu")
    assert dit.baseline_input is None
    assert dit.parts == ()
    assert dit.batch == 4
