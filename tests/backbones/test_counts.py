"""Parameters and multiply-accumulates at the published sizes, on the meta device.

tests/data/counts.csv holds one line per network and size. `source` is `authors` if the numbers were
measured on the authors' modules, and `reconstruction` for DiffuSSM and DiCo with text, whose code
was not published, and for DiMR-XL/3R, whose configuration was not.

- params_total, params_trainable: numbers of parameters, with class labels.
- core_g: billions of multiply-accumulates of convolutions, linear layers and products. A recurrence
  is added in closed form: two per state, channel and token of a scan. DiMSUM's dead projections are
  not counted.
- torchprofile_g: the same by torchprofile's rules, attention as explicit products, queries scaled.
  An upsampler's number holds the resize before it.
- fvcore_g: the count of DiG's and DyDiT's authors, by fvcore; DyDiT's leaves routers out.
- published_g: the paper's own figure.
- entries, keys: length of the state_dict and a digest of its names and shapes. Without a digest
  here, the test of the family has one of a small network.

LDM's label table is a module apart in the authors' code, and is in none of these numbers.
"""

import csv
from functools import cache

import pytest
import torch
from torch import nn

import backbones
from backbones import kernels
from backbones.adm import AttentionBlock
from backbones.ldm import CrossAttention
from experiments.engine.diffusion.cascade import append_low_res
from experiments.engine.specs.spec import Backbone, Cost
from experiments.engine.timing.cost import MacCounter, count_backbone, count_network
from tests.support.authors import digest_shapes
from tests.support.marks import family_of, slow_after_first
from tests.support.paths import DATA

ROWS = list(csv.DictReader((DATA / "counts.csv").open()))
LABEL_TABLES = {"ldm_4": 1001 * 512, "ldm_8": 1000 * 512}
DIG_HIDDEN = {384: 1024, 768: 2048, 1024: 2816, 1152: 3072}  # inner width of its SwiGLU by width


@cache
def counts(name: str, size: int) -> dict[str, int]:
    channels = backbones.options_of(name)["in_channels"]
    return count_backbone(Cost(Backbone(name), size=size, channels=channels, num_classes=1000))


def published(name: str) -> nn.Module:
    with torch.device("meta"):
        return backbones.build(name)


def assert_giga(count: int, written: str) -> None:
    """Four decimals are written."""
    assert abs(count / 1e9 - float(written)) < 0.51e-4


def resize_cost(name: str, size: int) -> int:
    """Multiply-accumulates of the resize before an upsampler, by torchprofile's rules."""
    if not name.startswith("adm_up"):
        return 0
    x = torch.empty(1, 3, size, size, device="meta")
    low_res = torch.empty(1, 3, size // 4, size // 4, device="meta")
    with MacCounter() as macs:
        append_low_res(x, low_res)
    assert macs.core == 0
    return macs.extra


def seen_by_fvcore(name: str, size: int) -> int:
    """Return what fvcore counts of DiG and of DyDiT, which their authors report as Gflops.

    fvcore does not look inside custom autograd functions. So DiG's recurrence is missing, and the
    SwiGLU's down projection, which is fused with the activation: 22 % of the total. A LayerNorm
    counts four per element. DyDiT is counted without its routers, as the dense network.
    """
    options = backbones.options_of(name)
    dim, depth = options["dim"], options["depth"]
    tokens = (size // options["patch"]) ** 2
    norms = (2 * depth + 1) * 4 * tokens * dim

    # What a block has that fvcore does not count.
    if name.startswith("dydit"):
        narrow = dim // 16
        unseen = 2 * dim * (options["heads"] - 1) + tokens * (dim * narrow + narrow)
    else:
        recurrence = 2 * tokens * (dim // 2) * (dim // options["heads"])
        down = tokens * DIG_HIDDEN[dim] * dim
        unseen = recurrence + down
    return counts(name, size)["macs_core"] - depth * unseen + norms


def name_row(row: dict[str, str]) -> str:
    return f"{row['name']} at {row['size']}"


# The smallest network of each family is counted by the fast tests.
@pytest.mark.parametrize(
    "row",
    slow_after_first(
        sorted(ROWS, key=lambda row: float(row["core_g"])),
        lambda row: family_of(row["name"]),
        name_row,
    ),
)
def test_counts_are_those_on_file(row: dict[str, str]):
    """Parameters are exact, and operations agree with every other counter to the digit."""
    name = row["name"]
    size = int(row["size"])
    ours = counts(name, size)
    table = LABEL_TABLES.get(name, 0)
    assert ours["params_total"] == int(row["params_total"]) + table
    if row["params_trainable"]:
        assert ours["params_trainable"] == int(row["params_trainable"]) + table

    # Some rows have counts of other libraries, and some have published ones.
    assert_giga(ours["macs_core"], row["core_g"])
    if row["torchprofile_g"]:
        torchprofile = ours["macs_torchprofile"] + resize_cost(name, size)
        assert_giga(torchprofile, row["torchprofile_g"])
    if row["fvcore_g"]:
        assert_giga(seen_by_fvcore(name, size), row["fvcore_g"])
    if row["published_g"]:
        check_published(row, ours["macs_core"])


def check_published(row: dict[str, str], core: int) -> None:
    """Compare with the paper's figure: its counter meets it, or sees less in a Mamba family."""
    figure = float(row["published_g"])
    if row["torchprofile_g"]:
        # The figure is met to its last digit.
        counted = float(row["fvcore_g"] or row["torchprofile_g"])
        decimals = len(row["published_g"].partition(".")[2])
        assert f"{counted:.{decimals}f}" == row["published_g"]
    elif row["fvcore_g"]:
        assert float(row["fvcore_g"]) == pytest.approx(figure, rel=2e-3)
    elif row["source"] == "authors":
        assert figure < core / 1e9


def test_every_published_size_is_counted():
    assert {row["name"] for row in ROWS} == {
        name for name in backbones.list_backbones() if not backbones.exceptions_of(name).uncounted
    }


def test_the_reconstruction_is_near_the_published_figures():
    """Ours is 9 % and 14 % above them; no variant of the published formula meets both."""
    figures = {row["size"]: row["published_g"] for row in ROWS if row["name"] == "diffussm_xl"}
    small, large = counts("diffussm_xl", 32), counts("diffussm_xl", 64)
    assert small["params_total"] == pytest.approx(673e6, rel=0.006)
    assert small["macs_core"] / 1e9 == pytest.approx(float(figures["32"]), rel=0.09)
    assert large["macs_core"] / 1e9 == pytest.approx(float(figures["64"]), rel=0.145)


def test_the_parameters_of_adm_u_and_of_ldm_with_its_class_table():
    names = backbones.list_backbones("adm_*") + backbones.list_backbones("ldm_*")
    total = {name: sum(p.numel() for p in published(name).parameters()) for name in names}
    assert total["adm_base_64"] + total["adm_up_256"] == 607_700_364
    assert total["adm_base_128"] + total["adm_up_512"] == 730_364_876
    assert (total["ldm_4"], total["ldm_8"]) == (401_433_091, 395_496_196)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row["entries"]], ids=lambda row: str(row["name"])
)
def test_state_dict_has_the_authors_keys(row: dict[str, str]):
    state = published(row["name"]).state_dict()
    if table := LABEL_TABLES.get(row["name"]):
        assert state.pop("cond_stage_model.embedding.weight").shape == (table // 512, 512)
    assert len(state) == int(row["entries"])
    if row["keys"]:
        assert digest_shapes(state) == row["keys"]


@pytest.mark.parametrize(
    "name, heads, order",
    [
        ("adm_base_64", [6] * 3 + [9] * 3 + [12] * 8 + [9] * 4 + [6] * 4, "new"),
        ("adm_base_128", [4] * 16, "legacy"),
        ("adm_256", [8] * 2 + [16] * 11 + [8] * 3, "legacy"),
        ("adm_512", [8] * 2 + [16] * 11 + [8] * 3, "legacy"),
        ("adm_up_256", [4] * 16, "legacy"),
        ("adm_up_512", [12] * 11, "legacy"),
        ("ldm_4", [1] * 32, None),
        ("ldm_8", [8] * 4 + [16] * 4 + [32] * 12 + [16] * 6 + [8] * 6, None),
    ],
)
def test_heads_and_their_order_which_no_count_and_no_key_shows(
    name: str, heads: list[int], order: str | None
):
    modules = published(name).modules()
    blocks = [block for block in modules if isinstance(block, AttentionBlock | CrossAttention)]
    assert [block.heads for block in blocks] == heads
    assert {getattr(block, "order", None) for block in blocks} == {order}


@pytest.mark.parametrize(
    "name, op, choices",
    [
        ("dig_s_2", "gated_linear", ("chunked", "reference")),
        ("diffussm_xl", "diagonal_ssm", ("fft", "reference")),
    ],
)
def test_a_recurrence_counts_the_same_whatever_runs(name: str, op: str, choices: tuple[str, str]):
    model = backbones.build(name, **backbones.tiny_options_of(name), input_size=8)
    inputs = (torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    seen = []
    for choice in choices:
        with torch.no_grad(), kernels.use(**{op: choice}), MacCounter() as macs:
            model(*inputs)
        seen.append((macs.core, macs.extra))
    meta = count_network(model.to("meta"), 8, 4)
    expected = (meta["macs_core"], meta["macs_torchprofile"] - meta["macs_core"])
    assert seen == [expected, expected]
