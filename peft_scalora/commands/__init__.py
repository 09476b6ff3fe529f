"""One module a command: `add_arguments(parser)`, `check(arguments)` and `run(arguments)`.

What `check` can refuse is refused at once: torch and PEFT are imported after it, within `run`.
"""
