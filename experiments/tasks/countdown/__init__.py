"""Countdown: reach a target number by arithmetic on a few given numbers, each used once.

The generator of problems, the text format and the verifier are re-exported here.
`load_problems` stays in `experiments.tasks.countdown.dataset`, because importing that module
imports TensorFlow Datasets, which is slow and which nothing else here needs. Nothing in this
package but `task`, which speaks the trainer's types, may know of JAX, of a model or of the trainer.
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
