"""The record of a run: rows of metrics, files, progress and alarm.

Checkpoints are imported by path, `rspo_jax.records.checkpoint`: they bring Orbax along, which takes seconds to import
and which readers do not need.
"""

from rspo_jax.extras import naming_the_extra

with naming_the_extra("rspo_jax.records"):
    from rspo_jax.records.alarm import Alarm, AlarmRecord, AlarmRule, CollapseRule, Warned, alarm_record, judge_alarm
    from rspo_jax.records.files import FilePath, GrowingFiles, as_path, is_bucket, is_leftover, replace_file
    from rspo_jax.records.metrics import (
        MetricsLog,
        mean_interval,
        read_diagnostics,
        read_metrics,
        wilson_interval,
        write_json,
    )
    from rspo_jax.records.progress import PhaseProgress
    from rspo_jax.records.rows import Phase

__all__ = [
    "Alarm",
    "AlarmRecord",
    "AlarmRule",
    "CollapseRule",
    "FilePath",
    "GrowingFiles",
    "MetricsLog",
    "Phase",
    "PhaseProgress",
    "Warned",
    "alarm_record",
    "as_path",
    "is_bucket",
    "is_leftover",
    "judge_alarm",
    "mean_interval",
    "read_diagnostics",
    "read_metrics",
    "replace_file",
    "wilson_interval",
    "write_json",
]
