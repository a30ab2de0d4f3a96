"""Show what a base or an adapter holds: `vitft inspect PATH`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

import adapters
from adapters.folder import read_adapter
from vitft.command import options as cli
from vitft.command.options import option
from vitft.hub import fetched
from vitft.model.checkpoint import is_library_folder, load_model


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Show the config, parameters, classes and fingerprint of a base, or what an adapter adapts."""

    path: str = option(
        help="A base file, a bundled base's name, the folder of a run, or hf:OWNER/NAME.",
        argument=True,
    )
    json: bool = option(False, "Print JSON.")


def inspect(path: str) -> dict[str, Any]:
    """Return the facts about a base file, a bundled base, an adapter's folder or a run's.

    Raises:
        ValueError, OSError: there is no base or adapter, or it is broken.
    """
    folder = Path(fetched(path))
    if (folder / "adapter_config.json").is_file():
        return inspect_adapter(folder)
    if (
        folder.is_dir()
        and not is_library_folder(folder)
        and (folder / "model.safetensors").is_file()
    ):
        return inspect_base(str(folder / "model.safetensors"))
    if folder.is_dir() and not is_library_folder(folder):
        raise ValueError(
            f"{folder} holds neither an adapter nor a base (adapter_config.json, model.safetensors)"
        )
    return inspect_base(path)


def inspect_base(path: str) -> dict[str, Any]:
    """Return the facts about a base."""
    model = load_model(path)
    return {
        "kind": "base",
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "config": asdict(model.config),
        "preprocessing": model.preprocessing,
        "fingerprint": adapters.fingerprint(model, exclude=("head",)),
        "classes": model.classes,
        "source": {k: v for k, v in model.facts.items() if k not in ("config", "layout")} or None,
    }


def inspect_adapter(folder: Path) -> dict[str, Any]:
    """Return the facts about the adapter in a folder."""
    saved = read_adapter(folder)
    return {
        "kind": "adapter",
        "n_parameters": sum(tensor.numel() for tensor in saved.tensors.values()),
        "config": saved.config,
        "base_fingerprint": saved.fingerprint,
        "classes": saved.classes,
        "preprocessing": saved.preprocessing,
        "tensors": {name: list(tensor.shape) for name, tensor in saved.tensors.items()},
    }


def run(options: InspectOptions) -> None:
    """Print the facts about a base or an adapter."""
    facts = inspect(options.path)
    if options.json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            click.echo(name)
            for key, entry in value.items():
                click.echo(f"  {key:<40} {entry}")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            click.echo(f"{name:<18} {f'{shown:,}' if isinstance(shown, int) else shown}")


command = cli.command("inspect", InspectOptions, run)
