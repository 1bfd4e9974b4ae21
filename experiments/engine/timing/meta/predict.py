"""Predict the throughput of declared timings, on cards by their data sheets and on this CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from experiments.engine.records.store import Store, timestamp
from experiments.engine.records.tree import tree_commit
from experiments.engine.reporting.efficiency.inference.predicted import (
    TRACED_MODES,
    InferenceNeeds,
    LatencyRow,
    PredictedLatency,
    read_shares,
    write_inference,
    write_latencies,
)
from experiments.engine.reporting.efficiency.memory import Line
from experiments.engine.reporting.efficiency.predictions import (
    CPU,
    PAPER_CARD,
    Declared,
    Prediction,
    read_cards,
    write_predictions,
)
from experiments.engine.reporting.efficiency.roofline import (
    PEAKS,
    Device,
    Sample,
    Shares,
    Work,
    fit_shares,
    predict_seconds,
)
from experiments.engine.reporting.efficiency.speed import AS_PUBLISHED
from experiments.engine.specs.spec import Ceilings, spec_id
from experiments.engine.timing.inference.trace import trace_inference
from experiments.engine.timing.meta.trace import trace_timing

# The table whose published throughputs the attained shares are fitted to.
FITTED_TABLE = "1"


def write_all(
    on_cards: Sequence[Declared],
    on_cpu: Sequence[Declared],
    store: Store,
    tell: Callable[[str], None],
) -> None:
    """Predict on all cards and on the CPU whose ceilings are committed, and write the files.

    Args:
        on_cards: what is predicted on every published card.
        on_cpu: what is predicted on the CPU, in fp32.
        store: the results folder to write to.
        tell: hears what is traced next.

    Raises:
        ValueError: a GPU was timed already, so that nothing can be predicted any more.
    """
    _require_untimed(store)

    # The attained shares come from Table 1 on the paper's card, and judge the other tables.
    cards = read_cards(store)
    traces = Traces(tell)
    (paper_card,) = (card for card in cards if card.name == PAPER_CARD)
    first = [row for row in on_cards if row.table == FITTED_TABLE]
    shares = fit_published(first, paper_card, traces)

    # Nothing is fitted on a CPU.
    predictions = list(predict(on_cards, cards, shares, traces))
    ceilings = store.reference.latest(Ceilings("cpu"))
    if ceilings:
        cpu = Device(CPU, ceilings.values["macs_per_s"], ceilings.values["bytes_per_s"])
        predictions += predict(on_cpu, [cpu], PEAKS, traces)
    write_predictions(store.root, predictions, shares, timestamp(), _code())


def write_latency(rows: Sequence[LatencyRow], store: Store, tell: Callable[[str], None]) -> None:
    """Predict one image's latency and the memory of inference on all cards, and write the files.

    Args:
        rows: what is predicted, on a GPU.
        store: the results folder to write to; it holds the predictions of throughput.
        tell: hears what is traced next.

    Raises:
        ValueError: a GPU was timed already, or throughput is not predicted yet.
    """
    _require_untimed(store)
    shares, cards, traces = read_shares(store.root), read_cards(store), Traces(tell)
    latencies: list[PredictedLatency] = []
    needs: list[InferenceNeeds] = []
    memory: dict[str, tuple[int, tuple[Line, ...]]] = {}
    for row in rows:
        timings = {mode: stage.timing for mode, stage in row.stages.items()}
        single = {mode: replace(timing, batch=1) for mode, timing in timings.items()}
        declared = Declared(row.table, row.label, "latency", single)
        for p in predict([declared], cards, shares, traces):
            milliseconds = (1e3 / p.bound, 1e3 / p.attained)
            latencies.append(PredictedLatency(p.table, p.row, p.mode, p.card, *milliseconds))

        # Rows of different tables may have the same network.
        for mode in TRACED_MODES:
            name = spec_id(timings[mode])
            if name not in memory:
                memory[name] = trace_inference(timings[mode])
            needs.append(InferenceNeeds(row.table, row.label, mode, *memory[name]))
    write_latencies(store.root, latencies, timestamp(), _code())
    write_inference(store.root, needs)


def _require_untimed(store: Store) -> None:
    """Raise ValueError if a GPU was timed."""
    timed = [
        record.name
        for folder in (store.reference, store.here)
        for record in folder.all()
        if record.kind in ("timing", "latency")
        and record.spec.get("timing", record.spec)["device"] == "cuda"
    ]
    if timed:
        raise ValueError(
            f"a GPU is timed already ({timed[0]}), and predictions must come before: keep those "
            "of results/predictions"
        )


def _code() -> str:
    """Return the commit of this tree, and whether the tree differs from it."""
    commit = tree_commit()
    return (commit.hash or "unknown") + (" with changes" if commit.dirty else "")


@dataclass
class Traces:
    """The work of rows, that of equal timings traced once."""

    # Hears what is traced next.
    tell: Callable[[str], None]
    _known: dict[str, list[Work]] = field(default_factory=dict)

    def of(self, row: Declared) -> list[Work]:
        """Return the work of a row; its operators are taken to be the same in all modes."""
        alone = replace(row.stages["fp32"], baseline=None, baseline_input=None)
        name = spec_id(alone)
        if name not in self._known:
            self.tell(f"{row.task}: {row.label} at {alone.size}x{alone.size}")
            self._known[name] = trace_timing(alone)
        return self._known[name]


def fit_published(declared: Sequence[Declared], card: Device, traces: Traces) -> Shares:
    """Fit the attained shares to published forward passes; equal networks count once."""
    samples: dict[str, Sample] = {}
    for row in declared:
        if row.task == "forward" and row.published:
            stage = row.stages[AS_PUBLISHED]
            samples[str(stage)] = Sample(traces.of(row), stage.batch / row.published)
    return fit_shares(list(samples.values()), card, AS_PUBLISHED)


def predict(
    declared: Sequence[Declared], cards: Sequence[Device], shares: Shares, traces: Traces
) -> Iterator[Prediction]:
    """Yield the images per second of every row in every mode, on every card."""
    for row in declared:
        work = traces.of(row)
        for mode, stage in row.stages.items():
            for card in cards:
                bound, attained = (
                    stage.batch / predict_seconds(work, card, mode, each)
                    for each in (PEAKS, shares)
                )
                yield Prediction(
                    row.table, row.label, row.task, mode, stage.batch, card.name, bound, attained
                )
