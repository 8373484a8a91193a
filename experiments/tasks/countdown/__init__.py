"""Countdown: reach a target number by arithmetic on a few given numbers, each used once.

The generator of problems, the text format and the verifier are re-exported here. `load_problems` stays in
`experiments.tasks.countdown.dataset`, which imports TensorFlow Datasets; that is slow, and nothing else here needs it.
"""

from experiments.tasks.countdown.problems import (
    SPLITS,
    CountdownConfig,
    Problem,
    generate_problems,
)
from experiments.tasks.countdown.text import CharacterTokenizer, prompt_text
from experiments.tasks.countdown.verifier import CountdownReward, Verdict, verify

__all__ = [
    "SPLITS",
    "CharacterTokenizer",
    "CountdownConfig",
    "CountdownReward",
    "Problem",
    "Verdict",
    "generate_problems",
    "prompt_text",
    "verify",
]
