"""The Python of README and docs runs, their commands have the options shown, their links lead on.

Each document runs in a folder that has what it names: FOLDER, photo.jpg, runs/mine and so on.
"""

import importlib
import importlib.util
import re
import shlex
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image

import adapters
from tests.families.sources import hf_model
from tests.shared import Run, drawn, long, slow
from vitft import load_model, save_model
from vitft.command.help import COMMANDS
from vitft.families.huggingface import KINDS
from vitft.families.names import FAMILIES

ROOT = Path(__file__).parents[1]
DOCS = sorted(path for path in (ROOT / "docs").glob("*.md") if path.stem != "commands")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
# in a document's Python, what takes long is made short
FINETUNE = {'base="cifar10"': 'base="BASE"', 'out="runs/mine"': 'out="runs/mine", epochs=1'}
SHORT = {
    "README": FINETUNE,
    "start": FINETUNE | {"range(60)": "range(2)", "1000": "10", '"symbols", 64': '"symbols", 8'},
    "photographs": {'out="runs/mine"': 'out="runs/mine", image_size=28'},
    "adapters": {'vit_b_16(weights="DEFAULT")': "VisionTransformer(32, 8, 2, 2, 32, 64)"},
    "backbones": {"224": "28"},
    "sharing": {'hub.fetched("hf:OWNER/signs")': '"runs/signs"'},
}
# commands that take no time, and are run with what the documents give them
CHEAP = ("check", "compare", "convert", "data", "embed", "evaluate", "inspect", "merge", "predict")
DOCUMENTED = [path for path in DOCUMENTS if "```python" in path.read_text()]
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)


def blocks(document: Path, language: str) -> list[tuple[int, str]]:
    """Return each fenced block of a language, and the number of lines before it."""
    text = document.read_text()
    found = re.finditer(rf"^ *```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


def commands(document: Path) -> list[str]:
    """Return what follows `vitft` in the document's blocks."""
    text = "".join(block for _, block in blocks(document, "sh")).replace("\\\n", "")
    lines = [re.sub(r"^.*torchrun .* -m vitft", "vitft", line) for line in text.splitlines()]
    found = [line for line in lines if line.startswith("vitft ")]
    return [line.removeprefix("vitft ").replace(" ...", "") for line in found]


def inline(document: Path) -> list[str]:
    """Return what follows `vitft` in the document's text, where it has several options."""
    found = re.findall(r"`vitft\s+(\w+ --[^`\[]* --[^`\[]*)`", document.read_text())
    return [line.replace("...", "") for line in found if "hf|timm" not in line]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an adapter for the bundled base, and of its merged model."""
    out, model = tmp_path_factory.mktemp("adapter"), load_model("cifar10")
    model.new_head(("red", "green"))
    adapters.inject(model, adapters.LoRAConfig(rank=2, targets=("wq",)), trainable=("head",))
    torch.nn.init.ones_(model.blocks[0].attn.wq.lora_b)
    adapters.save_adapter(model, out)
    save_model(adapters.merge(model), out / "model.safetensors")
    return out


@pytest.fixture(scope="module")
def run_folder(
    vitft: Run, base: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the folder of a run by LoRA."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    flags = ["--epochs=1", "--lr=1e-3", "--batch-size=30"]
    vitft("finetune", "--adapter=lora", "--base", base, "--data", folder, "--out", out, *flags)
    return out


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Enter a folder that has the pictures that documents name."""
    monkeypatch.chdir(tmp_path)
    for name in ("FOLDER", "DATA"):
        Path(name).symlink_to(folder)
    for name in ("photo.jpg", "cat.jpg", "dog.jpg", "image.png", "holidays/1.jpg", "photos/1.jpg"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (200, 30, 40)).save(name)
    return tmp_path


@long
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("document", DOCUMENTED, ids=lambda path: path.stem)
def test_the_python_runs(document: Path, desk: Path, base: Path, adapter: Path) -> None:
    Path("BASE").symlink_to(base)
    if "dinov2-small/" in "".join(code for _, code in blocks(document, "python")):
        hf_model("dinov2", desk / "dinov2-small", patch_size=14, image_size=28)
    if document.stem in ("adapters", "sharing"):
        for name in ("signs", "symbols", "letters", "a", "b", "full"):
            shutil.copytree(adapter, desk / "runs" / name)
    short = SHORT.get(document.stem, {})
    assert all(old in document.read_text() for old in short)
    namespace: dict[str, object] = {"__name__": document.stem}
    pictures = drawn() if "savefig" in document.read_text() else nullcontext()
    with patch.dict(adapters.METHODS), patch.dict(FAMILIES), patch.dict(KINDS), pictures:
        for line, code in blocks(document, "python"):
            for old, new in short.items():
                code = code.replace(old, new)
            # the blank lines let a traceback show the line of the document
            exec(compile("\n" * line + code, document, "exec"), namespace)


def test_part_2_draws_its_pictures(desk: Path) -> None:
    text = (ROOT / "docs" / "part-2.md").read_text()
    shown = re.findall(r"!\[[^]]*\]\((pictures/\S+)\)", text)
    assert len(shown) == 3
    assert all(f'savefig("{name}"' in text for name in shown)


LINES = sorted({line for document in DOCUMENTS for line in commands(document)})


@pytest.mark.parametrize("line", [*LINES, *(line for d in DOCUMENTS for line in inline(d))])
def test_a_command_has_the_options_shown(line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)
    command = importlib.import_module(f"recipes.{name}").command
    command.make_context(name, arguments, help_option_names=["-h", "--help"])  # click keeps it


def test_the_cheap_commands_of_the_documents_run(
    desk: Path, vitft: Run, base: Path, run_folder: Path
) -> None:
    hf_model("dinov2", desk / "dinov2-small", patch_size=14, image_size=28)
    for name in ("mine", "other"):
        shutil.copytree(run_folder, desk / "runs" / name)
    shutil.copytree(base.parent, desk / "runs" / "base")
    names = {"vit-timm", "vit.safetensors", "dino.safetensors", "runs/symbols"}  # not here
    done = []
    for line in LINES:
        name, *arguments = shlex.split(line, comments=True)
        if name in CHEAP and names.isdisjoint(arguments) and " hf:" not in line:
            vitft(name, *("28" if x == "224" else x for x in arguments))
            done.append(name)
    assert set(done) >= set(CHEAP) - {"convert", "compare"}


def test_the_modules_of_the_documents_are_there() -> None:
    named = re.findall(r"python -m ([\w.]+)", "".join(path.read_text() for path in DOCUMENTS))
    assert len(named) > 10
    assert [name for name in named if importlib.util.find_spec(name) is None] == []


def slugs(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_document
def test_the_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`]*`", "", text)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
        if target.startswith("http"):
            continue
        path = (document.parent / target).resolve() if target else document
        assert path.exists(), target
        assert not anchor or anchor in slugs(path), f"{target}#{anchor}"


def site() -> object:
    """Return docs/conf.py as a module."""
    spec = importlib.util.spec_from_file_location("site_conf", ROOT / "docs" / "conf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sites_page_of_commands_has_every_option() -> None:
    make: Callable[[], str] = site().commands_page  # type: ignore[attr-defined]
    sections = dict(part.split("\n", 1) for part in make().split("\n## ")[1:])
    assert list(sections) == list(COMMANDS)
    for name, text in sections.items():
        for parameter in importlib.import_module(f"recipes.{name}").command.params:
            assert parameter.name.upper() in text or f"`{parameter.opts[0]}`" in text
    assert re.search(
        r"^    lora  +LoRA", sections["finetune"].replace("      ", "    "), re.MULTILINE
    )
    assert r"CLASS/\*" in sections["pretrain"]


@slow
@pytest.mark.filterwarnings("ignore")
def test_a_link_that_leads_nowhere_fails_the_site(tmp_path: Path) -> None:
    build = pytest.importorskip("sphinx.cmd.build")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name in ("benchmarks", "recipes", "vitft"):
        (tmp_path / name).symlink_to(ROOT / name)
    arguments = ["-q", "-n", "-W", str(tmp_path / "docs"), str(tmp_path / "out")]
    assert build.build_main(arguments) == 0
    with (tmp_path / "docs" / "start.md").open("a") as file:
        file.write("\n[gone](gone.md)\n")
    assert build.build_main(arguments) != 0


def test_contributing_names_every_folder() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("[a-z]*/**/*.py")}
    folders = {folder for folder in folders if folder.parts[0] in ("vitft", "adapters", "recipes")}
    assert all(f"{folder}/" in text for folder in folders)
