"""Every command and its help text, saved in a file so that `--help` imports no recipe and no torch.

`python -m vitft.command.help` writes the file from the commands; a test compares the two.
"""

import importlib
import json
from pathlib import Path

import click

# a command, which is a module in recipes -> what `vitft --help` says of it
COMMANDS: dict[str, str] = {
    "pretrain": "Train a base from scratch.",
    "finetune": "Freeze a base and train an adapter and a new head.",
    "sweep": "Train many adapters together and pick the best by validation.",
    "compare": "Show finished runs side by side.",
    "report": "Make the report of a run or sweep again.",
    "rerun": "Repeat a run and say whether the result is the same.",
    "evaluate": "Measure accuracy on a test split.",
    "predict": "Classify image files.",
    "serve": "Answer over HTTP, with many adapters at once.",
    "embed": "Write the features of image files.",
    "convert": "Convert another library's Vision Transformer to a base.",
    "export": "Write a base for transformers, timm or ONNX Runtime.",
    "merge": "Bake an adapter into a plain base.",
    "push": "Put an adapter or a base on the hub, with its model card.",
    "inspect": "Show what a base or an adapter holds.",
    "check": "Find broken, duplicate and odd images in a data set.",
    "data": "List the data sets that have a name.",
}

FILE = Path(__file__).with_name("help.json")
WIDTH = 100


def saved_help(name: str) -> str:
    """Return the help of a command that help.json holds."""
    text: str = json.loads(FILE.read_text())[name]
    return text


def current_help(name: str) -> str:
    """Return the help of a command, made from its options; imports its recipe."""
    command: click.Command = importlib.import_module(f"recipes.{name}").command
    context = click.Context(
        command, info_name=f"vitft {name}", terminal_width=WIDTH, help_option_names=["-h", "--help"]
    )
    return command.get_help(context) + "\n"


def write() -> None:
    """Write the help of every command to help.json."""
    FILE.write_text(json.dumps({name: current_help(name) for name in COMMANDS}, indent=1) + "\n")


if __name__ == "__main__":
    write()
