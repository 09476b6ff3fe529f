"""lm-evaluation-harness's command, in a process where PEFT knows ScaLoRA; all arguments are those of `lm_eval`.

python -m eval.lm_eval.scalora --model hf --model_args pretrained=BASE,peft=ADAPTER_FOLDER --tasks arc_easy
"""

from lm_eval.__main__ import cli_evaluate

import peft_scalora  # noqa: F401  (the import registers the method)

if __name__ == "__main__":
    cli_evaluate()
