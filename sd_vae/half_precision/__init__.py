"""Half precision that cannot fail: where activations overflow float16, weights that do not, and what a run does then.

Importing this package is cheap: torch is imported when a name that needs it is first used.
"""
