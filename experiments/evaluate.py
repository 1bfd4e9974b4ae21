"""Score sample files in ADM's form and folders of PNG files.

    python experiments/evaluate.py samples.npz --against VIRTUAL_imagenet256_labeled.npz
    python experiments/evaluate.py reference FOLDER --size 256 --out reference.npz

A sample file holds uint8 images (arr_0, N x H x W x 3), and a folder lossless pictures of one size.
The reference holds images, statistics (mu, sigma, mu_s, sigma_s) or both. This prints FID, sFID,
IS, precision, recall, density, coverage, KID and MIND with N in their names, and sampling errors
where N allows one. No order of the images changes a digit. Repeated images and near copies are
counted, and errors are withheld where samples repeat. `--dinov2` adds FD-DINOv2, precision, recall,
density and coverage on DINOv2's features, as EDM2 takes them. `--record FILE.json` keeps the scores
for diff_protocol.py, with all that decided them. With `--paired`, two files that sample.py made
from common seeds are compared with the error of their difference. `reference` writes the statistics
of a folder, with what they are of.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The code is this file's tree, whatever the current folder and PYTHONPATH offer.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.engine.cli import Parser, add_device_option, run_command
from experiments.engine.data.locate import dinov2_path, inception_path
from experiments.engine.machine.gpu import choose_device, prepare_torch
from experiments.engine.records.files import require_target
from experiments.engine.records.manifest import UNKNOWN_FEATURES, samples_manifest
from experiments.engine.records.score_names import FID, counted_name
from experiments.engine.records.store import (
    SCORES,
    Record,
    provenance,
    read_record,
    timestamp,
    write_record,
)

if TYPE_CHECKING:
    from numpy import ndarray

    from experiments.engine.scoring.files.folders import StoredImages
    from experiments.engine.scoring.measure import Extractor, Measured
    from experiments.engine.scoring.reference import Reference


REFERENCE = "reference"  # the word before a folder whose statistics are written
TRAININGS = 0.013  # coefficient of variation of FID between trainings (arXiv:2606.20536)


@dataclass(frozen=True)
class Scorer:
    """What sample files are scored with."""

    extractor: Extractor
    reference: Reference
    # The reference's file.
    against: Path
    device: str
    # Whether precision and recall are also computed in ADM's half precision.
    half: bool


def main() -> int:
    """Score the files that the command line names, or write a reference."""
    is_reference = sys.argv[1:2] == [REFERENCE]
    return run_command(_write_reference if is_reference else _evaluate)


def _write_reference() -> int:
    """Write the statistics of the folder that the command line names."""
    parser = Parser(description=_write_reference.__doc__)
    parser.add_argument("folder", type=Path, help="pictures, in subfolders or not; or an .npz")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.npz", help="default: FOLDER-reference.npz"
    )
    parser.add_argument(
        "--size", type=int, help="side to which pictures of any size are cropped, by default as ADM"
    )
    parser.add_argument(
        "--crop", choices=("adm", "square"), default="adm", help="square: U-ViT's rule for MS-COCO"
    )
    _add_image_options(parser)
    args = parser.parse_args(sys.argv[2:])

    from experiments.engine.data.pictures import Crop
    from experiments.engine.scoring.files.folders import describe_lossy, open_images
    from experiments.engine.scoring.files.references import require_own_reference, write_reference

    # Everything is opened before anything is measured.
    device = choose_device(args.device)
    prepare_torch(device)
    if args.size is not None and args.size < 1:
        raise ValueError(f"--size is a side in pixels, got {args.size}")
    rule = Crop[args.crop.upper()]
    images = open_images(args.folder, lossy=args.lossy, crop=args.size, rule=rule)
    out = args.out or args.folder.with_name(f"{args.folder.resolve().name}-reference.npz")
    require_own_reference(out)

    made = write_reference(_load_extractor(args, device), images, out)
    height, width = made["size"]
    print(f"{made['num']} images {height} x {width}, sha256 {made['sha256'][:16]}: {out}")
    print(f"  repeated images {made['repeated']}, near copies {made['near_copies']}")
    if images.lossy:
        print(f"  warning: {describe_lossy(images)}")
    return 0


def _parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    # What is scored, and against what, comes first.
    parser.add_argument(
        "samples",
        nargs="+",
        type=Path,
        help="an .npz or a folder of pictures, or several to score in turn",
    )
    parser.add_argument(
        "--against",
        type=Path,
        required=True,
        metavar="REFERENCE",
        help="an .npz with statistics, images or both, or a folder of pictures",
    )
    _add_image_options(parser)

    # The other options add a score, a record or a device.
    parser.add_argument("--paired", action="store_true", help="compare two files from common seeds")
    parser.add_argument(
        "--half",
        action="store_true",
        help="also precision and recall in the half-precision arithmetic of ADM's evaluator",
    )
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE.json",
        help="write the scores of one file of images with their manifest",
    )
    return parser.parse_args()


def _add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of all that measures images."""
    parser.add_argument(
        "--inception",
        type=Path,
        default=inception_path(),
        metavar="FILE",
        help="weights (default: $DICO_INCEPTION, or in data/)",
    )
    parser.add_argument(
        "--dinov2",
        type=Path,
        nargs="?",
        const=dinov2_path(),
        metavar="FILE",
        help="also score on DINOv2's ViT-L/14 (weights: $DICO_DINOV2, or in data/)",
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch weights that are missing first"
    )
    parser.add_argument(
        "--lossy", action="store_true", help="take JPEG and lossy WebP too, and record it"
    )
    add_device_option(parser)


def _load_extractor(args: argparse.Namespace, device: str) -> Extractor:
    """Load Inception, and DINOv2 beside it where it is asked for."""
    from experiments.engine.judges.dinov2 import URL, load_dinov2
    from experiments.engine.scoring.inception import download_inception, fetch, load_inception
    from experiments.engine.scoring.measure import WithDinov2

    if args.download:
        download_inception(args.inception)
        if args.dinov2:
            fetch(URL, args.dinov2, "--dinov2")
    extractor = load_inception(args.inception, device)
    return WithDinov2(extractor, load_dinov2(args.dinov2, device)) if args.dinov2 else extractor


def _evaluate() -> int:
    args = _parse()

    from experiments.engine.data.image_files import find_common_order
    from experiments.engine.scoring.files.folders import holds_images, open_images
    from experiments.engine.scoring.reference import read_reference

    # Refuse what cannot be scored before anything is measured.
    device = choose_device(args.device)
    _check_numbers(args)
    prepare_torch(device)
    _check_contents(args)
    files = [open_images(path, lossy=args.lossy) for path in args.samples if holds_images(path)]
    if args.record and not files:
        raise ValueError(
            f"--record keeps the scores of images; {args.samples[0].name} holds statistics only"
        )
    if args.record:
        _require_record(args.record)
    order = find_common_order(*files) if args.paired else None

    extractor = _load_extractor(args, device)
    reference = read_reference(extractor, args.against, lossy=args.lossy)
    scorer = Scorer(extractor, reference, args.against, device, args.half)
    for path in args.samples:
        if not holds_images(path):
            print(_score_statistics(path, scorer))
    measured = [_score_images(images, scorer, args.record) for images in files]
    if order is not None:
        print(_compare(files, measured, order, reference))
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    if args.paired and len(args.samples) != 2:
        raise ValueError(f"--paired compares two sample files, got {len(args.samples)}")
    if args.record and len(args.samples) != 1:
        raise ValueError(f"--record keeps the scores of one sample file, got {len(args.samples)}")


def _require_record(path: Path) -> None:
    """Raise ValueError if a record cannot be written, or would replace what is no record."""
    require_target(path, "--record")
    if path.exists() and path.stat().st_size > 0:
        try:
            read_record(path)
        except ValueError as error:
            raise ValueError(f"{error}; name another --record") from None


def _check_contents(args: argparse.Namespace) -> None:
    """Raise ValueError for a file without images, unless its statistics can be scored."""
    from experiments.engine.scoring.files.folders import holds_images
    from experiments.engine.scoring.reference import statistics

    for path in args.samples:
        if holds_images(path):
            continue
        if not statistics(path):
            raise ValueError(f"{path}: holds no images (arr_0) and no statistics (mu, sigma)")
        if args.paired:
            raise ValueError(f"{path}: holds no images (arr_0)")


def _score_statistics(path: Path, scorer: Scorer) -> str:
    """Return the lines of a file that holds statistics alone."""
    from experiments.engine.scoring.reference import statistics
    from experiments.engine.scoring.scores import distances

    head = f"{path.name} against {scorer.against.name}, statistics only: N and errors are unknown"
    values = distances(statistics(path), scorer.reference)
    lines = [head, *(f"  {name:15} {value:.4f}" for name, value in values.items())]
    return "\n".join([*lines, *(f"  warning: {text}" for text in scorer.extractor.warnings)])


def _score_images(images: StoredImages, scorer: Scorer, record: Path | None) -> Measured:
    """Print the scores of a file of images, record them if asked, and return its features."""
    from experiments.engine.data.image_files import name_in_errors
    from experiments.engine.scoring.files.any_order import measure_in_any_order, warn_of_order
    from experiments.engine.scoring.files.folders import describe_lossy
    from experiments.engine.scoring.files.lines import text_of_scores
    from experiments.engine.scoring.reference import content_sha256, identify_measure
    from experiments.engine.scoring.scores import score

    # Scores are taken in the order of content.
    with name_in_errors(images.path):
        measured, order = measure_in_any_order(scorer.extractor, images)
        values = score(
            measured,
            scorer.reference,
            None if images.labels is None else images.labels[order],
            balanced=_is_balanced(images),
            half=scorer.half,
            device=scorer.device,
        )
    in_file_order = measured.take(order.argsort())
    values["warnings"] += scorer.extractor.warnings
    values["warnings"] += warn_of_order(in_file_order, values["is"])
    if images.lossy:
        values["warnings"].append(describe_lossy(images))
    if images.stray:
        values["warnings"].append(
            f"{images.path.name} carries {', '.join(images.stray)}, which was ignored: "
            "ADM's evaluator would score that instead of the images"
        )
    if record:
        identity = identify_measure(scorer.extractor, scorer.reference)
        sha256 = content_sha256(images.path, measured)
        write_record(record, _record_of(images, sha256, values, identity, scorer.device))

    shown = dict(values)
    unknown = ", by unknown features" if scorer.extractor.name == UNKNOWN_FEATURES else ""
    if images.origin and "nfe" in images.origin:
        shown["nfe"] = images.origin["nfe"]
    print(text_of_scores(images.path.name, shown, scorer.against.name + unknown))
    return in_file_order


def _record_of(
    images: StoredImages,
    sha256: str,
    values: dict[str, Any],
    identity: dict[str, Any],
    device: str,
) -> Record:
    """Return the scores in the form of an Evaluate record.

    The manifest holds both files' hashes, what the sampler wrote of itself, and how the scores were
    measured.
    """
    import torch

    from experiments.engine.numerics.precision import precision, read_tf32_flags
    from experiments.engine.scoring.files.any_order import ORDER
    from experiments.engine.scoring.outcome import label_histogram, package_versions
    from experiments.engine.scoring.reference import DINOV2

    # How the scores were measured.
    with precision("fp32", torch.device(device)):
        flags = read_tf32_flags()
    measure: dict[str, Any] = {
        "num": len(images),
        "image": {"size": images.shape[1], "format": "uint8"},
        "order": ORDER,
        "flags": flags,
    }
    if images.lossy:
        measure["image"]["lossy"] = dict(images.lossy)
    if images.labels is not None:
        measure["labels"] = {"histogram_sha256": label_histogram(images.labels)}
    packages = ["numpy", "scipy", "torch-fidelity"]
    if DINOV2.name in identity["extractor"]:
        packages.append("timm")
    measure["versions"] = package_versions(*packages)
    measure |= identity

    # No spec names the samples, so the record is named by its manifest.
    samples = {"name": images.path.name, "sha256": sha256}
    manifest = samples_manifest(images.origin or {}, {"samples": samples}, measure)
    text = json.dumps(manifest, sort_keys=True)
    return Record(
        hashlib.sha256(text.encode()).hexdigest()[:16],
        SCORES,
        "done",
        values | {"made": images.origin, "manifest": manifest},
        provenance()
        | {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "precision_flags": flags,
        },
        timestamp(),
        {},
    )


def _is_balanced(images: StoredImages) -> bool:
    return images.origin is not None and images.origin.get("labels") == "balanced"


def _compare(
    files: Sequence[StoredImages],
    measured: Sequence[Measured],
    order: tuple[ndarray, ndarray],
    reference: Reference,
) -> str:
    """Return the line that compares two files from common seeds."""
    from experiments.engine.scoring.scores import paired

    # Row i of both comes from the same seed.
    a, b = (features.take(rows) for features, rows in zip(measured, order, strict=True))
    labels = None if files[0].labels is None else files[0].labels[order[0]]
    difference = paired(a, b, reference, labels, _is_balanced(files[0]))

    names = f"{files[0].path.name} less {files[1].path.name}"
    text = f"{names}: {counted_name(FID, difference.num)} {difference.value:+.4f}"
    if math.isnan(difference.error):
        text += " (too few samples for its error)"
    else:
        text += f" ± {difference.error:.4f} (paired; ± {difference.error_unpaired:.4f} unpaired)"
    text += f", {difference.relative:+.1%}: {difference.verdict.value}"
    if abs(difference.relative) < TRAININGS:
        text += f"; between two trainings, one each, differences below {TRAININGS:.1%} say nothing"
    return text


if __name__ == "__main__":
    raise SystemExit(main())
