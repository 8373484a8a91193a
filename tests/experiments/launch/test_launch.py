"""The launch scripts, as far as a machine without a cloud can check them: their text, their dry runs, their requests to
a cloud that scripts on the PATH stand in for, and real JAX processes that they start, lose and restart. The manifest
for GKE is compared with the schemas of JobSet and Kubernetes."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.processes import free_port

from experiments.launch import jobset
from rspo_jax.hosts.cluster import SIGNS

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = ROOT / "experiments" / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
SECONDS = 120  # time after which a script is taken to hang
RUN_DIR = "gs://bucket/my run"  # the space reveals what is not quoted


def environment(bin_dir=None, **variables):
    """Return environment variables without those that a real cluster would set."""
    environ = {name: value for name, value in os.environ.items() if name not in SIGNS and name != "RUN_DIR"}
    path = environ["PATH"] if bin_dir is None else f"{bin_dir}:{environ['PATH']}"
    return environ | {"PATH": path, "RESTART_SECONDS": "0", "JAX_PLATFORMS": "cpu"} | variables


def call(script, *arguments, cwd=None, bin_dir=None, **variables):
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=cwd,
        env=environment(bin_dir, **variables),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def put(path, text):
    """Write an executable script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def wait_until(condition, what):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


# --- their text ---


def test_there_are_scripts():
    assert {script.name for script in SCRIPTS} == {
        "common.sh",
        "slurm.sbatch",
        "tpu_slice.sh",
        "tpu_vm.sh",
        "until_done.sh",
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_has_nothing_to_say(script):
    beside_python = Path(sys.executable).with_name("shellcheck")
    shellcheck = beside_python if beside_python.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: make setup")
    command = [str(shellcheck), "--external-sources", "--source-path=SCRIPTDIR", "--source-path=.", str(script)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_bash_can_read_it(script):
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


# --- until_done.sh ---


@pytest.fixture
def codes(tmp_path):
    """A function that makes a command which ends with the given exit codes, one after the other."""

    def make(*codes):
        (tmp_path / "codes").write_text("\n".join(map(str, codes)) + "\n")
        return put(
            tmp_path / "command",
            f'#!/usr/bin/env bash\ncd {shlex.quote(str(tmp_path))}\necho "$@" >> calls\n'
            'code=$(head -n 1 codes); sed -i 1d codes; exit "$code"\n',
        )

    return make


@pytest.mark.parametrize(
    ("given", "code", "calls"),
    [
        ([0, 5], 0, 1),
        ([1, 75, 137, 0], 0, 4),
        ([1, 2, 0], 2, 2),
        ([2, 0], 2, 1),
        ([3, 3, 3, 3, 0], 3, 3),
    ],
    ids=str,
)
def test_until_done(tmp_path, codes, given, code, calls):
    result = call(LAUNCH / "until_done.sh", codes(*given), "a b", "c", MAX_RESTARTS="2" if given[0] == 3 else "9")
    assert result.returncode == code, result.stderr
    assert (tmp_path / "calls").read_text() == "a b c\n" * calls
    assert result.stderr.count("starting it again in 0 s") == calls - 1


def test_until_done_without_a_command():
    result = call(LAUNCH / "until_done.sh")
    assert (result.returncode, result.stderr) == (
        2,
        "error: no command was given: until_done.sh COMMAND [ARGUMENT...]\n",
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_until_done_passes_a_signal_on_and_waits(tmp_path, number):
    command = put(
        tmp_path / "command",
        f"#!{sys.executable}\nimport pathlib, signal, sys, time\n"
        "def save(number, _):\n    time.sleep(0.3)\n    print('saved after', number)\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\ntime.sleep({SECONDS})\n",
    )
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "until_done.sh"), str(command)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        wait_until((tmp_path / "ready").exists, "the command has not started")
        process.send_signal(number)
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert (process.returncode, output) == (75, "saved after 15\n")


def test_until_done_stops_in_a_pause(tmp_path, codes):
    command = codes(9, 0)
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "until_done.sh"), str(command)],
        env=environment() | {"RESTART_SECONDS": str(SECONDS)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert "starting it again" in process.stderr.readline()
        process.terminate()
        process.communicate(timeout=SECONDS / 2)
    finally:
        process.kill()
    assert process.returncode == 9
    assert (tmp_path / "calls").read_text() == "\n"


# --- a TPU VM ---

RECORD = '#!/usr/bin/env bash\nprintf "%s\\0" "$(basename "$0")" "$@" >> "$CALLS"; echo >> "$CALLS"\n'


@pytest.fixture
def checkout(tmp_path):
    """A copy of the scripts in a folder of its own, with a Python that only records its arguments."""
    root = tmp_path / "checkout"
    shutil.copytree(LAUNCH, root / "experiments" / "launch")
    put(root / ".venv" / "bin" / "python", RECORD)
    return root


@pytest.fixture
def bin_dir(tmp_path):
    """A folder with commands that only record their arguments."""
    folder = tmp_path / "bin"
    for name in ("make", "curl", "gcloud", "srun", "scontrol"):
        put(folder / name, RECORD)
    return folder


def calls(tmp_path):
    lines = (tmp_path / "calls").read_text().splitlines()
    return [line.rstrip("\0").split("\0") for line in lines]


TRAINING = ["-m", "experiments.train", "countdown", "--task.low", "2", "--run-dir", RUN_DIR, "--resume-or-start"]
TASK = ["countdown", "--task.low", "2"]


def test_a_tpu_vm_is_set_up_and_trains(tmp_path, checkout, bin_dir):
    result = call(
        checkout / "experiments/launch/tpu_vm.sh",
        *TASK,
        bin_dir=bin_dir,
        RUN_DIR=RUN_DIR,
        PYTHON="python3.12",
        CALLS=str(tmp_path / "calls"),
        NOTICE_SECONDS=str(SECONDS),
    )
    assert result.returncode == 0, result.stderr
    setup, install, train = calls(tmp_path)
    assert setup == ["make", "setup", "PYTHON=python3.12"]
    assert install[:5] == ["python", "-m", "uv", "pip", "install"]
    assert install[-4:] == ["--constraints", "requirements-dev.txt", "jax[tpu]", "gcsfs"]
    assert train == ["python", *TRAINING]


def test_a_dry_run_on_a_tpu_vm_prints_the_commands(checkout, bin_dir):
    script = checkout / "experiments/launch/tpu_vm.sh"
    result = call(script, "--dry-run", *TASK, bin_dir=bin_dir, RUN_DIR=RUN_DIR, CALLS="nowhere")
    assert result.returncode == 0, result.stderr
    setup, _, train = map(shlex.split, result.stdout.splitlines())
    assert setup == ["make", "setup", "PYTHON=python3"]
    assert train[-len(TRAINING) :] == TRAINING
    assert not (checkout / "runs").exists()


@pytest.mark.parametrize("notice", ["TERMINATE_ON_HOST_MAINTENANCE", "TRUE"])
def test_a_notice_of_the_metadata_server_asks_the_run_to_stop(tmp_path, checkout, bin_dir, notice):
    key = "maintenance-event" if notice.startswith("TERMINATE") else "preempted"
    put(
        bin_dir / "curl",
        f'#!/usr/bin/env bash\nif [[ -e {shlex.quote(str(tmp_path / "ready"))} && "$*" == *instance/{key} ]]; then\n'
        f"  echo {notice}\nelif [[ $* == *maintenance-event ]]; then\n  echo NONE\nelse\n  echo FALSE\nfi\n",
    )
    put(checkout / ".venv/bin/python", waiting_for_sigterm(tmp_path))
    script = checkout / "experiments/launch/tpu_vm.sh"
    result = call(script, "countdown", bin_dir=bin_dir, RUN_DIR=RUN_DIR, CALLS="/dev/null", NOTICE_SECONDS="0.1")
    assert result.returncode == 75, result.stderr
    assert f"the metadata server says {key} = {notice}: saving and stopping" in result.stderr
    assert result.stdout == "saved\n"


def waiting_for_sigterm(tmp_path, name="ready"):
    """Return a stand-in for Python that trains until SIGTERM."""
    return (
        f'#!/usr/bin/env bash\n[[ $2 == experiments.train ]] || exit 0\nexec {shlex.quote(sys.executable)} -c "\n'
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(75)))\n"
        f"pathlib.Path({str(tmp_path / name)!r}).touch()\ntime.sleep({SECONDS})\n"
        '"\n'
    )


def test_a_run_that_is_left_over_is_asked_to_make_room(tmp_path, checkout, bin_dir):
    script = checkout / "experiments/launch/tpu_vm.sh"
    variables = {"RUN_DIR": RUN_DIR, "CALLS": str(tmp_path / "calls"), "NOTICE_SECONDS": str(SECONDS)}
    put(checkout / ".venv/bin/python", waiting_for_sigterm(tmp_path))
    old = subprocess.Popen(
        ["bash", str(script), "countdown"], env=environment(bin_dir, **variables), stdout=subprocess.PIPE, text=True
    )
    try:
        wait_until((tmp_path / "ready").exists, "the first run has not started")
        put(checkout / ".venv/bin/python", RECORD)
        new = call(script, *TASK, bin_dir=bin_dir, **variables)
        output, _ = old.communicate(timeout=SECONDS)
    finally:
        old.kill()
    assert (old.returncode, output) == (75, "saved\n")
    assert new.returncode == 0, new.stderr
    assert "a run is still active here: asking it to save and stop" in new.stderr
    assert calls(tmp_path)[-1] == ["python", *TRAINING]


@pytest.mark.parametrize(
    ("script", "arguments", "unset", "words"),
    [
        ("tpu_vm.sh", ["countdown"], "RUN_DIR", "RUN_DIR is not set: the run's address, such as gs://BUCKET/RUN"),
        ("tpu_vm.sh", [], None, "no task was given"),
        ("tpu_slice.sh", ["countdown"], "TPU_NAME", "TPU_NAME is not set: the name of the slice"),
        ("tpu_slice.sh", ["countdown"], "PROJECT", "PROJECT is not set"),
        ("tpu_slice.sh", ["countdown"], "ZONE", "ZONE is not set"),
        ("tpu_slice.sh", ["countdown"], "ACCELERATOR_TYPE", "ACCELERATOR_TYPE is not set: the type and size"),
        ("tpu_slice.sh", ["countdown"], "RUNTIME_VERSION", "RUNTIME_VERSION is not set"),
        ("tpu_slice.sh", ["countdown"], "RUN_DIR", "RUN_DIR is not set"),
        ("tpu_slice.sh", [], None, "no task was given"),
        ("slurm.sbatch", ["countdown"], "RUN_DIR", "RUN_DIR is not set: the run's folder, which all nodes see"),
        ("slurm.sbatch", [], None, "no task was given"),
    ],
)
def test_what_is_missing_is_named(tmp_path, checkout, bin_dir, script, arguments, unset, words):
    variables = SLICE | {"CALLS": str(tmp_path / "calls"), "SLURM_SUBMIT_DIR": str(checkout)}
    variables.pop(unset, None)
    result = call(checkout / "experiments/launch" / script, *arguments, bin_dir=bin_dir, **variables)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {words}")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "calls").exists()


# --- a TPU slice ---

SLICE = {
    "TPU_NAME": "my-slice",
    "PROJECT": "my-project",
    "ZONE": "my-zone",
    "ACCELERATOR_TYPE": "v5p-16",
    "RUNTIME_VERSION": "v2-alpha-tpuv5",
    "RUN_DIR": RUN_DIR,
}


@pytest.fixture
def repository(checkout):
    """The checkout as a git repository, whose commit slices get."""
    (checkout / "committed").write_text("1")
    (checkout / ".gitignore").write_text(".venv\nruns\n")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "x"]):
        subprocess.run([*git, *command], cwd=checkout, check=True)
    return checkout


def test_a_dry_run_of_a_slice_prints_the_commands(repository, bin_dir):
    script = repository / "experiments/launch/tpu_slice.sh"
    result = call(script, "--dry-run", *TASK, bin_dir=bin_dir, CALLS="nowhere", SPOT="1", **SLICE)
    assert result.returncode == 0, result.stderr
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    assert all(line[:4] == ["gcloud", "compute", "tpus", "tpu-vm"] for line in lines)
    assert all(line[-2:] == ["--project=my-project", "--zone=my-zone"] for line in lines)
    create, copy, train = [line[4:-2] for line in lines]
    assert create == ["create", "my-slice", "--accelerator-type=v5p-16", "--version=v2-alpha-tpuv5", "--spot"]
    assert copy[0] == "scp" and copy[2:] == ["my-slice:rspo_jax.tar.gz", "--worker=all"]
    assert train[:3] == ["ssh", "my-slice", "--worker=all"]
    remote = train[3].removeprefix("--command=")
    assert remote.startswith("mkdir -p rspo_jax && tar -xzf rspo_jax.tar.gz -C rspo_jax && cd rspo_jax && env ")
    words = shlex.split(remote.rsplit("&&", 1)[1])
    assert words == [
        "env",
        f"RUN_DIR={RUN_DIR}",
        "PYTHON=python3",
        "MAX_RESTARTS=0",
        "experiments/launch/tpu_vm.sh",
        *TASK,
    ]


GCLOUD = """#!/usr/bin/env bash
# Stands in for Google Cloud: a slice of two workers, each a folder here. States and exit codes come from files.
cd "$CLOUD"
echo "$4" >> verbs
case $4 in
  describe) cat state ;;
  create | start) echo READY > state ;;
  delete) rm state ;;
  scp) for worker in 0 1; do mkdir -p $worker && cp "$5" $worker/rspo_jax.tar.gz; done ;;
  ssh)
    for flag in "$@"; do [[ $flag != --command=* ]] || command=${flag#--command=}; done
    attempt=$(grep -c ssh verbs)
    for worker in 0 1; do
      (cd $worker && ATTEMPT=$attempt WORKER=$worker bash -c "$command" > log.$attempt 2>&1) &
      pids[worker]=$!
    done
    code=0
    for worker in 0 1; do wait "${pids[worker]}" || { last=$?; ((code)) || code=$last; }; done
    exit $code
    ;;
esac
"""

# Two processes of JAX that know each other by flags, as their `cluster` is no real one. At the first attempt the second
# one is killed.
PROGRAM = """
import os, signal, sys, time
import jax
from experiments.train import parse
from rspo_jax.hosts import ClusterConfig, joined

name, run, folder = parse(sys.argv[1:])
attempt, process = int(os.environ["ATTEMPT"]), int(os.environ["WORKER"])
port = int(os.environ["PORT"]) + attempt
with joined(ClusterConfig(f"localhost:{port}", 2, process)):
    if attempt == 1 and process == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if attempt == 1:
        time.sleep(100)
    print("trained", folder.run_dir, folder.resume_or_start)
"""


@pytest.fixture
def cloud(tmp_path, bin_dir):
    folder = tmp_path / "cloud"
    folder.mkdir()
    put(bin_dir / "gcloud", GCLOUD)
    put(bin_dir / "make", '#!/usr/bin/env bash\nmkdir -p .venv/bin && cp "$FAKE_PYTHON" .venv/bin/python\n')
    return folder


def start_slice(repository, bin_dir, cloud, python, *arguments, **variables):
    fake = put(cloud / "python", python)
    return call(
        repository / "experiments/launch/tpu_slice.sh",
        *(arguments or TASK),
        bin_dir=bin_dir,
        CLOUD=str(cloud),
        FAKE_PYTHON=str(fake),
        NOTICE_SECONDS=str(SECONDS),
        **(SLICE | variables),
    )


def verbs(cloud):
    return (cloud / "verbs").read_text().split()


@pytest.mark.slow
def test_a_slice_is_made_and_a_run_that_dies_on_it_is_resumed(repository, bin_dir, cloud, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    python = (
        "#!/usr/bin/env bash\n[[ $2 == experiments.train ]] || exit 0\nshift 2\n"
        f'PYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} {shlex.quote(str(program))} "$@"\n'
    )
    run_dir = str(tmp_path / "a run")
    result = start_slice(repository, bin_dir, cloud, python, PORT=str(free_port() - 1), RUN_DIR=run_dir)
    logs = {path.parent.name + path.suffix: path.read_text() for path in cloud.glob("[01]/log.*")}
    assert result.returncode == 0, (result.stderr, logs)
    assert verbs(cloud) == ["describe", "create", "scp", "ssh", "describe", "scp", "ssh"]
    assert "process 1 of 2" in logs["0.1"] and "died" in logs["0.1"]
    for worker in (0, 1):
        assert f"trained {run_dir} True" in logs[f"{worker}.2"]
        assert (cloud / str(worker) / "rspo_jax" / "committed").exists()


@pytest.mark.parametrize(
    ("state", "asked"),
    [
        ("READY", []),
        ("STOPPED", ["start"]),
        ("PREEMPTED", ["delete", "create"]),
        ("TERMINATED", ["delete", "create"]),
    ],
)
def test_what_becomes_of_a_slice(repository, bin_dir, cloud, state, asked):
    (cloud / "state").write_text(state)
    result = start_slice(repository, bin_dir, cloud, "#!/usr/bin/env bash\n")
    assert result.returncode == 0, result.stderr
    assert verbs(cloud) == ["describe", *asked, "scp", "ssh"]


def test_a_slice_that_is_not_ready_is_waited_for(repository, bin_dir, cloud):
    (cloud / "state").write_text("REPAIRING")
    result = start_slice(repository, bin_dir, cloud, "#!/usr/bin/env bash\n", MAX_RESTARTS="2")
    assert result.returncode == 1
    assert verbs(cloud) == ["describe"] * 3
    assert result.stderr.count("the slice is not ready yet") == 3


def test_a_mistake_is_not_tried_again(repository, bin_dir, cloud):
    python = "#!/usr/bin/env bash\n[[ $2 != experiments.train ]] || exit 2\n"
    assert start_slice(repository, bin_dir, cloud, python).returncode == 2
    assert verbs(cloud).count("ssh") == 1


def test_what_is_not_committed_is_said_not_to_be_copied(repository, bin_dir, cloud):
    (repository / "committed").write_text("2")
    result = start_slice(repository, bin_dir, cloud, "#!/usr/bin/env bash\n")
    assert "note: uncommitted changes are not copied to the slice" in result.stderr
    assert (cloud / "0/rspo_jax/committed").read_text() == "1"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_to_the_script_saves_and_stops_the_run(repository, bin_dir, cloud, number):
    fake = put(cloud / "python", waiting_for_sigterm(cloud, "ready.$WORKER").replace("'ready", "'ready"))
    fake.write_text(fake.read_text().replace(f"{str(cloud / 'ready.$WORKER')!r}", f"'{cloud}/ready.$WORKER'"))
    process = subprocess.Popen(
        ["bash", str(repository / "experiments/launch/tpu_slice.sh"), *TASK],
        env=environment(bin_dir, CLOUD=str(cloud), FAKE_PYTHON=str(fake), NOTICE_SECONDS=str(SECONDS), **SLICE),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for worker in (0, 1):
            wait_until((cloud / f"ready.{worker}").exists, "the run has not started")
        process.send_signal(number)
        process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 75
    assert verbs(cloud) == ["describe", "create", "scp", "ssh", "ssh"]
    for worker in (0, 1):
        assert "saved" in (cloud / str(worker) / "log.1").read_text()


# --- SLURM ---

SRUN = """#!/usr/bin/env bash
# Stands in for SLURM: two tasks here, with the variables of a step.
while [[ $1 == --* ]]; do shift; done
echo srun >> "$CALLS"
attempt=$(grep -c srun "$CALLS")
for task in 0 1; do
  SLURM_JOB_ID=$((JOB + attempt)) SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_PROCID=$task SLURM_LOCALID=0 \\
    ATTEMPT=$attempt "$@" &
  pids[task]=$!
done
code=0
for task in 0 1; do wait "${pids[task]}" || { last=$?; ((last > code)) && code=$last; }; done
exit $code
"""

TASKS = """
import os, signal, sys, time
import jax, numpy as np
from experiments.train import parse
from jax.experimental import multihost_utils
from rspo_jax.hosts import joined

name, run, folder = parse(sys.argv[1:])
with joined(folder.cluster):
    gathered = multihost_utils.process_allgather(np.int32(10 + jax.process_index()))
    if os.environ["ATTEMPT"] == "1":
        if jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100)
    line = f"task {jax.process_index()} of {jax.process_count()} {gathered.tolist()} {folder.run_dir}\\n"
    os.write(1, line.encode())  # at once: two processes share the pipe
"""


@pytest.mark.slow
def test_slurm_tasks_find_each_other_and_a_job_that_loses_one_queues_again(tmp_path, checkout, bin_dir):
    put(bin_dir / "srun", SRUN)
    program = tmp_path / "program.py"
    program.write_text(TASKS)
    python = put(
        tmp_path / "python",
        f"#!/usr/bin/env bash\nshift 2\nPYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} "
        f'{shlex.quote(str(program))} "$@"\n',
    )
    run_dir = str(tmp_path / "a run")
    variables = {
        "RUN_DIR": run_dir,
        "PYTHON": str(python),
        "CALLS": str(tmp_path / "calls"),
        "SLURM_SUBMIT_DIR": str(checkout),
        "SLURM_JOB_ID": "17",
        "JOB": str(time.time_ns() // 1000 % 4000),  # JAX takes the coordinator's port from the job's number
    }
    lost = call(checkout / "experiments/launch/slurm.sbatch", *TASK, bin_dir=bin_dir, **variables)
    assert lost.returncode == 137, lost.stderr
    assert "process 1 of 2" in lost.stderr and "died" in lost.stderr
    assert "srun ended with code 137: queueing again" in lost.stderr
    assert calls(tmp_path)[-1] == ["scontrol", "requeue", "17"]
    again = call(checkout / "experiments/launch/slurm.sbatch", *TASK, bin_dir=bin_dir, **variables)
    assert again.returncode == 0, again.stderr
    assert sorted(line for line in again.stdout.splitlines() if line.startswith("task")) == [
        f"task {process} of 2 [10, 11] {run_dir}" for process in (0, 1)
    ]


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, "0", False), (2, "0", False), (75, "0", True), (1, "99", True), (1, "100", False)],
)
def test_when_a_slurm_job_queues_again(tmp_path, checkout, bin_dir, code, restarts, requeued):
    put(bin_dir / "srun", f"{RECORD}exit {code}\n")
    variables = {"RUN_DIR": RUN_DIR, "SLURM_SUBMIT_DIR": str(checkout), "SLURM_JOB_ID": "17"}
    variables |= {"SLURM_RESTART_COUNT": restarts, "CALLS": str(tmp_path / "calls")}
    result = call(checkout / "experiments/launch/slurm.sbatch", *TASK, bin_dir=bin_dir, **variables)
    assert result.returncode == code
    step, *others = calls(tmp_path)
    assert step == ["srun", "--kill-on-bad-exit=0", "--wait=120", ".venv/bin/python", *TRAINING]
    assert others == ([["scontrol", "requeue", "17"]] if requeued else [])


def test_a_dry_run_of_a_slurm_job(checkout, bin_dir):
    variables = {"RUN_DIR": RUN_DIR, "SLURM_SUBMIT_DIR": str(checkout), "DRY_RUN": "1", "CALLS": "nowhere"}
    result = call(checkout / "experiments/launch/slurm.sbatch", *TASK, bin_dir=bin_dir, **variables)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert shlex.split(line) == ["srun", "--kill-on-bad-exit=0", "--wait=120", ".venv/bin/python", *TRAINING]


def test_sbatch_finds_its_options():
    """sbatch reads options only above the first command."""
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert len(options) == 5 and max(options) < first_command
    assert "#SBATCH --requeue" in lines and "#SBATCH --signal=TERM@300" in lines


# --- GKE ---

MANY = "many"  # marks a list

# The part of jobset.x-k8s.io/v1alpha2, batch/v1 and core/v1 that the manifest may use: names, types and, in sets,
# values. A name that ends with ! is required.
CONTAINER = {
    "name!": str,
    "image": str,
    "command": {MANY: str},
    "args": {MANY: str},
    "env": {MANY: {"name!": str, "value": str}},
    "resources": {"limits": {"google.com/tpu": int}},
}
POD = {
    "restartPolicy": {"Never", "OnFailure"},
    "terminationGracePeriodSeconds": int,
    "serviceAccountName": str,
    "nodeSelector": {"cloud.google.com/gke-tpu-accelerator": str, "cloud.google.com/gke-tpu-topology": str},
    "containers!": {MANY: CONTAINER},
}
JOB = {
    "completionMode": {"Indexed", "NonIndexed"},
    "completions": int,
    "parallelism": int,
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules!": {
            MANY: {
                "action!": {"FailJob", "FailIndex", "Ignore", "Count"},
                "onExitCodes": {"containerName": str, "operator!": {"In", "NotIn"}, "values!": {MANY: int}},
            }
        }
    },
    "template!": {"spec!": POD},
}
JOBSET = {
    "apiVersion!": {"jobset.x-k8s.io/v1alpha2"},
    "kind!": {"JobSet"},
    "metadata!": {"name!": str, "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": str}},
    "spec!": {
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": {"Recreate", "BlockingRecreate", "InPlaceRestart"},
            "rules": {
                MANY: {
                    "name!": str,
                    "action!": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
                    "onJobFailureReasons": {MANY: {"PodFailurePolicy", "BackoffLimitExceeded", "DeadlineExceeded"}},
                }
            },
        },
        "replicatedJobs!": {MANY: {"name!": str, "replicas": int, "template!": {"spec!": JOB}}},
    },
}


def departures(value, schema, where=""):
    """Return the departures of a value from a schema, a sentence each."""
    if isinstance(schema, set):
        return [] if value in schema else [f"{where} is {value!r}"]
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{where} is {value!r}, not {schema.__name__}"]
    if set(schema) == {MANY}:
        if not (isinstance(value, list) and value):
            return [f"{where} is no list of anything"]
        parts = [(f"{where}[{number}]", item, schema[MANY]) for number, item in enumerate(value)]
        return [line for name, item, inner in parts for line in departures(item, inner, name)]
    if not isinstance(value, dict):
        return [f"{where} is no mapping"]
    keys = {name.rstrip("!"): name for name in schema}
    found = [f"{where}.{name} is not known" for name in value if name not in keys]
    found += [f"{where}.{name} is missing" for name, key in keys.items() if key.endswith("!") and name not in value]
    parts = [(f"{where}.{name}", item, schema[keys[name]]) for name, item in value.items() if name in keys]
    return found + [line for name, item, inner in parts for line in departures(item, inner, name)]


GKE = {
    "NAME": "rspo-1",
    "IMAGE": "example.com/rspo_jax@sha256:0",
    "RUN_DIR": "gs://bucket/run",
    "SERVICE_ACCOUNT": "trainer",
    "TPU_ACCELERATOR": "tpu-v5p-slice",
    "TPU_TOPOLOGY": "4x4x4",
    "HOSTS": "16",
    "CHIPS": "4",
}


def manifest(arguments=TASK, **changes):
    return yaml.safe_load(jobset.render(list(arguments), GKE | changes))


def test_the_manifest_is_as_the_schemas_allow():
    assert departures(manifest(), JOBSET, "jobset") == []


@pytest.mark.parametrize(
    ("old", "new", "departure"),
    [
        ("maxRestarts:", "maxRestart:", "jobset.spec.failurePolicy.maxRestart is not known"),
        ("replicas: 1", "replicas: one", "jobset.spec.replicatedJobs[0].replicas is 'one', not int"),
        ('value: "1"', "value: 1", ".env[0].value is 1, not str"),
        ("action: FailJobSet", "action: Fail", "action is 'Fail'"),
        ("name: slice", "title: slice", "jobset.spec.replicatedJobs[0].name is missing"),
    ],
)
def test_the_schema_notices_departures(old, new, departure):
    text = jobset.render(TASK, GKE)
    assert text.count(old) == 1
    assert any(departure in line for line in departures(yaml.safe_load(text.replace(old, new)), JOBSET, "jobset"))


def test_what_the_manifest_says():
    spec = manifest(SLICES="2", GRACE_SECONDS="120")["spec"]
    (slices,) = spec["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (slices["replicas"], job["completions"], job["parallelism"], job["backoffLimit"]) == (2, 16, 16, 0)
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    assert pod["terminationGracePeriodSeconds"] == 120
    assert container["command"] + container["args"] == [
        "python",
        *TRAINING[:5],
        "--run-dir",
        GKE["RUN_DIR"],
        TRAINING[-1],
    ]
    # A pod of the job that ends with the code for mistakes fails the job for a reason that fails the whole set.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["onExitCodes"]["values"], rule["onExitCodes"]["containerName"]) == ([2], container["name"])
    assert spec["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


@pytest.mark.parametrize("text", ["a: b", '"', "'", "{x}", "# no comment", "null", "3", "$HOME", "${IMAGE}", "é"])
def test_values_stay_what_they_are(text):
    rendered = manifest(["countdown", text], IMAGE=text, RUN_DIR=f"gs://bucket/{text}")
    (container,) = rendered["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == text
    assert container["args"] == ["countdown", text, "--run-dir", f"gs://bucket/{text}", "--resume-or-start"]


@pytest.mark.parametrize("name", jobset.NEEDED)
def test_what_the_manifest_needs_is_named(name, capsys, monkeypatch):
    for other in (*jobset.NEEDED, *jobset.DEFAULTS):
        monkeypatch.delenv(other, raising=False)
    for other in set(GKE) - {name}:
        monkeypatch.setenv(other, GKE[other])
    assert jobset.main(TASK) == 2
    assert capsys.readouterr().err == f"error: {name} is not set: {jobset.NEEDED[name]}\n"
    monkeypatch.setenv(name, GKE[name])
    assert jobset.main(TASK) == 0
    assert yaml.safe_load(capsys.readouterr().out) == manifest()


@pytest.mark.parametrize("name", jobset.NUMBERS)
def test_numbers_of_the_manifest(name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number, got 'many'"):
        manifest(**{name: "many"})


def test_the_manifest_needs_a_task():
    with pytest.raises(ValueError, match="no task was given"):
        manifest([])


def test_the_manifest_holds_no_other_placeholders():
    names = set(re.findall(r"\$\{(\w+)\}", jobset.MANIFEST.read_text().split("apiVersion", 1)[1]))
    assert names == {*jobset.NEEDED, *jobset.DEFAULTS, "ARGUMENTS"} - {"RUN_DIR"}
    assert json.loads(json.dumps(manifest())) == manifest()
