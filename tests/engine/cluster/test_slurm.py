"""The command line, batch scripts and requeueing on a real Slurm.

tests/slurm_cluster.sh brings it up, with two virtual nodes on this machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experiments.engine.records.tree import REPOSITORY
from experiments.engine.runtime import heartbeat
from tests.support.commands import TABLE

CLUSTER = REPOSITORY / "tests" / "slurm_cluster.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
MISSING = [
    name
    for name in PROGRAMS
    if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None
]

CLIENTS: dict[str, str] = {}  # the environment of the cluster's clients, once it runs

TIMED = """
from dataclasses import replace
from experiments import efficiency
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Backbone, Cost

network = Backbone("dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1)))
row = Row("tiny", network, {}, None, costs=(Cost(network, 8, 3, 10),))
efficiency.TIMED[4] = replace(efficiency.TIMED[1], number=4, rows=(row,), against=None)

if __name__ == "__main__":
    raise SystemExit(efficiency.main())
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"{', '.join(MISSING)} not installed; "
        "apt-get install --no-install-recommends slurm-wlm munge",
    ),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a running cluster's clients."""
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    environment = os.environ | {"DIR": str(folder)}
    subprocess.run(["bash", CLUSTER, "start"], env=environment, check=True)
    site = {
        "GPUS_PER_NODE": "0",
        "CPUS_PER_TASK": "1",
        "CONCURRENT": "2",
        "SIGNAL_SECONDS": "30",
        "TIME": "1:00:00",
    }
    variables = {f"DICO_SLURM_{name}": value for name, value in site.items()}
    CLIENTS.update(
        os.environ
        | variables
        | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "PYTHON": sys.executable,
        }
    )
    yield CLIENTS
    subprocess.run(["bash", CLUSTER, "stop"], env=environment, check=True)


def client(slurm: dict[str, str], *command: str) -> str:
    return subprocess.run(
        command, env=slurm, capture_output=True, text=True, timeout=60, check=True
    ).stdout


def table(folder: Path, steps: int) -> Path:
    script = folder / "tiny.py"
    script.write_text(TABLE.format(steps=steps))
    return script


def call(
    slurm: dict[str, str], script: Path, *options: str, cluster: str = "slurm"
) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(script),
        "--table",
        "4",
        "--results",
        str(script.parent / "results"),
        "--cluster",
        cluster,
        *options,
    ]
    return subprocess.run(
        command, env=slurm, capture_output=True, text=True, timeout=300, check=False
    )


def states(text: str) -> dict[str, str]:
    """State by label of the jobs that train."""
    return {found[1]: found[2] for found in re.finditer(r"train +(\w+), seed 0 +(\w+)", text)}


def until(what: Callable[[], bool], words: str, seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"{words}\n{told()}"
        time.sleep(0.5)


def told() -> str:
    """Return the scheduler's jobs and the ends of its logs, for the message of a failed wait."""
    said = subprocess.run(
        ["scontrol", "show", "job"],
        env=CLIENTS,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    logs = sorted(Path(CLIENTS["SLURM_CONF"]).parent.glob("log/*.log"))
    return "\n".join(
        [
            said.stdout,
            said.stderr,
            *(
                f"{path.name}:\n" + "\n".join(path.read_text(errors="replace").splitlines()[-40:])
                for path in logs
            ),
        ]
    )


def records(root: Path) -> set[tuple[str, str]]:
    """Id and status of every record but counts."""
    found = (json.loads(path.read_text()) for path in root.glob("records/*/*.json"))
    return {(record["id"], record["status"]) for record in found if record["kind"] != "cost"}


def test_a_table_is_sent_watched_and_done(slurm: dict[str, str], tmp_path: Path):
    script = table(tmp_path, steps=5)
    plan = call(slurm, script, "--dry-run")
    assert plan.returncode == 0
    assert "#SBATCH --array=0-2%2" in plan.stdout
    assert not (tmp_path / "results").exists()
    ids = dict(
        re.findall(r"^(\w{16})  (?:timing|train|evaluate) +(\w+(?:, seed 0)?) ", plan.stdout, re.M)
    )
    assert set(states(call(slurm, script, "--status").stdout).values()) == {"not"}

    sent = call(slurm, script)
    assert sent.returncode == 0, sent.stderr
    assert len(re.findall(r"^submitted job \d+_\d: ", sent.stdout, re.M)) == 6
    assert "--status" in sent.stdout
    written = next(
        (tmp_path / "results" / "submissions").glob("dico-*/*_submission.sh")
    ).read_text()
    name = re.search(r"job-name=(\S+)", written).group(1)
    assert written.strip() in "\n".join(
        line.removeprefix("    ")
        for line in plan.stdout.replace("dico-YYYYMMDD-XXXXXXXX", name).splitlines()
    )

    first = states(call(slurm, script, "--status").stdout)
    assert set(first) == {"good", "bad", "last"}
    assert set(first.values()) <= {"waiting", "running"}
    again = call(slurm, script)
    assert "6 jobs are in the queue or running already" in again.stdout
    assert "submitted" not in again.stdout

    until(lambda: not client(slurm, "squeue", "-h"), "the queue empties")
    status = call(slurm, script, "--status").stdout
    assert states(status) == {"good": "done", "bad": "failed", "last": "done"}
    assert re.search(
        r"bad, seed 0 +failed +train ValueError: window attention needs a grid.*\n( +\| .*\n)+",
        status,
    )
    found = records(tmp_path / "results")
    assert {name for name, _ in found} <= set(ids)
    assert sum(state == "done" for _, state in found) == 7
    nothing = call(slurm, script, "--rows", "good", "last").stdout
    assert nothing.startswith("every stage has its record; python ")
    assert nothing.endswith("--cluster slurm --rows good last --report prints the table\n")
    here = call(slurm, script, "--rows", "good", "last", cluster="here")
    assert here.returncode == 0 and here.stderr == ""  # the same ids: nothing is left to run


def test_timings_are_sent_like_trainings(slurm: dict[str, str], tmp_path: Path):
    script = tmp_path / "time.py"
    script.write_text(TIMED)
    sent = call(slurm, script, "--sweep", "--rows", "tiny", "--task", "training")
    assert sent.returncode == 0, sent.stderr
    assert re.search(r"^submitted job \d+: tiny, fp32$", sent.stdout, re.M), sent.stderr
    until(lambda: not client(slurm, "squeue", "-h"), "the queue empties")
    assert re.search(
        r"timing +tiny, fp32 +done",
        call(slurm, script, "--sweep", "--rows", "tiny", "--task", "training", "--status").stdout,
    )
    table = call(
        slurm, script, "--sweep", "--rows", "tiny", "--task", "training", "--report"
    ).stdout
    assert re.search(r"fp32: best at batch \d+, [\d.]+ images per second", table)
    here = call(slurm, script, "--sweep", "--rows", "tiny", "--task", "training", cluster="here")
    assert (here.returncode, here.stdout, here.stderr) == (0, table, "")  # nothing is left to run


def test_what_was_sent_is_cancelled_and_nothing_else(slurm: dict[str, str], tmp_path: Path):
    script = table(tmp_path, steps=100_000)
    other = client(
        slurm, "sbatch", "--parsable", "--output=/dev/null", "--wrap", "sleep 600"
    ).strip()
    assert call(slurm, script, "--rows", "good").returncode == 0
    until(
        lambda: "running" in call(slurm, script, "--rows", "good", "--status").stdout,
        "the run starts",
    )
    done = call(slurm, script, "--rows", "good", "--cancel")
    assert done.returncode == 0
    assert len(re.findall(r"^cancelled job ", done.stdout, re.M)) >= 1
    until(
        lambda: client(slurm, "squeue", "-h", "-o", "%i").split() == [other],
        "only the other job is left",
    )
    assert (
        call(slurm, script, "--rows", "good", "--cancel").stdout
        == "no job of this command is in the queue\n"
    )
    client(slurm, "scancel", other)


def test_an_element_of_an_array_goes_back_alone(slurm: dict[str, str], tmp_path: Path):
    script = table(tmp_path, steps=100_000)
    rows = ("--rows", "good", "last")
    sent = call(slurm, script, *rows).stdout
    first, last = re.findall(r"^submitted job (\d+_[01]): \w+, seed 0$", sent, re.M)
    until(
        lambda: (
            len(
                re.findall(
                    r"running +training, step \d", call(slurm, script, *rows, "--status").stdout
                )
            )
            == 2
        ),
        "both runs train",
    )
    client(slurm, "scancel", "--signal=USR2", last)  # its SLURM_JOB_ID is the id of the array
    restarts = {
        job: lambda job=job: re.search(
            r"Restarts=(\d+)", client(slurm, "scontrol", "show", "job", job)
        ).group(1)
        for job in (first, last)
    }
    until(lambda: restarts[last]() == "1", "the element that was asked to make room is requeued")
    assert restarts[first]() == "0"
    assert client(slurm, "squeue", "-h", "-j", first, "-o", "%T") == "RUNNING\n"
    assert call(slurm, script, *rows, "--cancel").returncode == 0
    until(lambda: not client(slurm, "squeue", "-h"), "the queue empties")


def attempts(script: Path) -> dict[str, list[dict[str, object]]]:
    """Of every run in the script's results folder, by id."""
    found = script.parent.glob("results/runs/*/attempts.json")
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def training(slurm: dict[str, str], script: Path, *options: str, runs: int = 1) -> bool:
    return (
        len(
            re.findall(
                r"running +training, step [1-9]", call(slurm, script, *options, "--status").stdout
            )
        )
        == runs
    )


def test_a_job_that_a_higher_partition_takes_the_nodes_from_goes_on_and_a_cancelled_one_does_not(
    slurm: dict[str, str], tmp_path: Path
):
    script = table(tmp_path, steps=100_000)
    rows = ("--rows", "good")
    (job,) = re.findall(
        r"^submitted job (\d+): good, seed 0$", call(slurm, script, *rows).stdout, re.M
    )
    until(lambda: training(slurm, script, *rows), "the run trains")
    client(
        slurm,
        "sbatch",
        "--partition=high",
        "--nodes=2",
        "--exclusive",
        "--output=/dev/null",
        "--wrap",
        "sleep 1",
    )
    until(lambda: [len(found) for found in attempts(script).values()] == [2], "the run goes on")
    ((first, second),) = attempts(script).values()
    assert first["reason"] == "asked to stop (SIGTERM), to make room"
    assert 0 < first["end"] == second["start"]
    (run,) = (path.parent for path in tmp_path.glob("results/runs/*/attempts.json"))
    until(
        lambda: ((heartbeat.read_heartbeat(run) or {}).get("step") or 0) > second["start"],
        "the run trains again",
    )
    assert call(slurm, script, *rows, "--cancel").stdout == f"cancelled job {job}: good, seed 0\n"
    until(lambda: not client(slurm, "squeue", "-h"), "the queue empties")
    ((_, second),) = attempts(script).values()
    assert second["reason"] == "asked to stop (SIGTERM)"
    assert client(slurm, "squeue", "-h", "-t", "all", "-j", job, "-o", "%T") == "CANCELLED\n"
    assert not [state for _, state in records(tmp_path / "results") if state == "failed"]
    assert "last heard of: asked to stop (SIGTERM)" in call(slurm, script, *rows, "--status").stdout


def test_a_run_whose_slurmd_died_is_not_made_twice(slurm: dict[str, str], tmp_path: Path):
    script = table(tmp_path, steps=100_000)
    rows = ("--rows", "good")
    often = slurm | {"DICO_SLURM_CHECKPOINT_EVERY": "5"}
    (job,) = re.findall(
        r"^submitted job (\d+): good, seed 0$", call(often, script, *rows).stdout, re.M
    )
    until(
        lambda: any(tmp_path.glob("results/runs/*/checkpoints/step-*.pt")),
        "the run keeps a checkpoint",
    )
    node = client(slurm, "squeue", "-h", "-j", job, "-o", "%N").strip()
    cluster = slurm | {"DIR": str(Path(slurm["SLURM_CONF"]).parent)}
    subprocess.run(["bash", CLUSTER, "slurmd-kill", node[-1]], env=cluster, check=True)
    restarted = ["RUNNING", "1"]
    until(
        lambda: (
            client(slurm, "squeue", "-h", "-j", job, "-o", "%T").split()
            + re.findall(r"Restarts=(\d+)", client(slurm, "scontrol", "show", "job", job))
            == restarted
        ),
        "the job runs elsewhere",
    )
    (run,) = (path.parent for path in tmp_path.glob("results/runs/*/attempts.json"))
    before = heartbeat.read_heartbeat(run)  # of the process that nobody hears of
    until(lambda: heartbeat.read_heartbeat(run)["step"] > before["step"], "it goes on")
    assert heartbeat.read_heartbeat(run)["pid"] == before["pid"]
    assert [len(found) for found in attempts(script).values()] == [1]
    subprocess.run(["bash", CLUSTER, "node-start", node[-1]], env=cluster, check=True)
    until(
        lambda: [len(found) for found in attempts(script).values()] == [2],
        "the other attempt goes on",
    )
    ((first, second),) = attempts(script).values()
    assert 0 < second["start"] <= first["end"]
    assert heartbeat.read_heartbeat(run)["pid"] != before["pid"]
    assert call(slurm, script, *rows, "--cancel").returncode == 0
    until(lambda: not client(slurm, "squeue", "-h"), "the queue empties")
    until(
        lambda: (
            len(client(slurm, "sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").split())
            == 2
        ),
        "both nodes are idle",
    )


def test_a_time_limit_is_survived_with_a_signal_before_it_and_without(
    slurm: dict[str, str], tmp_path: Path
):
    script = table(tmp_path, steps=1_000_000)
    rows = ("--rows", "good", "last")
    slurm = {
        name: value
        for name, value in slurm.items()
        if name not in ("DICO_SLURM_TIME", "DICO_SLURM_SIGNAL_SECONDS")
    } | {"DICO_SLURM_SITE": str(tmp_path / "site.toml"), "DICO_SLURM_CHECKPOINT_EVERY": "50"}
    (tmp_path / "site.toml").write_text(
        'time = "0:02:00"\nsignal_seconds = 30\n[rows."last"]\nsignal_seconds = 0\n'
    )
    sent = dict(
        re.findall(r"^submitted job (\d+): (\w+), seed 0$", call(slurm, script, *rows).stdout, re.M)
    )
    until(lambda: training(slurm, script, *rows, runs=2), "both runs train")
    for job in sent:
        client(slurm, "scontrol", "update", f"jobid={job}", "TimeLimit=1")
    until(lambda: sorted(map(len, attempts(script).values())) >= [2, 2], "both runs go on")
    reasons = {found[0]["reason"] for found in attempts(script).values()}
    assert reasons == {"asked to make room (SIGUSR2)", "asked to stop (SIGTERM), to make room"}
    assert all(0 < found[0]["end"] == found[1]["start"] for found in attempts(script).values())
    assert call(slurm, script, *rows, "--cancel").returncode == 0
    until(lambda: not client(slurm, "squeue", "-h"), "the queue empties")


def test_a_results_folder_that_a_node_cannot_write_is_named(slurm: dict[str, str], tmp_path: Path):
    script = table(tmp_path, steps=5)
    rows = ("--rows", "good")
    (job,) = re.findall(
        r"^submitted job (\d+): good, seed 0$",
        call(slurm | {"DICO_SLURM_OPTIONS": "hold"}, script, *rows).stdout,
        re.M,
    )
    assert f"job {job}" in call(slurm, script, *rows, "--status").stdout
    shutil.rmtree(tmp_path / "results" / "records")
    (tmp_path / "results" / "records").write_text("")
    for held in re.findall(r"\d+", client(slurm, "squeue", "-h", "-o", "%i")):
        client(slurm, "scontrol", "release", held)
    until(lambda: not client(slurm, "squeue", "-h"), "the queue empties")
    assert re.search(
        r"good, seed 0 +failed +failed without a record .*\n( +\| .*\n)* +\| .*"
        r"cannot make the folder .*: File exists",
        call(slurm, script, *rows, "--status").stdout,
    )
    nowhere = {"RESULTS": str(tmp_path / "site.py" / "results")}
    (tmp_path / "site.py").write_text("")
    job = client(
        slurm | nowhere,
        "sbatch",
        "--parsable",
        f"--chdir={REPOSITORY}",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--gpus-per-node=0",
        f"--output={tmp_path}/log",
        "slurm/dico_s.sh",
    ).strip()
    until(lambda: not client(slurm, "squeue", "-h"), "the queue empties")
    assert "cannot write results to" in (tmp_path / "log").read_text()
    assert client(slurm, "squeue", "-h", "-t", "all", "-j", job, "-o", "%T") == "FAILED\n"


def test_what_the_scheduler_would_refuse_only_today_is_queued(
    slurm: dict[str, str], tmp_path: Path
):
    client(slurm, "scontrol", "update", "nodename=ALL", "state=drain", "reason=test")
    script = table(tmp_path, steps=5)
    rows = ("--rows", "good")
    sent = call(slurm, script, *rows)
    assert sent.returncode == 0, sent.stderr
    assert re.search(r"^submitted job \d+: good, seed 0$", sent.stdout, re.M), sent.stderr
    assert re.search(
        "^warning: sbatch: .*Requested node configuration is not available; submitted all the same",
        sent.stderr,
        re.M,
    )
    assert states(call(slurm, script, *rows, "--status").stdout) == {"good": "waiting"}
    client(slurm, "scontrol", "update", "nodename=ALL", "state=resume")
    assert call(slurm, script, *rows, "--cancel").returncode == 0
    until(lambda: not client(slurm, "squeue", "-h"), "the queue empties")


@pytest.mark.parametrize(
    "name, words", [("PARTITION", "invalid partition"), ("CONSTRAINT", "Invalid feature")]
)
def test_the_scheduler_refuses_in_its_own_words(
    name: str, words: str, slurm: dict[str, str], tmp_path: Path
):
    refused = call(
        slurm | {f"DICO_SLURM_{name}": "moon"}, table(tmp_path, steps=5), "--rows", "good"
    )
    assert refused.returncode == 2
    assert words in refused.stderr
    assert refused.stderr.splitlines()[-1].startswith("error: sbatch: ")
    assert not client(slurm, "squeue", "-h")
    assert not list((tmp_path / "results").glob("submissions/dico-*"))


def test_a_batch_script_gives_the_same_records_in_two_processes(
    slurm: dict[str, str], tmp_path: Path
):
    script = table(tmp_path, steps=5)
    root = tmp_path / "results"
    (tmp_path / "one.py").write_text(
        "import sys, tiny\nfrom experiments import run\n"
        "run.TABLES[4] = tiny.table\nsys.exit(run.main())\n"
    )
    text = (REPOSITORY / "slurm" / "dico_s.sh").read_text()
    text = text.replace(
        "experiments/run.py \\\n    --table 1 --row DiCo-S --protocol imagenet256",
        f"{tmp_path}/one.py --table 4 --row good",
    )
    (tmp_path / "run.sh").write_text(text)
    options = [
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=0",
        "--cpus-per-task=1",
        f"--output={tmp_path}/log",
    ]
    client(
        slurm | {"RESULTS": str(root)},
        "sbatch",
        f"--chdir={REPOSITORY}",
        *options,
        str(tmp_path / "run.sh"),
    )
    until(lambda: not client(slurm, "squeue", "-h"), "the queue empties")
    plan = call(slurm, script, "--rows", "good", "--dry-run").stdout
    declared = set(re.findall(r"^(\w{16})  (?:train|evaluate) ", plan, re.M))
    assert records(root) == {(name, "done") for name in declared}, (tmp_path / "log").read_text()
    (train,) = (json.loads(path.read_text()) for path in root.glob("records/train/*.json"))
    assert train["provenance"]["world_size"] == 2
    shown = [
        json.loads(line) for line in (root / "submissions" / "jobs.jsonl").read_text().splitlines()
    ]
    assert [(one["label"], one["name"], one["log"], one["ours"]) for one in shown] == [
        ("good, seed 0", "dico_s", str(tmp_path / "log"), False)
    ]


def test_a_training_survives_faults(slurm: dict[str, str]):
    command = [
        sys.executable,
        str(REPOSITORY / "tests" / "fault_test.py"),
        "--faults",
        "3",
        "--seed",
        "78",
        "--steps",
        "400",
    ]
    environment = {name: value for name, value in slurm.items() if name != "SLURM_CONF"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert os.geteuid() or set(re.findall(r"^fault .*: (.*)$", done.stdout, re.M)) == {
        "kill node",
        "requeue",
        "restart controller",
    }
    assert done.returncode == 0, done.stdout + done.stderr
    assert "faults injected: 3; survived: 3" in done.stdout, done.stdout + done.stderr
