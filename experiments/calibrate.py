"""Check this installation's scores: `python experiments/calibrate.py`.

Without files, this checks the arithmetic on synthetic sets whose scores are known in closed form.
Then it draws samples from two committed networks and scores them: sampler, guidance, features and
metrics of this installation must meet the committed scores.

With the published files of ADM's evaluator and the Inception weights, as in
`--pair imagenet256 REFERENCE.npz SAMPLES.npz`, it checks the whole path on ImageNet: five scores
must meet the published ones. `--download` fetches the weights once. The exit status is 1 if a check
fails.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The code is this file's tree, whatever the current folder and PYTHONPATH offer.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from experiments.ablation import TABLE_3, TABLE_4
from experiments.declared.protocols import DIGITS
from experiments.engine.cli import Parser, add_device_option, run_command
from experiments.engine.data.locate import inception_path
from experiments.engine.machine.gpu import choose_device, prepare_torch
from experiments.engine.records.manifest import UNKNOWN_FEATURES
from experiments.engine.records.score_names import CLASSIFIER_SCORES
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.records.weight_files import weights_sha256
from experiments.engine.specs.spec import Checkpoint, Evaluate, spec_id
from experiments.engine.specs.stages import evaluate_stage

if TYPE_CHECKING:
    from numpy import ndarray


@dataclass(frozen=True)
class PublishedScore:
    """A score of a published pair of files."""

    # By torch-fidelity's Inception with exact distances: lavinal712/ADM-evaluation-suite-pytorch.
    value: float
    tolerance: float
    # By ADM's own evaluator, whose half precision raises precision and recall: the README of
    # openai/guided-diffusion.
    by_adm: float


@dataclass(frozen=True)
class Check:
    """A value beside what it should be."""

    name: str
    value: float
    expected: float
    tolerance: float
    note: str = ""

    @property
    def passes(self) -> bool:
        """Return whether the value lies within the tolerance."""
        return abs(self.value - self.expected) <= self.tolerance


PAIRS = {
    "imagenet256": {
        "is": PublishedScore(215.9764, 0.2, 215.8370),
        "fid": PublishedScore(3.94103, 0.005, 3.94256),
        "sfid": PublishedScore(6.14049, 0.003, 6.14043),
        "precision": PublishedScore(0.82548, 0.0005, 0.82650),
        "recall": PublishedScore(0.5285, 0.001, 0.5309),
    },
    "imagenet128": {
        "is": PublishedScore(141.4781, 0.2, 141.4767),
        "fid": PublishedScore(2.97328, 0.005, 2.97329),
        "sfid": PublishedScore(5.09350, 0.003, 5.09456),
        "precision": PublishedScore(0.78042, 0.0005, 0.78138),
        "recall": PublishedScore(0.5906, 0.001, 0.5929),
    },
}
SAMPLES = {
    "imagenet256": "admnet_guided_upsampled_imagenet256.npz",
    "imagenet128": "admnet_guided_imagenet128.npz",
}

# By the file under results/weights, the evaluation of the training that made it.
NETWORKS = {
    "digits_dit.safetensors": evaluate_stage(TABLE_3.row("DiT (iso.)"), DIGITS, seed=0),
    "digits_dico.safetensors": evaluate_stage(TABLE_4.row("DiCo-S"), DIGITS, seed=0),
}
# Another processor rounds otherwise: single images change their class, and the judge, which is
# trained anew on every machine, sees features that differ a little.
DISTANCE_TOLERANCE = 0.05  # of the distance itself
SHARE_TOLERANCE = 0.02


def main() -> int:
    """Print the checks; the exit status is 1 if one fails."""
    return run_command(_calibrate)


def _calibrate() -> int:
    args = _parse()

    from experiments.engine.scoring.inception import download_inception

    if args.pair and args.pair[0] not in PAIRS:
        raise ValueError(f"unknown pair {args.pair[0]!r}; published are {', '.join(PAIRS)}")
    device = choose_device(args.device)
    prepare_torch(device)
    if args.download:
        download_inception(args.inception)

    if args.pair:
        name, reference, samples = args.pair
        checks = _check_pair(name, Path(reference), Path(samples), args.inception, device)
        return 0 if _print_checks(checks) else 1

    passed = _print_checks(_check_synthetic_sets(device))
    passed &= _print_checks(_check_networks(device))
    print(
        "The Inception network itself was not checked: "
        "that needs its weights and a published pair (--pair)."
    )
    return 0 if passed else 1


def _parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pair",
        nargs=3,
        metavar=("SET", "REFERENCE", "SAMPLES"),
        help=f"SET is {' or '.join(PAIRS)}; SAMPLES is ADM's file of guided samples",
    )

    # The weights and the device have defaults that suit most machines.
    parser.add_argument(
        "--inception",
        type=Path,
        default=inception_path(),
        metavar="FILE",
        help="weights (default: $DICO_INCEPTION, or in data/)",
    )
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch the Inception weights first, if they are missing",
    )
    add_device_option(parser)
    return parser.parse_args()


def _print_checks(checks: Iterable[Check]) -> bool:
    """Print each check as soon as it is known; return whether all passed."""
    passed = True
    for check in checks:
        passed &= check.passes
        print(
            f"{'ok  ' if check.passes else 'FAIL'} {check.name:44} {check.value:12.6f}   "
            f"expected {check.expected:.6f} ± {check.tolerance:g}{check.note}",
            flush=True,
        )
    return passed


def _check_pair(
    name: str, reference: Path, samples: Path, weights: Path, device: str
) -> Iterator[Check]:
    """Score a published pair of files."""
    from experiments.engine.data.image_files import ImageFile
    from experiments.engine.scoring.inception import load_inception, require_published
    from experiments.engine.scoring.measure import measure
    from experiments.engine.scoring.reference import read_reference
    from experiments.engine.scoring.scores import score

    images = ImageFile(samples)
    extractor = load_inception(weights, device)
    if extractor.name == UNKNOWN_FEATURES:
        require_published(weights)
    values = score(
        measure(extractor, images.batches()), read_reference(extractor, reference), device=device
    )
    for key, published in PAIRS[name].items():
        if key not in values:
            raise ValueError(
                f"{reference.name} does not allow {key}: it is not the published reference; "
                f"the samples should be {SAMPLES[name]}"
            )
        yield Check(
            f"{key}, {name}",
            values[key],
            published.value,
            published.tolerance,
            f"; ADM's evaluator {published.by_adm}",
        )


def _check_networks(device: str) -> Iterator[Check]:
    """Sample from the committed networks, and compare the scores with the committed ones.

    Raises:
        ValueError: if a file of weights, or the record of its scores, is missing.
    """
    from experiments.engine.runtime.context import Resources, RunContext
    from experiments.engine.scoring.stage import run_evaluation

    store = Store()
    with tempfile.TemporaryDirectory() as folder:
        for name, stage in NETWORKS.items():
            path = REPOSITORY / "results" / "weights" / name
            record = store.reference.latest(stage)
            if record is None or not path.is_file():
                raise ValueError(
                    f"results/weights/{name} or the record {spec_id(stage)} of its scores is "
                    "missing; restore results with git"
                )
            context = RunContext(
                Path(folder) / path.stem, Resources(device=device, checkpoint=path)
            )
            values = run_evaluation(_of_file(stage, path), Path(folder), context)
            for score in CLASSIFIER_SCORES[stage.features].all:
                expected = record.values[score.key]
                yield Check(
                    f"{score.key}, {path.stem}", values[score.key], expected, _tolerance(expected)
                )


def _of_file(stage: Evaluate, path: Path) -> Evaluate:
    """Return the evaluation with the weights of a file in place of its training's."""
    train = stage.train
    weights = Checkpoint(
        train.backbone, train.data, weights_sha256(path), diffusion=train.diffusion
    )
    return replace(stage, train=weights)


def _tolerance(expected: float) -> float:
    is_share = 0 <= expected <= 1
    return SHARE_TOLERANCE if is_share else DISTANCE_TOLERANCE * expected


def _check_synthetic_sets(device: str) -> Iterator[Check]:
    """Score sets whose scores are known.

    The sets are moved and scaled Gaussians, one-hot classes, separate clusters and equal kernels.
    """
    import numpy as np

    draw = np.random.default_rng(0)
    x = draw.standard_normal((20_000, 64))
    yield from _check_frechet(x)

    from experiments.engine.scoring.metrics import inception_score, kid
    from experiments.engine.scoring.neighbours import neighbour_shares, precision_recall

    even_classes = np.eye(10)[np.arange(20_000) % 10]
    value, _ = inception_score(even_classes)
    yield Check("Inception score of ten even classes", value, 10.0, 1e-9)

    # Clusters lie so far apart that no ball reaches from one to another.
    mode = np.arange(2_000) % 8
    whole = 50 * np.eye(8)[mode] + draw.standard_normal((2_000, 8))
    part = whole[mode < 4]
    _, recall = precision_recall(samples=part, reference=whole, device=device)
    yield Check("recall of the points of half the modes", recall, 0.5, 0.0)
    itself = neighbour_shares(samples=part, reference=part, device=device)
    yield Check("precision of a set against itself", itself.precision, 1.0, 0.0)
    yield Check("density of a set against itself", itself.density, 1.0, 1e-12)
    yield Check("coverage of a set against itself", itself.coverage, 1.0, 0.0)

    mean, spread = kid(samples=x[:10_000], reference=x[10_000:])
    note = " (4 standard errors over 100 subsets)"
    yield Check("KID of two halves", mean, 0.0, 4 * spread / 10, note)


def _check_frechet(x: ndarray) -> Iterator[Check]:
    """Check Fréchet distances of standard normal rows (N, d), moved and scaled."""
    import numpy as np

    from experiments.engine.scoring.frechet import frechet, frechet_jackknife
    from experiments.engine.scoring.moments import Moments, moments_of, split_into_blocks

    dim = x.shape[1]
    scale = np.linspace(0.7, 1.3, dim)
    shift = np.linspace(-0.1, 0.2, dim)
    unit = Moments.known(np.zeros(dim), np.eye(dim))
    truth = float(np.square(shift).sum() + np.square(scale - 1).sum())

    # Whitened rows have mean 0 and covariance 1 exactly, so their distance has no sampling error.
    white = x - x.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    value = frechet(moments_of(white * scale + shift), unit)
    yield Check("Fréchet distance, moved and scaled exactly", value, truth, 1e-9)

    value, error = frechet_jackknife(split_into_blocks(x * scale + shift), unit)
    note = " (4 standard errors)"
    yield Check("Fréchet distance of 20,000, bias removed", value, truth, 4 * error, note)

    value = frechet(moments_of(x), moments_of(x))
    yield Check("Fréchet distance of a set to itself", value, 0.0, 1e-9)


if __name__ == "__main__":
    raise SystemExit(main())
