"""Measurements: bars of the issues, speed and memory beside diffusers. Never part of the timed tests."""
