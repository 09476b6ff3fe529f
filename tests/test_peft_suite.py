"""PEFT's own tests with ScaLoRAConfig in the place of LoraConfig: what passes with the one must pass with the other.

The tests come from the source distribution of the installed PEFT. Both classes run in the same environment on the same
tiny random models. Only the tests that concern LoRA are run, first with ScaLoRAConfig. Those that it does not pass are
run with LoraConfig, and one that plain LoRA does not pass either does not count.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from textwrap import indent

import peft
import pytest
from peft_suite.models import build_hub_cache
from peft_suite.sdist import SdistUnavailable, fetch_sdist

import peft_scalora

# The longest of all tests has to begin early: groups of tests come before those that stand alone.
pytestmark = pytest.mark.xdist_group("peft_suite")
TESTS = Path(__file__).parent
CACHE = TESTS.parent / ".cache" / "peft_suite"

# PEFT's test modules, and how many tests have to pass in each, so that a broken collection is no success.
MODULES = {
    "tests/test_custom_models.py": 2500,
    "tests/test_mapping.py": 3,
    "tests/test_decoder_models.py": 650,
    "tests/test_encoder_decoder_models.py": 100,
}

# The only reasons for which ScaLoRAConfig may fail a test: the option, and why the method refuses it. Other options are
# refused too, but no test of these modules asks for them.
REFUSED = {
    "use_dora": "DoRA normalises the whole weight, so a fold would change the model's function",
    "alora_invocation_tokens": "the adapter acts on some tokens only, accumulated change acts on all",
    "velora_config": "its backward pass gives no exact gradient of lora_A",
    "monteclora_config": "it samples the factors that a fold has to be exact about",
    "use_bdlora": "block-diagonal factors do not stay block-diagonal under a fold",
    "kasa_config": "it changes the base weights",
    "target_parameters": "fused expert parameters share one pair of factors",
    "init_lora_weights='mica'": "it freezes a factor",
    "adapter_model.bin": "a pickle file can run code when it is read",
    "mixed": "PeftMixedModel has a closed list of the methods it can mix",
}
# How a refusal reads: ours name the field and its value, PEFT itself refuses mixed=True.
OURS = "ScaLoRA does not support {option}"
PEFTS = {"mixed": "The provided `peft_type` 'SCALORA' is not compatible with the `PeftMixedModel`"}


def refused_option(outcome: dict[str, str]) -> str | None:
    """The option of REFUSED that a failed test ran into, if that is why it failed."""
    if outcome.get("exception") != "ValueError":
        return None
    for option in REFUSED:
        start = PEFTS.get(option, OURS.format(option=option))
        if re.match(re.escape(start) + r"(?!\w)", outcome["message"]):
            return option
    return None


def judge(plain: dict[str, dict], ours: dict[str, dict]) -> tuple[Counter, list[str]]:
    """Compare outcomes by test id, of tests that ours did not pass: how many each option refuses, the failures left."""
    refused = Counter()
    failures = []
    for test, outcome in ours.items():
        if outcome["outcome"] == "passed" or plain[test]["outcome"] != "passed":
            continue
        if option := refused_option(outcome):
            refused[option] += 1
        else:
            reason = f"{outcome['outcome']}, {outcome.get('exception')}: {outcome.get('message')}"
            failures.append(f"{test}\n{indent(reason[:600], '    ')}")
    return refused, failures


def run_suite(sdist: Path, hub_cache: Path, folder: Path, config_cls: type, tests: Collection[str]) -> dict[str, dict]:
    """Run tests of PEFT's in a process of their own, with `config_cls` as `peft.LoraConfig`; the outcome by test id."""
    folder.mkdir()
    outcomes = folder / "outcomes.json"
    chosen = folder / "tests.txt"
    chosen.write_text("\n".join(tests))
    command = [sys.executable, "-m", "pytest", f"@{chosen}", "-p", "peft_suite.plugin", f"--outcomes={outcomes}"]
    command += [f"--lora-config={config_cls.__module__}:{config_cls.__name__}", f"--basetemp={folder / 'tmp'}"]
    # PEFT's settings want a coverage plugin, and turn transformers' announcements of deprecations into errors.
    command += ["-o", "addopts=", "-o", "filterwarnings=", "-p", "no:cacheprovider", "-q", "--tb=no", "-rN"]

    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    paths = [str(TESTS), str(Path(peft_scalora.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)

    run = subprocess.run(command, cwd=sdist, env=environment, capture_output=True, text=True)
    if run.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        pytest.fail(f"PEFT's tests did not run with {config_cls.__name__}:\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}")
    return json.loads(outcomes.read_text())


def test_what_passes_with_lora_passes_with_scalora(tmp_path, capsys):
    try:
        sdist = fetch_sdist(peft.__version__, CACHE)
    except SdistUnavailable as error:
        pytest.skip(str(error))
    hub_cache = build_hub_cache(tmp_path / "hub")

    ours = run_suite(sdist, hub_cache, tmp_path / "ours", peft_scalora.ScaLoRAConfig, MODULES)
    missed = [test for test, outcome in ours.items() if outcome["outcome"] != "passed"]
    plain = run_suite(sdist, hub_cache, tmp_path / "plain", peft.LoraConfig, missed)
    refused, failures = judge(plain, ours)

    passed = [test for test in ours if (plain.get(test) or ours[test])["outcome"] == "passed"]
    per_module = Counter(test.partition("::")[0] for test in passed)
    with capsys.disabled():
        print(f"\nPEFT {peft.__version__}: {len(ours)} LoRA tests, {len(passed)} pass with LoraConfig, of those")
        print(f"{len(passed) - refused.total() - len(failures)} pass with ScaLoRAConfig, {len(failures)} fail,")
        print(f"{refused.total()} ask for a refused option: {dict(refused.most_common())}")
        print(f"compared per module: {dict(per_module)}")

    if failures:
        pytest.fail(f"{len(failures)} tests pass with LoraConfig only:\n" + "\n".join(failures), pytrace=False)
    too_few = {module: per_module[module] for module, least in MODULES.items() if per_module[module] < least}
    assert not too_few, f"fewer tests than expected pass: {too_few}, expected {MODULES}"
    # Also the proof that the first run used our class at all.
    assert set(refused) == set(REFUSED), f"never refused: {set(REFUSED) - set(refused)}"


def test_only_listed_refusals_excuse_a_failure():
    def failed(exception, message):
        return {"outcome": "failed", "exception": exception, "message": message}

    ours = {
        "a": {"outcome": "passed"},
        "b": failed("ValueError", "ScaLoRA does not support use_dora=True: because"),
        "c": failed("ValueError", "ScaLoRA does not support bias='all': because"),
        "d": failed("ValueError", "ScaLoRA does not support init_lora_weights='micaria': because"),
        "e": failed("RuntimeError", "ScaLoRA does not support use_dora=True: because"),
        "f": {"outcome": "skipped", "exception": "Skipped", "message": "not applicable"},
        "g": failed("OSError", "no network"),
    }
    plain = {test: {"outcome": "passed"} for test in "bcdef"} | {"g": failed("OSError", "no network")}
    refused, failures = judge(plain, ours)
    assert refused == {"use_dora": 1}
    assert [failure[0] for failure in failures] == list("cdef")
