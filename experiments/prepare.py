"""Prepare data sets once, before anything is trained on them.

python experiments/prepare.py cifar10
python experiments/prepare.py latents --protocol imagenet256 --images ILSVRC/train
python experiments/prepare.py pixels --size 64 --images ILSVRC/train
python experiments/prepare.py pixels --size 24 --classes 2 --images flowers --out my_set
python experiments/prepare.py arrays --classes 0 --folder my_set
python experiments/prepare.py judge --out judge.safetensors
python experiments/prepare.py captions --train TRAIN.json --validation VAL.json --encoder CLIP
python experiments/prepare.py captions --protocol digits_text_minilm --encoder MINILM
"""

from __future__ import annotations

import sys
from pathlib import Path

# The code is this file's tree, whatever the current folder and PYTHONPATH offer.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from functools import partial
from typing import Any

from experiments.declared.help import preparations as about
from experiments.declared.protocols import CIFAR10, CIFAR10_16, COCO256, PROTOCOLS, SENTENCES
from experiments.declared.recipes import pixels
from experiments.engine.cli import Parser, run_command
from experiments.engine.data.locate import (
    JUDGE_WEIGHTS,
    find_cifar10,
    folder_of,
    seal_folder,
)
from experiments.engine.jobs.progress import ProgressLines
from experiments.engine.machine.cores import find_cores
from experiments.engine.machine.gpu import choose_device, prepare_torch
from experiments.engine.records.files import require_target
from experiments.engine.specs.stages import IMAGENET_CLASSES

PIXEL_SIZES = (64, 128, 256, 512)
LATENT_PROTOCOLS = {
    name: protocol for name, protocol in PROTOCOLS.items() if name.startswith("imagenet")
} | COCO256


def main() -> int:
    """Prepare the data set that the command line names; return the exit status."""
    return run_command(_run_verb)


def _run_verb() -> int:
    parser = Parser(__doc__)
    verbs = parser.add_subparsers(
        dest="data", required=True, metavar="cifar10|latents|pixels|arrays|judge|captions"
    )
    _add_cifar10(verbs)
    _add_latents(verbs)
    _add_pixels(verbs)
    _add_arrays(verbs)
    _add_judge(verbs)
    _add_captions(verbs)
    args = parser.parse_args()
    return args.prepare(args)


def _add_cifar10(verbs: Any) -> None:
    verb = verbs.add_parser(
        "cifar10", description=about.CIFAR10, help="download and check CIFAR-10"
    )
    verb.set_defaults(prepare=prepare_cifar10)


def _add_latents(verbs: Any) -> None:
    verb = verbs.add_parser("latents", description=about.LATENTS, help="encode pictures to latents")
    verb.set_defaults(prepare=prepare_latents)
    verb.add_argument("--protocol", choices=LATENT_PROTOCOLS, help="whose latents are made")
    _add_classes(verb)
    verb.add_argument(
        "--size",
        type=int,
        help="with --classes: side of the crops in pixels, a multiple of the autoencoder's factor",
    )
    _add_images(verb, "folder that holds one folder of images for each class")
    verb.add_argument(
        "--out",
        type=Path,
        help="where the latents go (default: $DICO_DATA/<protocol>, or data/<protocol>)",
    )
    verb.add_argument(
        "--vae",
        default="sd-vae-ft-ema",
        help="sd-vae-ft-ema, sd-vae-ft-mse, a folder of any AutoencoderKL of diffusers with "
        "safetensors, or a file of VA-VAE (default: sd-vae-ft-ema)",
    )
    verb.add_argument(
        "--reconstructions",
        type=int,
        default=256,
        metavar="N",
        help="pictures on which PSNR, SSIM and the Fréchet distance of reconstructions are taken "
        "(default: 256; 0: none)",
    )
    verb.add_argument(
        "--corrupt",
        choices=("refuse", "skip"),
        default="refuse",
        help="files that cannot be decoded: stop (default), or leave out and count",
    )
    verb.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    verb.add_argument(
        "--batch",
        type=int,
        default=32,
        help="images and flips that a GPU encodes at a time; a CPU takes one (default: 32)",
    )
    verb.add_argument("--shard", type=int, default=1024, help="images per shard (default: 1024)")
    _add_workers(verb)


def _add_pixels(verbs: Any) -> None:
    verb = verbs.add_parser("pixels", description=about.PIXELS, help="crop pictures to pixels")
    verb.set_defaults(prepare=prepare_pixels)
    verb.add_argument(
        "--size",
        required=True,
        type=int,
        help="side of the crops in pixels: 64, 128, 256 or 512, or any with --classes",
    )
    _add_classes(verb)
    _add_images(verb, "folder that holds one folder of images for each class")
    verb.add_argument(
        "--out",
        type=Path,
        help="where the two files go (default: $DICO_DATA/imagenet<size>_pixels, or "
        "data/imagenet<size>_pixels)",
    )
    _add_workers(verb)


def _add_arrays(verbs: Any) -> None:
    verb = verbs.add_parser("arrays", description=about.ARRAYS, help="prepare arrays of one's own")
    verb.set_defaults(prepare=prepare_arrays)
    verb.add_argument("--folder", required=True, type=Path, help="folder of the arrays")
    verb.add_argument(
        "--classes", required=True, type=int, metavar="N", help="number of classes; 0: none"
    )


def _add_classes(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--classes",
        type=int,
        metavar="N",
        help="prepare a set of one's own with so many class folders; 0: images without classes "
        "(needs --out)",
    )


def _require_own(args: argparse.Namespace) -> None:
    """Raise ValueError unless the options of a set of one's own fit together."""
    if args.classes < 0 or args.size is None or args.size < 1:
        raise ValueError("--classes takes a number from 0 on, and needs --size from 1 on")
    if args.out is None:
        raise ValueError("--classes prepares a set of one's own; name its folder with --out")


def _add_judge(verbs: Any) -> None:
    verb = verbs.add_parser("judge", description=about.JUDGE, help="train CIFAR-10's judge")
    verb.set_defaults(prepare=prepare_judge)
    verb.add_argument(
        "--out",
        type=Path,
        default=JUDGE_WEIGHTS,
        help="file of the weights (default: the committed one, results/weights/"
        f"{JUDGE_WEIGHTS.name})",
    )


def _add_captions(verbs: Any) -> None:
    verb = verbs.add_parser(
        "captions", description=about.CAPTIONS, help="encode captions to states, once"
    )
    verb.set_defaults(prepare=prepare_captions)
    verb.add_argument("--protocol", choices=SENTENCES, help="whose digits the captions name")
    for part, meaning in (("train", "trained on"), ("validation", "scored")):
        about_part = f"JSON annotations of the images that are {meaning}"
        verb.add_argument(f"--{part}", type=Path, metavar="FILE", help=about_part)
    verb.add_argument(
        "--encoder",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="folder of CLIP's text part; with --protocol: of a sentence encoder of BERT's form",
    )
    verb.add_argument(
        "--long",
        choices=("refuse", "cut"),
        default="refuse",
        help="captions longer than the context: stop (default), or cut and count",
    )
    verb.add_argument(
        "--out", type=Path, help="where the states go (default: $DICO_DATA/coco2014_captions)"
    )
    verb.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    verb.add_argument("--batch", type=int, default=64, help="captions at a time (default: 64)")


def _add_images(verb: argparse.ArgumentParser, help_text: str) -> None:
    verb.add_argument("--images", required=True, type=Path, help=help_text)


def _add_workers(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--workers",
        type=int,
        default=find_cores().number,
        help="threads that decode and crop (default: number of cores)",
    )


def prepare_cifar10(_: argparse.Namespace) -> int:
    """Download CIFAR-10 unless it is there, and read what is there."""
    from experiments.engine.data.cifar10 import download
    from experiments.engine.data.sets import load_cifar10

    folder = folder_of(CIFAR10.data)
    if not find_cifar10(folder, "train"):
        download(folder)
    for split in ("train", "test"):
        if not find_cifar10(folder, split):
            print(f"{split}: not in {folder}")
            continue
        images = load_cifar10(CIFAR10.data, split)
        identity = images.identity
        line = f"{split}: {len(images)} images from {identity['data_source']}"
        line += f", sha256 {identity['data_sha256'][:16]}"
        if "data_converted" in identity:
            line += f"; converted to RGB: {identity['data_converted']}"
        print(line)
    return 0


def prepare_judge(args: argparse.Namespace) -> int:
    """Train the classifier whose features score CIFAR-10 samples, on the training part alone."""
    from experiments.engine.data.sets import unfolded
    from experiments.engine.judges.cifar import make_judge

    if args.out.exists():
        raise ValueError(f"{args.out} exists already; remove it or choose another --out")
    require_target(args.out, "--out")
    print(make_judge(unfolded(CIFAR10_16.data), args.out, partial(print, flush=True)))
    return 0


def prepare_latents(args: argparse.Namespace) -> int:
    """Encode the pictures of a folder for a protocol, and describe the latents."""
    if min(args.batch, args.shard, args.workers) < 1 or args.reconstructions < 0:
        raise ValueError(
            "--batch, --shard and --workers take numbers from 1, --reconstructions from 0"
        )

    from experiments.engine.data.autoencoder import load_autoencoder, require_latents_of
    from experiments.engine.data.captioned.pictures import captioned_pictures, read_index
    from experiments.engine.data.checks import describe_pictures
    from experiments.engine.data.encode import EncodingJob, encode_pictures
    from experiments.engine.data.latent_statistics import describe_manifest
    from experiments.engine.data.pictures import Crop, find_pictures
    from experiments.engine.scoring.reconstruction.reach import report_reach
    from experiments.engine.specs.latent_space import space_of

    if (args.protocol is None) == (args.classes is None):
        raise ValueError("name either --protocol, or --classes with --size and --out")
    if args.classes is not None:
        _require_own(args)
    device = choose_device(args.device)
    prepare_torch(device.partition(":")[0])
    data = LATENT_PROTOCOLS[args.protocol or "imagenet256"].data
    own = args.classes is not None
    index = read_index() if data.captions else None
    if index is None:
        pictures = find_pictures(args.images, args.classes if own else data.num_classes)
        print(describe_pictures(pictures, own))
    else:
        pictures = captioned_pictures(args.images, index)
    vae = load_autoencoder(args.vae, device, args.batch)
    if not own:
        require_latents_of(data, vae, args.vae)
    if index is not None:
        vae.space = space_of(data)
    job = EncodingJob(
        pictures,
        vae,
        args.size if own else data.size * vae.factor,
        latents=data.latents,
        shard=args.shard,
        skip=args.corrupt == "skip",
        workers=args.workers,
        crop=Crop.ADM if index is None else Crop.SQUARE,
        captions=index,
    )
    folder = args.out or folder_of(data)
    manifest = encode_pictures(job, folder, ProgressLines())
    print(describe_manifest(manifest))
    if args.reconstructions:
        print(report_reach(job, args.reconstructions, folder))
    if own:
        _seal(args.out, args.classes)
    elif not manifest["statistics"]["as_expected"]:
        print(
            f"warning: {args.protocol} takes only sd-vae-ft's latents; a run on these declares "
            f"Data(vae={vae.encoder!r})",
            file=sys.stderr,
        )
    return 0


def _seal(folder: Path, num_classes: int) -> None:
    """Write data.json, and say how a study declares the set."""
    sha256 = seal_folder(folder, num_classes)
    print(f"content {sha256[:16]}; a study declares it by own_data({str(folder)!r})")


def prepare_pixels(args: argparse.Namespace) -> int:
    """Crop the pictures of a folder to one array."""
    if args.workers < 1:
        raise ValueError("--workers takes a number from 1 on")
    from experiments.engine.data.checks import describe_pictures
    from experiments.engine.data.pictures import describe_modes, find_pictures
    from experiments.engine.data.pixels import write_pixels

    own = args.classes is not None
    if own:
        _require_own(args)
    elif args.size not in PIXEL_SIZES:
        raise ValueError(f"--size takes one of {PIXEL_SIZES}, or any size with --classes")
    folder = args.out if own else args.out or folder_of(pixels(args.size))
    pictures = find_pictures(args.images, args.classes if own else IMAGENET_CLASSES)
    print(describe_pictures(pictures, own))
    converted = write_pixels(pictures, folder, args.size, args.workers)
    print(
        f"{len(pictures.files)} images of {args.size} x {args.size} pixels; "
        f"converted to RGB: {describe_modes(converted) or 'none'}"
    )
    if own:
        _seal(folder, args.classes)
    return 0


def prepare_captions(args: argparse.Namespace) -> int:
    """Encode the captions of digits, or of both parts of MS-COCO, and say what they are."""
    if args.batch < 1:
        raise ValueError("--batch takes a number from 1 on")
    if (args.protocol is None) != bool(args.train and args.validation):
        raise ValueError("name either --protocol, or --train and --validation")
    if args.protocol:
        from experiments.engine.texts.tables import prepare_table

        print(prepare_table(args.encoder, SENTENCES[args.protocol].data, args.out))
        return 0

    from experiments.engine.data.captioned.pictures import captions_folder
    from experiments.engine.texts.annotations import describe_annotations, read_annotations
    from experiments.engine.texts.encoder import load_text_encoder
    from experiments.engine.texts.states import CaptionJob, describe_states, encode_captions

    device = choose_device(args.device)
    prepare_torch(device.partition(":")[0])
    annotations = read_annotations(args.train, args.validation)
    data = next(iter(COCO256.values())).data
    print("\n".join(describe_annotations(annotations, data)))
    encoder = load_text_encoder(args.encoder, device)
    job = CaptionJob(annotations, encoder, args.batch, cut=args.long == "cut")
    manifest = encode_captions(job, args.out or captions_folder(), ProgressLines("captions"))
    print(describe_states(manifest, data))
    return 0


def prepare_arrays(args: argparse.Namespace) -> int:
    """Check the arrays of a folder, and write data.json beside them."""
    if args.classes < 0:
        raise ValueError("--classes takes a number from 0 on")
    from experiments.engine.data.locate import own_data
    from experiments.engine.data.sets import load

    _seal(args.folder, args.classes)
    images = load(own_data(args.folder))
    print(f"{len(images)} images, {args.classes} classes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
