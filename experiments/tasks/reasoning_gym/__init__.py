"""The data sets of the library reasoning-gym: generated problems of more than a hundred kinds, each with a verifier."""
