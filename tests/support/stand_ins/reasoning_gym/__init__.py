"""A stand-in for the library of this name: the part of its interface that the task uses, with difficult data sets."""
