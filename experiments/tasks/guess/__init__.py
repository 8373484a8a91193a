"""Guess a number with hints: a small task of several turns."""

from experiments.tasks.guess.game import GuessConfig, GuessTask, GuessTokenizer

__all__ = ["GuessConfig", "GuessTask", "GuessTokenizer"]
