"""The scripts around scores: what they print, and bad input in one line with exit status 2."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from backbones import build, list_backbones, tiny_options_of
from experiments import calibrate, diff_protocol, evaluate, evaluate_checkpoint, sample
from experiments.declared import paper_scores
from experiments.declared.checkpoints import nearest_row
from experiments.declared.protocols import CIFAR10, PROTOCOLS
from experiments.engine.data import image_files as npz
from experiments.engine.data import locate as sources
from experiments.engine.data.sets import ImageSet
from experiments.engine.records.store import Store, read_record
from experiments.engine.runtime.context import RunContext
from experiments.engine.scoring import inception, outcome, scores, stage
from experiments.engine.scoring import measure as scoring_measure
from experiments.engine.scoring import reference as scoring_reference
from experiments.engine.specs.spec import Backbone, Checkpoint, Data, Evaluate, Sampler
from experiments.engine.specs.stages import evaluate_stage
from experiments.main_results import TABLE_1, TABLES
from tests.support.extractors import Grey

# The layers of the stand-in for Inception.
NARROW_LAYERS = (
    scoring_reference.Layer("pool", "mu", "sigma", 6),
    scoring_reference.Layer("spatial", "mu_s", "sigma_s", 5),
)
IMAGES = np.random.default_rng(0).integers(0, 256, (80, 4, 4, 3), dtype=np.uint8)


def run(
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *arguments: object,
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    status = script.main()
    return status, *capsys.readouterr()


@pytest.fixture
def grey(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inception, "load_inception", lambda path, device: Grey())
    monkeypatch.setattr(stage, "load_inception", lambda path, device: Grey())
    monkeypatch.setattr(scores, "POOL", 6)


def sampled(path: Path, images: np.ndarray, seed: int = 0, order: int = 0) -> Path:
    index = np.random.default_rng(order).permutation(len(images))
    npz.write_images(
        path,
        iter([images[index]]),
        images.shape,
        (index % 8),
        index,
        {
            "labels": "random",
            "seed": seed,
            "nfe": 7,
            "sampler": {"kind": "Sampler", "name": "ddim", "scale": 1.5},
        },
    )
    return path


def test_any_two_files_are_scored(grey, tmp_path: Path, capsys, monkeypatch):
    np.savez(tmp_path / "real.npz", arr_0=IMAGES[:50])
    np.savez(tmp_path / "fake.npz", arr_0=IMAGES[30:], mu=np.zeros(2048), sigma=np.eye(2))
    status, out, _ = run(
        evaluate,
        capsys,
        monkeypatch,
        tmp_path / "fake.npz",
        "--against",
        tmp_path / "real.npz",
        "--half",
    )
    assert status == 0
    for words in (
        "FID-50 ",
        "sFID-50 ",
        "IS-50 ",
        "precision-50 ",
        "ADM's half precision",
        "50 reference rows",
        "KID-50 ",
        "real.npz holds no statistics",
        "carries mu, sigma, which was ignored",
    ):
        assert words in out


def test_common_seeds_are_paired_by_their_index(grey, tmp_path: Path, capsys, monkeypatch):
    np.savez(tmp_path / "real.npz", arr_0=IMAGES[::-1])
    brighter = np.minimum(IMAGES, 250) + np.uint8(5)
    a, b = sampled(tmp_path / "a.npz", IMAGES), sampled(tmp_path / "b.npz", brighter, order=1)
    status, out, _ = run(
        evaluate, capsys, monkeypatch, a, b, "--against", tmp_path / "real.npz", "--paired"
    )
    assert (
        status == 0
        and "a.npz less b.npz: FID-80 " in out
        and "paired; ±" in out
        and "resolved" in out.splitlines()[-1]
    )
    for other in (
        sampled(tmp_path / "c.npz", IMAGES, seed=1),
        sampled(tmp_path / "d.npz", IMAGES[:70]),
    ):
        status, _, err = run(
            evaluate, capsys, monkeypatch, a, other, "--against", tmp_path / "real.npz", "--paired"
        )
        assert status == 2 and "different seeds" in err and err.count("\n") == 1


def test_scores_are_recorded_with_all_that_decided_them(grey, tmp_path: Path, capsys, monkeypatch):
    np.savez(tmp_path / "real.npz", arr_0=IMAGES[::-1])
    for name, seed in (("a", 0), ("b", 1)):
        path = sampled(tmp_path / f"{name}.npz", IMAGES, seed)
        status, out, _ = run(
            evaluate,
            capsys,
            monkeypatch,
            path,
            "--against",
            tmp_path / "real.npz",
            "--record",
            tmp_path / f"{name}.json",
        )
        assert status == 0 and "network evaluations per image: 7\n" in out
    record = read_record(tmp_path / "a.json")
    measure, values = record.values["manifest"]["measure"], record.values
    assert (
        values["num"],
        measure["num"],
        measure["nfe"],
        measure["flags"]["matmul_tf32"],
        measure["labels"],
    ) == (
        80,
        80,
        7,
        False,
        {"policy": "random", "histogram_sha256": outcome.label_histogram(np.arange(80) % 8)},
    )
    assert (
        measure["guidance"]["scale"] == 1.5
        and measure["sampler"] == {"name": "ddim"}
        and measure["reference"]["sha256"] == npz.file_sha256(tmp_path / "real.npz")
    )
    assert (
        values["manifest"]["model"]["samples"]
        == {"name": "a.npz", "sha256": npz.file_sha256(tmp_path / "a.npz")}
        and values["made"]["seed"] == 0
    )
    assert (
        abs(values["fid"]) < 1e-9
        and any("holds no statistics" in text for text in values["warnings"])
        and measure["versions"]["torch"] == torch.__version__
    )
    status, out, _ = run(
        diff_protocol, capsys, monkeypatch, tmp_path / "a.json", tmp_path / "b.json"
    )
    assert status == 1 and "measure.seed: 0 | 1\n" in out and "differ in 1 fields" in out
    status, _, err = run(
        evaluate,
        capsys,
        monkeypatch,
        tmp_path / "a.npz",
        tmp_path / "b.npz",
        "--against",
        tmp_path / "real.npz",
        "--record",
        tmp_path / "c.json",
    )
    assert status == 2 and "of one sample file, got 2" in err and not (tmp_path / "c.json").exists()


def test_statistics_are_scored_as_far_as_they_go(grey, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(scoring_reference, "LAYERS", NARROW_LAYERS)
    for name, mean in (("a", 0.0), ("b", 2.0)):
        np.savez(tmp_path / f"{name}.npz", mu=np.full(6, mean), sigma=np.eye(6))
    status, out, _ = run(
        evaluate, capsys, monkeypatch, tmp_path / "a.npz", "--against", tmp_path / "b.npz"
    )
    assert (
        status == 0
        and "N and errors are unknown" in out
        and "fid             24.0000" in out
        and "is" not in out.split("unknown")[1]
    )


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["nothing.npz"], "no images (arr_0) and no statistics"),
        (["missing.npz"], "no such file"),
        (["real.npz", "--paired"], "compares two sample files"),
        (["real.npz", "real.npz", "--paired"], "does not say from which seeds"),
        (["floats.npz"], "float64"),
        (["unscaled.npz"], "unscaled.npz: 0, 1, 255 are all the levels that the images have"),
        (["one.npz"], "one.npz: a covariance needs at least 2 samples"),
        (
            ["seedless.npz", "seedless.npz", "--paired"],
            "seedless.npz does not say from which seeds",
        ),
        (["real.npz", "--inception", "no.pth"], "no such Inception weights"),
        (["folder"], "folder: is a folder, and no file"),
    ],
)
def test_bad_files_are_one_line(
    arguments: list[str], complaint: str, tmp_path: Path, capsys, monkeypatch, request
):
    monkeypatch.chdir(tmp_path)
    if arguments[-1] != "no.pth":
        request.getfixturevalue("grey")
    np.savez(
        "unscaled.npz",
        arr_0=np.linspace(-1, 1, 960).reshape(20, 4, 4, 3).astype(np.int8).astype(np.uint8),
    )
    np.savez("one.npz", arr_0=IMAGES[:1])
    npz.write_images(
        tmp_path / "seedless.npz",
        iter([IMAGES]),
        IMAGES.shape,
        np.zeros(80, int),
        np.arange(80),
        {"labels": "random"},
    )
    np.savez("real.npz", arr_0=IMAGES)
    np.savez("floats.npz", arr_0=IMAGES / 255)
    Path("folder").mkdir()
    np.savez("nothing.npz", arr_1=np.arange(3))
    status, _, err = run(evaluate, capsys, monkeypatch, *arguments, "--against", "real.npz")
    assert status == 2 and complaint in err and err.startswith("error: ") and err.count("\n") == 1


def test_the_arithmetic_is_calibrated_on_synthetic_sets(capsys, monkeypatch):
    status, out, _ = run(calibrate, capsys, monkeypatch, "--device", "cpu")
    assert status == 0 and out.count("ok ") == 9 and "FAIL" not in out and "was not checked" in out


def test_a_wrong_arithmetic_fails_calibration(capsys, monkeypatch):
    from experiments.engine.scoring import frechet

    right = frechet.frechet
    monkeypatch.setattr(frechet, "frechet", lambda a, b: 1.001 * right(a, b))
    status, out, _ = run(calibrate, capsys, monkeypatch, "--device", "cpu")
    assert status == 1 and "FAIL" in out


def test_a_published_pair_is_held_to_its_scores(grey, tmp_path: Path, capsys, monkeypatch):
    np.savez(tmp_path / "a.npz", arr_0=IMAGES)
    status, out, _ = run(
        calibrate,
        capsys,
        monkeypatch,
        "--pair",
        "imagenet256",
        tmp_path / "a.npz",
        tmp_path / "a.npz",
    )
    assert status == 1 and out.count("FAIL") == 5 and "ADM's evaluator 3.94256" in out
    status, _, err = run(
        calibrate,
        capsys,
        monkeypatch,
        "--pair",
        "imagenet64",
        tmp_path / "a.npz",
        tmp_path / "a.npz",
    )
    assert status == 2 and "unknown pair" in err


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny network's weights, under the name that the script builds in full size."""
    path = tmp_path / "net.pt"
    torch.save({"ema": build("dico_s", **tiny_options_of("dico_s")).state_dict()}, path)
    return path


def test_a_checkpoint_of_another_network_is_refused_before_anything_else(
    checkpoint: Path, tmp_path: Path, capsys, monkeypatch
):
    arguments = (
        "--backbone",
        "dico_s",
        "--protocol",
        "imagenet256",
        "--results",
        tmp_path / "results",
        "--checkpoint",
    )
    status, _, err = run(evaluate_checkpoint, capsys, monkeypatch, *arguments, checkpoint)
    assert status == 2 and "another model" in err and err.count("\n") == 1
    status, _, err = run(evaluate_checkpoint, capsys, monkeypatch, *arguments, tmp_path / "none.pt")
    assert status == 2 and "no such checkpoint" in err and not (tmp_path / "results").exists()


def test_a_dry_run_says_what_is_missing_and_what_it_would_cost(
    checkpoint: Path, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.setattr(sources, "ROOT", tmp_path / "nothing")
    monkeypatch.delenv("DICO_INCEPTION", raising=False)
    monkeypatch.setenv("DICO_VAE", "gone")
    monkeypatch.setattr(
        evaluate_checkpoint,
        "load_network",
        lambda backbone, file: (build("dico_s", **tiny_options_of("dico_s")).eval(), "ema"),
    )
    monkeypatch.setattr(evaluate_checkpoint, "_seconds_per_pass", lambda *given: 0.01)
    arguments = "--backbone", "dico_s", "--checkpoint", checkpoint, "--device", "cpu", "--protocol"
    status, out, _ = run(
        evaluate_checkpoint, capsys, monkeypatch, *arguments, "imagenet256", "--dry-run"
    )
    assert (
        status == 0
        and "missing: the Inception weights" in out
        and "missing: the reference VIRTUAL_imagenet256" in out
    )
    assert (
        "250 evaluations an image" in out
        and "about 34.7 hours" in out
        and "9.8 GB" in out
        and "missing: VAE gone is neither" in out
    )
    status, out, _ = run(
        evaluate_checkpoint, capsys, monkeypatch, *arguments, "imagenet256_guided", "--dry-run"
    )
    assert (
        status == 0
        and "500 evaluations" in out
        and "guidance scale 1.4" in out
        and out.splitlines()[-1] == "total: about 69 h of process time"
    )
    monkeypatch.setenv("DICO_SLURM_GPUS_PER_NODE", "4")
    status, out, _ = run(
        evaluate_checkpoint,
        capsys,
        monkeypatch,
        *arguments[:-3],
        "--protocol",
        "imagenet256",
        "--cluster",
        "slurm",
        "--dry-run",
    )
    assert (
        status == 0
        and "one job: net.pt, 50000 images" in out
        and "#SBATCH --gpus-per-node=4" in out
        and "hours;" not in out
    )
    status, _, err = run(
        evaluate_checkpoint,
        capsys,
        monkeypatch,
        *arguments,
        "imagenet256",
        "--results",
        tmp_path / "results",
    )
    assert (
        status == 2 and "lacks the Inception weights" in err and not (tmp_path / "results").exists()
    )


def test_a_dry_run_opens_what_the_run_would_open(
    checkpoint: Path, tmp_path: Path, capsys, monkeypatch
):
    pytest.importorskip("torch_fidelity")
    pytest.importorskip("diffusers")
    from tests.support.latent_sets import write_vae

    folder = tmp_path / "data" / "imagenet256"
    folder.mkdir(parents=True)
    (folder / "VIRTUAL_imagenet256_labeled.npz").write_bytes(b"<html>")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    monkeypatch.setattr(sources, "ROOT", tmp_path / "data")
    monkeypatch.setenv("DICO_INCEPTION", str(tmp_path / "junk.pth"))
    monkeypatch.setenv("DICO_VAE", str(write_vae(tmp_path / "vae")))
    monkeypatch.setattr(
        evaluate_checkpoint,
        "load_network",
        lambda backbone, file: (build("dico_s", **tiny_options_of("dico_s")).eval(), "ema"),
    )
    monkeypatch.setattr(evaluate_checkpoint, "_seconds_per_pass", lambda *given: 0.01)
    arguments = (
        "--backbone",
        "dico_s",
        "--checkpoint",
        checkpoint,
        "--device",
        "cpu",
        "--protocol",
        "imagenet256",
        "--dry-run",
    )
    status, out, _ = run(evaluate_checkpoint, capsys, monkeypatch, *arguments)
    assert status == 0 and "nothing is missing" not in out and "missing:" not in out
    assert (
        "unusable: junk.pth: not a readable checkpoint" in out
        and "VIRTUAL_imagenet256_labeled.npz: not a readable .npz" in out
        and "warning: decoded with an unknown VAE" in out
    )
    (folder / "manifest.json").write_text("{}")
    assert (
        "unusable: imagenet256/manifest.json cannot be read"
        in run(evaluate_checkpoint, capsys, monkeypatch, *arguments)[1]
    )


@pytest.mark.parametrize(
    "arrays, complaint",
    [
        (dict(arr_0=IMAGES / 255), "float64"),
        (dict(arr_1=np.arange(3)), "neither images"),
        (dict(arr_0=IMAGES, mu=np.zeros(2048)), "only one of mu"),
    ],
)
def test_a_reference_that_cannot_be_read_is_known_before_anything_is_drawn(
    arrays: dict, complaint: str, grey, tmp_path: Path, monkeypatch
):
    np.savez(tmp_path / "other.npz", **arrays)
    drawn = []
    monkeypatch.setattr(stage, "require_features", lambda spec: None)
    monkeypatch.setattr(stage, "reference_path", lambda data: tmp_path / "other.npz")
    monkeypatch.setattr(stage, "generate_samples", lambda *given: drawn.append(given))
    with pytest.raises(ValueError, match=f"other.npz: .*{complaint}"):
        stage.run_evaluation(
            Evaluate(
                Checkpoint(Backbone("dico_s"), PROTOCOLS["imagenet256"].data, "0" * 64),
                Sampler(),
                50_000,
                "inception",
            ),
            tmp_path,
            RunContext(tmp_path),
        )
    assert not drawn


@pytest.mark.parametrize(
    "name, size, words",
    [
        ("sit_s_2", 256, "sde"),
        ("uvit_l_4", 512, "dpm_solver"),
        ("dim_l", 256, "dpm_solver"),
        ("dimsum_l_2", 256, "dopri5"),
        ("dit_s_2", 256, "ancestral"),
    ],
)
def test_a_network_is_sampled_by_its_own_objectives_sampler(
    name: str, size: int, words: str, checkpoint: Path, capsys, monkeypatch
):
    seen = []
    monkeypatch.setattr(
        evaluate_checkpoint, "load_network", lambda backbone, file: (seen.append(backbone), "ema")
    )
    monkeypatch.setattr(evaluate_checkpoint, "_seconds_per_pass", lambda *given: 0.01)
    arguments = (
        "--backbone",
        name,
        "--checkpoint",
        checkpoint,
        "--device",
        "cpu",
        "--protocol",
        f"imagenet{size}",
        "--dry-run",
        "--option",
        "learn_sigma=false",
    )
    status, out, _ = run(evaluate_checkpoint, capsys, monkeypatch, *arguments)
    assert status == 0 and f"images, {words}, " in out and seen[0].options["learn_sigma"] is False
    status, _, err = run(
        evaluate_checkpoint, capsys, monkeypatch, *arguments, "--option", "learn_sigma=maybe"
    )
    assert status == 2 and "NAME=VALUE" in err


def test_what_makes_the_sampling_of_a_checkpoint_faster_is_a_resource(
    tmp_path: Path, capsys, monkeypatch
):
    plans = []
    monkeypatch.setattr(evaluate_checkpoint, "load_network", lambda backbone, file: (None, "ema"))
    monkeypatch.setattr(evaluate_checkpoint, "carry_out", lambda plan, *_: plans.append(plan))
    (tmp_path / "net.pt").write_bytes(b"")
    arguments = (
        "--backbone",
        "dico_s",
        "--checkpoint",
        tmp_path / "net.pt",
        "--protocol",
        "imagenet256",
        "--device",
    )
    assert (
        run(evaluate_checkpoint, capsys, monkeypatch, *arguments, "cpu", "--compile")[0]
        == run(
            evaluate_checkpoint, capsys, monkeypatch, *arguments, "cuda", "--graphs", "--batch", "3"
        )[0]
        == 0
    )
    assert [
        {name: value for name, value in plan.resources.items() if name != "checkpoint"}
        for plan in plans
    ] == [{"compile": True}, {"sample_batch": 3, "graphs": True}]
    status, _, err = run(evaluate_checkpoint, capsys, monkeypatch, *arguments, "cpu", "--graphs")
    assert (status, err) == (
        2,
        "error: CUDA graphs need a GPU, but this command uses cpu; leave out --graphs\n",
    )


def test_a_checkpoint_is_sampled_scored_and_recorded(grey, tmp_path: Path, capsys, monkeypatch):
    """The whole path in small: twelve images of 8 x 8 pixels and a stand-in for Inception."""
    data = Data("pixels", size=8, channels=3, num_classes=10)
    tiny = dict(dim=8, depths=(1, 1, 1, 1, 1))
    torch.save(
        {
            "ema": build(
                "dico_s", input_size=8, in_channels=3, num_classes=10, **tiny
            ).state_dict(),
            "args": Namespace(lr=1),
        },
        tmp_path / "net.pt",
    )
    monkeypatch.setattr(
        evaluate_checkpoint,
        "PROTOCOLS",
        {"tiny": replace(CIFAR10, name="tiny", data=data, sampler=Sampler(num_steps=2), num=12)},
    )
    pixels = ImageSet(
        np.random.default_rng(0).uniform(-1, 1, (30, 3, 8, 8)).astype(np.float32),
        np.arange(30) % 10,
        data,
    )
    monkeypatch.setattr(stage, "load", lambda asked: pixels)
    (tmp_path / "weights").write_bytes(b"")
    monkeypatch.setenv("DICO_INCEPTION", str(tmp_path / "weights"))
    arguments = (
        "--backbone",
        "dico_s",
        "--checkpoint",
        tmp_path / "net.pt",
        "--protocol",
        "tiny",
        "--device",
        "cpu",
        "--cluster",
        "debug",
        "--results",
        tmp_path / "results",
        "--option",
        "dim=8",
        "--option",
        "depths=[1,1,1,1,1]",
    )
    status, _, err = run(evaluate_checkpoint, capsys, monkeypatch, *arguments, "--report")
    assert (status, err) == (
        2,
        "error: there is no record of net.pt under tiny yet; leave out --report\n",
    )
    status, out, err = run(evaluate_checkpoint, capsys, monkeypatch, *arguments)
    assert (
        status == 0
        and "net.pt (key ema), tiny, manifest " in out
        and "FID-12 " in out
        and "network evaluations per image: 2\n" in out
        and "the paper has no such row" in out
    ), err
    (path,) = (tmp_path / "results" / "records" / "evaluate").glob("*.json")
    values = read_record(path).values
    assert values["nfe"] == 2 and values["manifest"]["model"]["sha256"] == npz.file_sha256(
        tmp_path / "net.pt"
    )
    again = run(evaluate_checkpoint, capsys, monkeypatch, *arguments)
    assert (
        again[0] == 0
        and out.endswith(again[1])
        and "loss" not in out
        and len(list(path.parent.iterdir())) == 1
    )


# FID as the paper prints it, guided and unguided, by network and side: of Tables 1 and 2, and what
# Tables 8 and 9 alone have.
PAPER = {
    256: {
        "dit_s_2": ("", "68.40"),
        "dit_b_2": ("", "43.47"),
        "dit_l_2": ("", "23.33"),
        "dit_xl_2": ("2.27", "19.47"),
        "dic_s": ("", "58.68"),
        "dic_b": ("", "32.33"),
        "dic_xl": ("", "13.11"),
        "dic_h": ("2.25", ""),
        "dig_s_2": ("", "62.06"),
        "dig_b_2": ("", "39.50"),
        "dig_l_2": ("", "22.90"),
        "dig_xl_2": ("2.07", "18.53"),
        "dico_s": ("", "49.97"),
        "dico_b": ("", "27.20"),
        "dico_l": ("", "13.66"),
        "dico_xl": ("2.05", "11.67"),
        "dico_h": ("1.90", ""),
        "ldm_4": ("3.95", ""),
        "uvit_l_2": ("3.40", ""),
        "uvit_h_2": ("2.29", ""),
        "sit_xl_2": ("2.06", ""),
        "dim_h": ("2.21", ""),
        "dis_h_2": ("2.10", ""),
        "diffussm_xl": ("2.28", ""),
        "dimsum_l_2": ("2.11", ""),
    },
    512: {
        "dit_xl_2": ("3.04", "12.03"),
        "dico_xl": ("2.53", "7.48"),
        "sit_xl_2": ("2.62", ""),
        "uvit_l_4": ("4.67", ""),
        "uvit_h_4": ("4.05", ""),
        "dim_h": ("3.78", ""),
        "dis_h_2": ("2.88", ""),
        "diffussm_xl": ("3.41", ""),
    },
}
SYSTEMS = {
    256: ({"adm_base_64", "adm_up_256", "adm_classifier_64"}, "3.94"),
    512: ({"adm_base_128", "adm_up_512", "adm_classifier_128"}, "3.85"),
}
SCORED = {
    "num": 50_000,
    "fid": 2.1,
    "fid_se": 0.01,
    "is": 280.0,
    "is_se": float("nan"),
    "sfid": 4.0,
    "warnings": ["careful"],
}


def beside(name: str, side: int, guided: bool) -> list[str]:
    protocol = PROTOCOLS[f"imagenet{side}"]
    spec = Evaluate(
        Checkpoint(Backbone(name), protocol.data, "0" * 64),
        replace(protocol.sampler, scale=1.5 if guided else 1.0),
        50_000,
        "inception",
    )
    return paper_scores.lines_beside_paper(SCORED, name, spec, Store(), TABLES)


@pytest.mark.parametrize("side", PAPER)
@pytest.mark.parametrize("name", list_backbones())
def test_every_network_finds_the_papers_value_under_its_own_guidance_and_no_other(
    name: str, side: int
):
    known = PAPER[side].get(name, ("", ""))
    for guided, fid, other in ((True, *known), (False, *known[::-1])):
        lines, words = beside(name, side, guided), "guided" if guided else "unguided"
        (note,) = [line for line in lines if line.startswith(("  paper: ", "  the paper has "))]
        assert (
            lines[0].endswith(f"2.1000 ± 0.0100{f'   paper {fid}' if fid else ''}")
            and lines[-1] == "  warning: careful"
        )
        if fid:
            assert note.startswith("  paper: arXiv:2505.11196v1 Table ") and note.endswith(
                f", {words}"
            )
        elif name in SYSTEMS[side][0]:
            assert "only within a system of" in note and f": FID-50K {SYSTEMS[side][1]}, " in note
        else:
            assert (
                f"no {words} row of this network, only" in note
                if other
                else note == "  the paper has no such row"
            )


def test_every_published_system_with_a_network_is_among_them():
    """No row of a network is left out of the list that the test above reads."""
    for side, numbers in paper_scores.PAPERS.items():
        names = {
            row.backbone.name for number in numbers for row in TABLES[number].rows if row.backbone
        }
        assert names == set(PAPER[int(side[-3:])]) | names & SYSTEMS[int(side[-3:])][0]


def test_the_longest_training_and_what_was_drawn_otherwise_are_said():
    assert "3,000,000 training steps, unguided" in "\n".join(beside("dico_xl", 512, False))
    assert "400,000 training steps, unguided" in "\n".join(beside("dico_xl", 256, False))
    otherwise = "drawn otherwise than its own recipe says: "
    assert f"{otherwise}scale 1.5, not 1.4 (--protocol imagenet256_own" in "\n".join(
        beside("dico_xl", 256, True)
    ) and otherwise not in "\n".join(beside("dit_xl_2", 256, True))
    assert f"{otherwise}name ancestral, not sde" in "\n".join(
        beside("sit_xl_2", 512, True)
    ) and "a reconstruction" in "\n".join(beside("diffussm_xl", 256, True))


def test_scores_on_a_classifiers_features_bear_their_own_names_and_no_published_value():
    values = {
        "num": 50_000,
        "fd_cifar_classifier": 3.25,
        "fd_cifar_classifier_se": 0.5,
        "precision_cifar_classifier": 0.75,
    }
    data = PROTOCOLS["cifar10_classifier"].data
    spec = Evaluate(
        Checkpoint(Backbone("dico_xl"), data, "0" * 64), Sampler(), 50_000, "cifar_classifier"
    )
    lines = paper_scores.lines_beside_paper(values, "dico_xl", spec, Store(), TABLES)
    assert lines == [
        "  fd_cifar_classifier 3.2500 ± 0.5000",
        "  precision_cifar_classifier 0.7500",
        "  the paper has no such row",
    ]


def test_guidance_is_that_of_the_images_and_not_of_the_protocol():
    spec = evaluate_stage(TABLE_1.row("DiCo-XL (w/ CFG)"), PROTOCOLS["imagenet256_own"], 0)
    assert PROTOCOLS["imagenet256_own"].sampler.scale == 1 and "unguided" not in "\n".join(
        paper_scores.lines_beside_paper(SCORED, "dico_xl", spec, Store(), TABLES)
    )
    assert [
        nearest_row("dico_xl", PROTOCOLS[f"imagenet{side}_own"], TABLES).method.sampler.scale > 1
        for side in (256, 512)
    ] == [True, True]
    guided = "\n".join(paper_scores.lines_beside_paper(SCORED, "dico_xl", spec, Store(), TABLES))
    assert (
        "FID-50K" in guided
        and "2.1000 ± 0.0100   paper 2.05" in guided
        and "paper 282.17" in guided
        and "sFID-50K       4.0000\n" in guided
    )


@pytest.mark.parametrize(
    "held, num, warned",
    [
        (("mu", "sigma", "mu_s", "sigma_s"), 30, False),
        (("mu", "sigma", "mu_s", "sigma_s"), 29, True),
        (("mu", "sigma"), 30, True),
        ((), 30, True),
    ],
)
def test_a_reference_that_is_not_adms_is_warned_of_in_the_record(
    held: tuple[str, ...], num: int, warned: bool, grey, tmp_path: Path, monkeypatch
):
    """ADM's holds the statistics of both layers, and so many images."""
    monkeypatch.setattr(scoring_reference, "LAYERS", NARROW_LAYERS)
    monkeypatch.setattr(stage, "ADM_REFERENCE", 30)
    statistics = dict(mu=np.zeros(6), sigma=np.eye(6), mu_s=np.zeros(5), sigma_s=np.eye(5))
    np.savez(
        tmp_path / "other.npz", arr_0=IMAGES[:num], **{name: statistics[name] for name in held}
    )
    monkeypatch.setattr(stage, "reference_path", lambda data: tmp_path / "other.npz")
    reference = stage._measure_reference(
        PROTOCOLS["imagenet256"].data, Grey(), tmp_path / "parts", RunContext(tmp_path)
    )
    found = scores.score(scoring_measure.measure(Grey(), iter([IMAGES])), reference)["warnings"]
    assert (
        any(
            "other.npz is not ADM's reference, which holds statistics and 30 images" in text
            for text in found
        )
        == warned
    )
    assert reference.identity["num_images"] == num and reference.identity[
        "sha256"
    ] == npz.file_sha256(tmp_path / "other.npz")


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--row", "nothing"], "has no row 'nothing'"),
        (["--row", "DiCo-S", "--num", "0"], "from 1 on"),
        (["--row", "DiCo-S"], "no finished checkpoint"),
    ],
)
def test_sampling_refuses_what_it_cannot_draw(
    arguments: list[str], complaint: str, tmp_path: Path, capsys, monkeypatch
):
    status, _, err = run(
        sample, capsys, monkeypatch, "--table", 4, "--results", tmp_path, *arguments
    )
    assert status == 2 and complaint in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "row, protocol, complaint",
    [
        ("DiCo-S", "digits", "no finished checkpoint"),
        (
            "ADM-U",
            "digits",
            "row 'ADM-U' is not the same in all of tables 1, 2, 8, 9; say which with --table",
        ),
        ("DiCo-X", "digits", "no table has a network as row 'DiCo-X'"),
        ("LlamaGen-3B", "digits", "no table has a network as row 'LlamaGen-3B'"),
    ],
)
def test_a_row_finds_its_table(
    row: str, protocol: str, complaint: str, tmp_path: Path, capsys, monkeypatch
):
    """A row that several tables declare alike is one run, whichever of them is named."""
    status, _, err = run(
        sample, capsys, monkeypatch, "--row", row, "--protocol", protocol, "--results", tmp_path
    )
    assert status == 2 and complaint in err and err.count("\n") == 1
