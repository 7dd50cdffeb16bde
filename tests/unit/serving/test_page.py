"""The page at /, in a real headless Chromium."""

import json
import shutil

import pytest
from support.server_cases import ScriptedEngine, serving, wait_until
from support.serving_cases import IMAGES, SIZES

import internvl_jax
from internvl_jax.serving.engine import Engine
from internvl_jax.serving.settings import EngineSettings

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="NO CHROMIUM: the page is not tested; apt install chromium")
expect = playwright.expect
expect.set_options(timeout=20_000)
QUESTION = "How many shapes are there?"


@pytest.fixture(scope="module")
def chat():
    return internvl_jax.load()


@pytest.fixture(scope="module")
def server(chat):
    with serving(chat, Engine(chat, EngineSettings(**SIZES))) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens pages; at the end, none has logged an error or asked another server for anything."""
    contexts, problems = [], []

    def visit(server, expected=(), **options):
        context = browser.new_context(**options)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: request.url.startswith((server.url, "data:", "blob:")) or problems.append(
            request.url))  # fmt: skip
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and not any(
            part in message.text for part in expected) and problems.append(message.text))  # fmt: skip
        page.goto(server.url)
        page.wait_for_selector("body[data-ready]")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture
def scripted(chat):
    engine = ScriptedEngine()
    with serving(chat, engine, room=2000) as server:
        yield server, engine


def ask(page, question, image=None):
    if image is not None:
        page.set_input_files("#files", str(image))
        page.wait_for_selector("#images img")
    page.fill("#question", question)
    page.press("#question", "Enter")


def last_answer(page):
    """The text of the last answer, when it has ended."""
    page.wait_for_selector("#send:visible")
    return page.locator(".turn").last.locator(".answer").inner_text().strip()


def test_questions_about_images_in_two_languages_and_turns(server, chat, visit):
    page = visit(server)
    assert page.inner_text("#model") == "nano"
    ask(page, QUESTION, IMAGES / "shapes.png")
    first = chat.chat(QUESTION, [IMAGES / "shapes.png"])
    assert last_answer(page) == first.text
    assert "tokens/s" in page.locator(".turn").last.inner_text()
    ask(page, "这是什么词？", IMAGES / "word.png")
    second = chat.chat("这是什么词？", [IMAGES / "shapes.png", IMAGES / "word.png"], first.history)
    expect(page.locator(".turn")).to_have_count(2)
    assert last_answer(page) == second.text
    assert page.locator(".turn .thumbnails img").count() == 2
    page.locator(".turn").last.get_by_role("button", name="Copy").click()
    expect(page.locator("#status")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == second.text

    # It is kept over a reload, exported, and deleted.
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.locator(".turn").count() == 2
    assert last_answer(page) == second.text
    with page.expect_download() as download:
        page.click("#export")
    exported = json.loads(download.value.path().read_text())
    assert [message["role"] for message in exported["messages"]] == ["user", "assistant"] * 2
    again = server.client.chat.completions.create(model=exported["model"], messages=exported["messages"][:3])
    assert again.choices[0].message.content == second.text
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#new")
    page.wait_for_selector("#empty:visible")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.locator(".turn").count() == 0


def test_pasted_and_dropped_images(server, chat, visit):
    page = visit(server)
    transfer = """async ([kind, target]) => {
        const canvas = Object.assign(document.createElement("canvas"), {width: 40, height: 30});
        const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
        const data = new DataTransfer();
        data.items.add(new File([blob], `${kind}.png`, {type: "image/png"}));
        const options = {bubbles: true, cancelable: true};
        document.querySelector(target).dispatchEvent(kind === "paste"
            ? new ClipboardEvent(kind, {...options, clipboardData: data})
            : new DragEvent(kind, {...options, dataTransfer: data}));
    }"""
    for number, (kind, target) in enumerate((("paste", "#question"), ("drop", "main")), 1):
        page.evaluate(transfer, [kind, target])
        expect(page.locator("#images img")).to_have_count(number)
    page.get_by_role("button", name="Remove drop.png").click()
    assert page.locator("#images img").count() == 1
    page.set_input_files("#files", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no image"})
    expect(page.locator("#alert")).to_contain_text("notes.txt is not")
    before = server.service.engine.stats.image_queries
    ask(page, "What is this?")
    assert last_answer(page)
    assert server.service.engine.stats.image_queries == before + 1


def test_streaming_stop_and_retry(scripted, visit):
    server, engine = scripted
    page = visit(server)
    ask(page, "Hello")
    (name,) = engine.wait()
    engine.say(name, "The **first** ")
    expect(page.locator(".answer strong")).to_have_text("first")
    assert page.is_hidden("#send")
    page.click("#stop")
    wait_until(lambda: engine.cancelled == [name])
    engine.finish(name, "cancelled")
    assert last_answer(page) == "The first"
    assert "Stopped." in page.locator(".turn").inner_text()
    page.get_by_role("button", name="Retry").click()
    (name,) = engine.wait()
    assert len(engine.requests[name][0].input_ids) > 0
    engine.finish(name, text="Second")
    assert last_answer(page) == "Second"
    expect(page.get_by_role("button", name="Copy")).to_be_visible()


def test_settings_reach_the_request(scripted, visit):
    server, engine = scripted
    page = visit(server)
    page.click("#settings-button")
    page.fill("#temperature", "0.7")
    page.fill("#max-tokens", "17")
    ask(page, "Hello")
    (name,) = engine.wait()
    generation = engine.requests[name][0].generation
    assert (generation.temperature, generation.max_new_tokens) == (0.7, 17)
    engine.finish(name, "length", text="so")
    last_answer(page)
    assert "reached the maximum" in page.locator(".turn").inner_text()
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.input_value("#temperature") == "0.7"
    page.click("#settings-button")
    page.fill("#temperature", "9")
    page.fill("#question", "Hello")
    page.press("#question", "Enter")
    assert not engine.requests
    assert page.locator(".turn").count() == 1


def test_enter_belongs_to_an_input_method(scripted, visit):
    """Chinese is typed through one, and Enter ends a composition, not a question."""
    server, engine = scripted
    page = visit(server)
    page.fill("#question", "ni hao")
    page.evaluate("""document.querySelector("#question").dispatchEvent(new KeyboardEvent("keydown",
        {key: "Enter", isComposing: true, bubbles: true, cancelable: true}))""")
    page.press("#question", "Shift+Enter")
    assert not engine.requests
    assert page.locator(".turn").count() == 0
    assert page.input_value("#question") == "ni hao\n"


def test_errors_are_sentences(scripted, visit):
    server, engine = scripted
    page = visit(server, expected=("Failed to load resource",))
    page.set_input_files("#files", {"name": "bad.png", "mimeType": "image/png", "buffer": b"no image"})
    page.wait_for_selector("#images img")
    ask(page, "Hello")
    last_answer(page)
    assert "The image is damaged, or in another format" in page.inner_text(".error")
    ask(page, "Hello again")
    (name,) = engine.wait()
    assert len(engine.requests[name][0].images) == 0
    engine.say(name, "half")
    expect(page.locator(".answer").last).to_contain_text("half")
    engine.finish(name, "error", tokens=())
    last_answer(page)
    assert "The model gave no answer" in page.locator(".error").last.inner_text()
    assert "left out" in page.locator(".turn").first.inner_text()
    page.context.set_offline(True)
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".error").last).to_contain_text("The server cannot be reached")


def test_a_key_is_asked_for(chat, visit):
    with serving(chat, ScriptedEngine(), api_keys=("secret",), local_only=False) as server:
        page = visit(server, expected=("Failed to load resource",))
        assert "needs an API key" in page.inner_text("#alert")
        page.fill("#api-key", "secret")
        page.press("#api-key", "Tab")
        expect(page.locator("#model")).to_have_text("nano")
        assert page.inner_text("#alert") == ""


ATTACK = """<script>window.hit = 1</script><img src=x onerror="window.hit = 2"><a href="javascript:window.hit=3">a</a>
<iframe src="https://evil.example"></iframe><form action="https://evil.example"><input></form>
![x](https://evil.example/x.png) <p id="question" style="position:fixed">over</p> <svg onload="window.hit=4"></svg>

| a | b |
|---|---|
| 1 | 2 |

```python
print("code")
```
"""


def test_answers_cannot_run_or_load_anything(scripted, visit):
    server, engine = scripted
    page = visit(server, expected=("Content Security Policy",))  # what the sanitizer parses, before it drops it
    ask(page, "Hello")
    (name,) = engine.wait()
    engine.finish(name, text=ATTACK)
    last_answer(page)
    assert page.locator(".answer td").count() == 2
    assert "print" in page.inner_text(".answer code")
    assert page.evaluate("window.hit") is None
    for selector in ("script", "img", "iframe", "form", "input", "svg", "[style]", "[id]", "[onerror]"):
        assert page.locator(f".answer {selector}").count() == 0, selector
    assert page.locator(".answer a").get_attribute("href") is None


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (375, "dark"),
        (1024, "light"),
        pytest.param(375, "light", marks=pytest.mark.long),
        pytest.param(1024, "dark", marks=pytest.mark.long),
    ],
)
def test_anyone_can_use_it(scripted, visit, scheme, width):
    """axe finds nothing; nothing is wider than a phone; all of it can be reached by keyboard."""
    server, engine = scripted
    page = visit(server, viewport={"width": width, "height": 700}, color_scheme=scheme, bypass_csp=True)
    page.click("#settings-button")
    ask(page, "A question " + "that is long " * 20, IMAGES / "shapes.png")
    (name,) = engine.wait()
    engine.finish(name, text="# Title\n\n[link](https://example.com) and `code`\n\n" + "word" * 100 + ATTACK)
    last_answer(page)
    ask(page, "And?", IMAGES / "word.png")
    (name,) = engine.wait()
    engine.finish(name, "error", tokens=())
    last_answer(page)
    page.set_input_files("#files", str(IMAGES / "shapes.png"))
    page.wait_for_selector("#images img")
    page.fill("#question", "")
    page.press("#question", "Enter")
    assert page.inner_text("#alert") == "Write a question first."
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = axe.Axe().run(page).response["violations"]
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
    reached = set()
    page.evaluate("document.activeElement.blur()")
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    fields = {"temperature", "max-tokens", "api-key", "question"}
    assert fields | {"new", "export", "settings-button", "add", "send", "Retry"} <= reached
