"""vLLM's OpenAI-style server as a process, spoken to through a socket in a folder: there is no port to clash."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from helpers_serving import NEW_TOKENS

LENGTH = 64  # of a sequence, at most
TIER = 32  # the lowest setting for rank 4 + 15
# One more than adapters at a time: on a CPU, vLLM 0.32 gives requests for the base the adapter of the last slot where
# others of their batch have one (vllm-project/vllm#48421).
SLOTS = 3
MEMORY = 2**26  # of the cache of keys and values, in bytes


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str):
        super().__init__("localhost")
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)


class Server:
    """The server of `vllm serve` with a base model and named adapters; ready once it is made."""

    def __init__(self, folder: Path, base: str, adapters: dict[str, str]):
        self.path = str(folder / "socket")
        self.log = folder / "log"
        options = {"uds": self.path, "dtype": "float32", "max-model-len": LENGTH, "kv-cache-memory-bytes": MEMORY}
        options |= {"max-loras": SLOTS, "max-cpu-loras": 4, "max-lora-rank": TIER, "served-model-name": "base"}
        flags = ["--enable-lora", "--enforce-eager", "--skip-tokenizer-init"]
        # `vllm serve` starts this, and looks for a distribution named vllm, which the one for CPUs is not.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base, *flags]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        command += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
        environment = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        while not self._is_ready():
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            time.sleep(0.2)

    def _is_ready(self) -> bool:
        try:
            return self.request("GET", "/health")[0] == 200
        except OSError:
            return False

    def request(self, method: str, path: str, content: dict | None = None) -> tuple[int, str]:
        connection = _Connection(self.path)
        body = None if content is None else json.dumps(content)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        status, text = answer.status, answer.read().decode()
        connection.close()
        return status, text

    def generated(self, model: str, prompt: list[int]) -> list[int]:
        content = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0.0}
        content |= {"ignore_eos": True, "return_token_ids": True}
        status, text = self.request("POST", "/v1/completions", content)
        assert status == 200, text
        return json.loads(text)["choices"][0]["token_ids"]

    def load_adapter(self, name: str, folder: str) -> tuple[int, str]:
        """Send what TRL's client sends after every weight sync."""
        content = {"lora_name": name, "lora_path": folder, "load_inplace": False}
        return self.request("POST", "/v1/load_lora_adapter", content)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
