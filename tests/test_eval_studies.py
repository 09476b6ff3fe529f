"""Studies: their published tables are those of their runs, and what they share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_models import tiny_llama

from eval import overhead
from eval.harness.corpus import held_out_loss, in_rows, windows
from eval.harness.record import kept, read, read_all
from eval.harness.statistics import running, with_range
from eval.studies import (
    gauss_newton_cost,
    gauss_newton_finetune,
    gauss_newton_report,
    overhead_sweep,
    stability,
)

RESULTS = Path(__file__).parents[1] / "results"


def gauss_newton_tables(folder) -> str:
    return gauss_newton_report.tables(read_all(str(folder / "study")))


TABLES = {
    "stability/residual.md": lambda folder: stability.table(read(str(folder / "residual_runs.json"))["runs"]),
    "gauss_newton/study.md": gauss_newton_tables,
    "gauss_newton/cost.md": lambda folder: gauss_newton_cost.table(read(str(folder / "cost.json"))),
    "gauss_newton/finetune/finetune.md": lambda folder: gauss_newton_finetune.table(read_all(str(folder))),
    "overhead/overhead.md": lambda folder: overhead.table(read(str(folder / "overhead.json"))),
    "overhead/sweep.md": lambda folder: overhead_sweep.table(read(str(folder / "sweep.json"))["sweeps"]),
}
SHAPES = ("llama-3-8b-block", "smollm2-135m-bfloat16")
TABLES |= {f"overhead/{shape}/overhead.md": TABLES["overhead/overhead.md"] for shape in SHAPES}


@pytest.mark.parametrize("name", TABLES)
def test_published_tables_are_those_of_their_runs(name):
    path = RESULTS / name
    assert path.read_text().rstrip("\n") == TABLES[name](path.parent).rstrip("\n")


def test_the_page_of_costs_shows_the_tables_of_every_shape():
    page = (RESULTS / "overhead.md").read_text()
    assert all((RESULTS / name).read_text() in page for name in TABLES if name.endswith("overhead.md"))


def test_windows_are_pieces_of_the_stream_and_rows_are_its_start():
    stream = torch.arange(20)
    found = windows(stream, 5, 200, torch.Generator().manual_seed(0))
    assert found.shape == (200, 5)
    assert torch.equal(found, found[:, :1] + torch.arange(5))
    assert set(found[:, 0].tolist()) == set(range(15))
    assert in_rows(stream, 6, 300).tolist() == [list(range(start, start + 6)) for start in (0, 6, 12)]
    assert in_rows(stream, 6, 2).tolist() == [list(range(6)), list(range(6, 12))]


def test_the_held_out_loss_is_of_every_token_but_the_first_and_leaves_the_mode():
    model = tiny_llama(attention_dropout=0.5).train()
    rows = torch.randint(2, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    loss = held_out_loss(model, rows)
    assert model.training
    with torch.no_grad():
        log_probabilities = model.eval()(rows).logits[:, :-1].double().log_softmax(-1)
    expected = -log_probabilities.gather(2, rows[:, 1:, None]).mean().item()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_running_values_and_ranges():
    values = np.random.default_rng(0).standard_normal(30).tolist()
    expected = [float(np.median(values[max(0, i - 3) : i + 1])) for i in range(30)]
    assert running(lambda part: float(np.median(part)), values, width=4) == expected
    assert with_range(1.25, 1.0, 2.0, ".1f") == "1.2 (1.0 to 2.0)"
    assert with_range(3.0, 3.0, 3.0, ".0f") == "3"


def test_a_result_is_made_once_and_one_with_other_settings_is_refused(tmp_path):
    path = str(tmp_path / "study" / "run.json")
    assert kept(path, {"rate": 0.1}, lambda: {"loss": 2.0}) == {"settings": {"rate": 0.1}, "loss": 2.0}
    assert kept(path, {"rate": 0.1}, lambda: 1 / 0)["loss"] == 2.0
    with pytest.raises(ValueError, match=r"run.json holds a run with other settings \(rate=0.1 there, 0.2 here\)"):
        kept(path, {"rate": 0.2}, lambda: {"loss": 3.0})
