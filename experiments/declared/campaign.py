"""The trainings behind the page of evidence, in the order in which they are worth their time.

A block is rows of one table under one protocol. First its ladder chooses a learning rate for every
network, then the rows are trained at full and at half length. Whatever is done when work stops is
whole. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from experiments import ablation, related
from experiments.declared.protocols import (
    CIFAR10_16,
    DIGITS,
    DIGITS_LONG,
    at_half_length,
    with_independent_weights,
)
from experiments.declared.rates import (
    FACTOR,
    LARGEST,
    SMALLEST,
    best_rate,
    missing_rates,
    with_chosen_rates,
)
from experiments.engine.jobs.job import Job
from experiments.engine.records.score_names import validation_loss
from experiments.engine.records.store import Record, Store
from experiments.engine.reporting.efficiency.savings import small_cost
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.selection import Run
from experiments.engine.specs.spec import Cost, HeldOut, Stage
from experiments.engine.specs.stages import (
    Protocol,
    distinct_networks,
    heldout_stage,
    network_id,
)

LADDER_SEED = 0
# By how much of its gated work a network may exceed the share that it is to use.
EXCESS = 0.05


@dataclass(frozen=True)
class Block:
    """Rows of a table under a protocol, at their chosen rates."""

    table: Table
    protocol: Protocol
    # Training seeds at full length, then those at half length.
    seeds: Sequence[int]
    half_seeds: Sequence[int]
    # Rows whose best rate and its neighbours are tried at full length too, one of each kind.
    checked: Sequence[str] = ()
    # Rows that are trained at full length with independent initial weights too.
    independent: Sequence[str] = ()
    # Whether the page of evidence compares each row with every other one.
    compared: bool = True

    @property
    def title(self) -> str:
        """Name the block for its user."""
        return f"Table {self.table.number} on {self.protocol.name}"

    def at_chosen_rates(self) -> Block:
        """Return the block with the rates that the file of rates holds now."""
        return replace(self, protocol=with_chosen_rates(self.protocol))

    def costs(self, store: Store) -> list[Cost]:
        """Return the counts of the small networks that have no record."""
        stages = [
            small_cost(row, self.protocol) for row in distinct_networks(self.table, self.protocol)
        ]
        return [stage for stage in stages if finished(stage, store) is None]

    def jobs(self) -> Iterator[Job]:
        """Yield the jobs of the block, seed by seed."""
        half = at_half_length(self.protocol)
        independent = with_independent_weights(self.protocol)
        for seed in sorted({*self.seeds, *self.half_seeds}):
            for row in distinct_networks(self.table, self.protocol):
                if seed in self.seeds:
                    yield _run(row, self.protocol, seed)
                if seed in self.half_seeds:
                    yield _run(row, half, seed, scored=False)
                if seed in self.seeds and row.label in self.independent:
                    yield _run(row, independent, seed, scored=False)
        for label in self.checked:
            yield from Ladder(self.table.row(label), self.protocol).checks()


@dataclass(frozen=True)
class Ladder:
    """The search of a network's learning rate."""

    row: Row
    protocol: Protocol

    @property
    def network(self) -> str:
        """The id of the network, under which the file of rates holds its rate."""
        return network_id(self.row, self.protocol)

    def stage(self, rate: float) -> HeldOut:
        """Return the validation loss at half length and one rate."""
        return self._stage(at_half_length(self.protocol), rate)

    def full_stages(self) -> dict[float, HeldOut]:
        """Return the validation losses at full length, at the chosen rate and its neighbours."""
        chosen = self._stage(self.protocol).train.recipe.lr
        rates = (chosen / FACTOR, chosen, chosen * FACTOR)
        return {rate: self._stage(self.protocol, rate) for rate in rates}

    def _stage(self, protocol: Protocol, rate: float | None = None) -> HeldOut:
        # What the row is fine-tuned from keeps its own rate.
        if rate is not None:
            recipe = replace(protocol.recipe, lr=rate)
            start_from = protocol.start_from or self.protocol
            protocol = replace(protocol, recipe=recipe, rates={}, start_from=start_from)
        stage = heldout_stage(self.row, protocol, LADDER_SEED, "validation")
        assert stage is not None, "a protocol with a ladder scores held-out images"
        return stage

    def losses(self, store: Store) -> dict[float, float]:
        """Return the losses that have records, by rate.

        A training that failed has the loss infinity. So has one that left much more of a network's
        gated work on than it was to use: it compares with no other.
        """
        rates = _factors_around(self.protocol.ladder)
        losses = {}
        for rate in rates:
            stage = self.stage(rate)
            record = finished(stage, store)
            if record is not None:
                losses[rate] = _loss_of(stage, record)
            elif _has_failed(stage, store):
                losses[rate] = math.inf
        return losses

    def jobs(self, store: Store) -> list[Job]:
        """Return a job for every rate that is still to be tried.

        Raises:
            ValueError: the ladder cannot grow as far as it must.
        """
        try:
            rates = missing_rates(self.protocol.ladder, self.losses(store))
        except ValueError as error:
            raise ValueError(f"{self.row.label} on {self.protocol.name}: {error}") from None
        return [self._job(rate, self.stage(rate)) for rate in rates]

    def checks(self) -> Iterator[Job]:
        """Yield a job for the chosen rate and each of its neighbours at full length."""
        for rate, stage in self.full_stages().items():
            yield self._job(rate, stage)

    def _job(self, rate: float, stage: HeldOut) -> Job:
        return Job(f"{self.row.label}, lr {rate:g}", (*stage.train.trainings, stage), chain=True)

    def best(self, store: Store) -> float:
        """Return the best rate."""
        return best_rate(self.losses(store))


# Rows for which the page shows whether the best rate moves from half to full length.
ATTENTION_AND_CONVOLUTION = ("DiCo-S", "CM->Self-Attn")
ISOTROPIC = ("DiT (iso.)",)
# Rows for which the page shows what shared initial weights do to the spread over seeds.
SPREAD_ROWS = ("DiCo-S", "w/o CCA", "DWC 7x7")

BLOCKS = (
    Block(ablation.TABLE_4, DIGITS, seeds=range(1), half_seeds=()),
    Block(ablation.TABLE_3, DIGITS, seeds=range(1), half_seeds=()),
    Block(ablation.TABLE_4, DIGITS, range(3), range(3)),
    Block(ablation.TABLE_3, DIGITS, range(3), range(3)),
    Block(ablation.TABLE_4, DIGITS, range(5), range(3), checked=ATTENTION_AND_CONVOLUTION),
    Block(ablation.TABLE_3, DIGITS, range(5), range(3), checked=ISOTROPIC),
    Block(ablation.TABLE_4, DIGITS, range(5), range(3), independent=SPREAD_ROWS),
    # What is fine-tuned starts from the dense network at its own rate, so that comes first.
    Block(related.PARENTS, DIGITS_LONG, range(3), half_seeds=(), compared=False),
    Block(related.RELATED_SMALL, DIGITS_LONG, range(1), half_seeds=(), compared=False),
    Block(related.RELATED_SMALL, DIGITS_LONG, range(3), half_seeds=(), compared=False),
    Block(related.AUTOREGRESSIVE, DIGITS_LONG, range(3), half_seeds=(), compared=False),
    Block(ablation.TABLE_4, CIFAR10_16, range(3), range(3), checked=ATTENTION_AND_CONVOLUTION),
    Block(ablation.TABLE_3, CIFAR10_16, range(3), range(3), checked=ISOTROPIC),
    Block(ablation.TABLE_4, CIFAR10_16, range(5), range(3), independent=SPREAD_ROWS),
)


def ladders_of(block: Block) -> list[Ladder]:
    """Return the searches that a block needs, one per network."""
    return [Ladder(row, block.protocol) for row in distinct_networks(block.table, block.protocol)]


def finished(stage: Stage, store: Store) -> Record | None:
    """Return a stage's record, of this machine or committed."""
    return store.here.latest(stage) or store.reference.latest(stage)


def _loss_of(stage: HeldOut, record: Record) -> float:
    """Return the loss of a record by which rates are compared."""
    asked = stage.train.diffusion.used_share
    if asked is not None and record.values["used_share"] > asked + EXCESS:
        return math.inf
    return validation_loss(record.values)


def _has_failed(stage: HeldOut, store: Store) -> bool:
    """Return whether a training diverged, so that there is nothing to score."""
    folders = (store.here, store.reference)
    return any(folder.latest(stage.train, status="failed") for folder in folders)


def _run(row: Row, protocol: Protocol, seed: int, scored: bool = True) -> Job:
    """Return the job of a run; samples are scored at full length alone."""
    run = Run.of(row, protocol, seed)
    stages = [stage for stage in run.stages if scored or stage is not run.stage]
    return Job(f"{row.label}, seed {seed}", tuple(stages), chain=True, row=row.label)


def _factors_around(ladder: Sequence[float]) -> list[float]:
    """Return the ladder with the rates that it can grow by, rising."""
    rates = list(ladder)
    while rates[0] / FACTOR >= SMALLEST:
        rates.insert(0, rates[0] / FACTOR)
    while rates[-1] * FACTOR <= LARGEST:
        rates.append(rates[-1] * FACTOR)
    return rates
