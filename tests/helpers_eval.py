"""Rows, collator and settings to train any method of the evaluation harness on tiny models."""

import gc

import torch
from helpers_models import VOCABULARY, tiny_bert, tiny_llama
from transformers import BertForSequenceClassification, LlamaForCausalLM

from eval.harness.models import IN_4_BIT, quantization_config
from eval.harness.training import Training, train

gc.freeze()  # Trainer collects garbage at the end of a run, and most of its time would go into what is imported

# In widths that bitsandbytes has fast paths for.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def rows(classifier: bool, count: int = 16, length: int = 9) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(2, VOCABULARY, (count, length), generator=generator)
    lengths = torch.randint(5, length + 1, (count,), generator=generator)
    found = [{"input_ids": row[:n], "labels": row[:n].clone()} for row, n in zip(tokens, lengths)]
    for i, row in enumerate(found):
        if classifier:
            row["labels"] = torch.tensor(i % 3)
        else:
            row["labels"][:2] = -100
    return found


def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
    def padded(name, value):
        return torch.nn.utils.rnn.pad_sequence([row[name] for row in batch], batch_first=True, padding_value=value)

    ids = padded("input_ids", 0)
    mask = padded("input_ids", -1).ne(-1).long()
    is_classifier = batch[0]["labels"].dim() == 0
    labels = torch.stack([row["labels"] for row in batch]) if is_classifier else padded("labels", -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain_model(kind: str) -> BertForSequenceClassification | LlamaForCausalLM:
    torch.manual_seed(0)
    return tiny_bert() if kind == "bert" else tiny_llama()


def base_model(kind: str, method: str, folder, dtype: str = "float32"):
    """The base that `method` starts from; in 4 bit by way of `folder`."""
    if method not in IN_4_BIT:
        return plain_model(kind)
    torch.manual_seed(0)
    small = plain_model(kind)
    type(small)(type(small.config)(**small.config.to_dict() | WIDE)).save_pretrained(folder)
    return type(small).from_pretrained(folder, quantization_config=quantization_config(method, dtype))


def settings(method: str, **kwargs) -> Training:
    chosen = {"model": "tiny", "method": method, "r": 2, "steps": 3, "warmup_steps": 0, "batch_size": 4}
    return Training(**chosen | {"eval_steps": 100, "scaling_interval": 1, "learning_rate": 1e-2} | kwargs)


def run(kind: str, method: str, folder, model=None, evaluate=lambda model: {}, **kwargs):
    """`train` of `method` on a tiny model: the model and its figures."""
    model = base_model(kind, method, folder / "base") if model is None else model
    return train(settings(method, **kwargs), model, rows(kind == "bert"), collate, evaluate, str(folder / "run"))
