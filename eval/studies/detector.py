"""Count what `detect_instability` finds and where it raises false alarms: by kind of curve and step, on losses alone.

Synthetic curves of known instability, 50 seeds each; all recorded training losses in `results` and of
`eval.studies.healthy_runs`; and the recorded runs with a blow-up put in. Nothing is trained; it takes a minute.

    python -m eval.studies.detector --output results/stability
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from tqdm import tqdm

from peft_scalora.files.atomic import replace_file
from peft_scalora.files.tables import markdown
from peft_scalora.stability import detect_instability

ROOT = Path(__file__).parents[2]
HEALTHY_RUNS = ROOT / "tests" / "healthy_runs.json"
SEEDS = 50
CHANCE = 0.69  # of two classes
EARLY_STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30)
LATE_STEPS = (30, 100, 170)
EARLY_LENGTH, LATE_LENGTH = 40, 200
Curve = Callable[[Random, int], list[float]]  # of a random generator, and of a step or a length


def noisy(random: Random, values: Iterator[float], noise: float) -> list[float]:
    """Multiply each value by 1 + noise times a normal number."""
    return [value * (1 + noise * random.gauss(0, 1)) for value in values]


def falling(random: Random, steps: int, noise: float = 0.05, start: float = 2.5, end: float = 0.5) -> list[float]:
    """Return a training loss as it should be."""
    return noisy(random, (end + (start - end) * math.exp(-8 * t / steps) for t in range(steps)), noise)


def chance_then(after: Callable[[Random, int], float]) -> Curve:
    """Return a curve that is at chance for `step` losses, and then what `after` says, losses after the step."""

    def curve(random: Random, step: int) -> list[float]:
        before = noisy(random, iter([CHANCE] * step), 0.03)
        return before + [after(random, t) for t in range(1, EARLY_LENGTH - step + 1)]

    return curve


def falling_then(after: Callable[[Random, float, int], float]) -> Curve:
    """Return a curve that falls for `step` losses, and then is what `after` makes of it."""

    def curve(random: Random, step: int) -> list[float]:
        losses = falling(random, LATE_LENGTH)
        return losses[:step] + [after(random, loss, t) for t, loss in enumerate(losses[step:], 1)]

    return curve


UNSTABLE: dict[str, tuple[Curve, tuple[int, ...], str]] = {  # curve, steps, kind of the last event
    "to 40, noise 20%": (chance_then(lambda random, t: 40 * (1 + 0.2 * random.gauss(0, 1))), EARLY_STEPS, "divergence"),
    "to 40, noise e^0.8": (chance_then(lambda random, t: 40 * math.exp(0.8 * random.gauss(0, 1))), EARLY_STEPS, ""),
    "growing 3-fold a step": (
        chance_then(lambda random, t: min(CHANCE * 3**t, 40) * math.exp(0.3 * random.gauss(0, 1))),
        EARLY_STEPS,
        "divergence",
    ),
    "to 3, noise 20%": (chance_then(lambda random, t: 3 * (1 + 0.2 * random.gauss(0, 1))), EARLY_STEPS, "divergence"),
    "to 1.5, noise 10%": (chance_then(lambda random, t: 1.5 * (1 + 0.1 * random.gauss(0, 1))), EARLY_STEPS, ""),
    "five times the loss": (falling_then(lambda random, loss, t: 5 * loss), LATE_STEPS, "divergence"),
    "drift up by the start's height in 100 steps": (
        falling_then(lambda random, loss, t: loss + 2 * t / 100),
        LATE_STEPS[:2],
        "divergence",
    ),
    "collapse to the start": (
        falling_then(lambda random, loss, t: 2.5 * (1 + 0.02 * random.gauss(0, 1))),
        LATE_STEPS,
        "divergence",
    ),
    "spike of 10 steps, four times": (
        falling_then(lambda random, loss, t: loss * (4 if t <= 10 else 1)),
        LATE_STEPS,
        "spike",
    ),
    "slow oscillation, period 40": (
        falling_then(lambda random, loss, t: loss + 1 - math.cos(2 * math.pi * t / 40)),
        LATE_STEPS[1:2],
        "",
    ),
    "fast oscillation that grows past the start": (
        falling_then(lambda random, loss, t: abs(loss + 0.3 * t * math.cos(2 * math.pi * t / 7))),
        LATE_STEPS[:2],
        "",
    ),
    "nan": (falling_then(lambda random, loss, t: math.nan), (1, 5, *LATE_STEPS, 199), "non-finite"),
}


def early_rise(height: float, length: int) -> Curve:
    """Return a curve that rises by a share of its start while the learning rate warms up, and then comes down."""

    def curve(random: Random, steps: int) -> list[float]:
        bumps = (height * math.sin(math.pi * min(1, t / length)) for t in range(steps))
        falls = (0.5 + 0.5 * math.exp(-4 * max(0, t - length / 2) / steps) for t in range(steps))
        return noisy(random, (2 * (bump + fall) for bump, fall in zip(bumps, falls)), 0.03)

    return curve


def memorised(random: Random, steps: int) -> list[float]:
    """Return losses of few rows learned by heart: nearly 0, now and then an example that is not."""
    learned = [CHANCE * math.exp(-8 * t / steps + 0.3 * random.gauss(0, 1)) for t in range(steps)]
    return [loss + (0.2 * random.random() if random.random() < 0.15 else 0.0) for loss in learned]


def outliers(random: Random, steps: int) -> list[float]:
    """Return a falling loss of which one in forty is four times too high."""
    return [loss * (4 if t % 40 == 25 else 1) for t, loss in enumerate(falling(random, steps))]


HEALTHY: dict[str, Curve] = {
    "falling, noise 5%": falling,
    "falling, noise 20%": lambda random, steps: falling(random, steps, 0.2),
    "falling, noise e^0.4": lambda random, steps: [
        loss * math.exp(0.4 * random.gauss(0, 1)) for loss in falling(random, steps, 0.0)
    ],
    "plateau at chance, noise 1%": lambda random, steps: falling(random, steps, 0.01, CHANCE, CHANCE),
    "plateau at chance, noise 20%": lambda random, steps: falling(random, steps, 0.2, CHANCE, CHANCE),
    "plateau, noise e^0.4": lambda random, steps: [math.exp(0.4 * random.gauss(0, 1)) for _ in range(steps)],
    "0 throughout": lambda random, steps: [0.0] * steps,
    "falls to exactly 0": lambda random, steps: [max(0.0, x) for x in falling(random, steps, 0.02, 2.3, -0.1)],
    "memorised": memorised,
    "at chance without noise, then with 15%": lambda random, steps: (
        [CHANCE] * (steps // 4) + noisy(random, iter([0.65] * (steps - steps // 4)), 0.15)
    ),
    "early rise of 10% over 40 steps": early_rise(0.1, 40),
    "early rise of 20% over 20 steps": early_rise(0.2, 20),
    "early rise of 30% over 10 steps": early_rise(0.3, 10),
    "epochs, a step down at each": lambda random, steps: noisy(
        random, (2 * 0.7 ** (t // 50) for t in range(steps)), 0.05
    ),
    "single outliers": outliers,
    "squared error, batch of 8": lambda random, steps: [
        (1 + 7 * math.exp(-8 * t / steps)) * sum(random.gauss(0, 1) ** 2 for _ in range(8)) / 8 for t in range(steps)
    ],
}
LENGTHS = (12, 40, 150, 600)


@dataclass
class Row:
    """Count the verdicts on the curves of one kind.

    Attributes:
        kind, step: which curves, and the losses before they go wrong; for healthy ones 0.
        runs: how many.
        found: how many were unstable, with an event that does not begin before the step.
        right: how many of them ended in the kind of event that they are; equal to found where any will do.
        alarms: how many had an event that begins before the step; for healthy ones any event.
    """

    kind: str
    step: int
    runs: int
    found: int = 0
    right: int = 0
    alarms: int = 0


def judge(row: Row, losses: list[float], expected: str = "") -> None:
    """Add the verdict on one run to its row."""
    events = detect_instability(losses).events
    # Half of the rise is what an event begins at, and noise may pass it a few steps before.
    early = [event for event in events if not row.step or event.start < row.step - 2]
    row.alarms += bool(early)
    found = len(events) > len(early)
    row.found += found
    row.right += found and (not expected or events[-1].kind == expected)


def count_unstable(kind: str, step: int, seeds: int = SEEDS) -> Row:
    """Judge the curves of one unstable kind that goes wrong after `step` losses."""
    curve, _, expected = UNSTABLE[kind]
    row = Row(kind, step, seeds)
    for seed in range(seeds):
        judge(row, curve(Random(f"{kind} {step} {seed}"), step), expected)
    return row


def count_healthy(kind: str, seeds: int = SEEDS) -> Row:
    """Judge the curves of one healthy kind, at all lengths."""
    row = Row(kind, 0, seeds * len(LENGTHS))
    for steps in LENGTHS:
        for seed in range(seeds):
            judge(row, HEALTHY[kind](Random(f"{kind} {steps} {seed}"), steps))
    return row


def recorded() -> Iterator[tuple[str, list[float]]]:
    """Return the training losses on record, by file: numbers (None if not finite) or [step, ..., loss]."""
    for path in [HEALTHY_RUNS, *sorted((ROOT / "results").rglob("*.json"))]:
        content = json.loads(path.read_text(encoding="utf-8"))
        for run in content.get("runs", [content]) if isinstance(content, dict) else []:
            losses = run.get("losses") if isinstance(run, dict) else None
            if losses:
                values = (loss[-1] if isinstance(loss, list) else loss for loss in losses)
                yield str(path.relative_to(ROOT)), [math.nan if loss is None else loss for loss in values]


def count_recorded() -> tuple[list[Row], list[Row], list[str]]:
    """Judge recorded runs, by folder, and those that are stable again with a blow-up put in; name the unstable."""
    rows: dict[str, Row] = {}
    broken = {step: Row("recorded, ten times the first loss", step, 0) for step in EARLY_STEPS}
    unstable = []
    for name, losses in recorded():
        source = "healthy runs" if name.startswith("tests") else "/".join(name.split("/")[1:-1])
        row = rows.setdefault(source, Row(source, 0, 0))
        row.runs += 1
        judge(row, losses)
        if detect_instability(losses).unstable:
            unstable.append(name)
            continue
        for step, row in broken.items():
            if len(losses) > step + 10:
                row.runs += 1
                judge(row, losses[:step] + [9 * losses[0] + loss for loss in losses[step:]], "divergence")
    return list(rows.values()), list(broken.values()), unstable


def by_step(rows: list[Row]) -> str:
    """Return a table with one line for each kind, and what was found at each step."""
    cells = {(row.kind, row.step): row for row in rows}
    kinds, steps = dict.fromkeys(row.kind for row in rows), sorted({row.step for row in rows})
    lines = []
    for kind in kinds:
        line = [cells.get((kind, step)) for step in steps]
        found = [f"{row.found}/{row.runs}" if row else "" for row in line]
        known = [row for row in line if row]
        right = f"{sum(row.right for row in known)}/{sum(row.found for row in known)}"
        lines.append([kind, *found, right, str(sum(row.alarms for row in known))])
    return markdown(["goes wrong after step", *map(str, steps), "kind right", "alarms before"], lines)


def report(result: dict[str, list[Row]]) -> str:
    """Return all tables."""
    early = [row for row in result["unstable"] if UNSTABLE[row.kind][1] == EARLY_STEPS] + result["broken"]
    late = [row for row in result["unstable"] if UNSTABLE[row.kind][1] != EARLY_STEPS]
    false = [[row.kind, str(row.runs), str(row.alarms)] for row in result["healthy"]]
    real = [[row.kind, str(row.runs), str(row.alarms)] for row in result["recorded"]]
    tables = [by_step(early), by_step(late), markdown(["healthy", "runs", "false alarms"], false)]
    return "\n\n".join([*tables, markdown(["recorded", "runs", "unstable"], real)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/detector")
    arguments = parser.parse_args()
    os.makedirs(arguments.output, exist_ok=True)
    points = [(kind, step) for kind, (_, steps, _) in UNSTABLE.items() for step in steps]
    result = {
        "unstable": [count_unstable(kind, step) for kind, step in tqdm(points, desc="unstable")],
        "healthy": [count_healthy(kind) for kind in tqdm(HEALTHY, desc="healthy")],
    }
    result["recorded"], result["broken"], names = count_recorded()
    saved = {name: [asdict(row) for row in rows] for name, rows in result.items()} | {"recorded_unstable": names}
    replace_file(os.path.join(arguments.output, "detector.json"), json.dumps(saved, indent=1) + "\n")
    text = report(result)
    replace_file(os.path.join(arguments.output, "detector.md"), text + "\n")
    print(text)


if __name__ == "__main__":
    main()
