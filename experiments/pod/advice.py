"""What would help a program that does not fit its devices: the bytes that a change frees, by arithmetic on what the
compiler counted. This file must never compile anything.
"""

import math
from typing import Any

from experiments.pod.programs import DECODE, PREFILL, UPDATE, Setting
from rspo_jax.sharding import RULES

_ROW_AXES = RULES["rows"]


def missing_bytes(figures: dict[str, Any]) -> int:
    """How much more memory a program needs than a device has; 0 where it fits."""
    held = figures["memory"]
    return 0 if figures["fits"] else max(held["peak"] - held["hbm"], 0)


def smaller_parts(setting: Setting, mesh: dict[str, int]) -> int | None:
    """The next larger number of micro-batches that the mesh can share equally, if any."""
    ways = math.prod(mesh[axis] for axis in _ROW_AXES)
    for parts in range(setting.micro_batches + 1, setting.batch + 1):
        if setting.batch % parts == 0 and (setting.batch // parts) % ways == 0:
            return parts
    return None


def advise(figures: dict[str, Any], setting: Setting, mesh: dict[str, int]) -> list[str]:
    """Sentences, those that free the most first.

    Args:
      figures: of a program that does not fit.
      setting: what it was compiled for.
      mesh: axis -> size.
    """
    held, program = figures["memory"], figures["program"]
    state = held["parameters"] + held["optimizer"]
    found: list[tuple[float, str]] = []
    if program == UPDATE:
        parts = smaller_parts(setting, mesh)
        # Gradients stay: one number in float32 for each parameter.
        freed = max(0.0, held["activations"] - held["parameters"]) * (1 - setting.micro_batches / (parts or 1))
        if parts is not None:
            found.append((freed, f"--micro-batches {parts}: activations of fewer rows at a time"))
        if mesh["data"] > 1:
            found.append(
                (state * (1 - 1 / mesh["data"]), f"--mesh.data 1 --mesh.fsdp {mesh['data'] * mesh['fsdp']}: no copies")
            )
        if held["route"]:
            found.append((held["route"], "the old route on the host (LearnerConfig.route_on_host)"))
    if program in (PREFILL, DECODE):
        found.append((held["parameters"] / 2, f"--mesh.expert {2 * mesh['expert']}: fewer experts a device"))
        if held["kv_cache"]:
            found.append((held["kv_cache"] / 2, "half as many responses at once (SamplerConfig.slots)"))
    elif mesh["context"] * 2 <= setting.model.num_kv_heads:
        rows = math.prod(mesh[axis] for axis in _ROW_AXES)
        freed = held["activations"] / 2 if setting.batch % (rows // 2) == 0 else 0
        found.append((freed, f"--mesh.context {2 * mesh['context']} on twice the devices: half the tokens a device"))
    found.append(((state + held["activations"]) / 2, "a pod of twice the size, for the same batch"))
    return [
        f"{sentence} (about {freed / 2**30:.1f} GiB)"
        for freed, sentence in sorted(found, key=lambda item: -item[0])
        if freed > 0
    ]
