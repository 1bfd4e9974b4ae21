"""Studies: whose networks carry the digest of a study's code, and what a study must declare."""

from dataclasses import replace
from typing import Any

import pytest

from experiments.ablation import DICO_S
from experiments.declared.protocols import DIGITS
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import Backbone, Cost, canonical, spec_id
from experiments.engine.specs.stages import evaluate_stage, train_stage
from experiments.engine.specs.study import Study, sign

OWN = Backbone("own_net", dict(dim=8))
MIXED = Backbone("hourglass", dict(mixer="shift"))
TABLE = Table(1, "mine", "a test", rows=(DICO_S, Row("own", OWN), Row("mixed", MIXED)))
STUDY = Study((TABLE,), (DIGITS,))
NAMES = {"own_net", "shift"}


def ids(study: Study) -> dict[str, str]:
    rows = study.tables[0].rows
    return {row.label: spec_id(evaluate_stage(row, study.protocols[0], 0)) for row in rows}


def test_only_networks_of_the_study_depend_on_its_digest():
    plain, one, other = ids(STUDY), ids(sign(STUDY, NAMES, "a" * 16)), ids(sign(STUDY, NAMES, "b"))
    assert plain["DiCo-S"] == one["DiCo-S"] == other["DiCo-S"]
    for label in ("own", "mixed"):
        assert len({plain[label], one[label], other[label]}) == 3


def test_every_network_of_a_row_is_signed():
    parts = dict(
        costs=(Cost(OWN, 8, 1, 10), Cost(DICO_S.require_backbone(), 8, 1, 10)),
        classifier=Row("guide", OWN),
        upsampler=Row("large", MIXED),
        start=Row("start", OWN),
    )
    row = sign(Row("system", DICO_S.backbone, OWN, **parts), NAMES, "d")
    assert row.backbone == DICO_S.backbone
    assert [cost.backbone.code for cost in row.costs] == ["d", ""]
    assert isinstance(row.small, Backbone)
    others = (row.small, row.classifier.backbone, row.upsampler.backbone, row.start.backbone)
    assert [backbone.code for backbone in others] == ["d"] * 4


@pytest.mark.parametrize(
    "changes", [dict(small=dict(mixer="shift")), dict(matched={8: dict(mixer="shift")})]
)
def test_a_mixer_that_comes_with_the_small_options_signs_the_row(changes: dict):
    row = sign(Row("hourglass", Backbone("hourglass"), **changes), NAMES, "d")
    assert train_stage(row, DIGITS, 0).backbone.code == "d"


def test_the_digest_survives_further_options():
    assert replace(OWN, code="d").but(dim=4) == Backbone("own_net", dict(dim=4), code="d")


def test_forms_of_networks_of_this_tree_are_those_of_older_records():
    assert canonical(OWN, full=True) == dict(kind="Backbone", name="own_net", options=dict(dim=8))
    assert canonical(replace(OWN, code="d"), full=True)["code"] == "d"


def test_rates_are_found_by_the_network_whatever_its_code():
    backbone = train_stage(Row("own", OWN), DIGITS, 0).backbone
    protocol = replace(DIGITS, rates={spec_id(backbone): 0.25})
    (row,) = sign((Row("own", OWN),), NAMES, "d")
    assert train_stage(row, protocol, 0).recipe.lr == 0.25


NO_TUPLE: Any = TABLE


@pytest.mark.parametrize(
    "study, message",
    [
        (Study((), (DIGITS,)), "declares no Table"),
        (Study((TABLE,), ()), "declares no Protocol"),
        (Study(NO_TUPLE, (DIGITS,)), r"takes a tuple of Tables, such as \(TABLE,\)"),
        (Study((TABLE, TABLE), (DIGITS,)), "two tables have the same name: 1, 1"),
        (Study((replace(TABLE, rows=()),), (DIGITS,)), "table 1 has no rows"),
        (Study((replace(TABLE, outside=(DICO_S,)),), (DIGITS,)), "two rows of table 1 have the"),
        (Study((TABLE,), (DIGITS,), seeds=()), "at least one seed"),
        (Study((TABLE,), (DIGITS,), seeds=(0, 0)), "two seeds have the same name"),
    ],
)
def test_a_study_that_leaves_no_choice_is_refused(study: Study, message: str):
    with pytest.raises(ValueError, match=message):
        study.check()
