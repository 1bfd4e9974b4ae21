"""The site file: its keys, what overrides what, and what is refused."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from experiments.engine.cluster.site import Site, load_site, warn_of_unknown_rows
from experiments.engine.records.tree import REPOSITORY
from tests.support.plans import site_file

EXAMPLE = REPOSITORY / "slurm" / "site.example.toml"


def test_the_example_holds_every_key_with_its_default():
    example = tomllib.loads(EXAMPLE.read_text())
    assert example == {key.name: getattr(Site(), key.name) for key in fields(Site)}
    assert load_site("DiCo-S", {"DICO_SLURM_SITE": str(EXAMPLE)}) == Site()


def test_a_row_overrides_the_file_and_the_environment_overrides_both(tmp_path: Path):
    text = """
nodes = 2
partition = "a"
[options]
reservation = "r"
[rows."DiCo-XL"]
nodes = 4
account = "x"
"""

    # The file, without and with a section of the row.
    environment = site_file(tmp_path, text)
    common = dict(partition="a", options={"reservation": "r"})
    assert load_site("DiCo-S", environment) == Site(nodes=2, **common)
    assert load_site("DiCo-XL", environment) == Site(nodes=4, account="x", **common)

    # Variables go before both; options are replaced as a whole.
    environment |= {
        "DICO_SLURM_NODES": "8",
        "DICO_SLURM_SHARD_OPTIMIZER": "true",
        "DICO_SLURM_OPTIONS": "--exclusive reservation='a b'",
    }
    options = {"exclusive": True, "reservation": "a b"}
    assert load_site("DiCo-XL", environment) == Site(
        nodes=8, partition="a", account="x", shard_optimizer=True, options=options
    )


def test_an_option_that_is_false_is_not_passed_on(tmp_path: Path):
    environment = site_file(tmp_path, "[options]\nexclusive = false\noversubscribe = true\n")
    assert load_site("DiCo-S", environment).options == {"oversubscribe": True}


@pytest.mark.parametrize(
    "text, environment, message",
    [
        ("nods = 2", {}, "unknown nods; known: nodes, gpus_per_node"),
        ('[rows."DiCo-S"]\nnods = 2', {}, 'rows."DiCo-S": unknown nods'),
        ('nodes = "2"', {}, "nodes takes a int, not '2'"),
        ("nodes = true", {}, "nodes takes a int, not True"),
        ("nodes = 0", {}, "nodes is 1 or more, not 0"),
        ("keep = 0", {}, "keep is 1 or more, not 0"),
        ("milestones = -1", {}, "milestones is 0 or more, not -1"),
        ("nodes =", {}, "cannot be read"),
        ("rows = 2", {}, "a row is a table of its own"),
        ('time = "24h"', {}, "[days-]hours:minutes:seconds, not '24h'"),
        ('time = "0:03:30"', {}, "less than a minute before the signal"),
        (
            "gpus_per_node = 4\ntasks_per_node = 8",
            {},
            "8 processes per node need as many GPUs, not 4",
        ),
        ('[options]\ntime = "1:00:00"\nsignal = "USR1@60"', {}, "options cannot set signal, time"),
        ("", {"DICO_SLURM_OPTIONS": "--ntasks-per-node=2"}, "options cannot set ntasks-per-node"),
        ('[options]\ngres = "gpu:a100:4"', {}, "options cannot set gres"),
        ("", {"DICO_SLURM_NODS": "2"}, "unknown nods"),
        ("", {"DICO_SLURM_NODES": "two"}, "nodes takes a int, not 'two'"),
        ("", {"DICO_SLURM_SHARD_OPTIMIZER": "maybe"}, "shard_optimizer takes a bool, not 'maybe'"),
    ],
)
def test_a_bad_site_is_one_line(
    text: str, environment: dict[str, str], message: str, tmp_path: Path
):
    with pytest.raises(ValueError) as caught:
        load_site("DiCo-S", site_file(tmp_path, text) | environment)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_site_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="DICO_SLURM_SITE names .*none.toml, which is not a file"):
        load_site("DiCo-S", {"DICO_SLURM_SITE": str(tmp_path / "none.toml")})


@pytest.mark.parametrize(
    "text, seconds", [("24:00:00", 86400), ("2-01:00:30", 176430), ("0:05:00", 300)]
)
def test_time_limits_are_read_as_slurm_writes_them(text: str, seconds: int):
    assert Site(time=text).seconds == seconds


@pytest.mark.parametrize(
    "site, device, world_size",
    [
        (Site(gpus_per_node=0), "cpu", 1),
        (Site(nodes=3), "cuda", 24),
        (Site(nodes=3).alone(), "cuda", 1),
    ],
)
def test_a_node_runs_one_process_per_gpu_or_one_without_gpus(
    site: Site, device: str, world_size: int
):
    assert (site.device, site.world_size) == (device, world_size)


def test_resources_for_a_row_that_no_table_declares_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    environment = site_file(tmp_path, '[rows."DiCo-Q"]\nnodes = 2\n[rows."DiCo-S"]\nnodes = 2\n')
    warn_of_unknown_rows(["DiCo-S", "DiCo-B"], environment)
    assert capsys.readouterr().err == (
        "warning: the site file has resources for 'DiCo-Q', "
        "which no table of this script declares\n"
    )
