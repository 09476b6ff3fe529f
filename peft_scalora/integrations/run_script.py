"""Run a Python script that knows PEFT alone: `python -m peft_scalora.integrations.run_script SCRIPT ARGUMENTS`.

Importing this module has registered ScaLoRA, so PEFT reads an adapter_config.json of the type SCALORA.
"""

from __future__ import annotations

import os
import runpy
import sys


def main() -> None:
    """Run the script as Python would, with its folder first among those that modules are imported from."""
    if len(sys.argv) < 2:
        sys.exit("run_script: name a Python script, and its arguments after it.")
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
