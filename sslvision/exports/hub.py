"""Uploading an export to the Hugging Face hub."""

import importlib.util
from pathlib import Path

from sslvision.errors import StorageError, UsageError


def hub_token() -> str | None:
    """Return the token of the hub that this machine has, by HF_TOKEN or `hf auth login`; None if it has none."""
    from huggingface_hub import get_token

    return get_token()


def require_hub() -> None:
    """Raise UsageError if huggingface_hub is not installed. timm requires it, so that it hardly is missing."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UsageError("push=... needs huggingface_hub, which is not installed: pip install huggingface_hub.")


def uploaded_files(folder: Path) -> list[tuple[str, int]]:
    """Return the names and sizes in bytes of the files that are uploaded: all of them."""
    return sorted((str(file.relative_to(folder)), file.stat().st_size) for file in folder.rglob("*") if file.is_file())


def push_to_hub(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder as one commit, and return the address of the repository, which is made if it does not exist.

    Raises:
        StorageError: The hub refuses it or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Upload an export of sslvision")
    except Exception as error:  # of the network, of the hub, or of permissions
        told = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise StorageError(
            f"{folder} is complete, but cannot be uploaded to {repository}: {told} Upload it later: "
            f"hf upload {repository} {folder}"
        ) from error
    return str(address)
