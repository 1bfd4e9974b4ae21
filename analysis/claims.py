"""A verdict on every claim of the paper, computed from committed records and published tables. No torch.

Evidence, from strong to weak: counted (a network here, exactly), measured here (at the claim's scale), measured at reduced
scale (the digits protocol, three seeds, probes one; of speed a CPU in place of the claim's GPU), published data only (the paper's tables checked against its words), not yet.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from analysis.probes.declared import declared
from analysis.query import Sources, rankable
from experiments import speed_claims
from experiments.ablation import TABLE_3, TABLE_4
from experiments.engine.report import Cell, Sheet
from experiments.engine.rows import Table
from experiments.engine.spread import pooled, reach, scaled
from experiments.engine.store import Record
from experiments.protocols import DIGITS, timing_stage
from experiments.speed_claims import half_digit

COUNTED, MEASURED, REDUCED, PUBLISHED, NOT_YET = LEVELS = (
    "counted", "measured here", "measured at reduced scale", "published data only", "not yet",
)  # fmt: skip
UNFUSED = {("selective_scan", "loop"): "the scan as a loop over tokens", ("gated_linear", "chunked"): "gated linear attention in chunks of plain PyTorch"}
Claim = dict[str, str]


@dataclass(frozen=True)
class Finding:
    """`value` with `error` in words; `basis` says what was set against what."""

    evidence: str
    value: str
    verdict: str
    basis: str
    error: str = ""
    records: tuple[Record, ...] = ()


def judge(claim: Claim, store: Sources) -> Finding:
    """The strongest evidence there is; open where published data that it needs is unfit. ValueError for a claim that no rule judges."""
    kind = claim["metric"], claim["relation"]
    rule = BY_ID.get(claim["id"]) or BY_KIND.get(kind)
    if rule is None:
        raise ValueError(f"claim {claim['id']}: no rule for {' and '.join(map(repr, kind))}; known: {', '.join(map(repr, BY_KIND))}, or by id {', '.join(BY_ID)}")
    try:
        return rule(claim, store)
    except ValueError as error:
        return Finding(NOT_YET, "", "open", str(error))


def claims_sheet(store: Sources) -> Sheet:
    """One row a claim of results/published/claims.csv; its basis leads to all records that were read to judge it."""
    columns = ["claim", "says", "paper", "evidence", "value", "error", "verdict", "basis", "source"]
    sheet = Sheet("Claims of the paper", [("", name) for name in columns])
    levels = []
    for claim in store.rows("claims.csv"):
        with store.noting() as noted:
            finding = judge(claim, store)
        levels.append(finding.evidence)
        words = [claim["id"], claim["claim"], claim["value"] or "-", finding.evidence, finding.value or "-", finding.error or "-", finding.verdict, finding.basis]
        cells = [Cell(words=text) for text in (*words, claim["source"].removeprefix("arXiv:2505.11196v1 "))]
        own = finding.records if any(character.isdigit() for character in finding.error) else ()
        for at, records in ((4, finding.records), (5, own), (7, tuple(noted.values()))):
            cells[at] = replace(cells[at], records=records)
        sheet.rows.append(cells)
    sheet.notes.append(f"{len(levels)} claims: " + ", ".join(f"{levels.count(level)} {level}" for level in LEVELS if level in levels) + ".")
    sheet.notes.append(
        "reproduced: the printed value to its last digit, or the order with every difference resolved. consistent: the paper's own tables give what its "
        "words say; nothing was run. not resolved: the spread over seeds is larger than the difference. open: nothing here bears on it yet."
    )
    return sheet


def _throughput(claim: Claim, store: Sources) -> Finding:
    """On a GPU; else by the claim's networks on a CPU, a proxy; else by the published table, small networks on a CPU beside it for scale."""
    if measured := _measured_speed(claim, store, "cuda"):
        return measured
    names = claim["subject"], claim["baseline"]
    speeds = [_published(name, "throughput_img_s", store) for name in names]
    missing = " and ".join(name for name, speed in zip(names, speeds, strict=True) if speed is None)
    if missing:
        printed = f"the paper prints no throughput of {missing}, and no GPU record is committed"
    else:
        printed = f"Table {1 if names[0].endswith('@256') else 2}: {speeds[0]:g} over {speeds[1]:g} img/s on an A100; no GPU record here"
    if proxy := _measured_speed(claim, store, "cpu"):
        return replace(proxy, basis=f"{proxy.basis}; {printed}")
    small = speed_claims.small_on_cpu(claim, store, "reference")
    basis = printed + (f". Not the claim's, for scale: {small}" if small else "")
    if missing:
        return Finding(NOT_YET, "", "open", basis)
    return Finding(PUBLISHED, f"{speeds[0] / speeds[1]:.2f}", _consistent(speeds[0] / speeds[1], claim["value"]), basis)


def _measured_speed(claim: Claim, store: Sources, device: str) -> Finding | None:
    """Ratio of two networks' throughput in every numeric mode that they were timed in, in turn."""
    if not (found := speed_claims.ratios(claim, device, store, "reference")):
        return None
    value = "; ".join(f"{ratio.value:.2f} ±{ratio.error:.2f} ({ratio.mode}, {ratio.device})" for ratio in found)
    records = sum((ratio.records for ratio in found), ())
    if device == "cuda":
        evidence, basis = MEASURED, "full batches timed in turn, synchronised but in the authors' own mode (as_published)" + _unfused(found)
    else:
        scans = "; the scan as a loop over tokens, for which GPUs have a fused kernel, so the claim cannot be judged so" * speed_claims.looped(records)
        evidence, basis = REDUCED, f"the claim's networks on a CPU, timed in turn at batch {records[0].spec['batch']}{scans}"
    return Finding(evidence, value, speed_claims.verdict(found, device), basis, "within each value", records)


def _unfused(found: Sequence[speed_claims.Ratio]) -> str:
    """In words: what ran on a GPU without the fused kernel that there is for it, as the records name it, and in which modes."""
    words = ""
    for (op, choice), how in UNFUSED.items():
        if modes := [ratio.mode for ratio in found if choice in ratio.records[0].provenance.get("kernels", {}).get(op, ())]:
            words += f"; {how}, without its fused kernel, in {' and '.join(modes)}"
    return words


def _gflops(claim: Claim, store: Sources) -> Finding:
    cell, same, counts = speed_claims.gflops(claim, store, "reference")
    if same is None:
        return Finding(NOT_YET, "", "open", "not every network of it has a count that reproduces the paper's counter")
    off = "" if "-" in claim["value"] else f": off by {cell.value - float(claim['value']):+.1f} points"
    return Finding(COUNTED, cell.words, "reproduced" if same else "not to the printed digit" + off, f"{counts} Gflops, counted here by the paper's counter", "exact", cell.records)


def _fid_value(claim: Claim, store: Sources) -> Finding:
    fid = _published(claim["subject"], "fid", store)
    if fid is None:
        return Finding(NOT_YET, "", "open", "the paper's tables hold no such row")
    return Finding(PUBLISHED, f"{fid:.2f}", _consistent(fid, claim["value"]), "the table repeats it; not trained or scored on ImageNet here", "one run, none given")


def _fid_ratio(claim: Claim, store: Sources) -> Finding:
    ours, other = (_published(claim[side], "fid", store) for side in ("subject", "baseline"))
    ratio = other / ours
    return Finding(PUBLISHED, f"{ratio:.2f}", _consistent(ratio, claim["value"]), f"Table 1: {other:g} over {ours:g}; not run on ImageNet here", "one run each, none given")


def _cca(claim: Claim, store: Sources) -> Finding:
    fid = {name: float(row["fid"]) for name, row in store.published("table4.csv", ("variant",)).items()}
    paper = fid["w/o CCA"] - fid["DiCo-S"]
    return _reduced(TABLE_4, [("w/o CCA", "DiCo-S")], f"Table 4 gives {paper:.2f} points ({_consistent(paper, claim['value'])}), a ratio of {fid['w/o CCA'] / fid['DiCo-S']:.2f}", store)


def _structures(claim: Claim, store: Sources) -> Finding:
    pairs = [(f"DiT ({name})", f"DiCo ({name})") for name in ("iso.", "iso.&skip", "U-shape")]
    return _reduced(TABLE_3, pairs, f"Table 3 has this order by FID in {_ordered(TABLE_3, pairs, 'fid', store)} of {len(pairs)}", store)


def _kernels(claim: Claim, store: Sources) -> Finding:
    names = ["DiCo-S", "DWC 5x5", "DWC 7x7"]
    timed = [store.latest(timing_stage(row, TABLE_4.baseline, "cpu"), "reference") for row in TABLE_4.rows if row.label in names]
    speeds = ", ".join(f"{r.values['relative']:.2f} ±{r.values['relative_spread']:.2f}" for r in timed if r)
    pairs = list(zip(names, names[1:], strict=False))
    orders = " and ".join(f"{_ordered(TABLE_4, pairs, column, store)} of {len(pairs)} by {word}" for column, word in (("fid", "FID"), ("throughput_img_s", "throughput")))
    return _reduced(TABLE_4, pairs, f"Table 4 has the order in {orders}; relative throughput on the CPU here: {speeds or 'none'}", store)


def _scaling(claim: Claim, store: Sources) -> Finding:
    """Orders in Table 7 at every step, and in the authors' logs window by window."""
    models = ["DiCo-S", "DiCo-B", "DiCo-L", "DiCo-XL"]
    fid = {(row["model"], row["train_steps"]): float(row["fid"]) for row in store.rows("table7.csv")}
    steps = sorted({step for _, step in fid}, key=int)
    fids = [fid[a, step] > fid[b, step] for a, b in zip(models, models[1:], strict=False) for step in steps]
    loss = {(row["model"], row["last_step"]): (float(row["loss"]), float(row["loss_sd"]) / math.sqrt(int(row["lines"]))) for row in store.rows("dico_logs.csv") if row["loss_sd"]}
    windows = [step for model, step in loss if model == models[0] and all((other, step) in loss for other in models)]
    clear, counter, lower = 0, 0, []
    for a, b in zip(models, models[1:], strict=False):
        for step in windows:
            (one, e1), (two, e2) = loss[a, step], loss[b, step]
            lower.append(one > two)
            clear, counter = clear + (one - two > 2 * math.hypot(e1, e2)), counter + (two - one > 2 * math.hypot(e1, e2))
    value = f"FID {sum(fids)} of {len(fids)}; loss {sum(lower)} of {len(lower)}"
    verdict = "consistent" if all(fids) and all(lower) else "consistent in FID, in loss not in every window" if all(fids) else "inconsistent"
    basis = f"neighbouring sizes in Table 7 at {len(steps)} steps, and in the authors' logs over {len(windows)} windows of 1000 steps: {clear} clear by two standard errors, {counter} clear the other way"
    return Finding(PUBLISHED, value, verdict, basis, "loss: from the lines of a window")


def _attention(claim: Claim, store: Sources) -> Finding:
    """Attention's mass within the near field over that of uniform attention, in the isotropic DiT trained on digits."""
    record = store.latest(declared("locality", TABLE_3.baseline, DIGITS, seed=0), "reference")
    if record is None or "attention" not in record.values:
        return Finding(NOT_YET, "", "open", "needs the named checkpoints at 512; no probe record is committed")
    found = record.values["attention"]
    ratio, distance = found["near"] / found["near_uniform"], found["distance"]
    verdict = "same direction, one seed" if ratio > 1 > distance else "against the claim, one seed"
    basis = f"attention of {TABLE_3.baseline.label} on digits, mean over layers and heads: mass on near tokens over the uniform value; mean distance {distance:.2f} of the uniform one. The named checkpoints were not probed"
    return Finding(REDUCED, f"{ratio:.2f}", verdict, basis, "one seed, none", (record,))


def _channels(claim: Claim, store: Sources) -> Finding:
    """Near-dead channels and effective rank of the last layer's mixer, with and without CCA, on digits."""
    rows = {row.label: row for row in TABLE_4.rows}
    records = [store.latest(declared("channels", rows[label], DIGITS, seed=0), "reference") for label in ("DiCo-S", "w/o CCA")]
    if None in records:
        return Finding(NOT_YET, "", "open", "no probe record is committed")
    (dead, rank), (dead_without, rank_without) = ((record.values["near_dead"], record.values["relative_rank"]) for record in records)
    signs = {dead < dead_without, rank > rank_without}
    verdict = "same direction, one seed" if signs == {True} else "against the claim, one seed" if signs == {False} else "mixed, one seed"
    basis = f"DiCo-S and w/o CCA on digits: share of near-dead channels {dead:.2f} and {dead_without:.2f}; effective rank over channels {rank:.2f} and {rank_without:.2f}"
    return Finding(REDUCED, f"{dead - dead_without:+.2f} near-dead", verdict, basis, "one seed, none", tuple(records))


def _reduced(table: Table, pairs: Sequence[tuple[str, str]], paper: str, store: Sources) -> Finding:
    """fd_digits of the first row over the second's for every pair, which the claim says is above 1."""
    found, other = rankable(table.rows, DIGITS, store)
    scores = {row.label: records for row, records in zip(table.rows, found, strict=True)}
    values = {label: [record.values for record in records] for label, records in scores.items()}
    spread = pooled("fd_digits", list(values.values()))
    labels = {label for pair in pairs for label in pair}
    if refused := [f"{label} ({', '.join(other[label])})" for label in sorted(labels & other.keys())]:
        return Finding(NOT_YET, "", "open", f"{paper}; not compared, scored by another protocol: {'; '.join(refused)}")
    if spread is None or not all(values[label] for label in labels):
        return Finding(NOT_YET, "", "open", f"{paper}; no repeated digits records")
    parts, signs = [], []
    for worse, better in pairs:
        gap = statistics.fmean(scaled("fd_digits", values[worse])) - statistics.fmean(scaled("fd_digits", values[better]))
        width = reach(spread, len(values[worse]), len(values[better]), len(pairs))
        parts.append((math.exp(gap), math.exp(gap - width), math.exp(gap + width)))
        signs.append(0 if abs(gap) <= width else 1 if gap > 0 else -1)
    resolved = [sign for sign in signs if sign]
    verdict = "not resolved" if not resolved else "against the claim" if min(resolved) < 0 else "reproduced" if len(resolved) == len(signs) else f"same direction, {len(resolved)} of {len(signs)} resolved"
    basis = "fd_digits on digits, " + ", ".join(f"{worse} over {better}" for worse, better in pairs) + f"; {paper}"
    value, error = ", ".join(f"{ratio:.2f}" for ratio, _, _ in parts), ", ".join(f"{low:.2f} to {high:.2f}" for _, low, high in parts)
    return Finding(REDUCED, value, verdict, basis, f"95 %: {error}", tuple(record for label in sorted(labels) for record in scores[label]))


def _ordered(table: Table, pairs: Sequence[tuple[str, str]], column: str, store: Sources) -> int:
    """Pairs whose second row has the lower published number."""
    published, keys = store.published(table.published, table.key), {row.label: row.published for row in table.rows}
    return sum(float(published[keys[a]][column]) > float(published[keys[b]][column]) for a, b in pairs)


def _published(name: str, column: str, store: Sources) -> float | None:
    """A number of Table 1 or 2 for a subject such as `DiCo-XL@256 cfg` or `DiG-XL/2@256 400K`."""
    model, _, rest = name.partition("@")
    resolution, _, state = rest.partition(" ")
    for row in store.rows("table1.csv" if resolution == "256" else "table2.csv"):
        fits = {"": True, "cfg": row["cfg"] == "yes"}.get(state, row["train_steps"] == state.replace("K", "000"))
        if row["model"] == model and fits and row[column]:
            return float(row[column])
    return None


def _rounds_to(value: float, printed: str) -> bool:
    return abs(value - float(printed)) <= half_digit(printed) + 1e-9


def _consistent(value: float, printed: str) -> str:
    return "consistent" if _rounds_to(value, printed) else f"inconsistent: {value:.2f}, not {printed}"


BY_KIND: dict[tuple[str, str], Callable[[Claim, Sources], Finding]] = {
    ("throughput", "ratio"): _throughput,
    ("gflops", "reduction_percent"): _gflops,
    ("gflops", "ratio_percent"): _gflops,
    ("fid", "value"): _fid_value,
    ("fid", "ratio"): _fid_ratio,
    ("attention", "shape"): _attention,
    ("channel activation", "more"): _channels,
}
BY_ID = {"cca-fid": _cca, "structure-order": _structures, "kernel-order": _kernels, "scaling-order": _scaling}
