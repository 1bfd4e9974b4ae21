"""Encode a folder of class folders once: `python experiments/prepare_latents.py --protocol imagenet256 --images ILSVRC/train`.

Crops as ADM does, encodes every image and its flip in fp32, and writes memory-mapped shards with a manifest to
$DICO_DATA/<protocol> (or --out). Start it as often as there are processes, GPUs or Slurm tasks: they share the shards.
Stopped or killed, the same command goes on. Moments of ImageNet take 84 GB at 256 pixels and 336 GB at 512; fixed
samples, as DiCo's authors stored them, half of that.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from experiments.declared.protocols import PROTOCOLS
from experiments.engine.cli import Parser, run_command
from experiments.engine.data.locate import folder_of
from experiments.engine.jobs.progress import images_line

LATENT_PROTOCOLS = {
    name: protocol for name, protocol in PROTOCOLS.items() if name.startswith("imagenet")
}


def main() -> int:
    return run_command(_main, str)


def _main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", required=True, choices=LATENT_PROTOCOLS)
    parser.add_argument(
        "--images",
        required=True,
        type=Path,
        help="folder that holds one folder of images for each class",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="where the latents go (default: $DICO_DATA/<protocol>, or data/<protocol>)",
    )
    parser.add_argument(
        "--vae",
        default="sd-vae-ft-ema",
        help="sd-vae-ft-ema, sd-vae-ft-mse, or a diffusers folder with safetensors (default: sd-vae-ft-ema)",
    )
    parser.add_argument(
        "--corrupt",
        choices=("refuse", "skip"),
        default="refuse",
        help="files that cannot be decoded: stop (default), or leave out and count",
    )
    parser.add_argument(
        "--device", help="cpu, cuda or cuda:N (default: the GPU where there is one)"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=32,
        help="images and flips that the VAE takes at a time on a GPU; a CPU takes one (default: 32)",
    )
    parser.add_argument("--shard", type=int, default=1024, help="images a shard (default: 1024)")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="threads that decode and crop (default: the cores)",
    )
    return _prepare(parser.parse_args())


def _prepare(args: argparse.Namespace) -> int:
    if min(args.batch, args.shard, args.workers) < 1:
        raise ValueError("--batch, --shard and --workers take numbers from 1")
    import torch

    from experiments.engine.data.autoencoder import load_autoencoder
    from experiments.engine.data.encode import EncodingJob, describe_statistics, encode_pictures
    from experiments.engine.data.pictures import describe_modes, find_pictures
    from experiments.engine.jobs.execute import require_device

    data = LATENT_PROTOCOLS[args.protocol].data
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    require_device(device.partition(":")[0])
    pictures = find_pictures(args.images, data.num_classes)
    vae = load_autoencoder(args.vae, device, args.batch)
    work = EncodingJob(
        pictures,
        vae,
        data.size * vae.factor,
        data.latents,
        args.shard,
        args.corrupt == "skip",
        args.workers,
    )
    manifest = encode_pictures(work, args.out or folder_of(data), _Progress())
    for name, reason in manifest["skipped"].items():
        print(f"skipped {name}: {reason}")
    converted = (
        describe_modes(manifest["converted"]) or "none"
        if "converted" in manifest
        else "unknown, older shards do not say"
    )
    print(
        f"{manifest['num_images']} images in {len(manifest['shards'])} shards, {len(manifest['skipped'])} skipped; converted to RGB: {converted}"
    )
    print(describe_statistics(manifest["statistics"]))
    if not manifest["statistics"]["as_expected"]:
        print(
            f"warning: {args.protocol} takes only sd-vae-ft's latents; a run on these declares Data(vae={vae.encoder!r})",
            file=sys.stderr,
        )
    return 0


class _Progress:
    """A line on standard error as shards get done, whoever makes them, with the time that is left."""

    def __init__(self) -> None:
        self.started, self.first, self.last = 0.0, -1, 0

    def __call__(self, done: int, total: int) -> None:
        if self.first < 0:
            self.started, self.first = time.monotonic(), done
        elif done > self.last:
            rate = (done - self.first) / (time.monotonic() - self.started)
            print(images_line(done, total, rate), file=sys.stderr, flush=True)
        self.last = done


if __name__ == "__main__":
    raise SystemExit(main())
