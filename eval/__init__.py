"""Evaluate reconstructions: `eval.evaluate(vaes, data)`."""
