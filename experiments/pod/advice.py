"""Advice for a program that does not fit its devices: the bytes that a change of settings would free.

They follow by arithmetic from the compiler's figures; nothing is compiled again.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.pod.programs import DECODE, PREFILL, UPDATE, Setting
from rspo_jax.sharding import RULES

_ROW_AXES = RULES["rows"]


def missing_bytes(figures: dict[str, Any]) -> int:
    """Return the bytes that a program needs beyond those of a device; 0 if it fits."""
    held = figures["memory"]
    return 0 if figures["fits"] else max(held["peak"] - held["hbm"], 0)


def micro_batches(setting: Setting, mesh: Mapping[str, int]) -> list[int]:
    """Return the larger numbers of micro-batches that the mesh can share equally."""
    ways = math.prod(mesh[axis] for axis in _ROW_AXES)
    larger = range(setting.micro_batches + 1, setting.batch + 1)
    return [parts for parts in larger if setting.batch % parts == 0 and (setting.batch // parts) % ways == 0]


def advise(figures: dict[str, Any], setting: Setting, mesh: Mapping[str, int]) -> list[str]:
    """Return sentences with the bytes that each change frees, largest first; "enough" marks those that suffice.

    Args:
      figures: the figures of a program that does not fit, from `analysis.analyse`.
      setting: the setting that it was compiled for.
      mesh: axis -> size.
    """
    held, missing = figures["memory"], missing_bytes(figures)
    changes = _changes(held, missing, setting, mesh, figures["program"])
    found = sorted(changes, key=lambda item: -item[0])
    return [
        f"{sentence}: about {freed / 2**30:.1f} GiB{', enough' if freed >= missing else ''}"
        for freed, sentence in found
        if freed > 0
    ]


Change = tuple[float, str]
"""Bytes that a change frees, and the change in words."""


def _changes(
    held: Mapping[str, int], missing: int, setting: Setting, mesh: Mapping[str, int], program: str
) -> Iterator[Change]:
    """Yield the changes that would help a program."""
    if program in (PREFILL, DECODE):
        # The sampler's experts are split along `expert` only.
        if setting.model.num_experts % (2 * mesh["expert"]) == 0 and mesh["fsdp"] % 2 == 0:
            yield held["parameters"] / 2, f"--mesh.expert {2 * mesh['expert']} --mesh.fsdp {mesh['fsdp'] // 2}"
        # Prefill returns the cache, decode takes it as an argument.
        yield max(held["kv_cache"], held["results"]) / 2, "half as many responses at once (SamplerConfig.slots)"
        return
    # The temporaries of an update hold a gradient for each parameter, and a copy of float32 parameters in bfloat16,
    # made ahead of the layers. The rest grows with the rows.
    state = held["parameters"] + held["optimizer"]
    gradients = held["parameters"] if program == UPDATE else 0
    copy = held["parameters"] / 2 if setting.model.param_dtype == "float32" else 0
    of_rows = max(0, held["activations"] - gradients - copy)
    # With several micro-batches, a sum of gradients in float32 is held beside the gradient of a part.
    sums = gradients if setting.micro_batches == 1 else 0
    frees = {parts: of_rows * (1 - setting.micro_batches / parts) - sums for parts in micro_batches(setting, mesh)}
    if frees:
        enough = [parts for parts, freed in frees.items() if freed >= missing]
        parts = enough[0] if enough else max(frees)
        yield frees[parts], f"--micro-batches {parts}"
    if setting.model.param_dtype == "float32":
        yield (state + gradients) / 2, "--param-dtype bfloat16"
    if mesh["data"] > 1:
        copies = 1 - 1 / mesh["data"]
        yield copies * (state + gradients), f"--mesh.data 1 --mesh.fsdp {mesh['data'] * mesh['fsdp']}"
    if held["route"]:
        yield held["route"], "the old route on the host (LearnerConfig.route_on_host)"
    yield (state + held["activations"]) / 2, "a pod of twice the size"
