"""Read the answers in the data's own solutions, GSM8K's and MATH's, in two ways, and see that they agree.

    python -m eval.check_answers --data-dir D

Rows come from the hub, or with --data-dir from `gsm8k/{train,test}.jsonl.gz` and `math/{train,test}.jsonl.gz` below a
folder. Fails if fewer agree than is wanted.
"""

from __future__ import annotations

import argparse

from tqdm.auto import tqdm

from eval.harness.answers import MathVerify, boxed_answer, gsm8k_answer
from eval.tasks.math_problems import load_problems


def check_answers(data_dir: str | None) -> bool:
    """Print how many answers of the data agree, and return whether enough do."""
    verifier = MathVerify()
    enough = True
    for name, least in (("gsm8k", 1.0), ("math", 0.99)):
        for split in ("train", "test"):
            rows = load_problems(name, split, data_dir)
            misses = [
                (number, row["solution"])
                for number, row in enumerate(tqdm(rows, desc=f"{name} {split}", leave=False), 1)
                if not CHECKS[name](row["solution"], verifier)
            ]
            agree = len(rows) - len(misses)
            enough &= agree >= least * len(rows)
            print(f"{rows.source}: {agree} of {len(rows)} ({agree / len(rows):.2%}), wanted {least:.0%}")
            for number, solution in misses:
                boxes = solution.count(r"\boxed") + solution.count(r"\fbox")
                print(f"  row {number}: {boxes} boxes, the last {boxed_answer(solution)!r}")
    print(f"math-verify: {verifier.timeouts} timeouts, errors {dict(verifier.errors)}")
    return enough


def _gsm8k_agrees(solution: str, verifier: MathVerify) -> bool:
    """Compare the official extraction with what `float` and math-verify read after the last ####."""
    written = solution.rsplit("####", 1)[1].strip()
    answer = gsm8k_answer(solution)
    return float(answer) == float(written.replace(",", "")) and verifier.agrees(answer, written)


def _math_agrees(solution: str, verifier: MathVerify) -> bool:
    """Compare the last box with what math-verify finds in the whole solution."""
    return verifier.agrees(boxed_answer(solution), solution)


CHECKS = {"gsm8k": _gsm8k_agrees, "math": _math_agrees}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder of the layout above; the hub unless given")
    raise SystemExit(0 if check_answers(parser.parse_args().data_dir) else 1)


if __name__ == "__main__":
    main()
