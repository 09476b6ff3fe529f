"""Batched greedy generation against the model's own argmax, one prompt and one whole forward pass a token."""

import copy
import json

import pytest
import torch
from helpers_runs import SPECIAL, WORDS, language_model, save_tokenizer
from transformers import AutoTokenizer

from eval.harness.generate import generate

PROMPTS = [
    "the cat sat",
    "a",
    "red blue dog ran on the mat",
    "not very",
    "mat mat mat mat",
    "dog",
    "a red cat sat on a",
]
EOS = SPECIAL.index("[EOS]")


@pytest.fixture(scope="module")
def model():
    """Random, with large weights in float64: no ties, and texts that differ; EOS is likely enough to occur."""
    model = language_model(initializer_range=0.5, vocab_size=len(SPECIAL + WORDS)).double()
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 1.5
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def continuation(model, tokenizer, prompt, count):
    """Token by token without a cache, without padding, until EOS."""
    ids = tokenizer(prompt)["input_ids"]
    new = []
    with torch.no_grad():
        while len(new) < count:
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
            if new[-1] == EOS:
                break
    words = SPECIAL + WORDS
    return " ".join(words[token] for token in new if words[token] not in ("[PAD]", "[UNK]", "[EOS]"))


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batched_equals_token_by_token(model, tokenizer, batch_size):
    expected = [continuation(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert len(set(expected)) > 4 and {len(text.split()) for text in expected} > {12}  # some end early
    assert generate(model, tokenizer, PROMPTS, 12, batch_size) == expected


def test_text_ends_before_the_first_stop_string(model, tokenizer):
    whole = generate(model, tokenizer, PROMPTS, 12)
    stop = whole[0].split()[2], whole[2].split()[3]
    expected = [text[: min([text.find(s) for s in stop if s in text] + [len(text)])] for text in whole]
    assert expected != whole
    assert generate(model, tokenizer, PROMPTS, 12, stop=stop) == expected


def test_settings_of_the_model_and_the_tokenizer_neither_count_nor_change(model, tokenizer):
    expected = generate(model, tokenizer, PROMPTS, 8)
    tokenizer.padding_side = "right"
    model.generation_config.update(do_sample=True, repetition_penalty=3.0, num_beams=2, temperature=5.0)
    model.train()
    try:
        assert generate(model, tokenizer, PROMPTS, 8) == expected
        assert tokenizer.padding_side == "right" and model.training
        assert model.generation_config.repetition_penalty == 3.0
    finally:
        model.generation_config.update(do_sample=False, repetition_penalty=1.0, num_beams=1, temperature=1.0)
        model.eval()


def test_a_call_that_was_killed_continues(model, tokenizer, tmp_path, monkeypatch):
    expected = generate(model, tokenizer, PROMPTS, 8)
    calls = []
    original = type(model).generate

    def dies_in_the_third_batch(self, **kwargs):
        calls.append(len(kwargs["input_ids"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, **kwargs)

    monkeypatch.setattr(type(model), "generate", dies_in_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, PROMPTS, 8, batch_size=2, folder=str(tmp_path))
    assert generate(model, tokenizer, PROMPTS, 8, batch_size=2, folder=str(tmp_path)) == expected
    assert sum(calls[3:]) == len(PROMPTS) - 4  # only what was missing


def test_a_tokenizer_without_a_pad_token_is_refused(model, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        generate(model, tokenizer, PROMPTS, 2)


def of_rank(rank, size, folder, model, tokenizer):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    texts = generate(model, tokenizer, PROMPTS, 8, batch_size=2)
    (folder / f"{rank}.json").write_text(json.dumps(texts))
    torch.distributed.destroy_process_group()


def test_every_process_has_all_texts(model, tokenizer, tmp_path):
    expected = generate(model, tokenizer, PROMPTS, 8)
    context = torch.multiprocessing.get_context("fork")  # keeps the model; one thread, so nothing is held
    processes = [context.Process(target=of_rank, args=(rank, 2, tmp_path, model, tokenizer)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [expected, expected]
