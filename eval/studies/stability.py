"""Where the normalisation stands and how long the residual step is: GPT-2 from scratch, after arXiv 2510.09904.

None, Pre-LN and Peri-LN x residual step 1 and 0.1 x weight decay off and on x seeds, all at one learning rate that is
too high on purpose: which runs diverge, how good the others become, and how hidden states grow with depth. Bytes of
generated English, held-out sentences of the same words. Runs that are in the output folder already are not repeated.

    python -m eval.studies.stability --output results/stability
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import time

import torch
from torch import nn
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from eval.harness.corpus import byte_stream, held_out_loss, in_rows, windows
from eval.harness.record import read
from eval.harness.statistics import median_and_range, running
from peft_scalora.files.atomic import replace_file
from peft_scalora.files.claim import refuse_other_run
from peft_scalora.files.tables import markdown
from peft_scalora.plots import finish_panel, panels, save_png
from peft_scalora.stability import HiddenStateProbe, detect_instability, scale_residual, to_peri_ln

NORMS, STEPS, DECAYS = ("none", "pre", "peri"), (1.0, 0.1), (0.0, 0.1)
NAMES = {"none": "no LN", "pre": "Pre-LN", "peri": "Peri-LN"}
RUNS_NAME = "residual_runs.json"
PROBE_EVERY = 25


def make_model(arguments: argparse.Namespace, norm: str, step: float) -> GPT2LMHeadModel:
    """Return GPT-2 without dropout; weights of 1/sqrt(width), as 0.02 is for a width of 2,500."""
    config = GPT2Config(
        vocab_size=128,
        n_embd=arguments.width,
        n_layer=arguments.depth,
        n_head=4,
        n_positions=arguments.length,
        initializer_range=1 / math.sqrt(arguments.width),
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    if norm == "peri":
        to_peri_ln(model)
    if step != 1:
        scale_residual(model, step)
    if norm == "none":
        for block in model.transformer.h:
            block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
        model.transformer.ln_f = nn.Identity()
    return model


def train(arguments: argparse.Namespace, norm: str, step: float, decay: float, seed: int, data, held_out) -> dict:
    """Train once, and return losses, held-out loss, hidden states by depth every 25 steps, and their bound."""
    torch.manual_seed(seed)
    model = make_model(arguments, norm, step)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 10))
    generator, losses, over_bound = torch.Generator().manual_seed(seed + 1), [], []
    started = time.perf_counter()
    with HiddenStateProbe(model, every=PROBE_EVERY) as probe:
        for number in range(1, arguments.steps + 1):
            batch = windows(data, arguments.length, arguments.batch, generator)
            loss = model(input_ids=batch, labels=batch).loss
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break
            optimizer.zero_grad()
            loss.backward()
            if norm == "peri" and number % PROBE_EVERY == 0:
                profile = probe.profiles[-1]
                over_bound.append(max(x / bound for x, bound in zip(profile.mean_abs, probe.bound(profile))))
            optimizer.step()
            schedule.step()
        bound = probe.bound(probe.profiles[-1]) if norm == "peri" else None
    final = held_out_loss(model, held_out)
    report = detect_instability(losses)
    profiles = [p for p in probe.profiles if all(map(math.isfinite, p.mean_abs))]
    return {
        "norm": norm,
        "step": step,
        "weight_decay": decay,
        "seed": seed,
        "diverged": report.diverged,
        "spikes": sum(event.kind == "spike" for event in report.events),
        "held_out_loss": final if math.isfinite(final) else None,
        "mean_abs": profiles[-1].mean_abs if profiles else None,
        "variance": profiles[-1].variance if profiles else None,
        "bound": bound,
        "largest_share_of_bound": max(over_bound) if over_bound else None,
        "losses": [round(loss, 4) if math.isfinite(loss) else None for loss in losses],
        "seconds": time.perf_counter() - started,
    }


def run_all(arguments: argparse.Namespace) -> list[dict]:
    """Return all runs of the grid, those that are missing trained now; saved after each."""
    path = os.path.join(arguments.output, RUNS_NAME)
    names = ("depth", "width", "length", "batch", "steps", "learning_rate")
    settings = {name: getattr(arguments, name) for name in names}
    saved = {"settings": settings, "torch": torch.__version__, "runs": []}
    if os.path.exists(path):
        saved = read(path)
        refuse_other_run(f"{path} holds runs", saved["settings"], settings, "choose another --output")
    done = {(run["norm"], run["step"], run["weight_decay"], run["seed"]) for run in saved["runs"]}
    data = byte_stream(20000, 0)
    held_out = in_rows(byte_stream(1500, 7), arguments.length, 300)
    # Seed by seed, so that a study that is cut short is whole for the seeds it has.
    grid = [(*kind, seed) for seed in range(arguments.seeds) for kind in itertools.product(NORMS, STEPS, DECAYS)]
    for kind in tqdm([kind for kind in grid if kind not in done], desc="runs"):
        saved["runs"].append(train(arguments, *kind, data, held_out))
        replace_file(path, json.dumps(saved))
    return saved["runs"]


def table(runs: list[dict]) -> str:
    """Return a Markdown table: of each kind of model diverged runs, median held-out loss and growth."""
    header = ["", "Δt", "weight decay", "diverged", "held-out nats a byte", "MA(X_D)", "largest MA / bound"]
    rows = []
    for norm, step, decay in itertools.product(NORMS, STEPS, DECAYS):
        found = [r for r in runs if (r["norm"], r["step"], r["weight_decay"]) == (norm, step, decay)]
        rows.append([NAMES[norm], f"{step:g}", f"{decay:g}", *figures(found)])
    return markdown(header, rows)


def figures(runs: list[dict]) -> list[str]:
    """Return the cells of one kind of model."""
    whole = [r for r in runs if not r["diverged"]]
    losses = [r["held_out_loss"] for r in runs if r["held_out_loss"] is not None]
    shares = [r["largest_share_of_bound"] for r in runs if r["largest_share_of_bound"]]
    return [
        f"{sum(r['diverged'] for r in runs)}/{len(runs)}",
        median_and_range(losses, ".3f") if losses else "not finite",
        f"{statistics.median(r['mean_abs'][-1] for r in whole):.3g}" if whole else "",
        f"{max(shares):.2f}" if shares else "",
    ]


def medians(curves: list[list[float]]) -> list[float]:
    """Return the median over runs, place by place."""
    return [statistics.median(values) for values in zip(*curves)]


def plot(runs: list[dict], path: str) -> None:
    """Plot hidden states by depth at the end, and training loss: medians over seeds, without weight decay."""
    figure, ((depth, loss),) = panels(2)
    for number, (norm, step) in enumerate(itertools.product(NORMS[1:], STEPS)):
        found = [r for r in runs if (r["norm"], r["step"], r["weight_decay"]) == (norm, step, 0.0)]
        if not found:
            continue
        style = {"color": f"C{number}", "label": f"{NAMES[norm]}, Δt = {step:g}", "linewidth": 1.6}
        by_depth = medians([r["mean_abs"] for r in found])
        depth.plot(range(len(by_depth)), by_depth, **style)
        if norm == "peri":
            bound = medians([r["bound"] for r in found])
            depth.plot(range(len(bound)), bound, "--", color=f"C{number}", linewidth=1.0, label="its bound")
        smooth = running(statistics.median, medians([r["losses"] for r in found]))
        loss.plot(range(1, len(smooth) + 1), smooth, **style)
    depth.set_yscale("log")
    loss.set_ylim(top=3.2)
    finish_panel(depth, "Hidden states after training", "block", "mean absolute activation")
    finish_panel(loss, "Training loss, running median of 10", "optimizer step", "nats a byte")
    for axis in (depth, loss):
        axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=2)
    save_png(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/stability")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=0.04)
    arguments = parser.parse_args()
    os.makedirs(arguments.output, exist_ok=True)
    runs = run_all(arguments)
    text = table(runs)
    replace_file(os.path.join(arguments.output, "residual.md"), text + "\n")
    plot(runs, os.path.join(arguments.output, "residual.png"))
    print(text)


if __name__ == "__main__":
    main()
