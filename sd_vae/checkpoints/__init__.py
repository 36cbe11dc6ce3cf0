"""Checkpoints in every layout that people have: read, write, convert."""
