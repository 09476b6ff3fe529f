"""vLLM's rules for loading a LoRA folder, written down from vLLM 0.33.0, apart from peft_scalora/files/vllm.py.

Sources: vllm/lora/peft_helper.py (PEFTHelper.validate_legal), vllm/lora/utils.py (parse_fine_tuned_lora_name,
is_base_embedding_weights), vllm/lora/lora_model.py (LoRAModel.from_local_checkpoint), vllm/config/lora.py
(MaxLoRARanks). tests/serving runs vLLM itself, in an environment of its own.
"""

import json
from pathlib import Path

from safetensors import safe_open

MAX_LORA_RANKS = [1, 8, 16, 32, 64, 128, 256, 320, 512]
# The suffixes of vLLM's LlamaForCausalLM: all its linear layers as adapters name them, and embedding_modules.
LLAMA_MODULES = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("embed_tokens", "lm_head"),
}


class Refused(Exception):
    pass


def parse_name(name: str) -> tuple[str, str]:
    """Module and part ("a", "b" or "full") of a tensor."""
    parts = name.split(".")
    start = 2 if parts[:2] == ["base_model", "model"] else 0
    if len(parts) >= 2 and parts[-1] in ("weight", "bias"):
        if parts[-2] in ("lora_A", "lora_B") and parts[-1] == "weight":
            return ".".join(parts[start:-2]), parts[-2][-1].lower()
        if parts[-2] in ("score", "classifier"):
            return parts[-2], "full"
    if parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
        return ".".join(parts[start:-1]), parts[-1][-1].lower()
    raise Refused(f"{name} is unsupported LoRA weight")


def check_config(config: dict, max_lora_rank: int) -> None:
    if max_lora_rank not in MAX_LORA_RANKS:
        raise Refused(f"max_lora_rank {max_lora_rank}")
    missing = {"r", "lora_alpha", "target_modules"} - config.keys()
    if missing:
        raise Refused(f"Missing required configuration fields: {missing}")
    kept = [name for name in config.get("modules_to_save") or [] if name not in ("classifier", "score")]
    features = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
    used = [name for name in features if config.get(name)]
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in ("gaussian", "eva", "orthogonal", "mica", "lora_ga"):
        used.append("init_lora_weights")
    if kept or used or config.get("bias", "none") != "none":
        raise Refused(f"unsupported: {kept} {used} bias={config.get('bias')}")
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if rank > max_lora_rank:
        raise Refused(f"LoRA rank {rank} is greater than max_lora_rank {max_lora_rank}.")


def load(folder, max_lora_rank: int, modules: set[str] = LLAMA_MODULES) -> dict[str, dict]:
    """{module: {"a": lora_A, "b": lora_B, "scaling": lora_alpha / r}}, or Refused."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    check_config(config, max_lora_rank)
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise NotImplementedError("not written down here")
    loaded = {}
    with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            if key.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
                continue
            module, part = parse_name(key)
            if module.rsplit(".", 1)[-1] not in modules | set(config.get("modules_to_save") or ()):
                raise Refused(f"expected target modules in {modules} but received {module}")
            entry = loaded.setdefault(module, {"scaling": config["lora_alpha"] / config["r"]})
            entry[part] = file.get_tensor(key)
    return loaded
