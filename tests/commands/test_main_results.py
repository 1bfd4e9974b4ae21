"""Tables 1, 2, 8 and 9: what their rows declare, what runs for them, and what they print."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import backbones
from experiments.ablation import DICO_S
from experiments.declared import recipes
from experiments.declared.protocols import (
    DIGITS,
    IMAGENET256,
    IMAGENET256_OWN,
    IMAGENET512,
    PROTOCOLS,
)
from experiments.declared.systems import SYSTEMS
from experiments.engine.cli import main
from experiments.engine.data.sets import load
from experiments.engine.diffusion.build import build_diffusion
from experiments.engine.diffusion.cascade import System
from experiments.engine.diffusion.samplers import bind_sampler
from experiments.engine.numerics.weights import digest
from experiments.engine.records.store import Store
from experiments.engine.reporting.tables import main_sheet, report_sheets
from experiments.engine.sampling.counting import CountingModel
from experiments.engine.sampling.generate import generate_images
from experiments.engine.specs.rows import Method, Row, Table
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.spec import Cost, Data, Train, spec_id
from experiments.engine.specs.stages import (
    cost_stages,
    evaluate_stage,
    network,
    timed_rows,
    timing_stage,
    train_stage,
)
from experiments.engine.training.trainer import Trainer, build
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
from tests.support.sheets import note_texts

ROWS = [
    pytest.param(table, row, id=f"{table.number} {row.label}")
    for table in TABLES.values()
    for row in table.rows
]
NETWORKS = [param for param in ROWS if param.values[1].backbone]
METHODS = {name: value for name, value in vars(recipes).items() if isinstance(value, Method)}
SMALL = {
    spec_id(evaluate_stage(row, DIGITS, 0)): row
    for table in TABLES.values()
    for row in (*table.outside, *table.rows)
    if row.backbone
}
TRAININGS = {
    spec_id(training): pytest.param(
        training, id=f"{row.label}, {training.backbone.name} at {training.data.size}"
    )
    for row in SMALL.values()
    for training in evaluate_stage(row, DIGITS, 0).trainings
}
PROVENANCE = {"device": "cpu", "cpu": "a", "torch": "b", "dirty": False, "seconds": 1.0}


def test_every_diffusion_system_that_has_a_network_is_one():
    numbers_only = {row.published for row in TABLE_8.rows if row.backbone is None}
    diffusion = {
        key
        for key, cells in Store().published("table8.csv", ("model",)).items()
        if cells["type"] == "Diff."
    }
    assert numbers_only & diffusion == {"Simple Diffusion", "VDM++"}
    assert (
        len(
            {
                row.backbone.name.split("_")[0]
                for table in TABLES.values()
                for row in table.rows
                if row.backbone
            }
        )
        == 12
    )


def test_a_family_is_one_run_on_digits():
    assert len(SMALL) == 12 + 6
    # These are eleven families and U-DiT, ADM's two base models alone and in a cascade, and two
    # networks of ADM guided at a scale each.
    # ADM's bases at 4x4 and 8x8 differ in their betas, as do the classifiers at 4x4. There is one
    # classifier at 8x8, and one upsampler.
    assert len(TRAININGS) == 12 + 4 + 2 + 1 + 1
    assert {"DiT-S/2", "DiT-XL/2 (w/ CFG)"} <= {
        row.label for row in TABLE_1.rows if train_stage(row, DIGITS, 0).backbone.name == "dit_s_2"
    }
    dico = next(row for row in TABLE_1.rows if row.label == "DiCo-XL (w/ CFG)")
    assert spec_id(evaluate_stage(dico, DIGITS, 1)) == spec_id(
        evaluate_stage(DICO_S, DIGITS, 1)
    )  # Table 4's


@pytest.mark.parametrize("table, row", NETWORKS)
def test_counted_systems_are_those_of_the_counts_table(table: Table, row: Row):
    known = {
        spec_id(cost)
        for system in SYSTEMS
        for cost in system.costs
        if system.resolution == (512 if table.number in (2, 9) else 256)
    }
    assert {spec_id(cost) for cost in cost_stages(row)} <= known


@pytest.mark.parametrize(
    "row",
    [
        row
        for row in {row.label: row for table in TABLES.values() for row in table.rows}.values()
        if row.label.startswith("DiffuSSM")
    ],
    ids=lambda row: row.label,
)
def test_a_reconstruction_is_marked(row: Row):
    assert row.label == "DiffuSSM-XL (reconstruction)"
    assert "no code was published" in row.note
    for table in TABLES.values():
        assert all(
            "reconstruction" in other.label
            for other in table.rows
            if other.published == "DiffuSSM-XL"
        )


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
@pytest.mark.parametrize("table, row", NETWORKS)
def test_network_objective_and_sampler_fit_each_other(table: Table, row: Row, protocol: Any):
    stage = evaluate_stage(row, protocol, 0)
    bind_sampler(
        stage.sampler, build_diffusion(stage.train.diffusion)
    )  # the process has this sampler
    options = (
        backbones.registry.options_of(stage.train.backbone.name) | stage.train.backbone.options
    )
    assert stage.train.recipe.label_dropout == 0 or options.get("null_label", True)
    assert stage.sampler.scale == 1 or stage.train.recipe.label_dropout > 0
    scale = protocol.sampler.scale if stage.train.recipe.label_dropout else 1
    assert protocol.own or (
        stage.sampler.scale == scale and stage.sampler.num_steps <= protocol.sampler.num_steps
    )


@pytest.mark.parametrize("spec", TRAININGS.values())
def test_a_familys_loss_trains_all_of_its_small_network(spec: Train):
    """Every live parameter has a gradient once no gate is closed, and the loss is finite."""
    draw = torch.Generator().manual_seed(0)
    model = build(spec.backbone, 0, torch.device("cpu"))
    objective = build_diffusion(spec.diffusion)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=draw)
    x0, eps = (torch.randn(4, 1, spec.data.size, spec.data.size, generator=draw) for _ in range(2))
    y = torch.tensor([0, 3, 9, 10 if spec.recipe.label_dropout else 1])
    loss = objective.losses(model, x0, y, objective.draw_times(4, draw), eps)["loss"]
    loss.mean().backward()
    assert loss.shape == (4,)
    assert loss.isfinite().all()
    dead = {
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    }
    # A softmax is 1 on LDM's one context token and on U-DiT's single tokens. The released DiMSUM
    # does not use one of its projections.
    known = {
        "ldm": ("attn2.to_q", "attn2.to_k", "norm2"),
        "udit": ("latent.0.attn1.logit_scale", "latent.0.attn2.logit_scale"),
        "dimsum": ("cond_proj",),
    }
    assert all(
        any(part in name for part in known.get(spec.backbone.name.split("_")[0], ()))
        for name in dead
    ), dead


@pytest.mark.parametrize("row", SMALL.values(), ids=lambda row: row.label)
def test_every_family_trains_and_samples_on_digits(row: Row):
    stage = evaluate_stage(row, DIGITS, 0)
    networks = {}
    for name in ("train", "classifier", "upsampler"):
        if training := getattr(stage, name):
            trainer = Trainer(replace(training, recipe=replace(training.recipe, steps=2, batch=4)))
            before = digest(trainer.model)
            losses = [loss.item() for loss in trainer.steps(load(training.data))]
            assert len(losses) == 2
            assert all(math.isfinite(loss) for loss in losses)
            assert digest(trainer.ema.eval()) != before
            networks[name] = trainer.ema
    stage = replace(
        stage,
        sampler=replace(stage.sampler, num_steps=3),
        upsampling=stage.upsampling and replace(stage.upsampling, num_steps=3),
        num=2,
    )
    counted = CountingModel(
        System(networks["train"], networks.get("classifier"), networks.get("upsampler"))
        if len(networks) > 1
        else networks["train"]
    )
    ((x, y),) = generate_images(stage, counted, torch.device("cpu"), 2)
    assert x.shape == (2, 1, 8, 8)
    assert x.isfinite().all()
    assert not torch.equal(x[0], x[1])
    assert y.tolist() == [0, 1]
    assert counted.evaluated == 2 * 3 * (2 if "upsampler" in networks else 1) or (
        stage.sampler.name == "dopri5" and counted.evaluated >= 2 * 8
    )


def test_the_common_recipe_with_a_methods_objective():
    for row, objective, sampler in (
        (SIT_XL, "flow", "sde"),
        (DIMSUM_L, "flow", "dopri5"),
        (UVIT_H, "iddpm", "dpm_solver"),
        (DIM_H, "iddpm", "dpm_solver"),
        (ADM_U, "iddpm", "ancestral"),
    ):
        stage = evaluate_stage(row, DIGITS, 0)
        assert stage.train.diffusion.name == objective
        assert stage.sampler.name == sampler
        assert stage.sampler.channels is None
        assert stage.num == DIGITS.num
        assert replace(stage.train.recipe, label_dropout=0.1) == DIGITS.recipe
        assert stage.train.recipe.label_dropout == (0 if row is ADM_U else 0.1)
        own = evaluate_stage(row, IMAGENET256_OWN, 0)
        assert own.train.recipe == row.method.recipe
        assert own.sampler == row.method.sampler
        assert stage.sampler.clip == (row is ADM_U)  # pixels
    assert train_stage(DIT_XL, DIGITS, 0) == replace(train_stage(TABLE_1.baseline, DIGITS, 0))
    assert train_stage(DIT_XL, IMAGENET256, 0).recipe.steps == 400_000
    assert train_stage(DIT_XL, IMAGENET256_OWN, 0).recipe.steps == 7_000_000


def test_adm_u_is_a_guided_base_and_an_upsampler_in_pixels_and_its_base_alone_on_latents():
    on_digits, own, on_latents = (
        evaluate_stage(ADM_U, protocol, 0) for protocol in (DIGITS, IMAGENET256_OWN, IMAGENET256)
    )
    for stage, sides, betas in (
        (on_digits, (4, 4, 8), "cosine"),
        (own, (64, 64, 256), "cosine"),
        (
            evaluate_stage(TABLES[2].row("ADM-U"), PROTOCOLS["imagenet512_own"], 0),
            (128, 128, 512),
            "linear",
        ),
    ):
        assert tuple(training.data.size for training in stage.trainings) == sides
        assert stage.data == stage.upsampler.data
        assert (
            tuple(training.backbone.options["input_size"] for training in stage.trainings) == sides
        )
        assert stage.train.diffusion.betas == stage.classifier.diffusion.betas == betas
        assert stage.classifier.diffusion.name == "classify"
        assert stage.upsampler.diffusion.betas == "linear"
        assert stage.upsampler.diffusion.low_res == sides[0]
        assert stage.upsampler.backbone.options["in_channels"] == 2 * stage.data.channels
        assert stage.sampler.classifier_scale == {4: 1.0, 64: 1.0, 128: 0.5}[sides[0]]
        assert stage.upsampling.classifier_scale == 0.0
        assert stage.sampler.clip
        assert stage.upsampling.clip
    assert [training.backbone.name for training in own.trainings] == [
        "adm_base_64",
        "adm_classifier_64",
        "adm_up_256",
    ]
    assert own.data == Data("imagenet256_pixels", 256, 3, 1000, flip=True)
    assert on_latents.trainings == (on_latents.train,)
    assert on_latents.sampler.classifier_scale == 0.0
    assert on_latents.sampler.clip is False
    alone = TABLE_1.row("ADM-64")
    assert evaluate_stage(alone, IMAGENET256, 0) == on_latents
    assert cost_stages(ADM_U)[0] == cost_stages(alone)[0] == Cost(alone.backbone, 64, 3, 1000)


def test_adm_g_is_guided_at_the_scale_of_its_size():
    for number, side, scale in ((1, 256, 1.0), (2, 512, 4.0)):
        stage = evaluate_stage(TABLES[number].row("ADM-G"), PROTOCOLS[f"imagenet{side}_own"], 0)
        assert [training.backbone.name for training in stage.trainings] == [
            f"adm_{side}",
            f"adm_classifier_{side}",
        ]
        assert stage.sampler.classifier_scale == scale
        assert {training.data.size for training in stage.trainings} == {side}


def test_recipes_are_those_of_the_papers():
    """Figures as the facts have them, typed a second time."""
    found = {
        name: (
            m.recipe.steps,
            m.recipe.batch,
            m.recipe.lr,
            m.recipe.label_dropout,
            m.sampler.name,
            m.sampler.num_steps,
            m.sampler.scale,
        )
        for name, m in METHODS.items()
    }
    assert found["DICO_H"] == (1_000_000, 1024, 2e-4, 0.1, "ancestral", 250, 1.4)
    assert found["DICO_XL"] == (3_750_000, 256, 1e-4, 0.1, "ancestral", 250, 1.4)
    assert found["UVIT_L"] == (300_000, 1024, 2e-4, 0.15, "dpm_solver", 50, 1.4)
    assert found["UVIT_H_512"] == (500_000, 1024, 2e-4, 0.1, "dpm_solver", 50, 1.7)
    assert found["DIM"] == (625_000, 768, 2e-4, 0.1, "dpm_solver", 50, 1.4)
    assert found["DIMSUM"] == (928_118, 704, 1e-4, 0.15, "dopri5", 250, 1.4)
    assert found["SIT"] == (7_000_000, 256, 1e-4, 0.1, "sde", 250, 1.5)
    assert found["ADM_64"][3] == 0
    assert found["LDM_4"][4:] == ("ddim", 250, 1.25)
    assert recipes.DIM.recipe.betas == (0.99, 0.99)
    assert recipes.DIM.recipe.eps == 1e-15
    assert recipes.DIM.recipe.weight_decay == 0.03
    assert recipes.DIM.recipe.grad_clip == 1.0
    assert all(method.source for method in METHODS.values())


def test_heavy_networks_are_timed_on_a_cpu_only_when_they_are_named():
    assert [row.label for row in timed_rows(TABLE_1, TABLE_1.rows, "cpu", named=False)] == [
        f"{family}"
        for size in "SB"
        for family in (f"DiT-{size}/2", f"DiC-{size}", f"DiG-{size}/2", f"DiCo-{size}")
    ]
    on_gpu = [row.label for row in timed_rows(TABLE_1, TABLE_1.rows, "cuda", named=False)]
    assert on_gpu == [row.label for row in TABLE_1.rows]
    assert timed_rows(TABLE_1, [DIT_XL], "cpu", named=True) == [DIT_XL]
    assert timed_rows(TABLE_8, TABLE_8.rows, "cuda", named=True) == []
    assert timing_stage(TABLES[2].rows[-1], TABLES[2].baseline, "cuda").size == 64
    assert timing_stage(DIT_XL, TABLE_1.baseline, "cuda").size == 32


def test_a_row_is_timed_at_its_own_input_and_a_cascade_whole():
    at_256, at_512 = (
        timing_stage(TABLES[number].row("ADM-U"), TABLES[number].baseline, "cuda")
        for number in (1, 2)
    )
    assert at_256.size == 64
    assert at_256.channels == 3
    assert at_256.batch == 64
    assert at_256.baseline_input == (32, 4)
    assert at_512.size == 128
    assert at_512.channels == 3
    assert at_512.batch == 16
    assert at_512.baseline_input == (64, 4)
    assert [(part.backbone.name, part.size) for part in (*at_256.parts, *at_512.parts)] == [
        ("adm_up_256", 256),
        ("adm_up_512", 512),
    ]
    ldm, dit = (
        timing_stage(TABLE_1.row(label), TABLE_1.baseline, "cpu") for label in ("LDM-4", "DiT-B/2")
    )
    assert ldm.size == 64
    assert ldm.channels == 3
    assert ldm.baseline_input == (32, 4)
    assert ldm.parts == ()
    assert dit.baseline_input is None
    assert dit.parts == ()
    assert dit.batch == 4


def cells(store: Store, table: Table) -> dict[str, dict[str, str]]:
    sheet = main_sheet(Selection(table, table.rows, DIGITS, (0,), "cpu"), store, store.here)
    return {
        row["row"].text(): {
            f"{column.group} {column.title}".strip(): cell.text(column.digits)
            for column, cell in sheet.cells(row)
        }
        for row in sheet.rows
    }


def test_systems_are_counted_whole_and_numbers_stay_numbers(tmp_path: Path):
    store = Store(tmp_path)
    for params, cost in zip((300_000_000, 311_000_000), cost_stages(ADM_U), strict=True):
        store.append(
            cost,
            "done",
            {"params_trainable": params, "macs_torchprofile": 10**11, "macs_core": 10**11 - 1},
            PROVENANCE,
        )
    found = cells(store, TABLE_8)
    assert found["ADM-U"]["params, M ours"] == "611.0"
    assert found["ADM-U"]["Gflops ours"] == "200.00"
    assert found["ADM-U"]["params, M paper"] == "608M"
    assert {name for name, text in found["MAR-H"].items() if text != "-"} == {
        "row",
        "type",
        "params, M paper",
        *(f"paper: ImageNet 256 {score}" for score in ("FID", "IS", "P", "R")),
    }
    assert found["MAR-H"]["paper: ImageNet 256 FID"] == "1.55"
    assert found["MAR-H"]["type"] == "AR"


def test_evaluations_per_image_are_noted_by_row_where_they_differ(tmp_path: Path):
    store = Store(tmp_path)
    scores = {
        "fd_digits": 1.0,
        "is_digits": 8.0,
        "precision_digits": 0.5,
        "recall_digits": 0.5,
        "agreement": 0.9,
    }
    for row, nfe in ((SIT_XL, 50.0), (DIT_XL, 50.0), (DIMSUM_L, 62.375)):
        store.append(evaluate_stage(row, DIGITS, 0), "done", scores | {"nfe": nfe}, PROVENANCE)
    same, different, none = (
        [
            text
            for sheet in report_sheets(Selection(TABLE_8, rows, DIGITS, (0,), "cpu"), store)
            for text in note_texts(sheet)
            if "evaluations" in text
        ]
        for rows in ([SIT_XL, DIT_XL], TABLE_8.rows, [ADM_U])
    )
    assert same == ["Network evaluations per image: 50."]
    assert not none
    assert different == ["Network evaluations per image: 50: DiT-XL/2, SiT-XL; 62.38: DiMSUM-L/2."]


@pytest.mark.parametrize(
    "number, columns",
    [
        (1, {"paper, A100 rel.", "paper: ImageNet 256 steps", "paper: ImageNet 256 guided"}),
        (9, {"type", "params, M paper"}),
    ],
)
def test_a_table_has_the_columns_that_were_published(
    number: int, columns: set[str], tmp_path: Path
):
    found = set(next(iter(cells(Store(tmp_path), TABLES[number]).values())))
    assert columns <= found
    assert bool(columns & {"type"}) == ("type" in found)
    assert ("paper, A100 rel." in found) == (number == 1)
    assert ("params, M paper" in found) == (number == 9)


def test_a_network_is_built_at_the_size_of_the_protocol():
    for row in SMALL.values():
        for protocol in (
            DIGITS,
            IMAGENET512,
        ):  # ADM's network for 512 pixels halves its input too often for a latent of side 32
            backbone = network(row, protocol)
            data = train_stage(row, protocol, 0).data
            with torch.device("meta"):
                model = backbones.build(backbone.name, **backbone.options)
            assert (model.in_channels, model.num_classes, backbone.options["input_size"]) == (
                data.channels,
                data.num_classes,
                data.size,
            ), row.label


def test_a_papers_own_recipes_are_for_its_own_resolution(capsys: pytest.CaptureFixture[str]):
    arguments = ["--table", "2", "--protocol", "imagenet256_own", "--dry-run"]
    assert main(TABLES, PROTOCOLS, None, arguments) == 2
    assert capsys.readouterr().err == (
        "error: the recipes of table 2 are for latents of side 64, but protocol imagenet256_own "
        "has 32; choose imagenet512_own\n"
    )
