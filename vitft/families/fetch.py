"""Names of models on the hub in, folders on this machine out."""

from pathlib import Path

PATTERNS = ["*config.json", "*.safetensors", "*.safetensors.index.json", "README.md"]


def is_name(source: str | Path) -> bool:
    """Return whether this is the name of a model on the hub: "hf:OWNER/NAME" or "timm:NAME"."""
    return str(source).startswith(("hf:", "timm:"))


def fetched(source: str | Path) -> str | Path:
    """Return the folder that "hf:OWNER/NAME" or "timm:NAME" was fetched to; others as they are.

    What is in the hub's cache is not fetched again, and needs no network.

    Raises:
        ValueError: the package huggingface_hub is missing.
        OSError: the hub has no such model, or there is no network.
    """
    if not is_name(source):
        return source
    scheme, _, name = str(source).partition(":")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(f"{source} needs huggingface_hub; install vitft[hub]") from error
    repository = name if scheme == "hf" else f"timm/{name.removeprefix('timm/')}"
    try:
        return snapshot_download(repository, allow_patterns=PATTERNS, local_files_only=True)
    except OSError:
        pass
    try:
        return snapshot_download(repository, allow_patterns=PATTERNS)
    except Exception as error:  # whatever the network or the hub says
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f"could not fetch {source} ({reason})") from error
