"""The name of a model on the Hugging Face hub in, its folder on this machine out; and uploads."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PATTERNS = [  # of the files that are downloaded
    "*config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "README.md",
    "summary.json",
]
LOGIN = "log in by `hf auth login`, or set HF_TOKEN"


def is_name(source: str | Path) -> bool:
    """Return whether this is the name of a model on the hub: "hf:OWNER/NAME" or "timm:NAME"."""
    return str(source).startswith(("hf:", "timm:"))


def repository_of(source: str | Path) -> tuple[str, str | None]:
    """Return the repository, and the revision or None, of "hf:OWNER/NAME@REVISION"."""
    scheme, _, rest = str(source).partition(":")
    name, _, revision = rest.partition("@")
    if scheme == "timm":
        name = f"timm/{name.removeprefix('timm/')}"
    return name, revision or None


def fetched(source: str | Path) -> str | Path:
    """Download "hf:OWNER/NAME[@REVISION]" or "timm:NAME" and return its folder.

    Any other source is returned as it is. Without a network, the hub's cache gives the version
    that was downloaded last.

    Raises:
        ValueError: the package huggingface_hub is missing.
        OSError: the hub has no such model, or there is no network.
    """
    if not is_name(source):
        return source
    hub = _package(str(source))
    repository, revision = repository_of(source)
    with hub_errors(f"could not fetch {source}"):
        return hub.snapshot_download(repository, revision=revision, allow_patterns=PATTERNS)


def push(repository: str, files: Mapping[str, bytes | Path], *, private: bool) -> tuple[str, str]:
    """Upload files in one commit, and return the repository's address and the commit's hash.

    Args:
        repository: "OWNER/NAME"; created if it does not exist.
        files: contents or paths, by the name in the repository.
        private: make a new repository private.

    Raises:
        ValueError: the package huggingface_hub is missing, or `private` is given and the repository
            is public already.
        OSError: the hub refuses it, or there is no network.
    """
    hub = _package("push")
    with hub_errors(f"could not push to hf:{repository}"):
        api = hub.HfApi()
        api.create_repo(repository, private=private or None, exist_ok=True)
        is_public = private and not api.model_info(repository).private
    if is_public:
        raise ValueError(
            f"hf:{repository} is there and public; choose another name, or no --private"
        )
    with hub_errors(f"could not push to hf:{repository}"):
        added = [
            hub.CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        commit = api.create_commit(repository, added, commit_message="vitft push")
    return f"{api.endpoint}/{repository}", commit.oid


@contextmanager
def hub_errors(doing: str) -> Iterator[None]:
    """Turn any error of the network or the hub into an OSError of one line, without the token.

    Args:
        doing: what failed, to begin the message with.

    Raises:
        OSError: there was an error.
    """
    try:
        yield
    except Exception as error:
        text = _reason(error)
    else:
        return
    raise OSError(
        f"{doing}: {_without_token(text)}"
    ) from None  # a traceback could show the token too


def _package(user: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(f"{user} needs huggingface_hub; install vitft[hub]") from error
    return huggingface_hub


def _reason(error: BaseException) -> str:
    """Return one line that says what is wrong, and what to do about it."""
    from huggingface_hub.errors import RevisionNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if status in (401, 403) and _token():
        return f"the hub refuses the token ({status}), or has no such model; {LOGIN}"
    if status in (401, 403):
        return f"the hub has no such model, or it needs a token ({status}); {LOGIN}"
    if status == 404:
        return "the hub has no such model, or does not show it to you"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = getattr(error, "server_message", None) or (lines or [type(error).__name__])[0]
    is_network = isinstance(error, OSError) or type(error).__module__.startswith("http")
    if status is None and is_network:
        return f"the hub cannot be reached ({said})"
    return said


def _token() -> str | None:
    from huggingface_hub import get_token

    with suppress(Exception):
        return get_token()
    return None


def _without_token(text: str) -> str:
    """Return the text with the token, as it is or as repr escapes it, replaced by ***."""
    token = _token()
    for form in (token, repr(token)[1:-1]) if token else ():
        text = text.replace(form, "***")
    return text
