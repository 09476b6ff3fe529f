"""Files of an adapter and their checks; nothing here needs a model."""
