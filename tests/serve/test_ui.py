"""The page: what its routes give, and the page itself in a headless Chromium that may ask nobody but the server."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from tests.serve.asking import WAIT_SEC, ScriptedModel, data_url, file_of, picture, request, serving
from tests.serve.test_server import process
from tests.tiny import make_checkpoint
from vz_edge.device.image import tile_boxes
from vz_edge.device.model import EdgeModel
from vz_edge.serve.app import create_app
from vz_edge.serve.engine import Engine
from vz_edge.serve.settings import Settings
from vz_edge.serve.ui import PAGE_FILES, PAGE_PATHS

TOKEN = "0123456789abcdef"
SCENE = Path(__file__).parents[2] / "examples" / "scene.jpg"
QUESTION = "What <b>is</b> this?"  # tags must stay what they are
BUDGETS = (90, 25)


def client_of(engine: Engine, **settings: Any) -> TestClient:
    return TestClient(create_app(engine, Settings(ui=True, **settings)), "http://localhost")


def look(client: TestClient, image: Image.Image, **fields: Any) -> Any:
    return client.post("/ui/look", json={"picture": data_url(file_of(image)), **fields})


def error_of(response: Any) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def test_there_is_no_page_unless_asked_for(engine: Engine) -> None:
    client = TestClient(create_app(engine, Settings()), "http://localhost")
    assert {client.get(path).status_code for path in [*PAGE_PATHS, "/ui/model"]} == {404}


def test_the_page_loads_nothing_from_elsewhere(engine: Engine) -> None:
    client = client_of(engine)
    for path in PAGE_PATHS:
        response = client.get(path)
        assert response.status_code == 200
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert "://" not in response.text


def test_files_need_no_token_and_the_model_does(engine: Engine) -> None:
    client = client_of(engine, token=TOKEN)
    assert {client.get(path).status_code for path in PAGE_PATHS} == {200}
    assert client.get("/ui/model").status_code == look(client, picture(1)).status_code == 401
    client.headers["Authorization"] = f"Bearer {TOKEN}"
    assert client.get("/ui/model").json() == {"name": "stand-in", "budgets": [20]}
    assert look(client, picture(1)).status_code == 200


def test_the_host_must_be_this_machine(engine: Engine) -> None:
    client = client_of(engine)
    assert {client.get(path, headers={"Host": "evil.example"}).status_code for path in PAGE_PATHS} == {403}


def test_a_look_is_what_the_model_sees(engine: Engine, model: EdgeModel) -> None:
    image = picture(1, (80, 30))
    result = model.encode(image)
    seen = look(client_of(engine), image).json()
    assert (seen["width"], seen["height"], tuple(seen["grid"])) == (80, 30, result.grid)
    assert seen["image_tokens"] == len(result.features)
    assert (seen["dominant"], seen["contextual"]) == (3, 1)
    assert result.kept is not None
    assert [tile["kept"] for tile in seen["tiles"]] == result.kept.tolist()
    boxes = tile_boxes(image.size, model.manifest.model, model.manifest.image)
    np.testing.assert_array_equal([tile["box"] for tile in seen["tiles"]], boxes)
    # The stand-in's graph is like one of an older export.
    assert all(tile["merged"] is tile["attention"] is None for tile in seen["tiles"])


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"tokens": 15}, (400, "invalid_value", "tokens")),
        ({"tokens": "20"}, (400, "invalid_value", "tokens")),
        ({"zoom": 2}, (400, "unknown_parameter", "zoom")),
        ({"picture": "data:image/png;base64,AAAA"}, (400, "invalid_image", "picture")),
        ({"picture": data_url(file_of(picture(1))[:200])}, (400, "invalid_image", "picture")),  # after its header
        ({"picture": "data:image/png;base64,?"}, (400, "invalid_base64", "picture")),
        ({"picture": str(SCENE)}, (400, "invalid_image_url", "picture")),
        ({"picture": "http:image/png;base64,AAAA"}, (400, "invalid_image_url", "picture")),
        ({"picture": data_url(file_of(picture(1, (400, 300))))}, (413, "image_too_large", "picture")),
    ],
)
def test_what_cannot_be_looked_at_is_refused(engine: Engine, fields: Any, error: Any) -> None:
    client = client_of(engine, max_pixels=400 * 300 - 1)
    assert error_of(look(client, picture(1), **fields)) == error


def test_a_look_stands_in_the_same_line(scripted_engine: Engine, scripted: ScriptedModel) -> None:
    with client_of(scripted_engine, deadline_sec=0.2) as client:
        assert error_of(look(client, picture(1)))[0] == 500  # the scripted model has no eyes
        for _ in range(2):  # the first is answered until it is let go, and the second waits behind it
            assert client.post("/v1/chat/completions", json=request()).status_code == 504
        scripted.let_go(100)


def test_a_budget_and_timings_are_the_api_s_own(engine: Engine) -> None:
    client = client_of(engine)
    asked = request("What?", data_url(file_of(picture(1))))
    whole = client.post("/v1/chat/completions", json={**asked, "tokens": 20}).json()
    assert all(whole["timings"][f"{stage}_sec"] > 0 for stage in ("preprocess", "vision", "prefill", "decode"))
    refused = client.post("/v1/chat/completions", json={**asked, "tokens": 15})
    assert error_of(refused) == (400, "invalid_value", "tokens")


# In a browser.


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if executable is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox", "--use-fake-device-for-media-stream"]
        browser = started.chromium.launch(executable_path=executable, args=arguments)
        yield browser
        browser.close()


class Visit:
    """A page, all that it asked for, and all that went wrong in it."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(color_scheme="dark", **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(1000 * WAIT_SEC)
        self.asked: list[str] = []
        self.wrong: list[str] = []
        self.page.on("request", lambda asked: self.asked.append(asked.url))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda said: self.wrong.append(said.text) if said.type == "error" else None)
        self.page.goto(url)

    def drop(self, file: Path) -> None:
        transfer = self.page.evaluate_handle(
            """([name, data]) => {
                const transfer = new DataTransfer();
                const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
                transfer.items.add(new File([bytes], name, { type: "image/png" }));
                return transfer;
            }""",
            [file.name, base64.b64encode(file.read_bytes()).decode()],
        )
        self.page.dispatch_event("#stage", "drop", {"dataTransfer": transfer})
        self.page.wait_for_selector("#send:enabled")

    def show(self, view: str) -> np.ndarray:
        """Choose a view; the canvas as uint8 [height, width, 3]."""
        self.page.check(f"[name=view][value={view}]", force=True)
        url = self.page.evaluate("document.querySelector('#canvas').toDataURL()")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))

    def ask(self, question: str) -> str:
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        self.page.wait_for_selector("#answers li:first-child .timings:not([hidden])")
        self.page.wait_for_selector("#send:visible:enabled")
        return str(self.page.text_content("#answers li:first-child .text"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two budgets from a tiny checkpoint: 36 patches a tile."""
    from vz_edge.host.export import ExportRequest, SilentProgress, plan_export, write_bundle

    folder = tmp_path_factory.mktemp("ui")
    make_checkpoint(folder / "checkpoint", family="llava_next")
    tokens = ",".join(map(str, BUDGETS))
    write_bundle(
        plan_export(ExportRequest(str(folder / "checkpoint"), folder / "out", tokens=tokens)), SilentProgress()
    )
    return folder / "out"


@pytest.fixture(scope="module")
def url(exported: Path) -> Iterator[str]:
    """The command itself."""
    with process(exported, "--ui") as (_, greeting):
        yield greeting.partition("browser at ")[2].partition(";")[0]


def patches_changed(canvas: np.ndarray, other: np.ndarray, model: EdgeModel) -> np.ndarray:
    """Which patches of the grid's tiles differ at their centres: bool [tiles, patches]."""
    spec, side = model.manifest.model, model.manifest.model.tower.patches_per_side
    with Image.open(SCENE) as scene:
        boxes = tile_boxes(scene.size, spec, model.manifest.image)
    corner = boxes[:, :2].min(axis=0)
    scale = canvas.shape[1] / (boxes[:, 2].max() - corner[0])
    steps = (np.arange(side) + 0.5) / side
    changed = []
    for left, top, right, bottom in boxes[1:]:
        x = ((left + steps * (right - left) - corner[0]) * scale).astype(int)
        y = ((top + steps * (bottom - top) - corner[1]) * scale).astype(int)
        changed.append((canvas[np.ix_(y, x)] != other[np.ix_(y, x)]).any(axis=-1).ravel())
    return np.stack(changed)


def test_a_picture_is_dropped_seen_and_asked_about(chromium: Any, url: str, exported: Path) -> None:
    model = EdgeModel.load(exported, threads=1)
    visit = Visit(chromium, url)
    visit.drop(SCENE)
    plain = visit.show("picture")
    for tokens in BUDGETS:
        if tokens != BUDGETS[0]:
            with visit.page.expect_response("**/ui/look"):
                visit.page.press("#tokens", "Home")  # the slider's lower end
            visit.page.wait_for_selector("#stage:not(.busy)")
        result = model.encode(SCENE, tokens)
        assert result.kept is not None
        kept = np.stack([np.isin(np.arange(1, 37), positions) for positions in result.kept[1:]])
        for view in ("dominant", "contextual"):
            np.testing.assert_array_equal(patches_changed(visit.show(view), plain, model), ~kept)
        assert patches_changed(visit.show("attention"), plain, model).all()
        assert f"{tokens} tokens" in visit.page.text_content("#summary")
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
        reply = model.ask(SCENE, [message], tokens=tokens, max_new_tokens=256)
        assert visit.ask(QUESTION) == reply.text
        assert visit.page.text_content("#answers li:first-child .question") == QUESTION
        assert f"{tokens} picture and {reply.prompt_tokens} text" in visit.page.text_content("li:first-child .usage")
        bars = "[...document.querySelectorAll('li:first-child .timings i')].map((bar) => parseFloat(bar.style.width))"
        assert sum(visit.page.evaluate(bars)) == pytest.approx(100, abs=0.1)
    assert visit.wrong == []
    assert all(asked.startswith((url, "data:,")) for asked in visit.asked)


def test_a_patch_says_what_became_of_it(chromium: Any, url: str, exported: Path) -> None:
    result = EdgeModel.load(exported, threads=1).encode(SCENE)
    assert result.kept is not None and result.merged is not None
    visit = Visit(chromium, url)
    visit.drop(SCENE)
    visit.page.check("[name=layer][value=base]", force=True)
    visit.page.focus("#canvas")
    for patch in range(6):
        visit.page.press("#canvas", "ArrowRight")
        visit.page.locator("#patch", has_text=f"column {patch + 1}:").wait_for()
        said = visit.page.text_content("#patch")
        assert said.startswith(f"Base tile, row 1, column {patch + 1}: ") and "% of its attention" in said
        token = result.merged[0][patch + 1]
        assert ("a dominant token" in said) == (token < 0) == (patch + 1 in result.kept[0])
        assert token < 0 or f"contextual token {token + 1} of " in said
    assert visit.wrong == []


def test_a_camera_s_picture_is_looked_at_or_the_refusal_explained(chromium: Any, url: str) -> None:
    refused = Visit(chromium, url)
    refused.page.click("#camera")
    refused.page.wait_for_selector("#problem:not([hidden])")
    assert "camera was not allowed" in refused.page.text_content("#problem")
    visit = Visit(chromium, url, permissions=["camera"])
    visit.page.click("#camera")
    visit.page.click("#shoot")
    visit.page.wait_for_selector("#send:enabled")
    assert visit.page.is_visible("#canvas") and not visit.page.is_visible("#video")
    assert visit.wrong == refused.wrong == []


@pytest.mark.parametrize("size", [(1280, 860), (390, 844)])
def test_sample_picture_and_question_are_on_the_first_screen(chromium: Any, url: str, size: tuple[int, int]) -> None:
    visit = Visit(chromium, url, viewport={"width": size[0], "height": size[1]})
    for shown in ("#sample", "#question", "#send", "#camera"):
        assert within(visit, shown, size), shown
    visit.page.click("#sample")
    visit.page.wait_for_selector("#send:enabled")
    visit.page.press("#question", "Enter")  # a question stands there already
    visit.page.wait_for_selector("#send:visible:enabled")
    for shown in ("#canvas", "#question", "#send", "#answers li:first-child .text"):
        assert within(visit, shown, size), shown
    assert visit.page.evaluate("document.documentElement.scrollWidth") == size[0]
    assert visit.wrong == [] and all(asked.startswith((url, "data:,")) for asked in visit.asked)


def within(visit: Visit, selector: str, size: tuple[int, int]) -> bool:
    box = visit.page.locator(selector).bounding_box()
    return bool(box and box["x"] >= 0 and box["y"] >= 0 and box["x"] + box["width"] <= size[0]) and (
        box["y"] + box["height"] <= size[1]
    )


def test_the_sample_picture_is_the_example(model: EdgeModel) -> None:
    with Image.open(PAGE_FILES["/ui/sample.webp"][0]) as sample, Image.open(SCENE) as scene:
        assert sample.size == scene.size
        difference = np.asarray(sample.convert("RGB"), float) - np.asarray(scene.convert("RGB"), float)
    assert np.abs(difference).mean() < 8 and PAGE_FILES["/ui/sample.webp"][0].stat().st_size < 16_000


def test_a_conversation_is_sent_along_until_a_new_one_begins(chromium: Any, url: str, exported: Path) -> None:
    model = EdgeModel.load(exported, threads=1)
    visit = Visit(chromium, url)
    bodies: list[Any] = []
    visit.page.on("request", lambda asked: bodies.append(asked.post_data_json) if "/chat/" in asked.url else None)
    visit.drop(SCENE)
    first = visit.ask("one")
    second = visit.ask("two")
    image, *texts = [part for message in bodies[1]["messages"] for part in parts_of(message)]
    assert image["type"] == "image_url" and [part["text"] for part in texts] == ["one", first, "two"]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "one"}]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "two"},
    ]
    assert second == model.ask(SCENE, messages, max_new_tokens=256).text
    assert visit.page.text_content("#turn") == "2 answers are sent along."

    def begins_anew(change: Any) -> None:
        assert visit.page.is_visible("#turns")
        change()
        visit.ask("one")
        assert [message["role"] for message in bodies[-1]["messages"] if message["role"] != "system"] == ["user"]
        assert parts_of(bodies[-1]["messages"][-1])[0]["type"] == "image_url"
        visit.ask("two")

    begins_anew(lambda: visit.page.click("#anew"))
    begins_anew(lambda: visit.drop(SCENE))
    visit.page.click("#options summary")
    begins_anew(lambda: visit.page.fill("#system", "Be brief."))
    assert bodies[-1]["messages"][0] == {"role": "system", "content": "Be brief."} and len(bodies[-1]["messages"]) == 4
    visit.page.uncheck("#remember")
    visit.ask("three")
    visit.ask("four")
    assert len(bodies[-1]["messages"]) == 2 and not visit.page.is_visible("#turns")
    assert visit.page.locator("#answers li").count() == 10 and visit.wrong == []


def parts_of(message: Any) -> list[Any]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def test_an_answer_is_a_choice_or_json(chromium: Any, url: str) -> None:
    visit = Visit(chromium, url)
    visit.drop(SCENE)
    visit.page.click("#options summary")
    visit.page.check("[name=form][value=choices]", force=True)
    visit.page.fill("#choices", "yes")
    for field, wrong, words in (
        ("choices", " yes, ,yes", "two choices or more"),
        ("schema", "{", "The schema is not JSON"),
        ("schema", "[1]", "no JSON object"),
    ):
        visit.page.check(f"[name=form][value={field}]", force=True)
        visit.page.fill(f"#{field}", wrong)
        visit.page.fill("#question", "what?")
        visit.page.press("#question", "Enter")
        visit.page.locator("#form-problem", has_text=words).wait_for()
    assert visit.page.locator("#answers li").count() == 0
    visit.page.fill("#schema", '{"type": "object", "properties": {"n": {"enum": [1]}}, "required": ["n"]}')
    assert "1" in visit.ask("what?") and not visit.page.is_visible("#form-problem")
    visit.page.check("[name=form][value=choices]", force=True)
    visit.page.fill("#choices", 'left, "right"')
    assert visit.ask("what?") in ("left", '"right"')
    assert visit.wrong == []


ENDED = 'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "%s"}]}\n\ndata: [DONE]\n\n'
SAYING = 'data: {"choices": [{"index": 0, "delta": {"content": "A"}}]}\n\n'
STREAMS = {
    ENDED % "stop": (".text", "No words: the model ended its answer at once."),
    SAYING + ENDED % "length": (".note", "Cut off"),
    SAYING + 'data: {"error": {"message": "out of time"}}\n\n': (".note", "Not answered: out of time"),
    SAYING: (".note", "Not answered: The server ended before the answer's end."),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_what_is_no_answer_is_told_in_words(chromium: Any, url: str, stream: str) -> None:
    visit = Visit(chromium, url)
    visit.drop(SCENE)
    visit.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream")
    )
    visit.page.fill("#question", "what?")
    visit.page.press("#question", "Enter")
    place, words = STREAMS[stream]
    visit.page.locator(f"#answers li:first-child {place}", has_text=words).wait_for()
    visit.page.wait_for_selector("#send:visible:enabled")
    assert visit.page.is_visible("#turns") == ("Not answered" not in words)  # what was not answered is not sent along
    visit.page.unroute("**/v1/chat/completions")
    visit.page.route("**/v1/chat/completions", lambda route: route.abort())
    visit.page.press("#question", "Enter")
    visit.page.locator("#answers li:first-child .note", has_text="The server does not answer").wait_for()


def test_a_picture_that_is_refused_is_not_shown(chromium: Any, url: str) -> None:
    visit = Visit(chromium, url)
    visit.drop(SCENE)
    refusal = {"status": 413, "json": {"error": {"message": "the picture is too large; send a smaller one"}}}
    visit.page.route("**/ui/look", lambda route: route.fulfill(**refusal))
    visit.page.set_input_files("#file", SCENE)
    visit.page.locator("#problem", has_text="the picture is too large; send a smaller one").wait_for()
    assert visit.page.is_visible("#sample") and not visit.page.is_visible("#canvas")
    assert visit.page.is_disabled("#send")


def test_what_was_read_before_is_told(chromium: Any, url: str) -> None:
    details = {"cached_tokens": 80, "image_tokens": 75}
    usage = {"prompt_tokens": 90, "completion_tokens": 3, "total_tokens": 93, "prompt_tokens_details": details}
    timings = {"preprocess_sec": 0.0, "vision_sec": 0.0, "prefill_sec": 0.0, "decode_sec": 0.0}
    told = f"data: {json.dumps({'choices': [], 'usage': usage, 'timings': timings})}\n\n"
    visit = Visit(chromium, url)
    visit.drop(SCENE)
    stream = {"body": SAYING + told + ENDED % "stop", "content_type": "text/event-stream"}
    visit.page.route("**/v1/chat/completions", lambda route: route.fulfill(**stream))
    assert visit.ask("what?") == "A"
    said = visit.page.text_content("li:first-child .usage")
    assert "75 picture and 15 text tokens, 80 of them read before, 3 written" in said
    assert visit.wrong == []


def test_every_term_has_an_explanation_and_is_used() -> None:
    text = {path: file.read_text(encoding="utf-8") for path, (file, _) in PAGE_FILES.items() if "webp" not in path}
    terms = text["/ui/terms.js"].partition("const TERMS = {")[2].partition("};")[0]
    explained = re.findall(r'^  "?([\w ]+)"?:', terms, re.MULTILINE)
    assert sorted(explained) == sorted(set(re.findall('data-term="([^"]+)"', text["/"])))


def test_terms_are_explained_under_the_pointer_and_by_key(chromium: Any, url: str) -> None:
    visit = Visit(chromium, url)
    visit.drop(SCENE)
    visit.ask("what?")
    terms = visit.page.locator("[data-term]:visible")
    for number in range(terms.count()):
        visit.page.mouse.move(0, 0)
        assert not visit.page.is_visible("#tip")
        terms.nth(number).hover()
        assert visit.page.is_visible("#tip") and len(visit.page.text_content("#tip")) > 30
    assert terms.count() >= 10
    visit.page.mouse.move(0, 0)
    explained = []
    for _ in range(40):
        visit.page.keyboard.press("Tab")
        if visit.page.is_visible("#tip"):
            explained.append(visit.page.text_content("#tip"))
            assert visit.page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
            visit.page.keyboard.press("Escape")
            assert not visit.page.is_visible("#tip")
    assert len(set(explained)) >= 6 and visit.wrong == []


def test_a_token_is_asked_for_and_an_older_bundle_shows_what_it_has(chromium: Any, engine: Engine) -> None:
    with serving(engine, Settings(token=TOKEN, ui=True)) as port:
        visit = Visit(chromium, f"http://127.0.0.1:{port}/")
        visit.page.fill("#token", "0" * 16)
        visit.page.press("#token", "Enter")
        visit.page.wait_for_selector("#problem:not([hidden])")
        assert "token is missing or wrong" in visit.page.text_content("#problem")
        visit.page.fill("#token", TOKEN)
        visit.page.press("#token", "Enter")
        visit.page.wait_for_selector("#token-form", state="hidden")
        assert visit.page.text_content("#model") == "stand-in"
        visit.drop(SCENE)
        assert visit.page.is_disabled("[name=view][value=contextual]")
        assert visit.page.is_disabled("[name=view][value=attention]")
        assert "does not tell which patches were merged" in visit.page.text_content("#summary")
        assert not visit.page.is_visible("#budget")
        visit.context.close()
