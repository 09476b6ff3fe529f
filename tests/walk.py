"""Follow README and the documentation as a stranger would, with the package out of the wheel and of the sdist.

    make walk

Builds both from what git tracks. The wheel goes into a new environment with what it asks for, the sdist over it
afterwards. Every command and every block of Python then runs in a folder that holds nothing but stand-ins: tiny models
under the names that the documents use, and rows. What is left out is listed with the reason. The sdist's own tests run
in the environment of the tests.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from helpers_documents import DOCUMENTS, ROOT, blocks, commands, reason_to_leave_out

README = ROOT / "README.md"
MODELS = ("MODEL", "PATH_OR_ID", "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct")
# Fast, of every room, and none that needs the repository's history.
OWN_TESTS = (
    "test_packaging.py",
    "test_layering.py",
    "test_cli.py",
    "test_card.py",
    "test_moments.py",
    "test_export.py",
)
STAND_INS = """
import sys
from helpers_runs import save_language_model, save_tokenizer, sentences, write_rows
from pathlib import Path
from transformers import AutoTokenizer

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% generation %}{{ message['content'] }}{% endgeneration %} "
    "{% endfor %}"
)
for name in sys.argv[1:]:
    save_language_model(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(name)
texts = sentences(40)
for name in ("train", "rows", "other"):
    write_rows(Path(name + ".jsonl"), [{"text": text} for text in texts])
Path("chats").mkdir()
turns = [[{"role": "user", "content": "the cat"}, {"role": "assistant", "content": text}] for text in texts]
write_rows(Path("chats/a.jsonl"), [{"messages": turn} for turn in turns])
"""


class Walk:
    """A clean environment, a folder of stand-ins, and what became of every step."""

    def __init__(self, folder: Path, environment: Path):
        self.folder = folder
        self.python = environment / "bin" / "python"
        self.failed = 0
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.variables = clean | {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(self, title: str, command: list, cwd: Path, **variables: str) -> None:
        """Run a step, say how long it took, and what it printed if it failed."""
        started = time.perf_counter()
        words = [str(word) for word in command]
        done = subprocess.run(words, cwd=cwd, env=self.variables | variables, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        print(f"{'FAILED' if done.returncode else 'ok':7} {seconds:4.0f} s  {title}", flush=True)
        if done.returncode:
            self.failed += 1
            print(done.stdout[-3000:] + done.stderr[-3000:])

    def install(self, *what: str) -> None:
        """Install with the versions that the tests run with."""
        command = [self.python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", *what]
        self.run(f"pip install {' '.join(Path(word).name for word in what)}", command, self.folder)

    def follow(self, documents: list[Path], name: str) -> None:
        """Run what documents give to a user, from top to bottom in one folder of stand-ins, each command once."""
        folder = self.folder / name
        folder.mkdir()
        variables = {"PYTHONPATH": str(ROOT / "tests")}
        self.run(f"{name}: stand-ins", [self.python, "-c", STAND_INS, *MODELS], folder, **variables)
        for text in (text for document in documents for text in blocks(document, "yaml")):
            if text.startswith("# run.yaml\n"):
                (folder / "run.yaml").write_text(text)
        of_user = (command for document in documents for command in commands(document) if not is_of_checkout(command))
        for command in dict.fromkeys(of_user):
            if reason_to_leave_out(command) is None:
                self.run(f"{name}: {command}", ["bash", "-c", command], folder)

    def run_blocks_of_readme(self, name: str) -> None:
        """Run README's blocks of Python, each in a process of its own, where `follow` has been."""
        for number, block in enumerate(blocks(README, "python"), start=1):
            self.run(f"{name}: Python block {number}", [self.python, "-c", block], self.folder / name)


def is_of_checkout(command: str) -> bool:
    """Tell whether a command needs a checkout: the evaluation is not installed."""
    return command.startswith("python -m eval")


def build(folder: Path) -> tuple[Path, Path]:
    """Return the sdist, and the wheel that is built from it."""
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(source)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return sdist, wheel


def walk_wheel(walk: Walk, wheel: Path) -> None:
    """Install the wheel as README says, and run what README and the documentation give to run."""
    walk.install(wheel)
    walk.follow([], "bare")
    walk.run_blocks_of_readme("bare")
    walk.install(f"{wheel}[finetune,hpo]", "pytest")
    walk.follow([README], "README.md")
    walk.follow([document for document in DOCUMENTS if document != README], "docs")
    apart = walk.folder / "blocks"  # the documents and the tests, without the package beside them
    apart.mkdir()
    for part in ("docs", "examples", "tests"):
        shutil.copytree(ROOT / part, apart / part)
    for part in ("README.md", "CONTRIBUTING.md", "pyproject.toml"):
        shutil.copy(ROOT / part, apart)
    tests = [walk.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_documents.py"]
    walk.run("Python blocks of all documents", tests, apart)


def walk_sdist(walk: Walk, sdist: Path, test_python: Path) -> None:
    """Install the sdist and follow README; run its own tests, and its evaluation as far as that is quick."""
    walk.install("--no-deps", "--force-reinstall", sdist)
    walk.follow([README], "README.md from the sdist")
    walk.follow([], "bare, from the sdist")
    walk.run_blocks_of_readme("bare, from the sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    unpacked = sdist.parent / sdist.name.removesuffix(".tar.gz")
    variables = {"PYTHONPATH": str(unpacked)}
    own = [test_python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in OWN_TESTS)]
    walk.run("tests of the sdist", own, unpacked, **variables)
    options: dict[tuple[str, ...], set[str]] = {}
    for command in (command for document in DOCUMENTS for command in commands(document)):
        words = shlex.split(command)[2:]
        if not is_of_checkout(command) or "--" in words or "lm_eval" in command:
            continue
        if reason_to_leave_out(command) is None:
            script = command.replace("python", shlex.quote(str(test_python)), 1)
            walk.run(command, ["bash", "-c", script], unpacked, **variables)
        else:  # its options are real, at least
            module = tuple(words[: 1 if words[1].startswith("-") else 2])
            options.setdefault(module, set()).update(word for word in words if word.startswith("--"))
    for module, wanted in options.items():
        help = f"{shlex.quote(str(test_python))} -m {' '.join(module)} --help > help"
        looked_for = [f"grep -q -e {option} help" for option in sorted(wanted)]
        script = "; ".join([help, *looked_for])
        walk.run(f"options of python -m {' '.join(module)}", ["bash", "-e", "-c", script], unpacked, **variables)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, required=True, help="made anew")
    parser.add_argument("--test-python", type=Path, required=True, help="of the environment of the tests")
    arguments = parser.parse_args()
    subprocess.run([sys.executable, "-m", "venv", "--clear", arguments.environment], check=True)
    with tempfile.TemporaryDirectory() as name:
        walk = Walk(Path(name), arguments.environment.absolute())
        sdist, wheel = build(walk.folder)
        walk_wheel(walk, wheel)
        walk_sdist(walk, sdist, arguments.test_python.absolute())  # not resolved: the link says which environment
    for command in (command for document in DOCUMENTS for command in commands(document)):
        if reason := reason_to_leave_out(command):
            print(f"left out ({reason}): {command}")
    print(f"{walk.failed} failed")
    return min(walk.failed, 1)


if __name__ == "__main__":
    sys.exit(main())
