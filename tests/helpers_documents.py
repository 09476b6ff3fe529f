"""Find what README and the documentation give to run: blocks of Python, commands, and files of settings."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"(pip|make|python|peft-scalora|accelerate|torchrun|lm_eval|swift|axolotl) ")
_VARIABLE = re.compile(r'^([A-Z])="(.*)"$', re.MULTILINE)


def blocks(document: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language, "" for those without one."""
    return [text for found, text in _BLOCK.findall(document.read_text()) if found == language]


def commands(document: Path) -> list[str]:
    """Return every command of the document as one line, with its variables filled in and without its comment."""
    found = []
    for block in blocks(document, ""):
        variables = dict(_VARIABLE.findall(block))
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\$([A-Z])\b", lambda name, known=variables: known[name[1]], line)
            line = " ".join(re.sub(r"\s+# .*", "", line).split())
            if _COMMAND.match(line):
                found.append(line)
    return found


# Why a command is not run by the walk, by how it begins. Those of the evaluation have their options checked.
LEFT_OUT = {
    "pip install 'peft-scalora": "needs the network; the wheel of this tree is installed in its place",
    "peft-scalora trl": "needs a data set",
    "swift": "needs an environment of its own: make test-integrations",
    "peft-scalora export run/*/checkpoint-*": "exports what ms-swift trained: make test-integrations",
    "python -m peft_scalora.integrations.run_script": "needs a checkout of PEFT and a GPU",
    "make quickstart": "takes minutes",
    "make lint": "CI runs it",
    "make types": "CI runs it",
    "make docs": "CI runs it",
    "make test": "CI runs it",
    "make walk": "this is it",
    "make seams": "installs the newest releases, which may break at any time",
    "python -m eval.glue": "needs a data set",
    "python -m eval.commonsense": "needs a data set",
    "python -m eval.math_problems": "needs a data set",
    "python -m eval.lm_eval.tasks": "needs a data set",
    "python -m eval.lm_eval.scalora": "lm-eval downloads its tasks",
    'python -c "import peft_scalora; from lm_eval': "lm-eval downloads its tasks",
    "lm_eval": "lm-eval downloads its tasks",
    "python -m eval.sweep": "takes hours",
    "python -m eval.studies.frontier run": "takes hours",
    "python -m eval.methods": "takes hours",
}


def reason_to_leave_out(command: str) -> str | None:
    """Return why the walk does not run a command; None where it does."""
    return next((reason for start, reason in LEFT_OUT.items() if command.startswith(start)), None)
