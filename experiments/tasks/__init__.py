"""Tasks: each package holds a data set of problems and the judge that rewards answers."""
