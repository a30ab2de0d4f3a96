"""`vitft serve`: what a client may ask, and adapters that come while others answer."""

import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

import adapters
from benchmarks.trouble import Command
from recipes.serve import listening, named
from recipes.serving.app import Limits, make_app
from recipes.serving.desk import Desk
from recipes.serving.jobs import Busy, Job
from tests.shared import Run
from vitft import Classifier, load_model
from vitft.evaluation.rollout import rollout

CPU = torch.device("cpu")
CLASSES = {"colours": ("red", "green", "blue"), "two": ("warm", "cold")}


def picture(colour: str = "red", kind: str = "png") -> bytes:
    content = BytesIO()
    Image.new("RGB", (12, 9), colour).save(content, kind)
    return content.getvalue()


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return adapters of two sets of classes, whose every number is random."""
    found = {}
    for name, classes in CLASSES.items():
        torch.manual_seed(len(name))
        model = load_model(base)
        model.new_head(classes)
        adapters.inject(model, adapters.LoRAConfig(rank=2), trainable=("head",))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.3)
        found[name] = str(tmp_path_factory.mktemp("adapters") / name)
        adapters.save_adapter(model, found[name])
    return found


@pytest.fixture
def desk(base: Path, folders: dict[str, str]) -> Iterator[Desk]:
    made = Desk(load_model(base), folders, device=CPU, max_adapters=3)
    yield made
    made.close()


@pytest.fixture
def client(desk: Desk) -> TestClient:
    limits = Limits(max_pictures=3, max_bytes=100_000)
    return TestClient(make_app(desk, limits, token=None, hosts=["testserver"]))


def files(*contents: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (f"{i}.png", content)) for i, content in enumerate(contents)]


def test_every_adapter_answers_as_it_does_alone(
    client: TestClient, base: Path, folders: dict[str, str], tmp_path: Path
) -> None:
    contents = [picture("red"), picture("blue", "jpeg")]
    found = client.post("/predict", files=files(*contents), data={"top": 3}).json()["images"]
    for content, image in zip(contents, found, strict=True):
        (tmp_path / "image").write_bytes(content)
        assert image["answers"].keys() == {*folders, "base"}
        for name, folder in [*folders.items(), ("base", ())]:
            expected = Classifier(base, folder).predict(tmp_path / "image", top=3)
            assert image["answers"][name] == pytest.approx(expected, abs=1e-5)
            assert [*image["answers"][name]] == [*expected]
    only = client.post("/predict", files=files(contents[0]), data={"adapters": "two", "top": 1})
    (answer,) = only.json()["images"]
    assert [*answer["answers"]] == ["two"]
    assert len(answer["answers"]["two"]) == 1


def test_attention_is_that_of_each_adapter_alone(
    client: TestClient, base: Path, folders: dict[str, str]
) -> None:
    given = {"adapters": "colours,two", "attention": "true"}
    content = BytesIO()
    noise = torch.randint(0, 256, (9, 12, 3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(content, "png")
    (found,) = client.post("/predict", data=given, files=files(content.getvalue())).json()["images"]
    assert [*found["attention"]] == ["colours", "two"]
    for name, look in found["attention"].items():
        classifier = Classifier(base, folders[name])
        expected = rollout(classifier.model, classifier.fit(Image.fromarray(noise.numpy())))
        torch.testing.assert_close(torch.tensor(look["weights"]), expected)
        assert look["picture"].startswith("data:image/jpeg;base64,")
    (plain,) = client.post("/predict", files=files(content.getvalue())).json()["images"]
    assert "attention" not in plain


def test_many_clients_share_passes_and_get_their_own_answers(
    client: TestClient, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    plain = desk.jobs.answer

    def counted(jobs: Sequence[Job]) -> None:
        passes.append(len(jobs))
        time.sleep(0.02)
        plain(jobs)

    monkeypatch.setattr(desk.jobs, "answer", counted)
    colours = ["red", "green", "blue", "white"] * 6

    def ask(colour: str) -> dict[str, float]:
        data = {"adapters": "colours", "top": 3}
        sent = client.post("/predict", files=files(picture(colour)), data=data)
        answer: dict[str, float] = sent.json()["images"][0]["answers"]["colours"]
        return answer

    with ThreadPoolExecutor(12) as pool:
        found = [*pool.map(ask, colours)]
    assert sum(passes) == 24
    assert max(passes) > 1
    for colour, answer in zip(colours, found, strict=True):
        assert answer == pytest.approx(found[colours.index(colour)], abs=1e-6)


def test_an_adapter_comes_and_is_replaced_while_others_answer(
    client: TestClient, folders: dict[str, str], desk: Desk
) -> None:
    stop, ends = threading.Event(), list[int]()

    def keep_asking() -> None:
        while not stop.is_set():
            sent = client.post("/predict", files=files(picture()), data={"adapters": "two"})
            ends.append(sent.status_code)

    thread = threading.Thread(target=keep_asking)
    thread.start()
    told = client.put("/adapters/rank=4,third", json={"folder": folders["colours"]}).json()
    assert told["classes"] == ["red", "green", "blue"]
    again = client.put("/adapters/rank=4,third", json={"folder": folders["two"]}).json()
    assert again["classes"] == ["warm", "cold"]
    stop.set()
    thread.join()
    assert {*ends} == {200}
    assert [found["name"] for found in client.get("/adapters").json()] == [
        *folders,
        "base",
        "rank=4,third",
    ]
    chosen = {"adapters": ["two, base", "rank=4,third"]}  # a name may hold a comma itself
    sent = client.post("/predict", files=files(picture()), data=chosen)
    two, _, third = sent.json()["images"][0]["answers"].values()
    assert two == pytest.approx(third)
    full = client.put("/adapters/fourth", json={"folder": folders["two"]})
    assert (full.status_code, "no room" in full.json()["detail"]) == (422, True)
    for name, folder in (("base", folders["two"]), ("rank=4,third", "nowhere")):
        assert client.put(f"/adapters/{name}", json={"folder": folder}).status_code == 422


def test_what_a_request_may_not_bring_is_refused(client: TestClient) -> None:
    ask = client.post
    broken = ask("/predict", files=files(b"no picture", picture())).json()["images"]
    assert "0.png is no readable image" in broken[0]["error"]
    assert broken[1]["answers"]
    assert ask("/predict", files=files(*[picture()] * 4)).status_code == 413
    assert ask("/predict", files=files(bytes(100_001))).status_code == 413
    unknown = ask("/predict", files=files(picture()), data={"adapters": "x"})
    assert (unknown.status_code, unknown.json()["detail"]) == (
        422,
        "there is no adapter 'x'; there are colours, two, base",
    )
    low = ask("/predict", files=files(picture()), data={"top": "0"})
    assert low.json() == {"detail": "top: Input should be greater than or equal to 1"}
    assert ask("/predict").status_code == low.status_code == 422
    headers = {"content-type": "application/json"}
    no_text = client.put("/adapters/new", content=b'{"folder": NaN}', headers=headers)
    assert no_text.json() == {"detail": "folder: Input should be a valid string"}
    lone = client.put("/adapters/new", content=rb'{"folder": "\udcff"}', headers=headers)
    assert (lone.status_code, lone.json()["detail"][:19]) == (422, "? holds no adapter:")
    assert client.get("/", headers={"host": "elsewhere.example"}).status_code == 400
    stream = (part for part in [b"x" * 10])
    assert ask("/predict", content=stream).status_code == 411


def test_too_many_waiting_pictures_are_refused(desk: Desk) -> None:
    image = torch.zeros(3, desk.fit.image_size, desk.fit.image_size, dtype=torch.uint8)
    waiting: list[Future[torch.Tensor]] = []
    most = desk.jobs.waiting.maxsize + desk.jobs.max_rows  # the thread has taken some already
    with desk.pass_lock, pytest.raises(Busy, match="too many pictures wait"):
        waiting.extend(desk.ask(image, ["two"]) for _ in range(most + 1))
    assert desk.jobs.waiting.maxsize <= len(waiting) <= most
    assert all(len(found.result(20)) == 1 for found in waiting)


def test_a_later_adapter_must_take_the_images_that_the_desk_makes(
    base: Path, tmp_path: Path
) -> None:
    for name, factor in (("same", 1), ("larger", 2)):
        model = adapters.inject(load_model(base), None, trainable=("head",))  # of the head alone
        model.resize(factor * model.image_size)
        adapters.save_adapter(model, tmp_path / name)
    desk = Desk(load_model(base), {}, device=CPU)
    with pytest.raises(ValueError, match="takes images prepared as"):
        desk.load("larger", str(tmp_path / "larger"))
    desk.load("same", str(tmp_path / "same"))
    assert [found["name"] for found in desk.listing()] == ["base", "same"]
    desk.close()


def test_a_desk_that_closes_answers_what_waits(desk: Desk) -> None:
    image = torch.zeros(3, desk.fit.image_size, desk.fit.image_size, dtype=torch.uint8)
    waiting = [desk.ask(image, ["two"]) for _ in range(3 * desk.jobs.max_rows)]
    desk.close()
    assert all(found.done() for found in waiting)
    assert not desk.jobs.thread.is_alive()
    desk.jobs.thread.join()


def test_nothing_of_a_picture_reaches_the_disk(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    rolled: list[object] = []
    plain = tempfile.SpooledTemporaryFile.rollover
    monkeypatch.setattr(
        tempfile.SpooledTemporaryFile, "rollover", lambda self: (rolled.append(self), plain(self))
    )
    client = TestClient(make_app(desk, Limits(), token=None, hosts=["testserver"]))
    noise = Image.effect_noise((1500, 1500), 90)
    noise.save(content := BytesIO(), "bmp")
    assert len(content.getvalue()) > 2 * 2**20  # beyond what is kept in memory by default
    (answer,) = client.post("/predict", files=files(content.getvalue())).json()["images"]
    assert answer["answers"]
    assert not rolled


def test_a_token_is_asked_of_everything_but_the_page(desk: Desk) -> None:
    client = TestClient(make_app(desk, Limits(), token="secret", hosts=["*"]))
    assert "What do the adapters see?" in client.get("/").text
    for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
        assert client.get("/adapters", headers=given).status_code == 401
        assert client.put("/adapters/x", json={}, headers=given).status_code == 401
    right = {"authorization": "Bearer secret"}
    assert client.get("/adapters", headers=right).status_code == 200


def test_an_error_of_a_pass_reaches_those_who_wait_and_the_next_are_answered(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.zeros(3, desk.fit.image_size, desk.fit.image_size, dtype=torch.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(Desk, "_part", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            desk.ask(image, ["two"]).result(20)
    assert len(desk.ask(image, ["two", "base"]).result(20)) == 2


def test_folders_have_names(tmp_path: Path) -> None:
    assert named((f"{tmp_path}/signs", "b=runs/x")) == {"signs": f"{tmp_path}/signs", "b": "runs/x"}
    with pytest.raises(ValueError, match="two adapters are called x; write NAME=FOLDER"):
        named(("a/x", "b/x"))


def test_others_are_served_with_a_token_only(
    vitft: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VITFT_TOKEN", raising=False)
    told = vitft("serve", "--base", base, "--host", "0.0.0.0", code=2).stderr
    assert "--host 0.0.0.0 can be reached by others; give them a token" in told


def test_where_nobody_can_listen_is_told(vitft: Run, base: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = vitft("serve", "--base", base, "--port", port, code=2).stderr
    assert f"cannot listen at 127.0.0.1, port {port}: Address already in use" in told
    with listening("localhost", 0) as found, socket.create_connection(found[0].getsockname()[:2]):
        port = found[0].getsockname()[1]
        assert {one.getsockname()[1] for one in found} == {port}
        with pytest.raises(ValueError, match="already in use"), listening("localhost", port):
            pass
    told = vitft("serve", "--base", base, "--host=a..b", "--token=x", code=2).stderr
    assert "cannot listen at a..b, port 8000: " in told
    told = vitft("serve", "--base", base, "--port=99999", code=2).stderr
    assert "--port 99999 is not in 0..65535" in told
    told = vitft("serve", "--base", base, "--max-waiting=0", code=2).stderr
    assert "max_waiting=0 is not positive" in told


def test_the_command_serves_until_it_is_stopped(base: Path, folders: dict[str, str]) -> None:
    given = [f"--adapter={folder}" for folder in folders.values()]
    command = Command(["serve", f"--base={base}", "--port=0", *given])
    assert command.output.readline() == "serving         colours, two, base\n"
    url = re.sub(r"^page +", "", command.output.readline()).strip()
    for _ in range(100):
        try:
            found = httpx.get(f"{url}adapters").json()
            break
        except httpx.ConnectError:
            time.sleep(0.1)
    assert [adapter["name"] for adapter in found] == ["colours", "two", "base"]
    sent = httpx.post(f"{url}predict", files=files(picture()), data={"top": 1}, timeout=20)
    assert sent.json()["images"][0]["answers"].keys() == {"colours", "two", "base"}
    command.send(signal.SIGINT)
    assert command.end(20).status == 0
