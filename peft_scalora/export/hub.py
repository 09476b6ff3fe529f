"""Sharing an adapter, an exported adapter or a merged model on the Hugging Face Hub."""

from __future__ import annotations

import os
import tempfile

from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from torch import nn


def push_to_hub(
    source: PeftModel | str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload a ScaLoRA adapter",
) -> CommitInfo:
    """Upload a model's adapters, or a folder that was saved or exported, with its model card.

    `model.push_to_hub(repo_id)` uploads the same files, but transformers then puts a card of its own in the place of
    the one that says how to load the adapter.

    Args:
        source: a PeftModel, or a folder with an adapter, an exported adapter or a merged model.
        repo_id: the repository; created if it does not exist.
        private: whether a repository that is created is private; None means the account's default.
        revision: the branch to upload to; None means the main one.
        token: an access token; None means the one that is stored.
        commit_message: of the upload.

    Raises:
        FileNotFoundError: source is no folder with a configuration. ValueError: it is a model, but no PeftModel.
    """
    if isinstance(source, nn.Module) and not isinstance(source, PeftModel):
        raise ValueError(
            f"push_to_hub takes a PeftModel or a folder, not {type(source).__name__}: call "
            "model.save_pretrained(folder) and push the folder."
        )
    if isinstance(source, PeftModel):
        with tempfile.TemporaryDirectory() as folder:
            source.save_pretrained(folder)
            return push_to_hub(
                folder, repo_id, private=private, revision=revision, token=token, commit_message=commit_message
            )
    if not any(os.path.isfile(os.path.join(source, name)) for name in ("adapter_config.json", "config.json")):
        raise FileNotFoundError(f"source={os.fspath(source)!r} has no adapter_config.json and no config.json.")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=source,
        revision=revision,
        commit_message=commit_message,
        ignore_patterns=["checkpoint-*", "*.bin", "*.pt", "*.pth"],  # a run's checkpoints; pickle files
    )
