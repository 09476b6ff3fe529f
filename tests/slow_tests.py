"""Write slow_tests.txt, the tests that `make test-fast` leaves out, from the times of a whole run.

    make test ARGS=--junitxml=report.xml && python tests/slow_tests.py report.xml

A test function is slow if one of its cases takes more than half a second, or all of them more than 1.2.
"""

import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

LIST = Path(__file__).with_suffix(".txt")
LONGEST, TOTAL = 0.5, 1.2  # seconds, on an idle machine


def slow_functions(report: str) -> list[str]:
    """Return the slow functions of a JUnit report as "module::function", sorted."""
    seconds = defaultdict(list)
    for case in ElementTree.parse(report).iter("testcase"):
        module = case.get("classname").rpartition(".")[2]
        seconds[f"{module}::{case.get('name').partition('[')[0]}"].append(float(case.get("time")))
    return sorted(name for name, times in seconds.items() if max(times) > LONGEST or sum(times) > TOTAL)


if __name__ == "__main__":
    LIST.write_text("\n".join(slow_functions(sys.argv[1])) + "\n")
