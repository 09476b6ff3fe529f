r"""Final answers of GSM8K and MATH: finding them in a text, and telling whether two are equal. Needs math-verify.

Strict: only an answer in the data set's own form counts, `#### NUMBER` or `\boxed{...}`. Flexible: for GSM8K the last
number of the text, as in lm-eval's flexible-extract; for MATH the boxed answer, or else the expression that math-verify
takes for the answer, which is one after "answer is", or else the last.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

# grade_school_math/dataset.py of openai/grade-school-math (ANS_RE).
GSM8K_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")
NUMBER = re.compile(r"(?:(?<![\w)\].])-)?(?:\\?\$)?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*(\{)|\s+([^{}$]+))")
BOXED = (LatexExtractionConfig(boxed_match_priority=0),)
ANYTHING = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def gsm8k_answer(text: str) -> str | None:
    """Return the number after the first `#### `, without commas, as the data set's authors read it, or None."""
    match = GSM8K_ANSWER.search(text)
    return match and match[1].strip().replace(",", "")


def last_number(text: str) -> str | None:
    """Return the last number, without commas and currency; a minus counts unless it follows a term, as in `7-3`."""
    matches = list(NUMBER.finditer(text))
    if not matches:
        return None
    return ("-" if matches[-1][0].startswith("-") else "") + matches[-1][1].replace(",", "")


def boxed_answer(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` or `\fbox{...}` that is closed; None if there is none.

    Braces may nest, escaped ones are text. `\boxed 9$`, as MATH has it twice, is read up to the dollar.
    """
    for box in reversed(list(BOX.finditer(text))):
        if not box[1]:
            return box[2].strip()
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[box.end() :], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return text[box.end() : box.end() + brace.start()].strip()
    return None


def same_number(reference: str, answer: str | None) -> bool:
    """Return whether both are decimal numbers, and equal; "1.2.3" is none."""
    try:
        return answer is not None and Decimal(reference) == Decimal(answer)
    except InvalidOperation:
        return False


@dataclass
class MathVerify:
    """math-verify, with what it could not decide counted: `timeouts`, and `errors` by their names.

    Works in the main thread only, since math-verify's timeouts are signals.
    """

    seconds: int = 5
    timeouts: int = 0
    errors: Counter = field(default_factory=Counter)

    def same_answer(self, reference: str, answer: str | None) -> bool:
        """Return whether two contents of boxes are the same letters, spaces apart, or mathematically equal."""
        if answer is None:
            return False
        return _letters(reference) == _letters(answer) or self.agrees(reference, rf"\boxed{{{answer}}}", BOXED)

    def agrees(self, reference: str, text: str, kinds=ANYTHING) -> bool:
        """Return whether what math-verify takes for the answer of a text is equal to the content of a box."""
        references = self._parse(rf"\boxed{{{reference}}}", BOXED)
        found = self._parse(text, kinds)
        return any(self._equal(a, b) for a in references for b in found)

    def _parse(self, text: str, kinds) -> list:
        return self._counted(lambda: parse(text, kinds, parsing_timeout=self.seconds, raise_on_error=True), [])

    def _equal(self, a, b) -> bool:
        return self._counted(lambda: verify(a, b, timeout_seconds=self.seconds, raise_on_error=True), False)

    def _counted(self, function, otherwise):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("math-verify's timeouts are signals: compare answers in the main thread.")
        try:
            return function()
        except TimeoutException:
            self.timeouts += 1
        except Exception as error:
            self.errors[type(error).__name__] += 1
        return otherwise


def _letters(answer: str) -> str:
    return re.sub(r"\s+", "", answer)
