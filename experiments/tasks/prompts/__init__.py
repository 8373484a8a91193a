"""Prompts of the user's own, scored by functions of the user's own, which have the signature of TRL's rewards."""
