"""Numbers of runs in words, the same in every report."""

import math

from experiments.reporting.record import HeldOut
from rspo_jax.records import Warned


def percent(value: float) -> str:
    """Return a share as a percentage with one decimal."""
    return f"{100 * value:.1f} %"


def describe_value(found: HeldOut) -> str:
    """Return a rate as a percentage, a mean reward as a number."""
    return percent(found.value) if found.is_rate else f"{found.value:.3f}"


def describe_bounds(found: HeldOut, between: str) -> str:
    """Return the bounds of the 95 % interval; an empty string without them."""
    if not math.isfinite(found.low + found.high):
        return ""
    scale, digits = (100, ".1f") if found.is_rate else (1, ".3f")
    return f"{scale * found.low:{digits}}{between}{scale * found.high:{digits}}"


def describe_alarm(warned: Warned) -> tuple[str, str]:
    """Return the step at which the alarm rang, and why it rang."""
    return ("none", "no sign of a collapse") if warned.alarm is None else (f"step {warned.alarm}", warned.why)


def describe_collapse(warned: Warned) -> tuple[str, str]:
    """Return the step at which the run collapsed, and how long after the alarm that was."""
    if warned.collapse is None:
        return "none", "the reward did not fall for good"
    if warned.lead is None:
        return f"step {warned.collapse}", "no alarm"
    words = f"{warned.lead} steps after the alarm" if warned.lead >= 0 else f"{-warned.lead} steps before the alarm"
    return f"step {warned.collapse}", words
