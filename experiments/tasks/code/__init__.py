"""Programming problems whose reward runs a response against unit tests in a sandbox; off unless switched on.

The config and the loader of problems are re-exported here; the task is in `experiments.tasks.code.task`. Users read
docs/code_rewards.md.
"""

from experiments.tasks.code.config import CodeConfig
from experiments.tasks.code.problems import Problem, Test, load_problems
from experiments.tasks.code.protections import PROTECTIONS, missing_protections
from experiments.tasks.code.sandbox import Limits, SandboxError

__all__ = [
    "PROTECTIONS",
    "CodeConfig",
    "Limits",
    "Problem",
    "SandboxError",
    "Test",
    "load_problems",
    "missing_protections",
]
