"""eval/studies/frontier.py: runs trained as a population, their search, and the report of the committed runs."""

import copy
import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import GraloraConfig, HiraConfig, LoraConfig, get_peft_model
from torch import nn

from eval.studies import frontier
from eval.studies.frontier_alone import Alone, train_alone
from eval.studies.frontier_headlines import README_ROWS, RULE_ROWS, headline_table
from eval.studies.frontier_population import Population, adapted, train_runs
from eval.studies.frontier_report import cells_of, effective_rank, report
from eval.studies.frontier_runs import METHODS, Run, append_runs, read_runs
from eval.studies.frontier_tasks import (
    BYTES,
    BaseModel,
    RecallTask,
    Texts,
    TextTask,
    base_model,
    held_out_rows,
)

RESULTS = Path("results/frontier")
TINY = BaseModel(width=16, layers=1, steps=3, batch=2)


def text(seed, size=3000):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(97, 105, (size,), generator=generator).to(torch.uint8)


@pytest.fixture(scope="module")
def texts():
    return Texts(base=text(0), base_held_out=text(1), new=text(2), new_held_out=text(3))


@pytest.fixture(scope="module")
def base(texts, tmp_path_factory):
    return base_model(TINY, texts, str(tmp_path_factory.mktemp("cache")))


def trained_alone(base, run, task):
    """Train one run as anybody would, and return its model and held-out loss."""
    torch.manual_seed(run.seed)
    model = adapted(base, METHODS[run.method], run.r).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if METHODS[run.method].optimizer == "muon":
        optimizer = torch.optim.Muon(parameters, lr=run.learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    else:
        optimizer = torch.optim.AdamW(parameters, lr=run.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    generator = torch.Generator().manual_seed(run.seed)
    for _ in range(run.steps):
        ids, labels = task.batch(generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return model, model(input_ids=task.rows_NT, labels=task.rows_NT).loss.item()


def change(model):
    """Return the weight change of all layers as one vector."""
    layers = [module for module in model.modules() if hasattr(module, "get_delta_weight")]
    return torch.cat([layer.get_delta_weight("default").flatten() for layer in layers]).detach()


# Muon multiplies in bfloat16: what differs in the last bits of a gradient is soon a thousandth of the change.
@pytest.mark.parametrize(
    "methods, tolerance",
    [
        (["LoRA", "ScaLoRA column", "ScaLoRA shrink, norm² 1/3"], 2e-4),
        (["LoRA, Muon", "ScaLoRA column, Muon"], 1e-2),
        (["ScaLoRA shrink, I = 1"], 2e-4),
        (["rsLoRA"], 2e-4),
        (["PiSSA"], 2e-4),
    ],
)
def test_a_population_trains_each_run_as_it_would_train_alone(base, texts, methods, tolerance):
    task = TextTask(texts)
    runs = [Run("text", method, 2, 25, -5, seed) for method in methods for seed in (0, 1)]
    population = Population(base, runs)
    records = population.train(task)
    losses = [score["loss"] for score in task.score(population)]
    changes = [change(model) for model in population.copies]
    for index, run in enumerate(runs):
        model, loss = trained_alone(base, run, task)
        assert losses[index] == pytest.approx(loss, abs=tolerance)
        assert (changes[index] - change(model)).norm() < tolerance * changes[index].norm()
        assert all((changes[index] - other).norm() > 10 * tolerance * other.norm() for other in changes[:index])
        assert records[index]["parameters"] == 2 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16)
        assert ("log_alpha" in records[index]) == run.method.startswith("ScaLoRA")
        if "shrink" in run.method:
            assert records[index]["log_alpha"] < 0 and records[index]["log_beta"] <= 0


def test_all_weights_trained_as_a_population_are_no_adapter(base, texts):
    runs = [Run("text", "full", 0, 3, -10, seed) for seed in (0, 1)]
    before = [p.clone() for p in base.parameters()]
    results = train_runs(base, runs, TextTask(texts), held_out_rows(texts.base_held_out))
    assert all(torch.equal(p, old) for p, old in zip(base.parameters(), before))
    assert results[0]["loss"] != results[1]["loss"]
    assert results[0]["parameters"] == 16 * 48 + 16 * 16 + 2 * 16 * 64


def trained_by_peft(base, config, run, task):
    """Train the adapter that PEFT makes of a configuration, and return its model."""
    torch.manual_seed(run.seed)
    model = get_peft_model(copy.deepcopy(base), config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=run.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(run.seed)
    for step in range(run.steps):
        optimizer.param_groups[0]["lr"] = run.learning_rate * (1 + math.cos(math.pi * step / run.steps)) / 2
        ids, labels = task.batch(generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return model


COMMON = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
ALONE = {
    "DoRA": LoraConfig(lora_alpha=4, use_dora=True, **COMMON),
    "HiRA": HiraConfig(**COMMON),
    "GraLoRA": GraloraConfig(alpha=4, gralora_k=2, **COMMON),
}


@pytest.mark.parametrize("method", ALONE)
def test_a_run_that_shares_no_forward_pass_trains_as_peft_s_model_does(base, texts, method):
    task, rows = TextTask(texts), held_out_rows(texts.base_held_out)
    run = Run("text", method, 2, 8, -5, 1)
    result = train_alone(base, run, task, rows)
    model = trained_by_peft(base, ALONE[method], run, task)
    with torch.no_grad():
        assert result["loss"] == pytest.approx(model(input_ids=task.rows_NT, labels=task.rows_NT).loss.item(), abs=1e-5)
        assert result["base_loss"] == pytest.approx(model(input_ids=rows, labels=rows).loss.item(), abs=1e-5)
    assert result["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_relora_restarts_between_its_cycles_and_warms_up_again(base, texts):
    run = Run("text", "ReLoRA", 2, 80, -8, 0)
    alone = Alone(base, run)
    factors = [alone.rate_factor(step) for step in range(run.steps)]
    assert [step for step, factor in enumerate(factors) if factor == 0] == [0, 20, 40, 60]
    assert factors[50] == pytest.approx((1 + math.cos(math.pi * 50 / 80)) / 2)
    assert factors[41] == pytest.approx((1 + math.cos(math.pi * 41 / 80)) / 4)
    alone.train(TextTask(texts))
    assert len(alone.restarts.merged) == 3


def make_study(tmp_path, texts, monkeypatch, suite="text"):
    monkeypatch.setattr(frontier, "load_texts", lambda data_dir: texts)
    return frontier.Study(str(tmp_path / "runs.jsonl"), suite, None, str(tmp_path / "cache"), TINY)


def test_a_search_ends_inside_its_grid_and_is_resumed_without_a_run(tmp_path, texts, monkeypatch):
    study = make_study(tmp_path, texts, monkeypatch)
    study.record_untrained()
    study.search([("LoRA", 1), ("ScaLoRA shrink", 1)], [12, 2], seeds=2)
    runs = read_runs(study.path)
    cells = cells_of(runs, "text")
    assert set(cells) == {(method, 1, steps) for method in ("LoRA", "ScaLoRA shrink") for steps in (2, 12)}
    assert all(set(cell.losses) == {1, 2} for cell in cells.values())
    study._train = None  # calling it would fail
    study.record_untrained()
    study.search([("LoRA", 1), ("ScaLoRA shrink", 1)], [12, 2], seeds=2)
    assert read_runs(study.path) == runs
    for name in ("untrained", "unigram counts", "ScaLoRA shrink | 1", "effective rank"):
        assert name in report(runs, "text")


def test_recall_is_the_share_of_numbers_that_are_right_to_the_last_digit(tmp_path, texts, monkeypatch):
    task = RecallTask(pairs=4)

    class Knows:
        """A population of one run that knows all numbers but one, in which a digit is wrong."""

        def logits(self, ids_SNT):
            logits = nn.functional.one_hot(ids_SNT.roll(-1, -1), BYTES).double()
            wrong = (ids_SNT == task.ids_NT[0]).all(-1)
            logits[wrong, -2] = nn.functional.one_hot(torch.tensor(ord("x")), BYTES).double()
            return logits

        def held_out_losses(self, ids_NT, labels_NT):
            return [0.5]

    assert task.score(Knows()) == [{"loss": 0.5, "recall": 0.75}]
    study = make_study(tmp_path, texts, monkeypatch, "recall")
    study.make([Run("recall", "LoRA", 1, 2, -6, 0)])
    (result,) = read_runs(study.path).values()
    assert 0 <= result["recall"] <= 1 and math.isfinite(result["loss"])


def test_counts_against_a_plain_count(texts):
    task = TextTask(texts)
    train, rows = texts.new.tolist(), task.rows_NT.tolist()
    pairs = Counter(itertools.pairwise(train))
    first = Counter(train[:-1])
    second = Counter(train[1:])
    held_out = [pair for row in rows for pair in itertools.pairwise(row)]
    bigram = [math.log((pairs[a, b] + 1 / BYTES) / (first[a] + 1)) for a, b in held_out]
    unigram = [math.log((second[b] + 1) / (len(train) - 1 + BYTES)) for _, b in held_out]
    assert task.counted()["bigram counts"] == pytest.approx(-sum(bigram) / len(bigram))
    assert task.counted()["unigram counts"] == pytest.approx(-sum(unigram) / len(unigram))


def test_the_effective_rank_is_read_off_lora_s_curve():
    ranks = [2, 4, 8, 16]
    losses = [3 - 0.1 * math.log2(r) for r in ranks]
    for r in (2, 3, 5.7, 16):
        assert effective_rank(ranks, losses, 3 - 0.1 * math.log2(r)) == pytest.approx(r, rel=1e-6)
    assert effective_rank(ranks, losses, 2.91) == 0 and effective_rank(ranks, losses, 2.59) == math.inf


def test_the_tables_of_a_few_runs_by_hand(tmp_path):
    path = str(tmp_path / "runs.jsonl")
    append_runs(path, [Run("text", "bigram counts", 0, 0, 0, 0)], [{"loss": 2.5}])
    losses = {("LoRA", 2): (2.9, 2.6), ("LoRA", 4): (2.4, 2.2), ("ScaLoRA shrink", 4): (2.3, 1.9)}
    for (method, r), told in losses.items():
        searched = {-8: 3.0, -7: 2.0, -6: 3.0}
        runs = [Run("text", method, r, 75, rate, 0) for rate in searched]
        runs += [Run("text", method, r, 75, -7, seed) for seed in (1, 2)]
        values = [*searched.values(), *told]
        append_runs(path, runs, [{"loss": loss, "base_loss": 1.0, "parameters": 100 * r} for loss in values])
    written = report(read_runs(path), "text")
    for row in (
        "| LoRA | 2 | 200 | 2.7500† ± 0.1500 (2; 0.018) | 1.000 |",
        "| LoRA | 4 | 400 | 2.3000 ± 0.1000 (2; 0.018) | 1.000 |",
        "| ScaLoRA shrink | 4 | -0.2000 ± 0.1000 (p = 0.3) |",
        "| LoRA | 2 | -0.6500 ± 0.0500 (p = 0.049) |",
        "| 200 | 2 | LoRA, r = 2: 2.7500 |",
        "| 400 | 4 | ScaLoRA shrink, r = 4: 2.1000; -0.2000 ± 0.1000 (p = 0.3) |",
        "| ScaLoRA shrink | 4 | > 4 (",
    ):
        assert row in written


def test_a_best_rate_at_an_end_of_its_grid_is_refused(tmp_path):
    path = tmp_path / "runs.jsonl"
    runs = [Run("text", "LoRA", 4, 75, rate, 0) for rate in (-8, -7, -6)]
    append_runs(str(path), runs, [{"loss": 2.0}, {"loss": 1.5}, {"loss": math.inf}])
    assert cells_of(read_runs(str(path)), "text") == {}
    append_runs(str(path), [Run("text", "LoRA", 4, 75, -9, 0)], [{"loss": 1.0}])
    with pytest.raises(
        ValueError, match=r"LoRA of rank 4, 75 steps: the best learning rate, 10\^\(-9/4\), is at an end"
    ):
        cells_of(read_runs(str(path)), "text")


def test_the_committed_tables_are_those_of_the_committed_runs():
    runs = read_runs(str(RESULTS / "runs.jsonl"))
    written = (RESULTS / "frontier.md").read_text()
    for suite in {run.suite for run in runs if run.steps}:
        assert report(runs, suite) in written
    cells = cells_of(runs, "text")
    assert headline_table(cells, README_ROWS) in Path("README.md").read_text()
    assert headline_table(cells, RULE_ROWS) in Path("docs/method.md").read_text()
    counts = min(result["loss"] for run, result in runs.items() if run.suite == "text" and "counts" in run.method)
    assert min(cell.mean for cell in cells.values()) < counts
