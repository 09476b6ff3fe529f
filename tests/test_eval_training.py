"""What a run of the harness is refused for before it is trained, and what makes it another run."""

import json

import pytest
from helpers_eval import plain_model, run
from transformers import TrainingArguments

from eval.harness import record
from eval.harness.training import Training, settings_of


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "lore"}, "method='lore' must be one of full, "),
        ({"scaling": "row"}, "scaling='row' must be one of "),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"steps": -1}, "steps=-1 must be at least 1"),
        ({"eval_steps": 0}, "eval_steps=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a number"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be a number"),
        ({"smoothness": "big"}, "smoothness='big' must be a number, or auto"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Training("model", **fields)


def test_rows_longer_than_the_model_reads_are_refused(tmp_path):
    model = plain_model("llama")
    model.config.max_position_embeddings = 8
    with pytest.raises(
        ValueError, match="leaves a training row of 9 tokens, and the model reads 8: choose max_length=8"
    ):
        run("llama", "lora", tmp_path, model=model)


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"one process sees 2 GPUs.*use accelerate launch"):
        run("llama", "lora", tmp_path)


def test_a_run_on_another_number_of_processes_is_another_run(tmp_path):
    path, identity = str(tmp_path / "run.json"), ("task", {"steps": 3}, {"train": {"rows": 4}})
    with record.recorded(path, *identity) as result:
        result["metrics"] = {}
    assert record.finished(path, *identity)["metrics"] == {}
    found = record.read(path)
    found["environment"]["processes"] = 2
    (tmp_path / "run.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"with other settings \(processes=2 there, 1 here\)"):
        record.finished(path, *identity)


def test_an_interrupted_run_is_continued_on_as_many_processes(tmp_path):
    path, identity = str(tmp_path / "run.json"), ("task", {"steps": 3}, {"train": {"rows": 4}})
    with pytest.raises(RuntimeError), record.recorded(path, *identity):
        raise RuntimeError
    kept = tmp_path / "run.json.checkpoints" / "run.json"
    begun = json.loads(kept.read_text())
    assert begun["environment"]["processes"] == 1
    begun["environment"]["processes"] = 2
    kept.write_text(json.dumps(begun))
    with (
        pytest.raises(ValueError, match=r"interrupted run with other settings \(processes=2 there, 1 here\)"),
        record.recorded(path, *identity),
    ):
        pass


def test_a_model_is_known_by_its_folder_or_by_its_whole_hub_id(tmp_path):
    (tmp_path / "final").mkdir()
    names = [settings_of(Training(str(model)))["model"] for model in (tmp_path / "final", "one/base", "other/base")]
    assert names == ["final", "one/base", "other/base"]
