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

from eval.studies.long_run import byte_stream
from peft_scalora.files.atomic import replace_file
from peft_scalora.plots import finish_panel, panels, save_png
from peft_scalora.stability import HiddenStateProbe, detect_instability, scale_residual, to_peri_ln

NORMS, STEPS, DECAYS = ("none", "pre", "peri"), (1.0, 0.1), (0.0, 0.1)
NAMES = {"none": "no LN", "pre": "Pre-LN", "peri": "Peri-LN"}
RUNS_NAME = "residual_runs.json"
PROBE_EVERY = 25


def make_model(arguments: argparse.Namespace, norm: str, step: float) -> GPT2LMHeadModel:
    """GPT-2 without dropout; weights of 1/sqrt(width), as 0.02 is for a width of 2,500."""
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
    """One run: losses of all steps, held-out loss, hidden states by depth every 25 steps, and the bound they keep."""
    torch.manual_seed(seed)
    model = make_model(arguments, norm, step)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 10))
    generator, losses, over_bound = torch.Generator().manual_seed(seed + 1), [], []
    started = time.perf_counter()
    with HiddenStateProbe(model, every=PROBE_EVERY) as probe:
        for number in range(1, arguments.steps + 1):
            starts = torch.randint(0, len(data) - arguments.length, (arguments.batch,), generator=generator)
            batch = torch.stack([data[start : start + arguments.length] for start in starts])
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
    model.eval()
    with torch.no_grad():
        held_out_loss = model(input_ids=held_out, labels=held_out).loss.item()
    report = detect_instability(losses)
    profiles = [p for p in probe.profiles if all(map(math.isfinite, p.mean_abs))]
    return {
        "norm": norm,
        "step": step,
        "weight_decay": decay,
        "seed": seed,
        "diverged": report.diverged,
        "spikes": sum(event.kind == "spike" for event in report.events),
        "held_out_loss": held_out_loss if math.isfinite(held_out_loss) else None,
        "mean_abs": profiles[-1].mean_abs if profiles else None,
        "variance": profiles[-1].variance if profiles else None,
        "bound": bound,
        "largest_share_of_bound": max(over_bound) if over_bound else None,
        "losses": [round(loss, 4) if math.isfinite(loss) else None for loss in losses],
        "seconds": time.perf_counter() - started,
    }


def run_all(arguments: argparse.Namespace) -> list[dict]:
    """All runs of the grid, those that are missing trained now; saved after each."""
    path = os.path.join(arguments.output, RUNS_NAME)
    names = ("depth", "width", "length", "batch", "steps", "learning_rate")
    settings = {name: getattr(arguments, name) for name in names}
    saved = {"settings": settings, "torch": torch.__version__, "runs": []}
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            saved = json.load(file)
        if saved["settings"] != settings:
            raise SystemExit(f"{path} holds runs with other settings, {saved['settings']}: choose another --output.")
    done = {(run["norm"], run["step"], run["weight_decay"], run["seed"]) for run in saved["runs"]}
    data, held_out = byte_stream(20000, 0), byte_stream(1500, 7)
    held_out = held_out[: arguments.length * 300].view(-1, arguments.length)
    # Seed by seed, so that a study that is cut short is whole for the seeds it has.
    grid = [(*kind, seed) for seed in range(arguments.seeds) for kind in itertools.product(NORMS, STEPS, DECAYS)]
    for kind in tqdm([kind for kind in grid if kind not in done], desc="runs"):
        saved["runs"].append(train(arguments, *kind, data, held_out))
        replace_file(path, json.dumps(saved))
    return saved["runs"]


def table(runs: list[dict]) -> str:
    """Markdown: for each kind of model diverged runs, median held-out loss and growth, both weight decays."""
    lines = [
        "| | Δt | weight decay | diverged | held-out nats a byte | MA(X_D) | largest MA / bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for norm, step, decay in itertools.product(NORMS, STEPS, DECAYS):
        found = [r for r in runs if (r["norm"], r["step"], r["weight_decay"]) == (norm, step, decay)]
        whole = [r for r in found if not r["diverged"]]
        losses = [r["held_out_loss"] for r in found if r["held_out_loss"] is not None]
        shares = [r["largest_share_of_bound"] for r in found if r["largest_share_of_bound"]]
        cells = [
            NAMES[norm],
            f"{step:g}",
            f"{decay:g}",
            f"{sum(r['diverged'] for r in found)}/{len(found)}",
            f"{statistics.median(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})" if losses else "not finite",
            f"{statistics.median(r['mean_abs'][-1] for r in whole):.3g}" if whole else "",
            f"{max(shares):.2f}" if shares else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs: list[dict], path: str) -> None:
    """Hidden states by depth at the end, and training loss: medians over seeds, without weight decay."""
    figure, ((depth, loss),) = panels(2)
    for number, (norm, step) in enumerate(itertools.product(NORMS[1:], STEPS)):
        found = [r for r in runs if (r["norm"], r["step"], r["weight_decay"]) == (norm, step, 0.0)]
        if not found:
            continue
        style = {"color": f"C{number}", "label": f"{NAMES[norm]}, Δt = {step:g}", "linewidth": 1.6}
        by_depth = [statistics.median(values) for values in zip(*(r["mean_abs"] for r in found))]
        depth.plot(range(len(by_depth)), by_depth, **style)
        if norm == "peri":
            bound = [statistics.median(values) for values in zip(*(r["bound"] for r in found))]
            depth.plot(range(len(bound)), bound, "--", color=f"C{number}", linewidth=1.0, label="its bound")
        curves = [statistics.median(values) for values in zip(*(r["losses"] for r in found))]
        smooth = [statistics.median(curves[max(0, i - 9) : i + 1]) for i in range(len(curves))]
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
