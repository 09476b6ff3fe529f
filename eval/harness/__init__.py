"""What the evaluation scripts share: rows, training, evaluation over ranks, and one JSON a run."""
