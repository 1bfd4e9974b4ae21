"""What every system of Tables 1, 2, 5, 8 and 9 costs, counted.

Each published Gflops figure stands beside our count in the convention that reproduces it and beside `core`, which is one
rule for all: every convolution, linear layer, matrix product and recurrence. A counter that cannot see inside a fused
operator leaves out what it holds; the notes say how much, from the counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from experiments.engine.records.store import RecordFolder, Store
from experiments.engine.reporting.sheet import Cell, Sheet
from experiments.engine.specs.spec import Backbone, Cost

Counts = dict[str, int]


@dataclass(frozen=True)
class System:
    """A system at one resolution. `saw` gives the count that its published figure shows; None where none reproduces it.

    Numbers in a note are fields that `notes` fills: {hidden}, {above} and {quadruple}.
    """

    label: str
    resolution: int
    costs: tuple[Cost, ...]
    saw: Callable[[Counts], float] | None = None
    convention: str = ""
    gflops: tuple[str, str] | None = None
    params: tuple[str, str] | None = None
    note: str = ""
    reconstruction: bool = False

    @property
    def title(self) -> str:
        return f"{self.label} (reconstruction)" if self.reconstruction else self.label


def latent(name: str, size: int, channels: int = 4) -> tuple[Cost, ...]:
    return (Cost(Backbone(name), size, channels, 1000),)


def torchprofile(counts: Counts) -> float:
    return counts["macs_torchprofile"]


def norms(counts: Counts) -> float:
    return counts["macs_norms"]


def fvcore(counts: Counts) -> float:
    """fvcore on a network without custom operators: products, and 5 an element of an affine norm, which `norms` counts once."""
    return counts["macs_core"] + 5 * (counts["macs_norms"] - counts["macs_core"])


def uvit_torchprofile(depth: int, dim: int) -> Callable[[Counts], float]:
    """torchprofile on U-ViT's own code, whose attention scales the logits, where ours scales the queries."""
    tokens, heads = 258, 16
    return lambda counts: counts["macs_torchprofile"] + depth * tokens * (heads * tokens - dim)


def dig_fvcore(dim: int, depth: int, heads: int, hidden: int) -> Callable[[Counts], float]:
    """fvcore on DiG: no recurrence and no SwiGLU down-projection (both in custom functions); a LayerNorm is 4 an element."""
    tokens = 256
    hidden_from_it = depth * (2 * tokens * (dim // 2) * (dim // heads) + tokens * hidden * dim)
    return lambda counts: counts["macs_core"] - hidden_from_it + (2 * depth + 1) * 4 * tokens * dim


def dim_fvcore(tokens: int, dim: int = 1536, depth: int = 49) -> Callable[[Counts], float]:
    """fvcore on DiM: causal convolution, x_proj, dt_proj, scan and out_proj are inside one fused operator."""
    inner, state, rank = 2 * dim, 16, dim // 16
    hidden_from_it = depth * tokens * inner * (3 + (rank + 2 * state) + rank + 2 * state + dim)
    return lambda counts: counts["macs_core"] - hidden_from_it


def dimsum_calflops(counts: Counts) -> float:
    """calflops on DiMSUM-L/2: no `@` products (in_proj, dt_proj), no attention products, no scan."""
    tokens, dim, blocks, shared, state, rank = 256, 1024, 16, 4, 16, 32
    mamba = (
        2 * blocks * tokens * dim * (dim + rank + 2 * state)
    )  # two half-width branches a block, each dim wide inside
    return counts["macs_core"] - mamba - (blocks + shared) * 2 * tokens**2 * dim


def published(table: int, model: str) -> tuple[str, str]:
    return f"table{table}.csv", model


def plain(label: str, name: str, table: int, **more: object) -> System:
    """A 256-pixel row that torchprofile reproduces."""
    return System(
        label, 256, latent(name, 32), torchprofile, "torchprofile", published(table, label), **more
    )


UNET_NOTE = "the DiT paper's figure: one step of the base model and one of the upsampler, without the classifier that guides"
DIG_NOTE = "fvcore does not see the SwiGLU down-projection and the recurrence: its count is {hidden} below core"
DIM_NOTE = "fvcore sees of a Mamba block only its input projection: its count is {hidden} below core; pad tokens are processed and counted"
DIMSUM_NOTE = "calflops does not see products written with @, attention's products and the scan; its count, here reconstructed, to a tenth of a per cent of what it gives itself, is {hidden} below core"
DIS_NOTE = "the paper prints no Gflops; its parameters are those of the unconditional pixel model"
SIT_NOTE = "a sampling step of its SDE calls the network twice in the authors' code, here once"
DIFFUSSM_NOTE = "a reconstruction: no code was published, and no variant meets both resolutions; core is {above} above the published figure"

SYSTEMS = (
    System("ADM-U", 256, latent("adm_base_64", 64, 3) + latent("adm_up_256", 256, 6), norms, "norms", published(1, "ADM-U"), published(8, "ADM-U"), UNET_NOTE),
    System("ADM-U", 512, latent("adm_base_128", 128, 3) + latent("adm_up_512", 512, 6), norms, "norms", published(2, "ADM-U"), published(9, "ADM-U"), UNET_NOTE),
    System("LDM-4", 256, latent("ldm_4", 64, 3), note="the paper prints none; ours includes the table of classes"),
    System("U-ViT-L/2", 256, latent("uvit_l_2", 32), fvcore, "fvcore", published(8, "U-ViT-L/2"), published(8, "U-ViT-L/2"), "copied from U-ViT's paper, which counted with another tool and rounded"),
    System("U-ViT-H/2", 256, latent("uvit_h_2", 32), uvit_torchprofile(29, 1152), "torchprofile", published(1, "U-ViT-H/2"), published(8, "U-ViT-H/2")),
    System("U-ViT-L/4", 512, latent("uvit_l_4", 64), uvit_torchprofile(21, 1024), "torchprofile", published(2, "U-ViT-L/4"), published(9, "U-ViT-L/4")),
    System("U-ViT-H/4", 512, latent("uvit_h_4", 64), uvit_torchprofile(29, 1152), "torchprofile", published(2, "U-ViT-H/4"), published(9, "U-ViT-H/4")),
    System("DiM-H", 256, latent("dim_h", 32), dim_fvcore(366), "fvcore, opaque", published(1, "DiM-H"), published(8, "DiM-H"), DIM_NOTE),
    System("DiM-H", 512, latent("dim_h", 64), dim_fvcore(1230), "fvcore, opaque", published(2, "DiM-H"), published(9, "DiM-H"), DIM_NOTE),
    System("DiS-H/2", 256, latent("dis_h_2", 32), params=published(8, "DiS-H/2"), note=DIS_NOTE),
    System("DiS-H/2", 512, latent("dis_h_2", 64), params=published(9, "DiS-H/2"), note=DIS_NOTE),
    System("DiffuSSM-XL", 256, latent("diffussm_xl", 32), None, "derived", published(1, "DiffuSSM-XL"), published(8, "DiffuSSM-XL"), DIFFUSSM_NOTE, True),
    System("DiffuSSM-XL", 512, latent("diffussm_xl", 64), None, "derived", published(2, "DiffuSSM-XL"), published(9, "DiffuSSM-XL"), DIFFUSSM_NOTE, True),
    System("DiMSUM-L/2", 256, latent("dimsum_l_2", 32), dimsum_calflops, "calflops", published(1, "DiMSUM-L/2"), published(8, "DiMSUM-L/2"), DIMSUM_NOTE),
    plain("DiT-S/2", "dit_s_2", 1),
    plain("DiT-B/2", "dit_b_2", 1),
    plain("DiT-L/2", "dit_l_2", 1),
    plain("DiT-XL/2", "dit_xl_2", 1, params=published(8, "DiT-XL/2")),
    System("DiT-XL/2", 512, latent("dit_xl_2", 64), torchprofile, "torchprofile", published(2, "DiT-XL/2"), published(9, "DiT-XL/2")),
    System("SiT-XL", 256, latent("sit_xl_2", 32), torchprofile, "torchprofile", published(8, "SiT-XL"), published(8, "SiT-XL"), SIT_NOTE),
    System("SiT-XL", 512, latent("sit_xl_2", 64), torchprofile, "torchprofile", published(9, "SiT-XL"), published(9, "SiT-XL"), SIT_NOTE),
    plain("DiC-S", "dic_s", 1),
    plain("DiC-B", "dic_b", 1),
    plain("DiC-XL", "dic_xl", 1),
    plain("DiC-H", "dic_h", 1, params=published(8, "DiC-H")),
    System("DiG-S/2", 256, latent("dig_s_2", 32), dig_fvcore(384, 12, 6, 1024), "fvcore, opaque", published(1, "DiG-S/2"), note=DIG_NOTE),
    System("DiG-B/2", 256, latent("dig_b_2", 32), dig_fvcore(768, 12, 12, 2048), "fvcore, opaque", published(1, "DiG-B/2"), note=DIG_NOTE),
    System("DiG-L/2", 256, latent("dig_l_2", 32), dig_fvcore(1024, 24, 16, 2816), "fvcore, opaque", published(1, "DiG-L/2"), note=DIG_NOTE),
    System("DiG-XL/2", 256, latent("dig_xl_2", 32), dig_fvcore(1152, 28, 18, 3072), "fvcore, opaque", published(1, "DiG-XL/2"), published(8, "DiG-XL/2"), DIG_NOTE),
    plain("DiCo-S", "dico_s", 5, params=published(5, "DiCo-S")),
    plain("DiCo-B", "dico_b", 5, params=published(5, "DiCo-B")),
    plain("DiCo-L", "dico_l", 5, params=published(5, "DiCo-L")),
    plain("DiCo-XL", "dico_xl", 5, params=published(5, "DiCo-XL")),
    plain("DiCo-H", "dico_h", 5, params=published(5, "DiCo-H")),
    System(
        "DiCo-XL", 512, latent("dico_xl", 64), torchprofile, "torchprofile", published(2, "DiCo-XL"), published(9, "DiCo-XL"),
        "the published figure cannot be reached: every cost is constant or proportional to the area, so four times that at 256, {quadruple}, is the most",
    ),
)  # fmt: skip


def counts_sheet(store: Store, source: RecordFolder | None = None) -> Sheet:
    """One row a system: published, ours in the published convention, and core. No torch."""
    source = source or store.here
    columns = [
        ("", "system"),
        ("", "pixels"),
        ("params, M", "paper"),
        ("params, M", "ours"),
        ("Gflops", "paper"),
        ("Gflops", "ours, same counter"),
    ]
    columns += [
        ("Gflops", "diff. %"),
        ("Gflops", "core"),
        ("Gflops", "core, diff. %"),
        ("", "counter"),
    ]
    sheet = Sheet(
        "Parameters and Gflops of the compared systems (DiCo paper, Tables 1, 2, 5, 8, 9)", columns
    )
    for system in SYSTEMS:
        paper = _published(store, system.gflops, "gflops")
        params, ours, core = counted(system, store, source)
        cells = [
            Cell(label=system.title),
            Cell(label=str(system.resolution)),
            _params(store, system),
            params,
            paper,
        ]
        sheet.rows.append(
            [
                *cells,
                ours,
                difference(ours, paper),
                core,
                difference(core, paper),
                Cell(label=system.convention or "-"),
            ]
        )
    sheet.notes = notes(
        [
            (f"{system.title} at {system.resolution}", system, row[4])
            for system, row in zip(SYSTEMS, sheet.rows, strict=True)
        ],
        store,
        source,
    )
    sheet.notes.append(
        "Gflops are multiply-accumulates at batch 1; params are all parameters, frozen position tables included."
    )
    return sheet


def notes(
    named: Iterable[tuple[str, System, Cell]], store: Store, source: RecordFolder
) -> list[str]:
    """What is said of systems by name, beside their published Gflops, once where it is said of several; a number without its record is a gap."""
    together: dict[str, list[tuple[str, System, Cell]]] = {}
    for one in named:
        if one[1].note:
            together.setdefault(one[1].note, []).append(one)
    return [
        f"{', '.join(name for name, _, _ in group)}: {_filled(note, group, store, source)}."
        for note, group in together.items()
    ]


def _filled(
    note: str, group: list[tuple[str, System, Cell]], store: Store, source: RecordFolder
) -> str:
    """hidden: by how much the published counter's figure is below core; above: by how much core is above the published figure;

    quadruple: four times the figure of the same network at 256.
    """
    measured = [(paper, *counted(system, store, source)[1:]) for _, system, paper in group]
    hidden = [
        -100 * (same.value / core.value - 1)
        for _, same, core in measured
        if same.value and core.value
    ]
    above = [
        100 * (core.value / paper.value - 1)
        for paper, _, core in measured
        if paper.value and core.value
    ]
    at_256 = [
        counted(other, store, source)[1]
        for other in SYSTEMS
        if (other.label, other.resolution) == (group[0][1].label, 256)
    ]
    quadruple = [Cell(4 * cell.value).text() for cell in at_256 if cell.value]
    return note.format(
        hidden=_span(hidden), above=_span(above), quadruple=quadruple[0] if quadruple else "-"
    )


def _span(shares: list[float]) -> str:
    ends = [f"{end:.0f}" for end in (min(shares), max(shares))] if shares else ["-"]
    return f"{' to '.join(dict.fromkeys(ends))} %"


def counted(system: System, store: Store, source: RecordFolder) -> tuple[Cell, Cell, Cell]:
    """All parameters in millions, Gflops in the convention of the published figure, and core Gflops; gaps where a record lacks."""
    records = tuple(record for cost in system.costs if (record := source.latest(cost)))
    if len(records) < len(system.costs):
        return Cell(), Cell(), Cell()
    total = {name: sum(record.values[name] for record in records) for name in records[0].values}
    same = Cell(system.saw(total) / 1e9, records=records) if system.saw else Cell()
    return (
        Cell(total["params_total"] / 1e6, None, 1, records=records),
        same,
        Cell(total["macs_core"] / 1e9, records=records),
    )


def difference(ours: Cell, paper: Cell) -> Cell:
    """In per cent of the published number."""
    return (
        Cell()
        if ours.value is None or paper.value is None
        else Cell(100 * (ours.value / paper.value - 1), records=ours.records)
    )


def _published(store: Store, where: tuple[str, str] | None, column: str) -> Cell:
    text = store.published(where[0], ("model",))[where[1]][column] if where else ""
    return Cell(float(text), None, len(text.partition(".")[2])) if text else Cell()


def _params(store: Store, system: System) -> Cell:
    """Tables 8 and 9 print 675M or 1.0B, Table 5 millions."""
    if system.params is None:
        return Cell()
    row = store.published(system.params[0], ("model",))[system.params[1]]
    return Cell(label=row.get("params") or row["params_m"])
