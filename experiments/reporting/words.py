"""Numbers of runs in words, the same in every report."""

from experiments.reporting.record import Rate
from rspo_jax.records import Warned


def percent(value: float) -> str:
    """Return a share as a percentage with one decimal."""
    return f"{100 * value:.1f} %"


def describe_interval(rate: Rate) -> str:
    """Return the 95 % interval of a rate in words."""
    return f"95 %: {100 * rate.low:.1f} to {100 * rate.high:.1f}"


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
