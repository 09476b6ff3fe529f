"""The package's version and source, apart so that packaging can read them without importing torch."""

__version__ = "0.1.0"
# The one place that says where the package comes from; setup.cfg and the documents are tested against it.
SOURCE_URL = "https://github.com/peft-scalora/peft-scalora"


def install_command(extra: str = "") -> str:
    """Return the shell command that installs the package from source, with an extra if one is named."""
    package = f"peft-scalora[{extra}]" if extra else "peft-scalora"
    return f"pip install '{package} @ git+{SOURCE_URL}'"
