"""`python -m experiments.launch.jobset TASK [FLAG...]`: prints the manifest of a run on TPU slices of GKE.

Fills `gke_jobset.yaml` in from the environment: pipe it into `kubectl apply -f -`. This file must never talk to a
cluster.
"""

import json
import os
import string
import sys
from collections.abc import Mapping
from pathlib import Path

MANIFEST = Path(__file__).with_name("gke_jobset.yaml")
NEEDED = {
    "NAME": "the name of the JobSet",
    "IMAGE": "the container image that holds this project",
    "RUN_DIR": "the run's address, gs://BUCKET/RUN",
    "SERVICE_ACCOUNT": "the Kubernetes service account that may write to RUN_DIR",
    "TPU_ACCELERATOR": "the kind of chip, such as tpu-v5p-slice",
    "TPU_TOPOLOGY": "the shape of a slice, such as 4x4x4",
    "HOSTS": "machines of a slice",
    "CHIPS": "chips of a machine",
}
DEFAULTS = {"SLICES": "1", "MAX_RESTARTS": "1000", "GRACE_SECONDS": "600"}
NUMBERS = ("HOSTS", "CHIPS", "SLICES", "MAX_RESTARTS", "GRACE_SECONDS")


def render(arguments: list[str], environment: Mapping[str, str]) -> str:
    """The manifest as YAML.

    Args:
      arguments: the task, and flags for `experiments.train`.
      environment: values for the names in `NEEDED` and, instead of the defaults, in `DEFAULTS`.

    Raises:
      ValueError: if one is missing, or is no whole number where it must be.
    """
    if not arguments:
        raise ValueError("no task was given: python -m experiments.launch.jobset TASK [FLAG...]")
    values = DEFAULTS | {name: environment[name] for name in (*NEEDED, *DEFAULTS) if environment.get(name)}
    for name, what in NEEDED.items():
        if name not in values:
            raise ValueError(f"{name} is not set: {what}")
    for name in NUMBERS:
        if not (values[name].isascii() and values[name].isdigit()):
            raise ValueError(f"{name} must be a whole number, got {values[name]!r}")
    # JSON is YAML: quotes, braces and the like in a value stay what they are.
    quoted = {name: value if name in NUMBERS else json.dumps(value) for name, value in values.items()}
    command = [*arguments, "--run-dir", values["RUN_DIR"], "--resume-or-start"]
    return string.Template(MANIFEST.read_text()).substitute(quoted, ARGUMENTS=json.dumps(command))


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for something that the user can mend."""
    try:
        print(render(sys.argv[1:] if arguments is None else arguments, os.environ), end="")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
