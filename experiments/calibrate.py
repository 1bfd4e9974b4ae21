"""Check this installation's scores: `python experiments/calibrate.py`.

Without files, the arithmetic is checked on synthetic sets whose scores are known in closed form. With the published files of
ADM's evaluator and the Inception weights, `--pair imagenet256 REFERENCE.npz SAMPLES.npz`, the whole path is: five scores must
meet the published ones. `--download` fetches the weights once. Exit status 1 if a check fails.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from experiments.engine.cli import Parser, run_command
from experiments.engine.data.locate import inception_path

# Scores that torch-fidelity's Inception with exact distances gives (lavinal712/ADM-evaluation-suite-pytorch), the tolerance of
# each, and what ADM's own evaluator gives (openai/guided-diffusion README), whose half precision raises precision and recall.
PAIRS = {
    "imagenet256": {
        "is": (215.9764, 0.2, 215.8370),
        "fid": (3.94103, 0.005, 3.94256),
        "sfid": (6.14049, 0.003, 6.14043),
        "precision": (0.82548, 0.0005, 0.82650),
        "recall": (0.5285, 0.001, 0.5309),
    },
    "imagenet128": {
        "is": (141.4781, 0.2, 141.4767),
        "fid": (2.97328, 0.005, 2.97329),
        "sfid": (5.09350, 0.003, 5.09456),
        "precision": (0.78042, 0.0005, 0.78138),
        "recall": (0.5906, 0.001, 0.5929),
    },
}
NAMES = {
    "imagenet256": "admnet_guided_upsampled_imagenet256.npz",
    "imagenet128": "admnet_guided_imagenet128.npz",
}


def main() -> int:
    return run_command(_main, str)


def _main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pair",
        nargs=3,
        metavar=("SET", "REFERENCE", "SAMPLES"),
        help=f"SET is {' or '.join(PAIRS)}; SAMPLES is ADM's file of guided samples",
    )
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
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: the GPU if there is one"
    )
    return _run(parser.parse_args())


def _run(args: argparse.Namespace) -> int:
    import torch

    from experiments.engine.jobs.execute import require_device
    from experiments.engine.scoring import inception

    if args.pair and args.pair[0] not in PAIRS:
        raise ValueError(f"unknown pair {args.pair[0]!r}; published are {', '.join(PAIRS)}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    require_device(device)
    if args.download:
        inception.download(args.inception)
    good = (
        _table(_published(*args.pair, args.inception, device))
        if args.pair
        else _table(_synthetic(device))
    )
    if not args.pair:
        print(
            "The Inception network itself was not checked: that needs its weights and a published pair (--pair)."
        )
    return 0 if good else 1


def _table(checks: Iterator[tuple[str, float, float, float, str]]) -> bool:
    good = True
    for name, value, expected, tolerance, note in checks:
        fits = abs(value - expected) <= tolerance
        good &= fits
        print(
            f"{'ok  ' if fits else 'FAIL'} {name:44} {value:12.6f}   expected {expected:.6f} ± {tolerance:g}{note}",
            flush=True,
        )
    return good


def _published(
    name: str, reference: str, samples: str, weights: Path, device: str
) -> Iterator[tuple[str, float, float, float, str]]:
    from experiments.engine.data.image_files import ImageFile
    from experiments.engine.scoring import inception, scores
    from experiments.engine.scoring.measure import measure
    from experiments.engine.scoring.reference import read_reference

    images = ImageFile(Path(samples))
    extractor = inception.load(weights, device)
    found = scores.score(
        measure(extractor, images.batches()),
        read_reference(extractor, Path(reference)),
        device=device,
    )
    for score, (expected, tolerance, adm) in PAIRS[name].items():
        if score not in found:
            raise ValueError(
                f"{Path(reference).name} does not allow {score}: it is not the published reference; the samples should be {NAMES[name]}"
            )
        yield f"{score}, {name}", found[score], expected, tolerance, f"; ADM's evaluator {adm}"


def _synthetic(device: str) -> Iterator[tuple[str, float, float, float, str]]:
    """Sets whose scores are known: moved and scaled Gaussians, one-hot classes, separate clusters, equal kernels."""
    import numpy as np

    from experiments.engine.scoring import metrics
    from experiments.engine.scoring.measure import blocks, blocks_sum
    from experiments.engine.scoring.neighbours import precision_recall

    draw, dim = np.random.default_rng(0), 64
    x, scale, shift = (
        draw.standard_normal((20_000, dim)),
        np.linspace(0.7, 1.3, dim),
        np.linspace(-0.1, 0.2, dim),
    )
    unit = metrics.Moments.known(np.zeros(dim), np.eye(dim))
    truth = float(np.square(shift).sum() + np.square(scale - 1).sum())
    white = x - x.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    yield (
        "Fréchet distance, moved and scaled exactly",
        metrics.frechet(blocks_sum(white * scale + shift), unit),
        truth,
        1e-9,
        "",
    )
    parts = blocks(x * scale + shift)
    value, error = metrics.frechet_jackknife(parts, unit)
    yield (
        "Fréchet distance of 20,000, bias removed",
        value,
        truth,
        4 * error,
        " (4 standard errors)",
    )
    yield (
        "Fréchet distance of a set to itself",
        metrics.frechet(blocks_sum(x), blocks_sum(x)),
        0.0,
        1e-9,
        "",
    )
    yield (
        "Inception score of ten even classes",
        metrics.inception_score(np.eye(10)[np.arange(20_000) % 10])[0],
        10.0,
        1e-9,
        "",
    )
    mode = np.arange(2_000) % 8
    whole = 50 * np.eye(8)[mode] + draw.standard_normal((2_000, 8))
    part = whole[mode < 4]
    yield (
        "recall of the points of half the modes",
        precision_recall(whole, part, device=device)[1],
        0.5,
        0.0,
        "",
    )
    yield (
        "precision of a set against itself",
        precision_recall(part, part, device=device)[0],
        1.0,
        0.0,
        "",
    )
    mean, spread = metrics.kid(x[:10_000], x[10_000:])
    yield "KID of two halves", mean, 0.0, 4 * spread / 10, " (4 standard errors over 100 subsets)"


if __name__ == "__main__":
    raise SystemExit(main())
