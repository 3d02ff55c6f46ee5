"""Procedural worlds with a language and an exact oracle: ground truth that costs nothing."""
