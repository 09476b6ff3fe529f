"""One rescaling of a model's adapters: scales, folds, accumulators, optimizer state."""
