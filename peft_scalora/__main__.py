"""`python -m peft_scalora` is the command peft-scalora."""

import sys

from .cli import main

sys.exit(main())
