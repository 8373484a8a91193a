"""Everything that draws runs: training curves, the reports of `report` and `compare`, and the figures of studies."""
