"""Mathematics: word problems whose answer is a number or a formula, and a judge that decides when two are equal.

This file imports nothing, because worker processes import it together with `experiments.tasks.mathematics.verifier`.
"""
