"""Verdict on the stability of a run, by its own losses."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from ..stability.instability import InstabilityReport, LossMonitor, detect_instability

WINDOW = 5  # losses whose median is where a run ended
WORSE_FACTOR = 2.0  # times the first loss, which is that of the untrained model: a run that ends above has diverged


def judge(losses: Sequence[float], log: Sequence[dict]) -> dict:
    """Return the `verdict` on a run, the `events` that were found, and `advice` in words where something is wrong.

    The verdict is "stable", "unstable", "diverged", or "too short to tell".

    Args:
        losses: the training loss of every step.
        log: Trainer's log_history, for the share of layers that rescaling skipped.
    """
    if not losses:
        return {"verdict": LossMonitor().report().verdict, "events": [], "advice": ""}
    report = detect_instability(losses)
    end = median(losses[-WINDOW:])
    worse = end > WORSE_FACTOR * losses[0]
    findings = _findings(report, losses)
    if worse:
        findings.append(f"the loss ended at {end:.4g}, far above the {losses[0]:.4g} that training began with")
    skipped = [entry["scalora/skipped"] for entry in log if "scalora/skipped" in entry]
    if skipped and skipped[-1] == 1:
        findings.append("the last rescalings skipped every layer")
    advice = f"{'; '.join(findings)}. {_remedy(report)}" if findings else ""
    verdict = "diverged" if worse or report.diverged else "unstable" if findings else report.verdict
    return {"verdict": verdict, "events": [vars(event) for event in report.events], "advice": advice}


def _findings(report: InstabilityReport, losses: Sequence[float]) -> list[str]:
    if not report.unstable:
        return []
    events = ", ".join(f"{event.kind} from step {event.start} to {event.end}" for event in report.events)
    return [f"the loss was unstable ({events}, largest {max(losses):.4g})"]


def _remedy(report: InstabilityReport) -> str:
    return report.advice if report.unstable else "Lower the learning rate, or add warmup."
