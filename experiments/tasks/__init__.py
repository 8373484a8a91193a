"""Tasks: each package holds a data set of problems and the verifier that rewards answers."""
