"""Checkpoints in the format of Hugging Face."""
