"""Mathematics: problems in words whose answer is a number or a formula, and a judge that knows when two are equal.

Worker processes import `experiments.tasks.mathematics.verifier`, and with it this file, so this file imports nothing.
"""
