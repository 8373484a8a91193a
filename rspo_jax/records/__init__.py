"""What a run leaves behind: rows of metrics, files, progress and alarm. Checkpoints are imported by their path,
`rspo_jax.records.checkpoint`: they bring Orbax along, which takes seconds to import and which readers do not need.
"""

from rspo_jax.records.alarm import Alarm, AlarmRecord, AlarmRule, CollapseRule, Warned, alarm_record, judge_alarm
from rspo_jax.records.files import FilePath, GrowingFiles, as_path, is_bucket, replace_file
from rspo_jax.records.metrics import MetricsLog, Progress, read_diagnostics, read_metrics, wilson_interval, write_json

__all__ = [
    "Alarm",
    "AlarmRecord",
    "AlarmRule",
    "CollapseRule",
    "FilePath",
    "GrowingFiles",
    "MetricsLog",
    "Progress",
    "Warned",
    "alarm_record",
    "as_path",
    "is_bucket",
    "judge_alarm",
    "read_diagnostics",
    "read_metrics",
    "replace_file",
    "wilson_interval",
    "write_json",
]
