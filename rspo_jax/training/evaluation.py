"""Evaluation of a run on held-out problems, between its steps."""

import math

import jax
import numpy as np

from rspo_jax.records.metrics import mean_interval, wilson_interval
from rspo_jax.rollouts import SamplerConfig, UsableProblems, reward_names, solve
from rspo_jax.training.metrics import mean_by_kind, mean_of
from rspo_jax.training.stages import Setup
from rspo_jax.training.state import RunState, sampling_params
from rspo_jax.types import KindsTask

MODES = {"greedy": 0.0, "sampled": 1.0}
"""Name -> temperature of the sampler."""


def evaluate(setup: Setup, state: RunState, final: bool) -> dict[str, float]:
    """Solve held-out problems, each once greedily and once by sampling, in conversations if the task has several turns.

    Args:
      setup: of the run.
      state: holds the parameters to evaluate.
      final: if True, the test split is solved beside the validation problems.

    Returns:
      Solve rates `eval_greedy` and `eval_sampled` on validation problems and, if final, `test_greedy` and
      `test_sampled`, each with the bounds of its 95 % Wilson interval (`_low`, `_high`). For a task that names its
      rewards, mean rewards `eval_greedy_reward` and so on, with the bounds of a 95 % bootstrap interval, NaN where
      all rewards are alike; they stand alone where the task does not tell which responses are correct. Responses that
      were left out are in neither. For a task that tells kinds of problems apart, the solve rates of each,
      `kinds/KIND/eval_greedy` and so on.
      `dropped_*_problems`, the number of problems left out of each split, if the run has a limit for prompts.
    """
    config, held_out = setup.config, setup.problems.held_out
    metrics: dict[str, float] = {}
    if config.max_prompt_tokens is not None:
        splits = {"train": setup.problems.train} | held_out
        finite = {name: split for name, split in splits.items() if isinstance(split, UsableProblems)}
        metrics |= {f"dropped_{name}_problems": float(split.dropped) for name, split in finite.items()}
    params = sampling_params(setup.policy, state.train.params, config)
    solved = {"eval": held_out["validation"].problems[: config.evaluation.problems]}
    solved |= {"test": held_out["test"].problems} if final else {}
    for split, problems in solved.items():
        for mode, temperature in MODES.items():
            sampler = SamplerConfig(config.sampler.max_new_tokens, temperature)
            key = jax.random.key(config.seed)
            task, width = setup.problems.task, setup.problems.width
            judged = solve(setup.policy, params, task, problems, key, sampler, width, setup.limits)
            name, counted = f"{split}_{mode}", ~judged.left_out
            if judged.correct is not None:
                correct = judged.correct[counted]
                low, high = wilson_interval(int(correct.sum()), correct.size) if correct.size else (math.nan, math.nan)
                metrics |= {name: float(mean_of(correct)), f"{name}_low": low, f"{name}_high": high}
                if isinstance(task, KindsTask):
                    kinds = np.array([task.kind(problem) for problem in problems])
                    metrics |= mean_by_kind(name, kinds[counted], correct)
            if reward_names(task):
                rewards = judged.rewards[counted]
                low, high = (mean_interval(rewards) if rewards.size else None) or (math.nan, math.nan)
                metrics |= {
                    f"{name}_reward": float(mean_of(rewards)),
                    f"{name}_reward_low": low,
                    f"{name}_reward_high": high,
                }
    return metrics
