"""Score ADM-style sample files: `python experiments/evaluate.py samples.npz --against VIRTUAL_imagenet256_labeled.npz`.

A sample file holds uint8 images (arr_0, N x H x W x 3); the reference holds such images, statistics (mu, sigma, mu_s,
sigma_s) or both. Prints FID, sFID, IS, precision, recall, density, coverage, KID and MIND with N in their names and sampling errors where N allows one.
`--record FILE.json` keeps them, with all that decided them, for diff_protocol.py.
With `--paired`, two files that sample.py made from common seeds are compared with the error of their difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.engine.cli import Parser, run_command
from experiments.engine.data.locate import inception_path
from experiments.engine.records.manifest import of_samples, score_name
from experiments.engine.records.store import SCORES, Record, provenance, timestamp, write_record

if TYPE_CHECKING:
    from experiments.engine.data.image_files import ImageFile

SHOWN = (
    "fid",
    "fid_corrected",
    "sfid",
    "is",
    "is_shuffled",
    "precision",
    "recall",
    "precision_half",
    "recall_half",
    "density",
    "coverage",
    "kid",
    "mind",
)
TRAININGS = 0.013  # coefficient of variation of FID between trainings (arXiv:2606.20536)


def main() -> int:
    return run_command(_main, str)


def _main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "samples", nargs="+", type=Path, help="one .npz, or several to score in turn"
    )
    parser.add_argument(
        "--against",
        type=Path,
        required=True,
        metavar="REFERENCE",
        help="an .npz with statistics, images or both",
    )
    parser.add_argument(
        "--inception",
        type=Path,
        default=inception_path(),
        metavar="FILE",
        help="weights (default: $DICO_INCEPTION, or in data/)",
    )
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
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: the GPU if there is one"
    )
    _run(parser.parse_args())
    return 0


def _run(args: argparse.Namespace) -> None:
    import torch

    from experiments.engine.data.image_files import ImageFile, has_images, name_in_errors
    from experiments.engine.jobs.execute import require_device
    from experiments.engine.scoring import inception, scores
    from experiments.engine.scoring.measure import Measured, measure
    from experiments.engine.scoring.reference import identity, read_reference, statistics

    if args.paired and len(args.samples) != 2:
        raise ValueError(f"--paired compares two sample files, got {len(args.samples)}")
    if args.record and len(args.samples) != 1:
        raise ValueError(f"--record keeps the scores of one sample file, got {len(args.samples)}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    require_device(device)
    for path in args.samples:
        if not has_images(path) and not (statistics(path) and not args.paired):
            raise ValueError(
                f"{path.name}: holds no images (arr_0)"
                + ("" if statistics(path) else " and no statistics (mu, sigma)")
            )
    files = [ImageFile(path) for path in args.samples if has_images(path)]
    if args.record and not files:
        raise ValueError(
            f"--record keeps the scores of images; {args.samples[0].name} holds statistics only"
        )
    order = _common_order(*files) if args.paired else None
    extractor = inception.load(args.inception, device)
    reference = read_reference(extractor, args.against)
    for path in (path for path in args.samples if not has_images(path)):
        found = scores.distances(statistics(path), reference)
        print(
            "\n".join(
                [
                    f"{path.name} against {args.against.name}, statistics only: N and errors are unknown",
                    *(f"  {name:15} {value:.4f}" for name, value in found.items()),
                ]
            )
        )
    measured = []
    for images in files:
        with name_in_errors(images.path):
            measured.append(measure(extractor, images.batches()))
            values = scores.score(
                measured[-1],
                reference,
                images.labels,
                balanced=_balanced(images),
                half=args.half,
                device=device,
            )
        if images.stray:
            values["warnings"].append(
                f"{images.path.name} carries {', '.join(images.stray)}, which was ignored: ADM's evaluator would score that instead of the images"
            )
        if args.record:
            write_record(
                args.record,
                _recorded(images, values, identity(extractor, reference), device),
            )
        print(
            _shown(
                images.path.name,
                values
                | {key: images.made[key] for key in ("nfe",) if images.made and key in images.made},
                args.against.name,
            )
        )
    if order is not None:
        sides = [
            Measured(m.pool[rows], m.spatial[rows], m.probabilities[rows])
            for m, rows in zip(measured, order, strict=True)
        ]
        labels = None if files[0].labels is None else files[0].labels[order[0]]
        print(
            _compared(scores.paired(*sides, reference, labels, _balanced(files[0])), args.samples)
        )


def _recorded(
    images: ImageFile, values: dict[str, Any], identity: dict[str, Any], device: str
) -> Record:
    """The scores with both files' hashes, what the sampler wrote of itself, and how they were measured, in the form of an Evaluate record."""
    import torch

    from experiments.engine.data.image_files import file_sha256
    from experiments.engine.numerics.precision import precision, read_tf32_flags
    from experiments.engine.scoring.stage import histogram, versions

    with precision("fp32", torch.device(device)):
        found = {
            "num": len(images),
            "image": {"size": images.shape[1], "format": "uint8"},
            "flags": read_tf32_flags(),
        }
    found |= (
        {"labels": {"histogram_sha256": histogram(images.labels)}}
        if images.labels is not None
        else {}
    )
    found |= {"versions": versions("numpy", "scipy", "torch-fidelity"), **identity}
    whole = of_samples(
        images.made or {},
        {"samples": {"name": images.path.name, "sha256": file_sha256(images.path)}},
        found,
    )
    place = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "precision_flags": found["flags"],
    }
    name = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]
    return Record(
        name,
        SCORES,
        "done",
        values | {"made": images.made, "manifest": whole},
        provenance() | place,
        timestamp(),
        {},
    )


def _common_order(a: ImageFile, b: ImageFile) -> tuple[Any, Any]:
    """Rows of both files in the order of generation; ValueError unless they come from the same seeds and labels."""
    for images in (a, b):
        if images.index is None or images.labels is None or (images.made or {}).get("seed") is None:
            raise ValueError(
                f"{images.path.name} does not say from which seeds it was made; pairs need files that sample.py wrote"
            )
    rows = a.index.argsort(), b.index.argsort()
    same = (
        len(a) == len(b)
        and (a.index[rows[0]] == b.index[rows[1]]).all()
        and (a.labels[rows[0]] == b.labels[rows[1]]).all()
    )
    if not same or a.made["seed"] != b.made["seed"]:
        raise ValueError(
            f"{a.path.name} and {b.path.name} were made from different seeds or labels: compare them unpaired"
        )
    return rows


def _balanced(images: ImageFile) -> bool:
    return images.made is not None and images.made.get("labels") == "balanced"


def _shown(name: str, values: dict[str, Any], reference: str) -> str:
    lines = [f"{name} against {reference}"]
    for key in (
        key
        for key in SHOWN
        if values.get(key, float("nan")) == values.get(key, float("nan")) and key in values
    ):
        base, _, kind = key.partition("_")
        words = {
            "": "",
            "corrected": ", without its finite-N bias",
            "shuffled": ", order shuffled",
            "half": ", ADM's half precision",
        }[kind]
        error = values.get(f"{key}_se")
        spread = (
            f" ± {error:.4f}"
            if error is not None and error == error
            else " (deviation over subsets " + f"{values['kid_sd']:.6f})"
            if key == "kid"
            else ""
        )
        digits = 6 if base == "kid" else 4
        counts = (
            f", k 3, {values['num_reference']} reference rows"
            if base in ("precision", "recall", "density", "coverage")
            else ""
        )
        counts += f", over {values['mind_rows']} rows of each" if base == "mind" else ""
        lines.append(
            f"  {score_name(base, values['num']):15} {values[key]:.{digits}f}{spread}{words}{counts}"
        )
    lines += [f"  network evaluations per image: {values['nfe']}"] if "nfe" in values else []
    return "\n".join([*lines, *(f"  warning: {text}" for text in values["warnings"])])


def _compared(values: dict[str, Any], paths: list[Path]) -> str:
    line = f"{paths[0].name} less {paths[1].name}: {score_name('fid', values['num'])} {values['fid_difference']:+.4f}"
    if values["fid_difference_se"] == values["fid_difference_se"]:
        line += f" ± {values['fid_difference_se']:.4f} (paired; ± {values['fid_difference_se_unpaired']:.4f} unpaired)"
    else:
        line += " (too few samples for its error)"
    caution = (
        f"; between two trainings, one each, differences below {TRAININGS:.1%} say nothing"
        if abs(values["fid_relative"]) < TRAININGS
        else ""
    )
    return f"{line}, {values['fid_relative']:+.1%}: {values['verdict']}{caution}"


if __name__ == "__main__":
    raise SystemExit(main())
