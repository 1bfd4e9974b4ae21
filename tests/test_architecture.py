"""The arrows of the design, read from every file's imports, and what no committed file may hold."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import backbones

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    str(path.relative_to(ROOT)): path
    for folder in ("backbones", "experiments", "analysis", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
CODE = [name for name in FILES if not name.startswith("tests/")]
GPU_LIBRARIES = {"flash_attn", "mamba_ssm", "fla", "causal_conv1d"}
OPTIONAL = GPU_LIBRARIES | {
    "pynvml",
    "torchvision",
    "torch_fidelity",
    "submitit",
    "diffusers",
    "plotly",
    "itables",
    "selenium",
    "nbclient",
    "nbformat",
}
# The floors of experiments/engine, from top to bottom. A file imports its own floor and lower ones.
FLOORS = (
    "cli",
    "choices",
    "cluster",
    "benchmarks",
    "jobs",
    "scoring",
    "sampling",
    "timing",
    "training",
    "judges",
    "texts",
    "data",
    "runtime",
    "reporting",
    "diffusion",
    "autoregressive",
    "records",
    "numerics",
    "specs",
    "machine",
)
LIGHT_ENGINE = (
    "benchmarks/footprint benchmarks/session benchmarks/spec benchmarks/targets choices cli "
    "cluster/client cluster/launch cluster/local cluster/nested cluster/site cluster/slurm "
    "cluster/status cluster/submit data/locate jobs/estimate jobs/job jobs/memory jobs/plan "
    "jobs/pool jobs/progress "
    "jobs/scheduled machine/cores machine/environment machine/gpu machine/lifetime "
    "machine/sockets machine/streams "
    "records/code records/comparison records/effects records/files records/manifest "
    "records/score_names records/store records/weight_files "
    "reporting/efficiency/claims reporting/efficiency/counts "
    "reporting/efficiency/details reporting/efficiency/images "
    "reporting/efficiency/inference/predicted reporting/efficiency/inference/sheets "
    "reporting/efficiency/memory reporting/efficiency/memory_sheet "
    "reporting/efficiency/predicted_sheets reporting/efficiency/predictions "
    "reporting/efficiency/roofline reporting/efficiency/savings reporting/efficiency/speed "
    "reporting/lookup reporting/notes "
    "reporting/render reporting/sheet reporting/statistics reporting/tables specs/rows specs/spec "
    "runtime/attempts runtime/heartbeat runtime/preemption runtime/progress specs/selection "
    "specs/stages specs/study specs/latent_space specs/weights"
)
LIGHT = [
    *(f"experiments/engine/{name}.py" for name in LIGHT_ENGINE.split()),
    *(
        name
        for name in CODE
        if re.fullmatch(
            r"(experiments(/declared)?|analysis(/(claims|evidence|figures|page|tables))?)/\w+\.py",
            name,
        )
    ),
]


@cache
def imports(name: str, lazy: bool = True) -> tuple[str, ...]:
    """Return the modules that a file imports, `from a import b` as a and a.b.

    Without `lazy`, only imports at the top level count.
    """
    return tuple(_walk_imports(ast.parse(FILES[name].read_text()), lazy))


def _walk_imports(tree: ast.AST, lazy: bool) -> Iterator[str]:
    """Walk the tree, but not into functions and what only types need, unless asked to."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))
        elif lazy or not (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or _for_types_only(node)
        ):
            waiting += ast.iter_child_nodes(node)


def _for_types_only(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def packages(name: str, lazy: bool = True) -> set[str]:
    return {module.partition(".")[0] for module in imports(name, lazy)}


def within(name: str, folder: str) -> list[str]:
    return [
        module for module in imports(name) if module == folder or module.startswith(f"{folder}.")
    ]


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git repository here")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def files_of(*folders: str) -> list[str]:
    return [name for name in CODE if name.startswith(folders)]


def test_imports_are_absolute():
    relative = {name: [each for each in imports(name) if each.startswith(".")] for name in CODE}
    assert not without_empty(relative)


def without_empty(found: Mapping[str, Collection[str]]) -> dict[str, Collection[str]]:
    """Return the files that break a rule, with what breaks it."""
    return {name: what for name, what in found.items() if what}


def test_backbones_import_torch_and_nothing_of_the_suite():
    foreign = {}
    for name in files_of("backbones/"):
        known = {"backbones", "torch", "timm", "numpy", "safetensors"} | sys.stdlib_module_names
        known |= GPU_LIBRARIES if name.startswith("backbones/kernels/") else set()
        known |= {"triton"} if re.fullmatch(r"backbones/kernels/\w+_triton\.py", name) else set()
        foreign[name] = packages(name) - known
    assert not without_empty(foreign)


def test_parts_of_networks_import_downward():
    upward = {}
    for folder, below in (
        ("backbones/mixers/", {"kernels", "mixers", "layers"}),
        ("backbones/kernels/", {"kernels"}),
    ):
        for name in files_of(folder):
            parts = {module.split(".")[1] for module in within(name, "backbones")}
            upward[name] = parts - below
    assert upward
    assert not without_empty(upward)


def test_experiments_do_not_import_analysis():
    upward = {name: within(name, "analysis") for name in files_of("experiments/")}
    assert not without_empty(upward)


def test_engine_imports_its_own_floor_and_those_below():
    upward = {}
    for name in files_of("experiments/engine/"):
        if name == "experiments/engine/__init__.py":
            continue
        floor = FLOORS.index(name.removesuffix(".py").split("/")[2])
        below = tuple(f"experiments.engine.{each}." for each in FLOORS[floor:])
        others = [module for module in within(name, "experiments") if module.count(".") >= 2]
        upward[name] = [module for module in others if not f"{module}.".startswith(below)]
    assert not without_empty(upward)


def test_folders_hold_at_most_twelve_modules():
    rooms = Counter(
        name.rpartition("/")[0]
        for name in CODE
        if not name.endswith("__init__.py") and not name.startswith("backbones/")
    )
    del rooms["experiments"]  # a script a verb
    assert not {room: number for room, number in rooms.items() if number > 12}


def test_no_imports_form_a_circle():
    known = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in CODE
    }
    graph = {
        module: {other for other in imports(name) if other in known and other != module}
        for module, name in known.items()
        if not name.endswith("__init__.py")
    }
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_engine_names_no_backbone():
    names = set(backbones.list_backbones())
    found = {}
    for name in files_of("experiments/engine/"):
        imported = set(within(name, "backbones")) - {"backbones", "backbones.kernels"}
        strings = [
            node.value
            for node in ast.walk(ast.parse(FILES[name].read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        found[name] = imported | {w for text in strings for w in re.findall(r"\w+", text)} & names
    assert not without_empty(found)


def test_declarations_and_reports_import_no_torch_at_the_top():
    heavy = {"torch", "timm", "numpy", "scipy", "sklearn", "rich", "backbones"}
    assert not without_empty({name: packages(name, lazy=False) & heavy for name in LIGHT})


def test_no_torch_is_loaded_by_declarations_and_reports():
    modules = ", ".join(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in LIGHT
    )
    code = f"import sys, {modules}\nprint(*{{'torch', 'timm', 'numpy'}} & set(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not loaded.stdout.strip()


def test_optional_libraries_are_imported_where_they_are_used():
    found = {}
    for name in FILES:
        found[name] = packages(name, lazy=False) & OPTIONAL
        if not name.startswith(("backbones/kernels/", "tests/")):
            found[name] |= packages(name) & GPU_LIBRARIES
    assert not without_empty(found)


def test_files_are_short():
    lines = {name: len(FILES[name].read_text().splitlines()) for name in CODE}
    assert not {name: number for name, number in lines.items() if number > 400}


def test_the_lock_names_no_server():
    assert "://" not in (ROOT / "requirements.lock").read_text()


def test_no_committed_file_holds_a_machine_path():
    machine = re.compile(
        rb"(?<![\w.:/-])/(?:home|root|Users|work|mnt|scratch)/\w|\b[A-Z]:\\Users\\"
    )
    found = [
        (str(path.relative_to(ROOT)), match.group())
        for path in tracked()
        if b"\0" not in (text := path.read_bytes())
        for match in machine.finditer(text)
    ]
    assert not found
