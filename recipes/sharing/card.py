"""The folder of a run in; its model card, README.md in the hub's format, out.

The card is made from the folder alone: summary.json, config.json and the header of the weights. It
names no path of this machine.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.sharing.public import base_name, data_name, is_bundled, is_public
from recipes.sharing.run_files import RunFiles, read_run_files
from vitft.data.named import is_named_set
from vitft.data.shapes import CLASSES as DRAWN
from vitft.files import write_bytes
from vitft.hub import is_name, repository_of
from vitft.report.figures import wilson

CARD = "README.md"
MARK = "<!-- vitft writes this card anew. Remove this line to keep what you write yourself. -->"
PEFT_TYPES = ("LORA", "VERA", "LOHA", "LOKR", "IA3", "LN_TUNING")  # methods that PEFT has, too
# figure in summary.json -> the hub's name of the metric
METRICS = {
    "mean_average_precision": "mean_average_precision",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced_accuracy",
    "macro_f1": "f1",
}
RECIPE = (  # the options of a run that the card lists
    *("preset", "epochs", "batch_size", "lr", "weight_decay", "optimizer", "layer_decay"),
    *("schedule", "warmup", "label_smoothing", "flip", "shift", "min_area", "trivial", "rand"),
    *("erase", "mixup", "cutmix", "limit", "shots", "class_weights", "sample", "ema", "image_size"),
    *("head_start", "rank", "alpha", "dropout", "layers", "unfreeze", "sizes", "stem", "pooling"),
)
SPLITS = ("train", "validation", "test")
MAX_CLASSES = 50  # that the card names


def write_card(folder: Path) -> None:
    """Write the card of a run, unless there is one that the user wrote."""
    if is_ours(folder):
        write_bytes(folder / CARD, card(folder).encode())


def is_ours(folder: Path) -> bool:
    """Return whether there is no card yet, or one with MARK, which vitft may overwrite."""
    path = folder / CARD
    if not path.exists():
        return True
    return path.is_file() and MARK in path.read_text(errors="replace")


def card(folder: Path, repository: str | None = None) -> str:
    """Return the model card of a run.

    Args:
        folder: of the run.
        repository: "OWNER/NAME" on the hub, where the card will be published.

    Raises:
        ValueError, OSError: as for `read_run_files`.
    """
    run = read_run_files(folder)
    name = repository.split("/")[-1] if repository else folder.resolve().name
    source = f"hf:{repository}" if repository else name
    try:
        head = yaml(front(run, name))
        rows = "".join(f"| {key} | {value} |\n" for key, value in facts(run).items() if value)
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise ValueError(f"{folder / 'summary.json'} is broken ({error!r})") from error
    return (
        f"{head}\n{MARK}\n\n# {plain(name)}\n\n{opening(run)}\n\n| | |\n|---|---|\n"
        f"{rows}\n## Load it\n\n{loading(run, source)}"
    )


def yaml(values: Mapping[str, Any]) -> str:
    """Return values as YAML front matter, between two lines of dashes."""
    return "".join(["---\n", *(f"{k}: {_quoted(v)}\n" for k, v in values.items()), "---\n"])


def front(run: RunFiles, name: str) -> dict[str, Any]:
    """Return the metadata that the hub reads, for the card's front matter."""
    base, data = base_name(run.summary), str(run.summary.get("data", ""))
    tags = ["vitft", "vision-transformer", "image-classification"]
    tags += [run.method] if run.method else []
    tags += ["peft"] * (run.adapter.get("peft_type") in PEFT_TYPES)
    found: dict[str, Any] = {
        "library_name": "vitft",
        "pipeline_tag": "image-classification",
        "license": licence(run) or "unknown",
        "tags": tags,
    }
    if base is not None and is_name(base):
        relation = "adapter" if run.adapter else "finetune"
        found |= {"base_model": repository_of(base)[0], "base_model_relation": relation}
    split, _, figures = measured(run.summary)
    kind = data.lower() if is_named_set(data) else "imagefolder"
    if data and data not in DRAWN:
        found["datasets"] = [kind]
    if not figures:
        return found
    metrics = [
        {"type": METRICS[key], "value": round(value, 4), "name": f"{split} {words(key)}"}
        for key, value in figures.items()
    ]
    result = {
        "task": {"type": "image-classification", "name": "Image Classification"},
        "dataset": {"type": kind, "name": data_name(data), "split": split},
        "metrics": metrics,
    }
    found["metrics"] = [metric["type"] for metric in metrics]
    return found | {"model-index": [{"name": name, "results": [result]}]}


def licence(run: RunFiles) -> str | None:
    """Return the base's licence by the hub's name for it; None where it is unknown."""
    base, text = run.summary.get("base"), run.summary.get("base_licence")
    if isinstance(base, str) and is_bundled(base):
        return "mit"
    if not isinstance(text, str):
        return None
    return text.lower() if re.fullmatch(r"[\w.-]+", text) else "other"


def measured(summary: Mapping[str, Any]) -> tuple[str, int, dict[str, float]]:
    """Return the split that was measured, its number of images, and the metrics by name.

    It is the test split, or the validation split where there are no metrics of the former.
    """
    for split, prefix in (("test", "test_"), ("validation", "val_")):
        found = {key: summary.get(prefix + key) for key in METRICS}
        figures = {k: v for k, v in found.items() if isinstance(v, float) and math.isfinite(v)}
        if "mean_average_precision" in figures:  # with several labels, accuracy is ambiguous
            figures = {"mean_average_precision": figures["mean_average_precision"]}
        if figures:
            return split, int(summary.get(f"n_{split}") or 0), figures
    return "test", 0, {}


def facts(run: RunFiles) -> dict[str, str]:
    """Return the rows of the card's table, in Markdown."""
    summary, config = run.summary, run.config
    n_all, n_trained = summary.get("n_parameters"), summary.get("n_trainable")
    counts = [f"{summary[f'n_{name}']:,} {name}" for name in SPLITS if summary.get(f"n_{name}")]
    counts = [text.replace("train", "training") for text in counts]
    return {
        "base": _base(run),
        "licence": plain(licence(run) or "unknown"),
        "data": f"{plain(data_name(summary['data']))}: {', '.join(counts)} images"
        if counts
        else "",
        "measured": _figures(summary),
        "features of the frozen base": _frozen(summary),
        "trained": f"{_what(run)}: {n_trained:,} of {n_all:,} parameters" if n_all else _what(run),
        "recipe": _recipe(config),
        "seed": f"{summary['seed']}, one run" if "seed" in summary else "",
        "stopped": plain(str(summary.get("stopped", ""))),
        "versions": ", ".join(f"{k} {v}" for k, v in summary.get("versions", {}).items()),
    }


def opening(run: RunFiles) -> str:
    """Return what the run has made, in a sentence or two."""
    base, n = base_name(run.summary), len(run.classes)
    named = ", ".join(plain(name) for name in run.classes[:MAX_CLASSES])
    more = f" and {n - MAX_CLASSES:,} more" if n > MAX_CLASSES else ""
    kind = "A Vision Transformer"
    if run.adapter:
        on = f"on {_code(base)}, a Vision Transformer" if base else "on a Vision Transformer"
        kind = f"An adapter ({plain(str(run.method))}) {on}"
    elif base:
        kind = f"A Vision Transformer, fine-tuned whole from {_code(base)}"
    return f"{kind}, made with vitft. It tells {n:,} classes apart: {named}{more}."


def loading(run: RunFiles, source: str) -> str:
    """Return Python code that loads it from `source`, a name on the hub or a folder."""
    base = base_name(run.summary) or "BASE"
    arguments = [base, source] if run.adapter else [source]
    hint = ""
    if run.adapter and not is_public(base):
        hint = f"\n{_code(base)} stands for the base's file, which is not on the hub.\n"
    extra = "[hub]" if any(map(is_name, arguments)) else ""
    return (
        f"`pip install 'vitft{extra}'`, then\n\n```python\nfrom vitft import Classifier\n\n"
        f"classifier = Classifier({', '.join(map(_quoted, arguments))})\n"
        f'print(classifier.predict("photo.jpg"))\n```\n{hint}'
    )


def plain(text: str) -> str:
    """Return text, on one line, with Markdown's special characters escaped."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", _line(text))


def words(key: str) -> str:
    """Return the readable name of a metric."""
    return "macro F1" if key == "macro_f1" else key.replace("_", " ")


def _base(run: RunFiles) -> str:
    base = base_name(run.summary)
    mark = f"fingerprint `{run.fingerprint}`" if run.fingerprint else ""
    if base is None:
        return mark
    where = ""
    if is_bundled(base):
        where = "ships with vitft"
    elif is_name(base):
        name = repository_of(base)[0]
        where = f"[{plain(name)}](https://huggingface.co/{name})"
    return ", ".join(part for part in (_code(base), where, mark) if part)


def _figures(summary: Mapping[str, Any]) -> str:
    split, n, figures = measured(summary)
    parts = [f"{split} {words(key)} **{value:.2%}**" for key, value in figures.items()]
    if parts and n:
        parts[0] += f" of {n:,} images"
        if "accuracy" in figures:
            low, high = wilson(figures["accuracy"], n)
            parts[0] += f" (95 % interval: {low:.1%} to {high:.1%})"
    return ", ".join(parts)


def _frozen(summary: Mapping[str, Any]) -> str:
    names = {"nearest neighbours": "knn", "a linear probe": "probe"}
    found = {text: summary.get(f"frozen_{key}_accuracy") for text, key in names.items()}
    shown = [f"{text} {x:.2%}" for text, x in found.items() if isinstance(x, float)]
    return f"validation accuracy by {' and '.join(shown)}" if shown else ""


def _recipe(config: Mapping[str, Any]) -> str:
    """Return the options of RECIPE that are not switched off, in Markdown."""
    shown = []
    for key in RECIPE:
        value = config.get(key)
        is_off = value in (None, "", [], 0, "default", "equal", "all")
        if not is_off and not (isinstance(value, float) and value == 1):
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            shown.append(key.replace("_", " ") + ("" if value is True else f" {text}"))
    return plain(", ".join(shown))


def _what(run: RunFiles) -> str:
    if not run.adapter:
        return "every parameter"
    if not run.adapter.get("target_modules"):
        return f"{plain(str(run.method))}, the head with it"
    targets = run.adapter["target_modules"]
    ends = [targets] if isinstance(targets, str) else [name.split(".")[-1] for name in targets]
    return f"{plain(str(run.method))} on {plain(', '.join(dict.fromkeys(ends)))}, and the head"


def _line(text: str) -> str:
    """Return the text with unprintable characters, also line breaks, replaced by "?"."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _quoted(value: Any) -> str:
    """Return a value as printable JSON, which YAML and Python read, too."""
    return _line(json.dumps(value, ensure_ascii=False))


def _code(text: str) -> str:
    return "`" + _line(text).replace("`", "'") + "`"
