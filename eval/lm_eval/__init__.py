"""lm-eval on ScaLoRA adapters, and its agreement with this package's own scores."""
