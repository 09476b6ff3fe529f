"""Adapter folders from somebody else: damaged, contradictory or malicious. Clear errors, and nothing is executed."""

import copy
import json
import pickle

import pytest
import torch
from helpers_adapters import save
from helpers_models import KINDS, Linears, floats, output
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file, save_file

from peft_scalora.cli import main
from peft_scalora.export.info import adapter_info
from peft_scalora.export.lora import export_folder
from peft_scalora.files.checks import check_values

WEIGHTS = "adapter_model.safetensors"
LAYER = "base_model.model.lin0"


@pytest.fixture
def folder(tmp_path):
    """A sound adapter of two layers, to be spoiled."""
    save(KINDS["Linear"].filled()[1], tmp_path / "adapter")
    return tmp_path / "adapter"


def readers(folder):
    """Every way by which a folder is read: to a model, to its figures, to plain LoRA."""
    return {
        "load": lambda: PeftModel.from_pretrained(Linears(), folder),
        "load lean": lambda: PeftModel.from_pretrained(Linears(), str(folder), low_cpu_mem_usage=True),
        "load second": lambda: KINDS["Linear"].filled()[1].load_adapter(folder, "second"),
        "info": lambda: adapter_info(str(folder)),
        "export": lambda: export_folder(str(folder), str(folder.parent / "plain")),
    }


def all_refuse(folder, *parts, only=None):
    """Each reader raises an error that holds all parts, and writes nothing."""
    for name, read in readers(folder).items():
        if only is None or name in only:
            with pytest.raises((ValueError, OSError)) as error:
                read()
            for part in parts:
                assert part in str(error.value), (name, error.value)
    assert not (folder.parent / "plain").exists()


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))  # also NaN and Infinity, as Python's json writes and reads them


def change_weights(folder, **tensors):
    state = load_file(folder / WEIGHTS)
    for key, change in tensors.items():
        name = f"{LAYER}.{key}.weight"
        state[name] = change(state[name])
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def test_the_sound_folder_is_read(folder):
    loaded = [read() for read in readers(folder).values()]
    assert isinstance(loaded[0], PeftModel)


class Bomb:
    """Leaves a file behind when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS])
def test_pickles_are_not_opened(folder, name):
    bomb, trace = folder / name, folder.parent / "exploded"
    (folder / WEIGHTS).unlink()
    bomb.write_bytes(pickle.dumps({f"{LAYER}.lora_A.weight": Bomb(trace)}))
    all_refuse(folder, name)
    assert not trace.exists()
    pickle.loads(bomb.read_bytes())
    assert trace.exists(), "the bomb would have gone off"


def test_a_pickle_beside_the_weights_is_ignored(folder):
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(folder.parent / "exploded")))
    for read in readers(folder).values():
        read()
    assert not (folder.parent / "exploded").exists()


def test_an_index_leads_to_no_other_file(folder):
    """Sharded checkpoints name their files in an index; an adapter is one file."""
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {f"{LAYER}.lora_A.weight": "../elsewhere.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    all_refuse(folder, f"{WEIGHTS}.index.json", "Save it again")


@pytest.mark.parametrize("size", [0, 4, 8, 200, -1], ids=["empty", "length", "no header", "header", "last byte"])
def test_truncated_weights(folder, size):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])
    all_refuse(folder, WEIGHTS, "no complete safetensors file", "fetch or save it again")


def test_a_header_that_claims_more_than_the_file_holds(folder):
    header = json.dumps({f"{LAYER}.lora_A.weight": {"dtype": "F32", "shape": [2**40, 14], "data_offsets": [0, 2**46]}})
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header.encode())
    all_refuse(folder, WEIGHTS, "no complete safetensors file")


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdin", "missing", "text"])
def test_links_are_followed_to_safetensors_only(folder, target):
    (folder / WEIGHTS).unlink()
    (folder.parent / "text").write_text("a secret")
    (folder / WEIGHTS).symlink_to(target if target.startswith("/") else folder.parent / target)
    for name, read in readers(folder).items():
        with pytest.raises((ValueError, OSError), match="safetensors") as error:
            read()
        assert "secret" not in str(error.value), name


@pytest.mark.parametrize(
    "key, change",
    [
        ("lora_A", lambda t: t[:1]),
        ("lora_A", lambda t: t.repeat(3, 1)),
        ("lora_B", lambda t: t.T.contiguous()),
        ("scalora_U", lambda t: t[:-1].contiguous()),
        ("scalora_V", lambda t: t[:, :-1].contiguous()),
        ("scalora_V", lambda t: t[0]),
        ("scalora_norms", lambda t: t[:1]),
        ("scalora_scale", lambda t: torch.cat([t, t])),
        ("scalora_progress", lambda t: torch.cat([t, t])),
    ],
)
def test_wrong_shapes(folder, key, change):
    change_weights(folder, **{key: change})
    shape = tuple(load_file(folder / WEIGHTS)[f"{LAYER}.{key}.weight"].shape)
    all_refuse(folder, WEIGHTS, LAYER, "r=2", "fetch or save it again")
    with pytest.raises(ValueError, match=LAYER) as error:
        adapter_info(str(folder))
    if key != "lora_B":  # which decides what shape U has to be of
        assert f"{key}.weight of shape {shape}" in str(error.value)


def test_missing_tensors(folder):
    state = load_file(folder / WEIGHTS)
    del state[f"{LAYER}.scalora_V.weight"]
    save_file(state, folder / WEIGHTS)
    all_refuse(folder, f"{LAYER}.scalora_V.weight of shape missing")
    save_file({"unrelated": torch.ones(3)}, folder / WEIGHTS)
    all_refuse(folder, "holds no layer of a ScaLoRA adapter")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["lora_A", "lora_B", "scalora_U", "scalora_V", "scalora_norms"])
def test_values_that_are_not_finite(folder, key, value):
    change_weights(folder, **{key: lambda t: t.index_fill(0, torch.tensor([1]), value)})
    all_refuse(folder, f"{LAYER}.{key}.weight", "nan or infinite", "earlier checkpoint")


@pytest.mark.parametrize("progress", [[-1, 0, 0], [6, 6, 6], [6, 6, 2**62], [6, -1, 5], [6, 6, -1]])
def test_impossible_progress(folder, progress):
    change_weights(folder, scalora_progress=lambda t: torch.tensor(progress))
    all_refuse(folder, f"{LAYER}.scalora_progress.weight={progress}", "at most 5 columns")


@pytest.mark.parametrize("key", ["lora_A", "scalora_U", "scalora_scale"])
def test_wrong_types(folder, key):
    change_weights(folder, **{key: lambda t: t.to(torch.int32)})
    all_refuse(folder, f"{LAYER}.{key}.weight", "torch.int32")


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"r": 10**12}, ["r=1000000000000", "above every dimension"]),
        ({"r": 9}, ["r=9"]),
        ({"r": -4}, ["r=-4 must be a whole number"]),
        ({"r": "2"}, ["r='2' must be a whole number"]),
        ({"r": [2]}, ["r=[2] must be a whole number"]),
        ({"r": True}, ["r=True must be a whole number"]),
        ({"rank_pattern": {"lin5": 10**12}}, ["rank_pattern['lin5']=1000000000000"]),
        ({"rank_pattern": {"lin0": "many"}}, ["rank_pattern['lin0']='many'"]),
        ({"rank_pattern": ["lin0"]}, ["rank_pattern=['lin0']"]),
        ({"alpha_pattern": {"lin0": float("nan")}}, ["alpha_pattern['lin0']=nan"]),
        ({"accumulator_rank": 10**12}, ["accumulator_rank=1000000000000", "scalora_U.weight of shape (18, 5)"]),
        ({"accumulator_rank": 0}, ["accumulator_rank=0"]),
        ({"accumulator": "dense"}, ["scalora_U.weight of shape (18, 5)", "want (18, 14)"]),  # as version 0.1 saved it
        ({"accumulator": "../../etc"}, ["accumulator='../../etc'"]),
        ({"lora_alpha": float("inf")}, ["lora_alpha=inf"]),
        ({"lora_alpha": None}, ["lora_alpha=None"]),
        ({"lora_dropout": float("nan")}, ["lora_dropout=nan"]),
        ({"smoothness": float("nan")}, ["smoothness=nan"]),
        ({"scaling": "import os"}, ["scaling='import os'"]),
        ({"scaling_interval": 0}, ["scaling_interval=0"]),
        ({"use_dora": True}, ["use_dora=True"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights='pissa'"]),
        ({"task_type": "SYSTEM"}, ["SYSTEM"]),
    ],
)
def test_configurations_that_cannot_be(folder, changes, parts):
    change_config(folder, **changes)
    all_refuse(folder, *parts)


@pytest.mark.filterwarnings("ignore:.*runtime_config")
def test_unknown_fields_are_named_and_ignored(folder):
    base = Linears()
    expected = output(PeftModel.from_pretrained(copy.deepcopy(base), folder), floats(5, 14))
    change_config(folder, __class__="os.system", on_load="rm -rf /", forward="lambda x: x", runtime_config={"a": 1})
    for read in readers(folder).values():
        with pytest.warns(UserWarning, match="'__class__', 'forward', 'on_load'"):
            read()
    with pytest.warns(UserWarning, match="'__class__', 'forward', 'on_load'"):
        loaded = PeftModel.from_pretrained(base, folder)
    assert torch.equal(output(loaded, floats(5, 14)), expected)


def test_a_configuration_imports_no_module(folder, tmp_path, monkeypatch):
    """AutoPeftModel imports the module that a configuration names: PEFT takes only known ones."""
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    change_config(
        folder, auto_mapping={"parent_library": "planted", "base_model_class": "X"}, base_model_name_or_path="x"
    )
    with pytest.raises(ValueError, match="planted"):
        AutoPeftModel.from_pretrained(folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"peft_type": "SCALORA", "r": 2', "\x00\xff"])
def test_configurations_that_are_no_json_object(folder, text):
    (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
    all_refuse(folder, str(folder), "adapter_config.json", only=("info", "export"))


@pytest.mark.parametrize("name", ["lin0.base_layer.weight", "head.weight"])
def test_weights_of_the_base_model_are_not_replaced(folder, name):
    class WithHead(Linears):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(10, 3)

    state = load_file(folder / WEIGHTS)
    shape = (18, 14) if "lin0" in name else (3, 10)
    save_file(state | {f"base_model.model.{name}": torch.zeros(shape)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"{name}, a weight of the base model"):
        PeftModel.from_pretrained(WithHead(), folder)


def test_other_trained_modules_may_hold_anything():
    """A mask of a module that was trained whole is -inf on purpose."""
    check_values({"base_model.model.classifier.mask": torch.tensor([0.0, -float("inf")])}, "adapter")


def test_the_command_says_it_in_one_line(folder, capsys):
    change_weights(folder, lora_B=lambda t: t * float("nan"))
    assert main(["info", str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("peft-scalora: ") and error.count("\n") == 1
    assert f"{LAYER}.lora_B.weight with nan" in error
