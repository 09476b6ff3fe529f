"""Importing the package makes PEFT know the method: once, cheaply, and not over a method of that name."""

import gc
import importlib
import pickle
import subprocess
import sys
import textwrap

import peft.mapping
import peft.utils.hotswap
import pytest
from helpers_models import KINDS, floats, scalora_layers, train
from peft import LoraConfig, get_peft_model
from torch.optim import optimizer as torch_optimizer

import peft_scalora
from peft_scalora import ScaLoRAConfig
from peft_scalora.layer import LAYERS

MAPPINGS = [
    (peft.mapping, "PEFT_TYPE_TO_CONFIG_MAPPING"),
    (peft.mapping, "PEFT_TYPE_TO_TUNER_MAPPING"),
    (peft.mapping, "PEFT_TYPE_TO_PREFIX_MAPPING"),
    (peft.utils.hotswap, "CONFIG_KEYS_TO_CHECK"),
]


def run(script: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture
def mappings():
    """PEFT's mappings, put back afterwards."""
    saved = [(getattr(module, name), dict(getattr(module, name))) for module, name in MAPPINGS]
    yield [mapping for mapping, _ in saved]
    for mapping, content in saved:
        mapping.clear()
        mapping.update(content)


@pytest.fixture
def hooks():
    """The step hooks of all of torch's optimizers, put back afterwards."""
    hooks = torch_optimizer._global_optimizer_pre_hooks
    saved = dict(hooks)
    yield hooks
    hooks.clear()
    hooks.update(saved)


def test_every_mapping_knows_the_method():
    for module, name in MAPPINGS:
        assert "SCALORA" in getattr(module, name)
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["SCALORA"] is ScaLoRAConfig
    assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["SCALORA"] == peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["LORA"]
    assert isinstance(get_peft_model(KINDS["Linear"].build(), KINDS["Linear"].config()).base_model,
                      peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["SCALORA"])  # fmt: skip
    # Every other method is as it was.
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["LORA"] is LoraConfig
    assert "SCALORA" not in peft.PeftType.__members__


def test_type_behaves_like_one_of_pefts():
    kind = ScaLoRAConfig().peft_type
    assert kind == "SCALORA"
    assert kind.value == "SCALORA"
    assert hash(kind) == hash("SCALORA")
    assert kind != peft.PeftType.LORA
    assert {kind: 1}["SCALORA"] == 1
    assert pickle.loads(pickle.dumps(kind)) is kind


def test_registering_again_does_nothing(mappings, hooks):
    before = [dict(mapping) for mapping in mappings], dict(hooks)
    peft_scalora.register()
    importlib.reload(sys.modules["peft_scalora.register"]).register()
    importlib.reload(sys.modules["peft_scalora"])
    assert ([dict(mapping) for mapping in mappings], dict(hooks)) == before


def test_importing_again_from_scratch_works():
    """As in a server that reruns a changed script: old and new models train on, each step counted once."""
    script = """
        import importlib, sys
        import torch
        from peft import get_peft_model

        def build(package):
            config = package.ScaLoRAConfig(r=2, target_modules=["0"], scaling="column", scaling_interval=1)
            return get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config)

        def counts(model):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.ones(2, 6)).square().sum().backward()
                optimizer.step()
            progress = model.base_model.model[0].progress("default")
            return progress.steps, progress.rescalings

        import peft_scalora
        old = build(peft_scalora)
        for name in [name for name in sys.modules if name.startswith("peft_scalora")]:
            del sys.modules[name]
        import peft_scalora as again
        assert again is not peft_scalora or again.ScaLoRAConfig is not type(old.peft_config["default"])
        print(counts(build(again)), counts(old))
    """
    assert run(script) == "(3, 3) (3, 3)"


class Foreign(LoraConfig):
    pass


def test_a_method_of_that_name_from_elsewhere_is_refused(mappings, hooks):
    before = dict(hooks)
    for mapping in mappings:
        mapping.pop("SCALORA")
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["SCALORA"] = Foreign
    with pytest.raises(RuntimeError, match=rf"already has a method 'SCALORA' \({__name__}.Foreign\).*[Uu]ninstall"):
        peft_scalora.register()
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["SCALORA"] is Foreign
    assert "SCALORA" not in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
    assert dict(hooks) == before


def test_one_hook_sees_every_step_once(hooks):
    _, model = KINDS["Linear"].filled()
    before = [layer.progress("default").steps for layer in scalora_layers(model).values()]
    peft_scalora.register()
    train(model, floats(5, 14), 4)
    assert [layer.progress("default").steps for layer in scalora_layers(model).values()] == [n + 4 for n in before]


def test_deleted_models_are_forgotten():
    _, model = KINDS["Linear"].filled()
    optimizer = train(model, floats(5, 14), 1)
    layers = list(map(id, scalora_layers(model).values()))
    assert set(layers) <= {id(layer) for layer in LAYERS}
    del model, optimizer
    gc.collect()
    assert not set(layers) & {id(layer) for layer in LAYERS}


def test_public_names():
    for name in peft_scalora.__all__:
        assert getattr(peft_scalora, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'scale_everything'"):
        peft_scalora.scale_everything


def test_pickled_configuration_and_type_in_a_process_without_the_import():
    """Unpickling imports the package, and with it registers the method."""
    config = ScaLoRAConfig(r=2, target_modules=["lin0"], smoothness=2.0)
    script = f"""
        import pickle, sys
        config = pickle.loads({pickle.dumps(config)!r})
        assert type(config).__name__ == "ScaLoRAConfig" and config.smoothness == 2.0
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING
        assert PEFT_TYPE_TO_CONFIG_MAPPING["SCALORA"] is type(config)
    """
    run(script)


def test_import_is_cheap():
    """Nothing beyond what peft itself imports but the package's own modules and the standard library."""
    script = """
        import sys
        import peft, peft.utils.hotswap, peft.tuners.lora
        before = set(sys.modules)
        import peft_scalora
        for name in sorted(set(sys.modules) - before):
            print(name)
        import torch
        from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks
        assert len(hooks) == 1
    """
    new = run(script).split()
    assert "peft_scalora.register" in new
    assert not [name for name in new if name.split(".")[0] not in sys.stdlib_module_names | {"peft_scalora"}]
    heavy = {"peft_scalora.callbacks", "peft_scalora.cli", "peft_scalora.finetuning.run", "peft_scalora.plots"}
    assert not heavy & set(new)
