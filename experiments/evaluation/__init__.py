"""Parts of `python -m experiments.evaluate`: subjects, responses and their folder, estimates, summary."""
