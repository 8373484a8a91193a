"""Notebooks that explain the library, and the command that runs them: `python -m experiments.notebooks`."""
