"""Score a published checkpoint: `python experiments/evaluate_checkpoint.py --backbone dico_xl --checkpoint DiCo-XL.pt --protocol imagenet256`.

Loads the weights strictly and without running code from the file, draws the protocol's images, scores them and prints the
paper's values beside; the record says what was measured. `--dry-run` lists what is missing on this machine and what the
run would cost on it; `--cluster slurm` sends it. Running again goes on where a stopped run was.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.checkpoint import options_of
from experiments.engine.cli import Parser, add_run_options, carry_out, device_of, guarded, require_device
from experiments.engine.launch import Job
from experiments.engine.manifest import score_name
from experiments.engine.plan import Listed
from experiments.engine.rows import Row
from experiments.engine.sources import is_latent, missing_features, require_features, vae_source
from experiments.engine.spec import Backbone, Checkpoint, Diffusion, Evaluate, spec_id
from experiments.engine.store import REPOSITORY, Store
from experiments.main_results import TABLES
from experiments.protocols import PROTOCOLS, Protocol, cost_stages, sampler_of

if TYPE_CHECKING:
    from torch import nn

PAPERS = {"imagenet256": "table1.csv", "imagenet512": "table2.csv"}
SCORES = ("fid", "fid_corrected", "sfid", "is", "precision", "recall", "kid")


def main(arguments: Sequence[str] | None = None) -> int:
    """Score, plan or print; the exit status is `guarded`'s."""
    return guarded(lambda: _main(_parse(arguments), arguments))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="registered name, e.g. dico_xl")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help=".pt or .safetensors")
    parser.add_argument("--protocol", choices=[name for name, protocol in PROTOCOLS.items() if not protocol.small], required=True)
    add_network_options(parser)
    parser.add_argument("--batch", type=int, metavar="N", help="images at a time on a GPU (default: 250, on Slurm the site's sample_batch)")
    add_run_options(parser)
    args = parser.parse_args(arguments)
    if args.batch is not None and args.batch < 1:
        parser.error("--batch takes a number from 1 on")
    return args


def _main(args: argparse.Namespace, arguments: Sequence[str] | None) -> int:
    protocol, device = PROTOCOLS[args.protocol], device_of(args, args.backbone)
    spec, model, key = evaluation_of(args, protocol)
    if args.dry_run:
        if args.cluster != "slurm":
            require_device(device)
        print(f"{args.checkpoint.name}: weights under the key {key}")
        print(_plan(spec, model, device if args.cluster != "slurm" else None))
    store = Store(args.results, REPOSITORY / "results" / "reference")
    resources = {"checkpoint": args.checkpoint.resolve()} | ({"sample_batch": args.batch} if args.batch else {})
    job = Job(f"{args.checkpoint.name}, {spec.num} images", (spec,), row=args.backbone)
    good = carry_out(Listed(device, together=(job,), resources=resources), args, store, arguments, lambda: require_features(spec))
    if good and (record := store.latest(spec)):
        print("\n".join([f"{args.checkpoint.name} (key {key}), {args.protocol}, manifest {record.values['manifest']['hash']}", *_beside(record.values, args.backbone, spec)]))
    elif good:
        raise ValueError(f"there is no record of {args.checkpoint.name} under {args.protocol} yet; leave out --report")
    return 1 if good is False else 0


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """What `evaluation_of` takes beside --backbone and --checkpoint."""
    parser.add_argument("--key", help="where a .pt file keeps its weights (default: ema, else state_dict, else flat)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the network: learn_sigma=false for SiT's 512 model, raster_padding=true for DiM's")


def evaluation_of(args: argparse.Namespace, protocol: Protocol) -> tuple[Evaluate, nn.Module, str]:
    """The stage that scores a published file, its network, and the key under which its weights lie; ValueError for a file of another network."""
    from experiments.engine.npz import sha256

    data = protocol.data
    row = _declared(args.backbone, protocol)
    own = row.backbone.options if row and (row.backbone.name, cost_stages(row)[0].size) == (args.backbone, data.size) else {}
    size = dict(input_size=data.size, in_channels=data.channels, num_classes=data.num_classes)
    backbone = Backbone(args.backbone, own | size | options_of(args.option))
    model, key = _load(backbone, args)
    weights = Checkpoint(backbone, data, sha256(args.checkpoint), args.key or Checkpoint.key, row.method.diffusion if row else Diffusion())
    return Evaluate(weights, sampler_of(row, protocol) if row else protocol.sampler, protocol.num, protocol.features, protocol.labels), model, key


def _declared(name: str, protocol: Protocol) -> Row | None:
    """The row whose objective and sampler are the network's: its own at this size, guided where there is one, else of its size, else of its family."""
    rows = [row for table in TABLES.values() for row in table.rows if row.method and row.backbone.name.partition("_")[0] == name.partition("_")[0]]
    return min(rows, key=lambda row: (row.backbone.name != name, cost_stages(row)[0].size != protocol.data.size, sampler_of(row, protocol).scale == 1), default=None)


def _load(backbone: Backbone, args: argparse.Namespace) -> tuple[nn.Module, str]:
    """The network, and the key under which the file keeps its weights."""
    import torch

    import backbones

    with torch.random.fork_rng(devices=[]):
        model = backbones.build(backbone.name, **backbone.options)
    key = backbones.load_published(model, args.checkpoint, args.key)
    return model.eval(), key


def _plan(spec: Evaluate, model: nn.Module, device: str | None) -> str:
    """What is missing, and the cost of N images on this device, if it is the one: the network timed here, times its evaluations."""
    lines = [f"{spec_id(spec)}  {spec.num} images, {spec.sampler.name}, {spec.sampler.num_steps} steps, guidance scale {spec.sampler.scale:g}, {spec.labels} labels, {spec.precision}"]
    lines += [f"missing: {text}" for text in _missing(spec)] or ["nothing is missing"]
    passes = spec.sampler.num_steps * (1 if spec.sampler.scale == 1 else 2)
    if spec.sampler.name == "dopri5":
        return "\n".join([*lines, "cost: unknown; its steps are as many as each image needs"])
    if device:
        seconds = _seconds_per_pass(spec, model, device)
        hours = spec.num * passes * seconds / 3600
        lines.append(f"sampling: {passes} evaluations an image at {seconds * 1000:.3g} ms each on this device: about {hours:.3g} hours; decoding and features come on top")
    else:
        lines.append(f"sampling: {passes} evaluations an image; what one costs, this command says on a node, without --cluster slurm")
    gigabytes = spec.num * 3 * (8 * spec.data.size if is_latent(spec.data) else spec.data.size) ** 2 / 1e9
    lines.append(f"disk: {gigabytes:.1f} GB of images")
    return "\n".join(lines)


def _missing(spec: Evaluate) -> list[str]:
    found = missing_features(spec)
    if is_latent(spec.data) and find_spec("diffusers"):
        from experiments.engine.autoencoder import missing_vae

        found += filter(None, [missing_vae(vae_source())])
    return found


def _seconds_per_pass(spec: Evaluate, model: nn.Module, device: str) -> float:
    """Seconds an image and evaluation: the fastest of three small batches after a warm-up."""
    import torch

    from experiments.engine.precision import precision

    data, batch = spec.data, 64 if device == "cuda" else 1
    model.to(device)
    given = torch.zeros(batch, data.channels, data.size, data.size, device=device), torch.zeros(batch, device=device), torch.zeros(batch, dtype=torch.long, device=device)
    times = []
    with torch.inference_mode(), precision(spec.precision, torch.device(device)):
        for _ in range(4):
            started = time.perf_counter()
            model(*given).sum().item()  # reading the number waits for the device
            times.append(time.perf_counter() - started)
    return min(times[1:]) / batch


def _beside(values: dict[str, Any], backbone: str, spec: Evaluate) -> list[str]:
    """Our scores, each with the paper's value for the same network where it has one."""
    paper = _published(backbone, spec)
    lines = []
    for key in (key for key in SCORES if values.get(key) is not None and values[key] == values[key]):
        error, known = values.get(f"{key}_se"), paper.get(key)
        spread = f" ± {error:.4f}" if error is not None and error == error else ""
        words = ", without its finite-N bias" if key == "fid_corrected" else ""
        lines.append(f"  {score_name(key.partition('_')[0], values['num']):14} {values[key]:.4f}{spread}{words}" + (f"   paper {known}" if known else ""))
    steps = f"{int(paper['train_steps']):,} training steps, " if paper.get("train_steps") else ""
    note = f"  paper: {paper['source']}, {paper['model']}, {steps}{'guided' if paper['cfg'] == 'yes' else 'unguided'}" if paper else "  the paper has no such row"
    return [*lines, note, *(f"  warning: {text}" for text in values["warnings"])]


def _published(backbone: str, spec: Evaluate) -> dict[str, str]:
    """The paper's longest-trained row of this network, guided or not as the images were."""
    if spec.data.name not in PAPERS:
        return {}
    guided = "no" if spec.sampler.scale == 1 else "yes"
    with open(REPOSITORY / "results" / "published" / PAPERS[spec.data.name], newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["cfg"] == guided and row["model"].lower().replace("-", "_").replace("/", "_") == backbone]
    return max(rows, key=lambda row: int(row["train_steps"] or 0), default={})


if __name__ == "__main__":
    raise SystemExit(main())
