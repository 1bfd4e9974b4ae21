"""Variables of the environment: what is set to nothing is not set, and one reader reads them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.engine.cluster.site import Site, load_site
from experiments.engine.machine.environment import read_number, read_variable
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.runtime.group import ALONE, Group, group_from_environment

PRINT_PLACES = """
from experiments.engine.data import locate
from experiments.engine.cli import Parser, add_results_option
parser = Parser()
add_results_option(parser)
print(locate.ROOT, locate.inception_path(), locate.vae_source(), parser.parse_args([]).results)
"""


@pytest.mark.parametrize(
    ("value", "meant"),
    [("x", "x"), (" x", " x"), ("", None), (" ", None), ("\t\n", None), ("0", "0")],
)
def test_an_empty_variable_is_not_set(value: str, meant: str | None):
    assert read_variable("A", {"A": value}) == meant and read_variable("B", {"A": value}) is None


def test_a_number_is_a_number_or_one_line():
    assert read_number("A", {"A": "7"}) == 7 and read_number("A", {"A": ""}) is None
    with pytest.raises(ValueError, match="A takes a whole number, not 'seven'"):
        read_number("A", {"A": "seven"})


@pytest.mark.parametrize("value", ["", " "])
def test_places_are_the_usual_ones_where_variables_are_empty(value: str, tmp_path: Path):
    names = ("DICO_DATA", "DICO_INCEPTION", "DICO_VAE", "RESULTS")
    done = subprocess.run(
        [sys.executable, "-c", PRINT_PLACES],
        cwd=tmp_path,
        env=dict.fromkeys(names, value) | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    data = REPOSITORY / "data"
    inception = data / "weights-inception-2015-12-05-6726825d.pth"
    assert done.stdout.split() == [str(data), str(inception), "sd-vae-ft-ema", "None"]


@pytest.mark.parametrize("name", ["SITE", "PARTITION", "NODES", "COMPILE", "OPTIONS", "TIME"])
def test_empty_variables_change_no_resource(name: str, tmp_path: Path):
    site = tmp_path / "site.toml"
    site.write_text('partition = "gpu"\nnodes = 2\n')
    environment = {"DICO_SLURM_SITE": str(site), f"DICO_SLURM_{name}": ""}
    usual = Site() if name == "SITE" else Site(partition="gpu", nodes=2)
    assert load_site("DiCo-S", environment) == usual


@pytest.mark.parametrize(
    ("environment", "group"),
    [
        ({"RANK": "", "WORLD_SIZE": ""}, ALONE),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": ""}, Group(1, 2, 0)),
        ({"SLURM_PROCID": "", "SLURM_STEP_ID": "0"}, ALONE),
        ({"SLURM_PROCID": "1", "SLURM_STEP_ID": ""}, ALONE),
        ({"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, Group(1, 2, 0)),
    ],
)
def test_empty_ranks_are_no_ranks(environment: dict[str, str], group: Group):
    assert group_from_environment(environment) == group


def test_every_variable_is_read_through_one_reader():
    """Code may copy or change the environment as a whole, but it reads no name from it."""
    direct = ("os.getenv", "os.environb", "os.environ.get")
    found = []
    for path in (*REPOSITORY.glob("experiments/**/*.py"), *REPOSITORY.glob("analysis/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_read = isinstance(node, ast.Attribute) and ast.unparse(node) in direct
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
                is_read = ast.unparse(node.value) == "os.environ"
            if is_read:
                found.append(f"{path}:{node.lineno}")
    assert not found


def test_shell_scripts_give_every_variable_a_default_for_emptiness():
    """`${NAME-default}` and `${NAME+set}` take an empty variable for a set one."""
    for path in REPOSITORY.glob("slurm/*.sh"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for part in line.split("${")[1:]:
                name = part.split("}")[0].split(":")[0]
                assert not set("-=+?") & set(name.rstrip("@")), f"{path.name}:{number}: {line}"
