"""One dataclass of options, one function and one command for each thing that `vitft` does.

`recipes.finetune` is a module that can also be called, as `vitft.finetune`.
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "finetune":
        raise AttributeError(f"module 'recipes' has no attribute {name!r}")
    return importlib.import_module("recipes.finetune")
