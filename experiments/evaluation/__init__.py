"""The parts of `python -m experiments.evaluate`: subjects, responses and their folder, estimates, report."""
