"""`python -m experiments.launch.jobset TASK [FLAG...]`: the manifest of a run on TPU slices of GKE.

The command fills in `gke_jobset.yaml` from the environment and prints it, for `kubectl apply -f -`.
"""

import json
import os
import string
import sys
from collections.abc import Mapping
from pathlib import Path

from experiments.errors import complain

MANIFEST = Path(__file__).with_name("gke_jobset.yaml")
NEEDED = {
    "NAME": "the name of the JobSet",
    "IMAGE": "the container image that holds this project",
    "RUN_DIR": "the run's address, gs://BUCKET/RUN",
    "SERVICE_ACCOUNT": "the Kubernetes service account that may write to RUN_DIR",
    "TPU_ACCELERATOR": "the kind of chip, such as tpu-v5p-slice",
    "TPU_TOPOLOGY": "the shape of a slice, such as 4x4x4",
    "HOSTS": "the number of machines of a slice",
    "CHIPS": "the number of chips of a machine",
}
DEFAULTS = {"SLICES": "1", "MAX_RESTARTS": "1000", "GRACE_SECONDS": "600"}
NUMBERS = ("HOSTS", "CHIPS", "SLICES", "MAX_RESTARTS", "GRACE_SECONDS")


def render(arguments: list[str], environment: Mapping[str, str]) -> str:
    """Return the manifest as YAML.

    Args:
      arguments: the task, and flags for `experiments.train`.
      environment: values for the names in `NEEDED` and, in place of the defaults, in `DEFAULTS`.

    Raises:
      ValueError: if a value is missing, or is not a whole number where it must be one.
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
    # JSON is valid YAML, so quotes, braces and the like in a value keep their meaning.
    quoted = {name: value if name in NUMBERS else json.dumps(value) for name, value in values.items()}
    command = [*arguments, "--run-dir", values["RUN_DIR"], "--resume-or-start"]
    return string.Template(MANIFEST.read_text()).substitute(quoted, ARGUMENTS=json.dumps(command))


def main(arguments: list[str] | None = None) -> int:
    """Print the manifest and return the exit code: 0, or 2 for a mistake that the user can correct."""
    try:
        print(render(sys.argv[1:] if arguments is None else arguments, os.environ), end="")
    except ValueError as error:
        return complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
