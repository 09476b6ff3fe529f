"""Evaluation of fine-tuning methods, run from a checkout as `python -m eval.glue` and the like; not installed."""
