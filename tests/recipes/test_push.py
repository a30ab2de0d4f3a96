"""`vitft push`, and adapters and bases by their names on the hub, against a stand-in of it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from recipes.push import published
from recipes.serve import named
from tests.recipes.hub import TOKEN, Hub, standing
from tests.shared import Run
from vitft import Classifier, hub, load_model, save_model
from vitft.files import read_tensors, write_tensors

NAME = "hf:someone/colours"


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a hub, with a cache of its own, and be logged in."""
    with standing() as found:
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def test_what_is_pushed_answers_as_the_folder_does(
    vitft: Run, run: Path, base: Path, folder: Path, there: Hub
) -> None:
    said = vitft("push", run, NAME, "--private").stdout
    assert f"{there.url}/someone/colours" in said
    assert there.private == {"someone/colours"}
    assert there.files("someone/colours").keys() == {
        *("adapter_config.json", "adapter_model.safetensors"),
        *("README.md", "summary.json", "metrics.jsonl"),
    }
    image = folder / "test" / "red" / "000.png"
    assert Classifier(base, NAME).predict(image) == Classifier(base, run).predict(image)
    (commit,) = there.versions["someone/colours"]
    assert f"{NAME}@{commit}" in said
    flags = ["--base", base, "--adapter", f"{NAME}@{commit}"]
    assert "red" in vitft("predict", *flags, "--adapter", run, image).stdout
    assert "test accuracy" in vitft("evaluate", *flags, "--data", folder).stdout
    assert "lora_A" in vitft("inspect", NAME).stdout


def test_a_new_version_is_fetched_and_the_old_one_has_its_number(
    vitft: Run, run: Path, there: Hub, tmp_path: Path
) -> None:
    vitft("push", run, NAME)
    before = Path(hub.fetched(NAME), "README.md").read_bytes()
    copied = shutil.copytree(run, tmp_path / "copied")
    (copied / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    vitft("push", copied, NAME)
    assert Path(hub.fetched(NAME), "README.md").read_text().endswith("mine\n")
    first = [*there.versions["someone/colours"]][0]
    assert Path(hub.fetched(f"{NAME}@{first}"), "README.md").read_bytes() == before
    line = vitft("inspect", f"{NAME}@none", code=2).stderr
    assert line == f"Error: could not fetch {NAME}@none: it has no such revision\n"


def test_a_base_goes_there_and_back(vitft: Run, base: Path, there: Hub) -> None:
    vitft("push", base.parent, "hf:someone/base")
    assert there.files("someone/base").keys() == {
        *("model.safetensors", "README.md", "summary.json", "metrics.jsonl")
    }
    assert load_model("hf:someone/base").classes == load_model(base).classes


def test_an_adapter_of_the_hub_names_a_base_that_others_have(
    vitft: Run, run: Path, there: Hub, tmp_path: Path, base: Path, folder: Path
) -> None:
    vitft("push", base.parent, "hf:someone/base")
    flags = ["--adapter=linear", "--base=hf:someone/base", "--data", folder, "--limit=6"]
    vitft("finetune", *flags, "--epochs=1", "--out", tmp_path / "mine")
    vitft("push", tmp_path / "mine", NAME)
    assert Classifier(adapter=NAME).classes == load_model(base).classes
    card = there.files("someone/colours")["README.md"].decode()
    assert 'base_model: "someone/base"' in card
    assert f'Classifier("hf:someone/base", "{NAME}")' in card
    vitft("push", run, "hf:someone/other")  # whose base is a file of this machine
    line = vitft("predict", "--adapter", "hf:someone/other", "x.png", code=2).stderr
    assert "does not tell which base it was trained on; name it by --base" in line


@pytest.mark.parametrize("options", [[], ["--private"]])
def test_a_refused_token_is_one_line_without_it(
    options: list[str], vitft: Run, run: Path, there: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrongSecret")
    done = vitft("push", run, NAME, *options, code=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: could not push to {NAME}: the hub refuses the token (401)")
    assert "Secret" not in done.stdout + done.stderr
    done = vitft("inspect", NAME, code=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: could not fetch {NAME}: the hub refuses the token (401)")
    assert there.versions == {}


@pytest.mark.parametrize("token", [TOKEN, "hf_Secret\x01", "hf_Secrét"])
def test_a_token_is_not_told_whatever_an_error_says(
    token: str, vitft: Run, run: Path, there: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(OSError, match="illegal header") as error, hub.hub_errors("could not push"):
        raise RuntimeError(f"illegal header 'Bearer {token}' or {token!r}")
    assert not re.search("ecret", str(error.value))
    assert error.value.__suppress_context__  # nor in a traceback
    if token != TOKEN:
        (line,) = vitft("push", run, NAME, code=2).stderr.splitlines()
        assert line.startswith("Error: could not push")
        assert "ecret" not in line


def test_without_a_network_the_cache_answers_or_one_line(
    vitft: Run, run: Path, there: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    vitft("push", run, NAME)
    fetched = hub.fetched(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.fetched(NAME) == fetched
    for command in (["push", run, NAME], ["inspect", "hf:someone/other"]):
        (line,) = vitft(*command, code=2).stderr.splitlines()
        assert "the hub cannot be reached (" in line


def test_a_public_repository_is_not_taken_for_a_private_one(
    vitft: Run, run: Path, there: Hub
) -> None:
    vitft("push", run, NAME)
    line = vitft("push", run, NAME, "--private", code=2).stderr
    assert "is there and public; choose another name, or no --private" in line
    assert len(there.versions["someone/colours"]) == 1


def test_no_path_of_this_machine_is_published(run: Path, base: Path, folder: Path) -> None:
    files = published(run, "someone/colours", with_report=True)
    texts = {name: text.decode() for name, text in files.items() if isinstance(text, bytes)}
    assert "data:image" in texts["report.html"]
    for private in (run.parent, base.parent, folder.parent, Path.home()):
        assert not [name for name, text in texts.items() if f"{private}/" in text]
    assert f"{folder.name}" in texts["report.html"]
    assert json.loads(texts["summary.json"])["data"] == folder.name
    assert "base" not in json.loads(texts["summary.json"])


def test_paths_that_are_relative_to_another_folder_are_not_published(
    vitft: Run, base: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base.parent, tmp_path / "secret" / "base")
    shutil.copytree(folder, tmp_path / "secret" / "colours")
    monkeypatch.chdir(tmp_path)
    flags = ["--adapter=linear", "--base=secret/base", "--data=secret/colours", "--epochs=1"]
    vitft("finetune", *flags, "--out=secret/run")
    monkeypatch.chdir("secret/run")
    files = published(Path("."), "someone/colours", with_report=True)
    texts = {name: text.decode() for name, text in files.items() if isinstance(text, bytes)}
    assert not [name for name, text in texts.items() if "secret" in text]
    assert "<dd>colours</dd>" in texts["report.html"]


def test_a_path_in_the_weights_header_is_refused(base: Path, tmp_path: Path) -> None:
    model = load_model(base)
    model.facts = {"config": {"_name_or_path": str(Path.home() / "models" / "x")}}
    save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="the header of .* holds the path"):
        published(tmp_path, "someone/base", with_report=False)


def test_a_served_adapter_of_the_hub_has_its_name() -> None:
    assert named((f"{NAME}@v1", f"other={NAME}")) == {"colours": f"{NAME}@v1", "other": NAME}


def test_pictures_in_a_report_stay_as_they_are(tmp_path: Path) -> None:
    from recipes.sharing.public import cleaned

    text = '<img src="data:image/png;base64,x/d/y==">/d/y/x.png &#x27;/d/y&#x27; /d/yes'
    expected = text.replace(">/d/y/", ">y/").replace(";/d/y&", ";y&")
    assert cleaned(text, ["/d/y"]) == expected


@pytest.mark.parametrize(
    ("change", "to", "message"),
    [
        ("nothing", "someone/colours", "is no hf:OWNER/NAME"),
        ("nothing", f"{NAME}@v1", "is no hf:OWNER/NAME"),
        ("empty", NAME, "holds neither an adapter nor a base"),
        ("cut", NAME, "is broken"),
    ],
)
def test_what_cannot_be_pushed_is_said_first(
    change: str, to: str, message: str, vitft: Run, run: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(run, tmp_path / "copied")
    if change == "empty":
        (copied / "adapter_config.json").unlink()
    if change == "cut":
        file = copied / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-20])
    (line,) = vitft("push", copied, to, code=2).stderr.splitlines()
    assert message in line


@pytest.mark.parametrize("name", ["README.md", "metrics.jsonl"])
def test_a_file_that_is_no_text_is_named(name: str, vitft: Run, run: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "copied")
    (copied / name).write_bytes(b"caf\xe9")
    (line,) = vitft("push", copied, NAME, code=2).stderr.splitlines()
    assert line.startswith(f"Error: {copied / name} is no text")


@pytest.mark.parametrize("classes", [5, [1, 2], [["a"]]])
def test_classes_that_are_no_names_are_refused(
    classes: object, vitft: Run, base: Path, tmp_path: Path
) -> None:
    tensors, metadata = read_tensors(base)
    write_tensors(tmp_path / "model.safetensors", tensors, metadata | {"classes": classes})
    (line,) = vitft("push", tmp_path, NAME, code=2).stderr.splitlines()
    assert "model.safetensors: classes: " in line


@pytest.mark.parametrize("content", ['{"n_test": 1e999, "test_accuracy": 0.5}', '[["seed", 1]]'])
def test_a_summary_that_no_run_wrote_is_refused(
    content: str, vitft: Run, run: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(run, tmp_path / "copied")
    (copied / "summary.json").write_text(content)
    (line,) = vitft("push", copied, NAME, code=2).stderr.splitlines()
    assert "summary.json is broken" in line


def test_the_hubs_address_may_be_another(there: Hub, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": there.url, "HF_HOME": str(tmp_path), "HF_TOKEN": ""}
    code = "from vitft.hub import fetched; fetched('hf:someone/none')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment
    )
    assert "it needs a token (401)" in done.stderr
