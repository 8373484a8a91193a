"""Programming problems whose reward runs a response against unit tests, in a sandbox, off unless it is asked for.

The config and the loader of problems are re-exported here; the task stays in `experiments.tasks.code.task`. Nothing in
this package may know of JAX, of a model or of the trainer. docs/code_rewards.md is for its users.
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
