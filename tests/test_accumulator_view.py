"""How folded change is kept is one class: another one is put in from outside the package, in one place."""

import copy

import pytest
import torch
from helpers_models import Linears, check_filled, distance, fill, floats, output, scalora_config, scalora_layers, train
from peft import PeftModel, get_peft_model

from peft_scalora import ScaLoRAConfig, effective_rank, export_lora
from peft_scalora.accumulator import ACCUMULATORS, Accumulator
from peft_scalora.export.info import adapter_info


class Whole(Accumulator):
    """The change itself (out x in), in one tensor that is saved as `scalora_W`."""

    @staticmethod
    def shapes(shape, capacity):
        return {"scalora_W": shape}

    @staticmethod
    def stored(tensors, columns):
        W = tensors["scalora_W"][:, :columns]
        return W, torch.eye(tensors["scalora_W"].shape[1])[:columns]

    @property
    def shape(self):
        return tuple(self.tensors["scalora_W"].shape)

    @property
    def capacity(self):
        return min(self.shape)

    def beside_base(self):
        return self.in_use()

    def fits(self, columns):
        return True

    @classmethod
    def append(cls, accumulators, U_LMK, V_LKN):
        for accumulator, U, V in zip(accumulators, U_LMK, V_LKN):
            accumulator.tensors["scalora_W"].add_(U @ V)
            accumulator.columns = V.shape[1]


@pytest.fixture
def whole(monkeypatch):
    monkeypatch.setitem(ACCUMULATORS, "whole", Whole)


def test_an_accumulator_from_outside_trains_saves_loads_and_exports(whole, tmp_path):
    base, x = Linears().eval(), floats(5, 14)
    torch.manual_seed(0)
    factored = get_peft_model(copy.deepcopy(base), scalora_config(target_modules=["lin0", "lin1"], accumulator_rank=64))
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), scalora_config(target_modules=["lin0", "lin1"], accumulator="whole"))
    check_filled(fill(factored))
    train(model.train(), floats(5, 14), steps=6)
    model.eval()
    assert all(layer.scalora_W["default"].norm() > 1e-3 for layer in scalora_layers(model).values())
    assert distance(output(model, x), output(factored, x)) < 1e-5
    assert effective_rank(model) == effective_rank(factored)
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "saved").eval()
    assert distance(output(loaded, x), output(model, x)) < 1e-6
    assert adapter_info(str(tmp_path / "saved"))["layers"]["lin0"]["accumulated_columns"] == 14
    export_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "plain").eval()
    assert distance(output(plain, x), output(model, x)) < 1e-5
    assert distance(output(model.merge_and_unload(), x), output(plain, x)) < 1e-5


def test_a_name_that_nobody_put_in_is_refused():
    with pytest.raises(ValueError, match="accumulator='whole' must be one of "):
        ScaLoRAConfig(accumulator="whole")
