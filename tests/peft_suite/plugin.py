"""pytest plugin: keeps PEFT's LoRA tests, puts a class behind the name `peft.LoraConfig`, writes down every outcome."""

import importlib
import inspect
import json
import re
from collections import defaultdict
from pathlib import Path

import peft
import pytest
import torch

PLAIN = peft.LoraConfig
OTHER_METHOD = re.compile(r"\b(?!LoraConfig\b|PeftConfig\b|PretrainedConfig\b)[A-Z]\w*Config\b")


def pytest_addoption(parser):
    parser.addoption("--lora-config", default="peft:LoraConfig", help="module:class that peft.LoraConfig shall name")
    parser.addoption("--outcomes", required=True, help="JSON file to write")


def pytest_configure(config):
    module, name = config.getoption("--lora-config").split(":")
    config_cls = getattr(importlib.import_module(module), name)
    config.pluginmanager.register(SuitePlugin(config_cls, Path(config.getoption("--outcomes"))))


class EveryId(defaultdict):
    """Contains every key, so that PEFT's `hub_online_once` takes every model for one that is already downloaded."""

    def __contains__(self, key):
        return True


class SuitePlugin:
    """One run of the suite with `config_cls` as `peft.LoraConfig`."""

    def __init__(self, config_cls: type, path: Path):
        self.config_cls = config_cls
        self.path = path
        self.outcomes: dict[str, dict[str, str]] = {}

    def pytest_sessionstart(self):
        peft.LoraConfig = self.config_cls

    def pytest_make_parametrize_id(self, val):
        # A test needs the same id in both runs.
        return PLAIN.__name__ if val is self.config_cls else None

    def pytest_collection_modifyitems(self, config, items):
        kept = [item for item in items if self.concerns_lora(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept

    def pytest_collection_finish(self):
        # The test modules are imported. PEFT's own late imports of the name mean plain LoRA.
        peft.LoraConfig = PLAIN

    def concerns_lora(self, item) -> bool:
        """Whether a test is about LoRA: by the PEFT configs among its parameters, without such by its source."""
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        classes = [value if isinstance(value, type) else type(value) for value in parameters]
        methods = [cls for cls in classes if issubclass(cls, peft.PeftConfig)]
        if methods:
            return self.config_cls in methods
        source = "".join(inspect.getsource(function) for function in functions_behind(item))
        return bool(re.search(r"\bLoraConfig\b", source)) or not OTHER_METHOD.search(source)

    @pytest.fixture(autouse=True, scope="session")
    def models_are_local(self):
        importlib.import_module("tests.testing_utils")._HUB_MODEL_ACCESSES = EveryId(int)

    @pytest.fixture(autouse=True)
    def seeded(self):
        # Some tests draw random weights and compare outputs under a tolerance.
        torch.manual_seed(0)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.when == "call" or not report.passed:
            self.outcomes[item.nodeid] = {"outcome": report.outcome}
            if call.excinfo is not None:
                error = {"exception": call.excinfo.type.__name__, "message": str(call.excinfo.value)}
                self.outcomes[item.nodeid] |= error
        return report

    def pytest_sessionfinish(self):
        self.path.write_text(json.dumps(self.outcomes, indent=1))


def functions_behind(item) -> list:
    """The test function and those of its fixtures that PEFT's tests define."""
    definitions = [last for *_, last in item._fixtureinfo.name2fixturedefs.values()]
    return [item.function, *(d.func for d in definitions if d.func.__module__.startswith("tests."))]
