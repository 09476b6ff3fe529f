"""Studies of the method and of training with it, one module each, run as `python -m eval.studies.NAME`."""
