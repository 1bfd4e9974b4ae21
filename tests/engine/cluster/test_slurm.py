"""The commands and batch scripts on a real Slurm: what is sent, shown, cancelled and refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.engine.data.locate import seal_folder
from experiments.engine.records.tree import REPOSITORY
from tests.support.slurm import NEEDS_CLUSTER, Cluster, Command, training_states, write_table

pytestmark = NEEDS_CLUSTER

# A script whose table 4 times one small network.
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

# A script that adds the table of tiny.py to those of run.py.
SINGLE_RUN = """
import sys
import tiny
from experiments import run

run.TABLES[4] = tiny.table
sys.exit(run.main())
"""


# A study with a mixer of its own, and data that its path leads to from where it is started.
STUDY = """
from dataclasses import replace
from torch import nn
from backbones import register_mixer
from experiments.declared.protocols import DIGITS
from experiments.engine.data.locate import own_data
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import Backbone
from experiments.engine.specs.study import Study

class Mix(nn.Conv2d):
    def __init__(self, dim, *, size, index):
        super().__init__(dim, dim, 1)

register_mixer("mix", Mix)
row = Row("Mix", Backbone("hourglass", dict(dim=8, depths=(1, 1, 1, 1, 1), mixer="mix")))
short = replace(DIGITS.recipe, steps=3, warmup=1, batch=8)
two_steps = replace(DIGITS.sampler, num_steps=2)
digits = replace(DIGITS, recipe=short, sampler=two_steps, num=20, heldout=None)
mine = replace(digits, name="mine", data=own_data("my_set"))
table = Table(1, "mine", "a test", rows=(row,), timed=False)
STUDY = Study((table,), (digits, mine))
"""


def planned_script(plan: str, name: str) -> str:
    """Return what a plan prints of its batch scripts, for a submission of a name."""
    lines = plan.replace("dico-YYYYMMDD-XXXXXXXX", name).splitlines()
    return "\n".join(line.removeprefix("    ") for line in lines)


def test_a_table_is_sent_watched_and_done(slurm: Cluster, tmp_path: Path):
    """A table goes from its plan to its records, and every call says how far it has come."""
    command = write_table(slurm, tmp_path, 5)

    # A plan shows the arrays and writes nothing.
    plan = command.call("--dry-run")
    assert plan.returncode == 0
    assert "#SBATCH --array=0-2%2" in plan.stdout
    assert not command.results.exists()
    ids = re.findall(
        r"^(\w{16})  (?:timing|train|evaluate|heldout) +\w+(?:, seed 0)? ", plan.stdout, re.M
    )
    assert set(training_states(command.status()).values()) == {"not"}

    # A call submits every job.
    with slurm.held():
        sent = command.call()
        assert sent.returncode == 0, sent.stderr
        assert len(re.findall(r"^submitted job \d+_\d: ", sent.stdout, re.M)) == 6
        assert "--status" in sent.stdout

        # While the jobs are in the queue, a second call submits none.
        waiting = dict.fromkeys(("good", "bad", "last"), "waiting")
        assert training_states(command.status()) == waiting
        again = command.call()
        assert "6 jobs are in the queue or running already" in again.stdout
        assert "submitted" not in again.stdout

    # What was submitted is what the plan had shown.
    submissions = command.results / "submissions"
    script = next(submissions.glob("dico-*/*_submission.sh")).read_text()
    name = re.search(r"job-name=(\S+)", script).group(1)
    assert script.strip() in planned_script(plan.stdout, name)

    # At the end the status shows which trainings failed, and the end of their logs.
    slurm.wait_until_empty()
    status = command.status()
    assert training_states(status) == {"good": "done", "bad": "failed", "last": "done"}
    failure = r"bad, seed 0 +failed +train ValueError: window attention needs a grid.*\n"
    assert re.search(failure + r"( +\| .*\n)+", status)

    # The records are those that the plan named.
    records = command.records()
    assert {name for name, _ in records} <= set(ids)
    assert sum(state == "done" for _, state in records) == 9

    # Where every stage has its record, nothing is left to submit, nor to run on this machine.
    rest = ("--rows", "good", "last")
    finished = command.call(*rest).stdout
    assert finished.startswith("every stage has its record; python ")
    assert finished.endswith("--cluster slurm --rows good last --report prints the table\n")
    here = command.call(*rest, cluster="here")
    assert here.returncode == 0
    assert here.stderr == ""


def test_a_study_is_sent_as_it_is_and_may_be_edited_while_it_waits(slurm: Cluster, tmp_path: Path):
    """A job runs the study that was submitted, in the folder from which it was submitted."""
    (tmp_path / "my_set").mkdir()
    np.save(tmp_path / "my_set" / "images.npy", np.zeros((4, 1, 8, 8), np.uint8))
    np.save(tmp_path / "my_set" / "labels.npy", np.zeros(4, np.int64))
    seal_folder(tmp_path / "my_set", num_classes=1)
    study = tmp_path / "my_study.py"
    study.write_text(STUDY)

    # While the job is held, the file changes.
    script = REPOSITORY / "experiments" / "run.py"
    sent = subprocess.run(
        [sys.executable, script, study.name, "--results", "out", "--cluster", "slurm"],
        cwd=tmp_path,
        env={**slurm.environment, "DICO_SLURM_OPTIONS": "hold"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.search(r"^submitted job \d+: Mix, seed 0$", sent.stdout, re.M), sent.stderr
    study.write_text("import nothing_that_exists\n")
    (job,) = slurm.queued()
    slurm.client("scontrol", "release", job)
    slurm.wait_until_empty()

    # The record is that of the file as it was.
    digest = hashlib.sha256(STUDY.encode()).hexdigest()[:16]
    records = [json.loads(p.read_text()) for p in tmp_path.glob("out/records/*/*.json")]
    trained = [record["spec"]["backbone"] for record in records if record["kind"] == "train"]
    assert [backbone["code"] for backbone in trained] == [digest]


def test_timings_are_sent_like_trainings(slurm: Cluster, tmp_path: Path):
    """A sweep over batches runs in a job, and its report is the one of this machine."""
    script = tmp_path / "time.py"
    script.write_text(TIMED)
    sweep = ("--sweep", "--rows", "tiny", "--task", "training")
    command = Command(slurm.environment, script, sweep)

    # The sweep is one job.
    sent = command.call()
    assert sent.returncode == 0, sent.stderr
    assert re.search(r"^submitted job \d+: tiny, fp32$", sent.stdout, re.M), sent.stderr
    slurm.wait_until_empty()
    assert re.search(r"timing +tiny, fp32 +done", command.status())

    # A run on this machine finds every record, and prints the same report.
    report = command.call("--report").stdout
    assert re.search(r"fp32: best at batch \d+, [\d.]+ images per second", report)
    here = command.call(cluster="here")
    assert (here.returncode, here.stdout, here.stderr) == (0, report, "")


def test_what_was_sent_is_cancelled_and_nothing_else(slurm: Cluster, tmp_path: Path):
    """--cancel ends the jobs of its command and no other job of the user."""
    command = write_table(slurm, tmp_path, 100_000, "good")
    other = slurm.submit("--output=/dev/null", "--wrap", "sleep 600")
    command.send()
    slurm.wait_until(lambda: "running" in command.status(), "the run starts")

    # The other job stays in the queue.
    cancelled = command.call("--cancel")
    assert cancelled.returncode == 0
    assert len(re.findall(r"^cancelled job ", cancelled.stdout, re.M)) >= 1
    slurm.wait_until(lambda: slurm.queued() == [other], "only the other job is left")

    # A second call has nothing to cancel.
    assert command.call("--cancel").stdout == "no job of this command is in the queue\n"
    slurm.client("scancel", other)


def test_a_results_folder_that_a_node_cannot_write_is_named(slurm: Cluster, tmp_path: Path):
    """A job that cannot keep its record fails, and the status shows the line that says why."""
    command = write_table(slurm, tmp_path, 5, "good")

    # A held job waits while its folder of records becomes a file.
    job = command.under(DICO_SLURM_OPTIONS="hold").send()["good"]
    assert f"job {job}" in command.status()
    shutil.rmtree(command.results / "records")
    (command.results / "records").write_text("")

    # Released, it fails without a record.
    for held in re.findall(r"\d+", slurm.client("squeue", "-h", "-o", "%i")):
        slurm.client("scontrol", "release", held)
    slurm.wait_until_empty()
    failure = r"good, seed 0 +failed +failed without a record .*\n( +\| .*\n)* +\| .*"
    cause = r"cannot make the folder .*: File exists"
    assert re.search(failure + cause, command.status())


def test_a_batch_script_without_a_results_folder_fails_at_once(slurm: Cluster, tmp_path: Path):
    """A batch script names the results folder that its node cannot make."""
    (tmp_path / "site.py").write_text("")
    job = slurm.submit(
        f"--chdir={REPOSITORY}",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--gpus-per-node=0",
        f"--output={tmp_path}/log",
        "slurm/dico_s.sh",
        RESULTS=str(tmp_path / "site.py" / "results"),
    )
    slurm.wait_until_empty()

    # Its log names the folder.
    assert "cannot write results to" in (tmp_path / "log").read_text()
    assert slurm.state_of(job, "-t", "all") == "FAILED"


def test_what_the_scheduler_would_refuse_only_today_is_queued(slurm: Cluster, tmp_path: Path):
    """A job that no node can run at present is submitted with a warning."""
    slurm.client("scontrol", "update", "nodename=ALL", "state=drain", "reason=test")
    command = write_table(slurm, tmp_path, 5, "good")

    # The scheduler's words become a warning.
    sent = command.call()
    assert sent.returncode == 0, sent.stderr
    assert re.search(r"^submitted job \d+: good, seed 0$", sent.stdout, re.M), sent.stderr
    refusal = "Requested node configuration is not available; submitted all the same"
    assert re.search(f"^warning: sbatch: .*{refusal}", sent.stderr, re.M)
    assert training_states(command.status()) == {"good": "waiting"}

    # Leave the nodes as they were.
    slurm.client("scontrol", "update", "nodename=ALL", "state=resume")
    assert command.call("--cancel").returncode == 0
    slurm.wait_until_empty()


@pytest.mark.parametrize(
    "name, words", [("PARTITION", "invalid partition"), ("CONSTRAINT", "Invalid feature")]
)
def test_the_scheduler_refuses_in_its_own_words(
    name: str, words: str, slurm: Cluster, tmp_path: Path
):
    """A site that the scheduler does not know is one line of error, and leaves nothing behind."""
    command = write_table(slurm, tmp_path, 5, "good")
    refused = command.under(**{f"DICO_SLURM_{name}": "moon"}).call()

    # The last line quotes the scheduler.
    assert refused.returncode == 2
    assert words in refused.stderr
    assert refused.stderr.splitlines()[-1].startswith("error: sbatch: ")

    # Neither the queue nor the results folder holds a trace of it.
    assert not slurm.queued()
    assert not list(command.results.glob("submissions/dico-*"))


def test_a_batch_script_gives_the_same_records_in_two_processes(slurm: Cluster, tmp_path: Path):
    """A batch script of slurm/ on two nodes makes the records that the table's command plans."""
    command = write_table(slurm, tmp_path, 5, "good")
    (tmp_path / "single.py").write_text(SINGLE_RUN)

    # The committed script runs the small row in place of its own.
    published = "experiments/run.py \\\n    --table 1 --row DiCo-S --protocol imagenet256"
    text = (REPOSITORY / "slurm" / "dico_s.sh").read_text()
    small = text.replace(published, f"{tmp_path}/single.py --table 4 --row good")
    (tmp_path / "run.sh").write_text(small)
    slurm.submit(
        f"--chdir={REPOSITORY}",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=0",
        "--cpus-per-task=1",
        f"--output={tmp_path}/log",
        str(tmp_path / "run.sh"),
        RESULTS=str(command.results),
    )
    slurm.wait_until_empty()

    # Every planned stage is done, and the training was shared by both processes.
    plan = command.call("--dry-run").stdout
    planned = re.findall(r"^(\w{16})  (?:train|evaluate|heldout) ", plan, re.M)
    log = (tmp_path / "log").read_text()
    assert command.records() == {(name, "done") for name in planned}, log
    (path,) = command.results.glob("records/train/*.json")
    assert json.loads(path.read_text())["provenance"]["world_size"] == 2

    # The job is listed as one that the user wrote.
    (line,) = (command.results / "submissions" / "jobs.jsonl").read_text().splitlines()
    job = json.loads(line)
    assert (job["label"], job["name"]) == ("good, seed 0", "dico_s")
    assert job["log"] == str(tmp_path / "log")
    assert job["ours"] is False
