"""Resources of a cluster, what is sent with them and what is refused before it: no Slurm is needed here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest

from experiments import run
from experiments.ablation import TABLES
from experiments.declared.protocols import DIGITS, IMAGENET256, PROTOCOLS
from experiments.engine.cli import main
from experiments.engine.cluster import client as scheduler
from experiments.engine.cluster import site
from experiments.engine.cluster import status as slurm
from experiments.engine.cluster.site import Site, load_site
from experiments.engine.cluster.submit import _tell, given, parameters, sbatch_text
from experiments.engine.jobs import plan
from experiments.engine.jobs.plan import Chosen
from experiments.engine.jobs.pool import Job
from experiments.engine.records.files import written_whole
from experiments.engine.records.store import REPOSITORY, Store
from experiments.engine.runtime import heartbeat
from experiments.engine.specs.spec import spec_id
from experiments.engine.specs.stages import Protocol, cost_stage, train_stage
from tests.support.commands import TABLE as TINY

TABLE = TABLES[4]
RUN_TABLES = run.TABLES
SCRIPTS = sorted(
    path for path in (REPOSITORY / "slurm").glob("*.sh") if path.name not in ("env.sh", "job.sh")
)


def written(folder: Path, text: str) -> dict[str, str]:
    """An environment that names a site file of this text."""
    (folder / "site.toml").write_text(text)
    return {"DICO_SLURM_SITE": str(folder / "site.toml")}


def test_the_example_holds_every_key_with_its_default():
    example = tomllib.loads((REPOSITORY / "slurm" / "site.example.toml").read_text())
    assert example == {f.name: getattr(Site(), f.name) for f in fields(Site)}
    assert (
        load_site("DiCo-S", {"DICO_SLURM_SITE": str(REPOSITORY / "slurm" / "site.example.toml")})
        == Site()
    )


def test_a_row_overrides_the_file_and_the_environment_both(tmp_path: Path):
    environment = written(
        tmp_path,
        'nodes = 2\npartition = "a"\n[options]\nreservation = "r"\n[rows."DiCo-XL"]\nnodes = 4\naccount = "x"\n',
    )
    assert load_site("DiCo-S", environment) == Site(
        nodes=2, partition="a", options={"reservation": "r"}
    )
    assert load_site("DiCo-XL", environment) == Site(
        nodes=4, partition="a", account="x", options={"reservation": "r"}
    )
    environment |= {
        "DICO_SLURM_NODES": "8",
        "DICO_SLURM_SHARD_OPTIMIZER": "true",
        "DICO_SLURM_OPTIONS": "--exclusive reservation='a b'",
    }
    assert load_site("DiCo-XL", environment) == Site(
        nodes=8,
        partition="a",
        account="x",
        shard_optimizer=True,
        options={"exclusive": True, "reservation": "a b"},
    )
    assert load_site(
        "DiCo-S", written(tmp_path, "[options]\nexclusive = false\noversubscribe = true\n")
    ).options == {"oversubscribe": True}


@pytest.mark.parametrize(
    "text, environment, words",
    [
        ("nods = 2", {}, "unknown nods; known: nodes, gpus_per_node"),
        ('[rows."DiCo-S"]\nnods = 2', {}, 'rows."DiCo-S": unknown nods'),
        ('nodes = "2"', {}, "nodes is a int, not '2'"),
        ("nodes = true", {}, "nodes is a int, not True"),
        ("nodes = 0", {}, "nodes is 1 or more, not 0"),
        ("keep = 0", {}, "keep is 1 or more, not 0"),
        ("milestones = -1", {}, "milestones is 0 or more, not -1"),
        ("nodes =", {}, "cannot be read"),
        ('time = "24h"', {}, "[days-]hours:minutes:seconds, not '24h'"),
        ('time = "0:03:30"', {}, "less than a minute before the signal"),
        (
            "gpus_per_node = 4\ntasks_per_node = 8",
            {},
            "8 processes a node need as many GPUs, not 4",
        ),
        ('[options]\ntime = "1:00:00"\nsignal = "USR1@60"', {}, "options cannot set signal, time"),
        ("", {"DICO_SLURM_OPTIONS": "--ntasks-per-node=2"}, "options cannot set ntasks-per-node"),
        ('[options]\ngres = "gpu:a100:4"', {}, "options cannot set gres"),
        ("", {"DICO_SLURM_NODS": "2"}, "unknown nods"),
        ("", {"DICO_SLURM_NODES": "two"}, "nodes is a int, not 'two'"),
        ("", {"DICO_SLURM_SHARD_OPTIMIZER": "maybe"}, "shard_optimizer is a bool, not 'maybe'"),
    ],
)
def test_a_bad_site_is_one_line(text: str, environment: dict[str, str], words: str, tmp_path: Path):
    with pytest.raises(ValueError) as caught:
        load_site("DiCo-S", written(tmp_path, text) | environment)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_trainer_takes_what_the_site_gives_and_its_own_defaults_are_the_same(tmp_path: Path):
    from experiments.engine.runtime.context import Resources

    assert Resources(**given(Site(gpus_per_node=0))) == Resources()
    text = "keep = 5\nmilestones = 100\nmicro_batch = 8\nsample_batch = 4\ncollective_seconds = 60"
    site = load_site("DiCo-S", written(tmp_path, text))
    assert Resources(**given(site)) == Resources(
        "cuda", micro_batch=8, sample_batch=4, keep=5, milestones=100, timeout=60.0
    )


@pytest.mark.parametrize(
    "text, seconds", [("24:00:00", 86400), ("2-01:00:30", 176430), ("0:05:00", 300)]
)
def test_time_limits(text: str, seconds: int):
    assert Site(time=text).seconds == seconds


def test_a_batch_script_holds_what_the_site_gives(tmp_path: Path):
    given = Site(
        nodes=2,
        gpus_per_node=4,
        cpus_per_task=6,
        mem="100G",
        partition="p",
        account="a",
        qos="q",
        constraint="c",
        concurrent=3,
        options={"exclusive": True},
    )
    text = sbatch_text(given, tmp_path / "submissions" / "dico-x", 5)
    flags = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.M))
    assert (
        flags["array"] == "0-4%3"
        and flags["signal"] == "USR2@180"
        and flags["open-mode"] == "append"
        and {"requeue", "exclusive"} <= set(flags)
    )
    assert [
        flags[name]
        for name in ("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time")
    ] == ["2", "4", "4", "6", "100G", "1440"]
    assert [flags[name] for name in ("partition", "account", "qos", "constraint")] == [
        "p",
        "a",
        "q",
        "c",
    ]
    assert (
        re.search(r"^srun .*--cpus-per-task=6 --kill-on-bad-exit=1 .*submitit", text, re.M)
        and "source slurm/job.sh" in text
    )
    assert "array" not in sbatch_text(given, tmp_path / "submissions" / "dico-x", 1)
    assert "#SBATCH --gpus-per-node=a100:4\n" in sbatch_text(
        replace(given, gpu_type="a100"), tmp_path / "submissions" / "dico-x", 1
    )


def test_only_a_cpu_site_asks_for_no_gpu(tmp_path: Path):
    assert "gpus_per_node" not in parameters(Site(gpus_per_node=0), tmp_path / "a" / "b")
    assert (Site(gpus_per_node=0).device, Site(gpus_per_node=0).world_size) == ("cpu", 1)
    assert (Site(nodes=3).device, Site(nodes=3).world_size, Site(nodes=3).alone().world_size) == (
        "cuda",
        24,
        1,
    )


def chosen(protocol=IMAGENET256, device: str = "cuda") -> Chosen:
    return Chosen(TABLE, TABLE.rows[:2], protocol, [0], device)


@pytest.mark.parametrize(
    "variables, words",
    [
        (
            {"DICO_SLURM_NODES": "3"},
            "DiCo-S, seed 0: 3 nodes of 8 processes do not divide the batch of 256",
        ),
        (
            {"DICO_SLURM_TIME": "0:05:00"},
            "a time limit of 0:05:00 is shorter than one checkpoint interval",
        ),
    ],
)
def test_what_cannot_work_is_known_before_it_is_sent(
    variables: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(words)):
        slurm.groups(chosen(), Store(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_training_and_its_evaluation_are_one_job_and_a_timing_is_its_own(tmp_path: Path):
    (timing, timings), (training, trainings) = slurm.groups(chosen(), Store(tmp_path))
    assert (timing.world_size, training.world_size) == (1, 8)
    assert [[type(stage).__name__ for stage in job.stages] for job in (*timings, *trainings)] == [
        ["Timing"]
    ] * 2 + [["Train", "Evaluate"]] * 2


def test_rows_of_one_training_are_one_job_whose_evaluations_all_run(tmp_path: Path):
    table = RUN_TABLES[2]
    rows = [table.row("DiCo-XL, 3M"), table.row("DiT-XL/2, 3M"), table.row("DiCo-XL (w/ CFG)")]
    jobs = Chosen(table, rows, PROTOCOLS["imagenet512_own"], [0], "cuda").trainings()
    assert [(job.label, [type(stage).__name__ for stage in job.stages]) for job in jobs] == [
        ("DiCo-XL, 3M, seed 0", ["Train", "Evaluate", "Evaluate"]),
        ("DiT-XL/2, 3M, seed 0", ["Train", "Evaluate"]),
    ]
    train, first, second = jobs[0].stages
    assert first != second and first.train == second.train == train
    store = Store(tmp_path)
    done, failed = (
        store.append(train, "done", {}, {}),
        store.append(first, "failed", {}, {}, "an error"),
    )
    assert not jobs[0].ended([done, failed]) and jobs[0].ended(
        [store.append(train, "failed", {}, {}, "an error")]
    )


def test_what_one_table_submitted_another_does_not_cancel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["experiments/ablation.py"])
    shared = [
        Chosen(TABLES[number], [TABLES[number].row(label)], DIGITS, [0], "cpu")
        for number, label in ((3, "DiT (U-shape)"), (4, "CM->Self-Attn"))
    ]
    assert shared[0].trainings()[0].stages == shared[1].trainings()[0].stages and slurm._experiment(
        shared[0]
    ) != slurm._experiment(shared[1])


def test_rows_with_resources_of_their_own_are_an_array_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(
        "DICO_SLURM_SITE", written(tmp_path, '[rows."GELU->ReLU"]\nnodes = 2\n')["DICO_SLURM_SITE"]
    )
    groups = slurm.groups(chosen(), Store(tmp_path))
    assert [(site.nodes, [job.label for job in jobs]) for site, jobs in groups[1:]] == [
        (1, ["DiCo-S, seed 0"]),
        (2, ["GELU->ReLU, seed 0"]),
    ]


def expected(
    label: str, table: int, protocol: Protocol, store: Store, device: str = "cuda"
) -> tuple[float, str]:
    """Seconds of a GPU an image, and their source."""
    where = RUN_TABLES[table]
    return plan.seconds_an_image(
        where.row(label), Chosen(where, where.rows, protocol, [0], device), store
    )


def test_expected_cost_comes_from_the_row_then_from_gflops_and_is_else_unknown(tmp_path: Path):
    store = Store(tmp_path)
    assert expected("DiCo-S", 4, IMAGENET256, store) == (
        8 * 11 * 3600 / (400_000 * 256),
        "the paper's training time on A100 (Table 6)",
    )
    assert expected("DiCo-XL, 3M", 2, PROTOCOLS["imagenet512_own"], store) == expected(
        "DiCo-XL (w/ CFG)", 2, PROTOCOLS["imagenet512_own"], store
    )
    assert (
        expected("DiCo-XL, 3M", 2, PROTOCOLS["imagenet512_own"], store)[1]
        == "the paper's training time on A100 (Table 6)"
    )
    assert (
        expected("GELU->ReLU", 4, IMAGENET256, store) is None
        and expected("DiCo-S", 4, DIGITS, store) is None
    )  # nothing is counted yet
    for label, macs in (("DiCo-S", 4e9), ("GELU->ReLU", 5e9), ("DWC 5x5", 6e9)):
        store.append(cost_stage(TABLE.row(label)), "done", {"macs_core": macs}, {})
    seconds, source = expected("GELU->ReLU", 4, IMAGENET256, store)
    assert seconds == pytest.approx(8 * 11 * 3600 / (400_000 * 256) * 5 / 4) and source.endswith(
        "A100 (Table 6) of DiCo-S, scaled by counted Gflops"
    )
    store.append(
        train_stage(TABLE.baseline, IMAGENET256, 1),
        "done",
        {"images_per_s": 4000.0},
        {"device": "H200", "world_size": 4},
    )
    assert expected("DiCo-S", 4, IMAGENET256, store) == (
        pytest.approx(1e-3),
        "recorded throughput on H200",
    )
    assert expected("DWC 5x5", 4, IMAGENET256, store) == (
        pytest.approx(1.5e-3),
        "recorded throughput on H200 of DiCo-S, scaled by counted Gflops",
    )
    store.append(
        train_stage(TABLE.row("DWC 5x5"), IMAGENET256, 0),
        "done",
        {"images_per_s": 1000.0},
        {"device": "H200", "world_size": 1},
    )
    assert expected("GELU->ReLU", 4, IMAGENET256, store)[0] == pytest.approx(
        (1e-3 * 5 / 4 + 1e-3 * 5 / 6) / 2
    )
    assert expected("DiCo-S", 4, IMAGENET256, store, "cpu") is None


def test_a_plan_says_what_every_own_recipe_costs_or_that_it_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(
        "DICO_SLURM_SITE", written(tmp_path, "checkpoint_every = 1")["DICO_SLURM_SITE"]
    )
    table, own = RUN_TABLES[8], PROTOCOLS["imagenet256_own"]
    store, runs = (
        Store(tmp_path, REPOSITORY / "results" / "reference"),
        Chosen(RUN_TABLES[8], RUN_TABLES[8].rows, own, [0], "cuda"),
    )
    text = slurm.describe(runs, store)
    costs = re.findall(
        r"^(.+), seed 0: (?:about (\S+) GPU-hours of training, by .*Table 6|GPU-hours of training unknown)",
        text,
        re.M,
    )
    assert {label for label, _ in costs} == {
        job.label.removesuffix(", seed 0") for job in runs.trainings()
    } and table.row("DiCo-XL").label in dict(costs)
    assert (
        dict(costs)["DiCo-H"] == f"{64 * 113:,}"
        and "" in dict(costs).values()
        and not {"0", "0.0"} & set(dict(costs).values())
    )


def test_resources_for_a_row_that_no_table_declares_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(
        "DICO_SLURM_SITE",
        written(tmp_path, '[rows."DiCo-Q"]\nnodes = 2\n[rows."DiCo-S"]\nnodes = 2\n')[
            "DICO_SLURM_SITE"
        ],
    )
    assert (
        main(
            TABLES,
            PROTOCOLS,
            None,
            [
                "--table",
                "4",
                "--cluster",
                "slurm",
                "--dry-run",
                "--results",
                str(tmp_path / "results"),
            ],
        )
        == 0
    )
    assert (
        capsys.readouterr().err
        == "warning: the site file has resources for 'DiCo-Q', which no table of this script declares\n"
    )
    monkeypatch.setattr(
        sys,
        "argv",
        ["run.py", "--table", "1", "--row", "DiCo-S", "--results", str(tmp_path / "results")],
    )
    for name, value in {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "dico_s",
        "DICO_LOG": str(tmp_path / "log"),
        "DICO_DATA": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--protocol", "imagenet256"])
    assert run.main() == 2 and re.search(
        "error: protocol imagenet256 needs VAE latents in .*\n$", capsys.readouterr().err
    )  # known to --status all the same
    (job,) = Chosen(
        RUN_TABLES[1], [RUN_TABLES[1].row("DiCo-S")], IMAGENET256, [0], "cuda"
    ).trainings()
    assert [
        one.job for one in scheduler.submitted(tmp_path / "results", map(spec_id, job.stages))
    ] == ["7"]


def test_results_go_where_the_environment_says_unless_the_command_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RESULTS", str(tmp_path / "a"))
    for options, folder in (([], "a"), (["--results", str(tmp_path / "b")], "b")):
        assert (
            main(
                TABLES,
                PROTOCOLS,
                None,
                ["--table", "4", "--cluster", "slurm", "--dry-run", *options],
            )
            == 0
        )
        assert f"SUBMITTED_FROM={tmp_path / folder}\n" in capsys.readouterr().out


def test_a_job_here_is_told_of_by_what_it_recorded_itself(tmp_path: Path):
    store, job, heard = Store(tmp_path), chosen(DIGITS, "cpu").trainings()[0], []
    old = store.append(job.stages[0], "failed", {}, {}, "an error of long ago")

    def notify(job: Job, event: str, payload: object) -> None:
        heard.append((event, payload))

    assert not _tell(
        job, RuntimeError("killed"), Store(tmp_path), tmp_path / "log", old.utc[:-1] + "a", notify
    )
    assert heard == [("error", f"killed (its log: {tmp_path / 'log'})"), ("end", None)]
    heard.clear()
    assert not _tell(
        job, RuntimeError("failed"), Store(tmp_path), tmp_path / "log", old.utc, notify
    )
    assert [event for event, _ in heard] == ["record", "end"]


def test_a_job_of_its_own_script_shows_and_is_not_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, runs = (
        Store(tmp_path),
        Chosen(RUN_TABLES[1], [RUN_TABLES[1].row("DiCo-S")], IMAGENET256, [0], "cuda"),
    )
    calls = tmp_path / "bin"
    calls.mkdir()
    for name, text in {
        "squeue": f"cat {tmp_path}/queue",
        "scancel": f'echo "$@" >> {tmp_path}/cancelled; echo "scancel: error: Invalid job id" >&2; exit 1',
    }.items():
        (calls / name).write_text(f"#!/bin/sh\n{text}\n")
        (calls / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(calls), prepend=os.pathsep)
    (tmp_path / "queue").write_text("7|PENDING|Priority|dico_s\n")
    assert re.search(
        r"DiCo-S, seed 0 +waiting +pending: Priority \(job 7, by the batch script",
        slurm.status(runs, store),
    )
    stages = [spec_id(stage) for stage in runs.trainings()[0].stages]
    for name, value in {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "dico_s",
        "DICO_LOG": str(tmp_path / "log"),
    }.items():
        monkeypatch.setenv(name, value)
    scheduler.remember_this_job(tmp_path, "DiCo-S, seed 0", stages)
    scheduler.remember_this_job(tmp_path, "DiCo-S, seed 0", stages)  # after a requeue
    (tmp_path / "queue").write_text("7|RUNNING|None|dico_s\n")
    assert len(scheduler.submitted(tmp_path, stages)) == 1 and re.search(
        r"DiCo-S, seed 0 +running +starting \(job 7\)", slurm.status(runs, store)
    )
    assert [found.job for found in scheduler.waiting_or_running(tmp_path, stages)] == [
        "7"
    ] and not scheduler.cancel(tmp_path, stages, "a.py")
    scheduler.remember(
        tmp_path,
        [
            scheduler.Submission((stage,), "x", f"8_{k}", "dico-x", "log", experiment="a.py")
            for k, stage in enumerate(stages)
        ],
    )
    (tmp_path / "queue").write_text(
        "7|RUNNING|None|dico_s\n8_0|COMPLETING|None|dico-x\n8_1|COMPLETING|None|dico-x\n"
    )
    assert [one.job for one in scheduler.cancel(tmp_path, stages, "a.py")] == ["8_0", "8_1"] and (
        tmp_path / "cancelled"
    ).read_text() == "8_0 8_1\n"
    (tmp_path / "queue").write_text("8_0|RUNNING|None|dico-x\n")
    assert not scheduler.cancel(
        tmp_path, stages, "b.py"
    )  # another experiment, of which the same run is a part
    with pytest.raises(ValueError, match="^scancel: Invalid job id$"):
        scheduler.cancel(tmp_path, stages, "a.py")
    (tmp_path / "queue").write_text("7|FAILED|NonZeroExitCode|dico_s\n")
    (tmp_path / "log").write_text("its last words\n")
    scheduler.ledger(tmp_path).write_text(
        scheduler.ledger(tmp_path).read_text().splitlines()[0] + "\n"
    )
    assert re.search(
        r"failed +failed without a record \(job 7\)\n +\| its last words", slurm.status(runs, store)
    )
    (tmp_path / "queue").write_text("7|CANCELLED|None|dico_s\n")
    assert re.search(r"DiCo-S, seed 0 +cancelled +job 7$", slurm.status(runs, store), re.M)
    scheduler.ledger(tmp_path).write_text("")  # of one that died before Python began
    (tmp_path / "queue").write_text("9|FAILED|NonZeroExitCode|dico_s\n")
    (tmp_path / "slurm-dico_s-9.log").write_text("no such module\n")
    assert re.search(
        r"failed +failed: NonZeroExitCode \(job 9, by the batch script of this name\)\n +\| no such module",
        slurm.status(runs, store),
    )


def test_the_runs_of_a_queue_that_cannot_be_asked_show_by_their_heartbeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, runs = Store(tmp_path), chosen(DIGITS, "cpu")
    (tmp_path / "submissions").mkdir()
    scheduler.remember(
        tmp_path,
        [
            scheduler.Submission(
                (spec_id(runs.trainings()[0].stages[0]),), "DiCo-S, seed 0", "8", "dico-x", "log"
            )
        ],
    )
    (tmp_path / "squeue").write_text(
        "#!/bin/sh\necho 'squeue: error: Unable to contact slurm controller' >&2; exit 1\n"
    )
    (tmp_path / "squeue").chmod(0o755)
    for folder, words in (
        (tmp_path, "squeue: Unable to contact slurm controller: what waits"),
        (tmp_path / "none", "squeue is not on this machine: what waits"),
    ):
        monkeypatch.setenv("PATH", str(folder))
        text = slurm.status(runs, store)
        assert text.startswith(words) and re.search(
            r"DiCo-S, seed 0 +submitted +job 8$", text, re.M
        )


def test_a_death_after_a_failure_of_old_is_what_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, runs = Store(tmp_path), chosen(DIGITS, "cpu")
    train = runs.trainings()[0].stages[0]
    store.append(train, "failed", {}, {}, "ValueError: long ago")
    assert "ValueError: long ago" in slurm.status(runs, store)
    monkeypatch.setattr(heartbeat, "STALE_AFTER", -1.0)
    monkeypatch.setattr(heartbeat.time, "time", lambda: 4e9)
    beat = heartbeat.Heartbeat(store.run_dir(train))
    beat.update(state="training", step=1, steps=2)
    beat.end("training")
    assert "ValueError: long ago" not in slurm.status(runs, store)


def test_what_the_shell_gives_to_sbatch_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert "this shell sets" not in slurm.describe(chosen(), Store(tmp_path))
    monkeypatch.setenv("SBATCH_PARTITION", "high")
    assert (
        "\nthis shell sets what sbatch puts before the text above: SBATCH_PARTITION=high\n"
        in slurm.describe(chosen(), Store(tmp_path))
    )


def test_a_gpu_is_not_promised_the_seconds_of_a_cpu(tmp_path: Path):
    store = Store(tmp_path)
    train = chosen(DIGITS).trainings()[0].stages[0]
    store.append(train, "failed", {}, {}, "so that it would run again")
    reference = Store(tmp_path, reference=tmp_path / "records")
    store.append(
        replace(train, seed=1), "done", {}, {"device": "cpu", "world_size": 1, "seconds": 77.0}
    )
    seconds = {
        device: plan.describe(Chosen(TABLE, TABLE.rows[:1], DIGITS, [0, 1], device), reference)
        for device in ("cpu", "cuda")
    }
    assert (
        "stages of unknown length" in seconds["cuda"].splitlines()[-1] and "about" in seconds["cpu"]
    )
    assert not re.search(r"train .*about", seconds["cuda"])


REQUEUED = """
source slurm/job.sh
echo "$1" >&2
bash -c "exit 137"
"""


@pytest.mark.parametrize("progress", [False, True])
def test_a_job_whose_processes_die_goes_back_five_times_without_progress(
    tmp_path: Path, progress: bool
):
    for name, text in {
        "squeue": "echo RUNNING",
        "scontrol": f'echo "$@" >> {tmp_path}/requeued',
        "srun": "",
        "sleep": "",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "RESULTS": str(tmp_path / "results"),
    }
    for attempt in range(7):
        command = ["bash", "-c", REQUEUED, "job", str(attempt)]
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=environment | {"SLURM_RESTART_COUNT": str(attempt)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 137
        if attempt == 5:
            assert ("five restarts without progress" in done.stderr) != progress
            break
        if progress:
            (tmp_path / "results" / "submissions" / "job-7.restarts").unlink()
    assert (tmp_path / "requeued").read_text().splitlines() == ["requeue 7"] * (
        6 if progress else 5
    )


def test_a_run_nobody_submitted_shows_by_its_heartbeat(tmp_path: Path):
    store, runs = Store(tmp_path), chosen(DIGITS, "cpu")
    folder = store.run_dir(runs.trainings()[0].stages[0])
    folder.mkdir(parents=True)
    beat = heartbeat.Heartbeat(folder)
    beat.update(state="training", step=100, steps=650, images_per_s=64.0)
    beat.end("training")
    text = slurm.status(runs, store)
    assert re.search(
        r"train +DiCo-S, seed 0 +running +training, step 100 of 650, 64 images/s, 9 min left", text
    )
    assert re.search(r"train +GELU->ReLU, seed 0 +not submitted", text)
    folder = store.run_dir(runs.trainings()[0].stages[1])
    folder.mkdir(parents=True)
    beat = heartbeat.Heartbeat(folder)
    beat.update(state="evaluating", step=2, steps=9, seconds_left=600.0)
    beat.end("evaluating")
    assert re.search(
        r"train +DiCo-S, seed 0 +running +evaluating, step 2 of 9, 10 min left \(on",
        slurm.status(runs, store),
    )


def test_only_what_was_submitted_for_a_stage_is_found_again(tmp_path: Path):
    with written_whole(scheduler.ledger(tmp_path)) as file:
        file.write(b'{"cut')
    first, second = (
        scheduler.Submission((name,), name, f"{number}_0", "dico-x", "log")
        for number, name in enumerate("ab")
    )
    scheduler.ledger(tmp_path).write_text("")
    scheduler.remember(tmp_path, [first, second])
    with open(scheduler.ledger(tmp_path), "a") as file:
        file.write('{"cut')
    assert [found.job for found in scheduler.submitted(tmp_path, ["b"])] == ["1_0"]


def test_a_device_that_the_site_lacks_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DICO_SLURM_GPUS_PER_NODE", "8")
    assert (
        main(
            TABLES,
            PROTOCOLS,
            None,
            ["--table", "4", "--cluster", "slurm", "--device", "cpu", "--dry-run"],
        )
        == 2
    )
    assert re.fullmatch(
        "error: --device cpu contradicts the site, whose nodes compute on cuda; .*\n",
        capsys.readouterr().err,
    )


def test_without_slurm_it_is_said_and_nothing_is_written(tmp_path: Path):
    command = [
        sys.executable,
        str(REPOSITORY / "experiments" / "ablation.py"),
        "--table",
        "4",
        "--cluster",
        "slurm",
        "--results",
        str(tmp_path / "results"),
    ]
    environment = os.environ | {"PATH": str(tmp_path), "DICO_SLURM_GPUS_PER_NODE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "") and not (tmp_path / "results").exists()
    assert (
        done.stderr.startswith(
            "error: no Slurm on this machine (sbatch, squeue, srun, scancel not found)"
        )
        and done.stderr.count("\n") == 1
    )


def test_an_account_that_the_scheduler_does_not_know_is_refused_in_its_words(tmp_path: Path):
    words = (
        "Batch job submission failed: Invalid account or account/partition combination specified"
    )
    for name in ("squeue", "srun", "scancel"):
        (tmp_path / name).write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").write_text(
        f'#!/bin/sh\ngrep -q "^#SBATCH --account=moon$" "$2" && {{ echo "sbatch: error: {words}" >&2; exit 1; }}\n'
    )
    for name in ("sbatch", "squeue", "srun", "scancel"):
        (tmp_path / name).chmod(0o755)
    script, root = tmp_path / "tiny.py", tmp_path / "results"
    script.write_text(TINY.format(steps=5))
    given = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "DICO_SLURM_GPUS_PER_NODE": "0",
        "DICO_SLURM_ACCOUNT": "moon",
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [
        sys.executable,
        str(script),
        "--table",
        "4",
        "--rows",
        "good",
        "--cluster",
        "slurm",
        "--results",
        str(root),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | given, timeout=300, check=False
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == f"error: sbatch: {words}"
    assert not list(root.glob("submissions/dico-*")) and not scheduler.submitted(root, [])


def test_a_scheduler_that_does_not_answer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "squeue").write_text("#!/bin/sh\nexec sleep 100\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(scheduler, "TIMEOUT", 0.2)
    with pytest.raises(ValueError, match="squeue did not answer"):
        scheduler.queue(["dico-x"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_names_a_declared_run_and_the_processes_that_it_takes(script: Path):
    text = script.read_text()
    table, row, protocol = re.search(r"--table (\S+) --row (\S+) --protocol (\S+)", text).groups()
    (job,) = Chosen(
        RUN_TABLES[int(table)], [RUN_TABLES[int(table)].row(row)], PROTOCOLS[protocol], [0], "cuda"
    ).trainings()
    nodes, tasks = (
        int(re.search(rf"--{name}=(\d+)", text).group(1)) for name in ("nodes", "ntasks-per-node")
    )
    assert isinstance(job, Job) and job.stages[0].recipe.batch % (nodes * tasks) == 0
    assert job.stages[0].backbone.name == script.stem.removesuffix("_512")
    assert (
        {"--requeue", "--open-mode=append"} <= set(text.split())
        and "--signal=USR2@180" in text
        and "--kill-on-bad-exit=1" in text
    )
    assert (
        spec_id(job.stages[0])
        and len(SCRIPTS) == 7
        and site.PREFIX in (REPOSITORY / "slurm" / "site.example.toml").read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_submitit_on_this_machine_gives_the_same_records(cluster: str, tmp_path: Path):
    script = tmp_path / "tiny.py"
    script.write_text(TINY.format(steps=5))
    command = [
        sys.executable,
        str(script),
        "--table",
        "4",
        "--rows",
        "good",
        "bad",
        "--results",
        str(tmp_path / "results"),
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, "--cluster", cluster],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert (
        done.returncode == 1 and "bad: train failed: ValueError: window attention" in done.stdout
    ), done.stderr
    plan = subprocess.run(
        [*command, "--dry-run"], capture_output=True, text=True, env=environment, check=True
    ).stdout
    assert len(re.findall(r"  done$", plan, re.M)) == 6 and "failed before, would run again" in plan
