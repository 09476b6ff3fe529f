"""Tasks of a language model: where their rows are, what is asked, and what counts as an answer."""
