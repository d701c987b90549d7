"""A real server on a real socket: slow clients, clients that leave, OpenAI's own client, and a browser."""

import shutil
import socket
import time

import pytest

pytest.importorskip("fastapi", reason="FastAPI is not installed (pip install 'calibtrain[serve]')")
import httpx

from calibtrain.app import protocol
from calibtrain.pipeline.reply import REFUSAL
from calibtrain.pipeline.scope import at_most

HEAD = b"POST /api/answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 20\r\n"


def connect(address):
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def ask(address, question):
    return httpx.post(f"{address}/api/answer", json={"question": question}, timeout=30).json()


def test_headers_that_never_end_are_hung_up_on(monkeypatch, address):
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.2)
    with connect(address) as slow:
        slow.sendall(HEAD)
        assert slow.recv(100) == b""
    assert ask(address, "still there")["best_guess"] == "echo still there"


def test_a_busy_connection_is_kept_and_an_idle_one_closed(monkeypatch, address):
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.15)
    request = HEAD.replace(b"20", b"21") + b"\r\n" + b'{"question": "again"}'
    with connect(address) as kept:
        for _ in range(60):
            kept.sendall(request)
            found = b""
            while b'"refusal"' not in found:
                found += kept.recv(10_000)
            assert b" 200 " in found
        assert kept.recv(100) == b""


def test_a_refused_body_is_read_so_that_the_refusal_arrives(address):
    body = b'{"question": "' + b"x" * 2_000_000 + b'"}'
    for _ in range(20):
        response = httpx.post(f"{address}/api/answer", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 413


def test_a_body_that_never_ends_gets_408(address):
    with connect(address) as slow:
        slow.sendall(HEAD + b"\r\n{")
        assert b" 408 " in slow.recv(1000)
    assert ask(address, "still there")["best_guess"] == "echo still there"


def test_an_answer_in_work_is_waited_for_however_long_the_headers_may_take(monkeypatch, address, model):
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.1)
    model.seconds = 0.6
    assert ask(address, "slow")["best_guess"] == "echo slow"


def test_a_client_that_left_is_not_worked_for(address, model):
    model.go.clear()
    body = b'{"question": "gone"}'
    first = connect(address)
    first.sendall(HEAD + b"\r\n" + body)  # in work
    time.sleep(0.3)
    second = connect(address)
    second.sendall(HEAD + b"\r\n" + body)  # waits
    time.sleep(0.2)
    second.close()
    time.sleep(0.3)
    model.go.set()
    assert b" 200 " in first.recv(1000)
    first.close()
    assert ask(address, "next")["best_guess"] == "echo next"
    assert model.batches == [1, 1]


def test_many_idle_connections_shut_nobody_out(address):
    idle = [connect(address) for _ in range(200)]
    assert ask(address, "still there")["best_guess"] == "echo still there"
    for one in idle:
        one.close()


@pytest.mark.peer
def test_the_official_client_works(address):
    openai = pytest.importorskip("openai", reason="the openai client is not installed (make peers)")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)
    assert [model.id for model in client.models.list()] == ["demo"]
    message = [{"role": "user", "content": "what is it"}]
    whole = client.chat.completions.create(model="demo", messages=message, temperature=0)
    assert whole.choices[0].message.content == "echo what is it"
    assert whole.calibtrain["abstained"] is False
    assert 0 < whole.calibtrain["confidence"] < 1
    chunks = list(client.chat.completions.create(model="demo", messages=message, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "echo what is it"
    assert chunks[-1].calibtrain == whole.calibtrain
    message[0]["content"] = "doubt"
    doubted = client.chat.completions.create(model="demo", messages=message, extra_body={"calibtrain": {"risk": 0.1}})
    assert doubted.choices[0].message.content == REFUSAL
    with pytest.raises(openai.BadRequestError, match="greedy"):
        client.chat.completions.create(model="demo", messages=message, temperature=1.3)
    with pytest.raises(openai.NotFoundError, match="only 'demo'"):
        client.chat.completions.create(model="other", messages=message)


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (make peers)")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=quiet)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, address):
    """Open the page at a size and in a colour scheme; a script's error or a refused resource fails the test."""
    problems = []

    def open_page(width=1000, height=900, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(address)
        return page

    yield open_page
    assert problems == []


def put(page, question):
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.wait_for_selector(f'#asked:text-is("{question}")')


def lightness(page, selector):
    red, green, blue = page.eval_on_selector(
        selector, "one => getComputedStyle(one).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
    )
    return (red + green + blue) / 765


@pytest.mark.peer
def test_asking_answering_and_abstaining(opened):
    page = opened()
    assert not page.is_visible("#result")
    put(page, "what is it")
    assert page.inner_text("#answer") == "echo what is it"
    assert "likely to be right" in page.inner_text("#sentence") or "certain" in page.inner_text("#sentence")
    assert page.get_attribute("#gauge", "aria-valuetext").split("%")[0].isdigit()
    assert page.locator("#pieces li").count() == 3
    assert not page.is_visible("#guess")
    put(page, "doubt")
    assert page.inner_text("#answer") == REFUSAL
    assert page.inner_text("#state") == "Not sure enough to answer"
    assert page.inner_text("#chance").endswith("%")
    assert "I answer from" in page.inner_text("#reason")
    assert not page.is_visible("#guess-text")
    assert not page.is_visible("#pieces")
    page.click("#guess summary")
    assert page.inner_text("#guess-text") == "echo doubt"


@pytest.mark.peer
def test_the_slider_moves_the_threshold_along_the_certified_curve(opened, answerer):
    page = opened()
    put(page, "doubt")
    levels = answerer.levels()
    for index, level in enumerate(levels):
        page.fill("#risk", str(index))
        promise = page.inner_text("#promise")
        assert f"At most {at_most(level.risk)} of its answers" in promise
        assert page.inner_text("#scope") == level.promise
        assert page.inner_text("#limit") == level.limit
        assert page.get_attribute("#risk", "aria-valuetext") == promise
        stop = page.inner_text(".stops li.chosen")
        assert stop == f"at most {at_most(level.risk)}"
        wanted = REFUSAL if answerer.answer("doubt").probability < level.threshold else "echo doubt"
        assert page.inner_text("#answer") == wanted
    assert page.inner_text("#answer") == "echo doubt"  # the last stop answers everything, and still promises


@pytest.mark.peer
def test_the_keyboard_is_enough(opened):
    page = opened()
    page.keyboard.type("doubt")  # the field has the focus from the start
    page.keyboard.press("Enter")
    page.wait_for_selector('#asked:text-is("doubt")')
    for _ in range(4):  # the button, two examples, the guess kept back
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.inner_text("#guess-text") == "echo doubt"
    page.keyboard.press("Tab")
    before = page.input_value("#risk")
    page.keyboard.press("End")
    assert page.input_value("#risk") != before
    assert page.inner_text("#answer") == "echo doubt"


@pytest.mark.peer
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_cut_off_at_any_width(opened, width):
    page = opened(width, 800)
    put(page, "a " + "very" * 40 + " long word")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.peer
def test_an_example_is_asked_with_a_click(opened):
    page = opened()
    page.click(".example >> nth=1")
    page.wait_for_selector('#asked:text-is("why is it")')
    assert page.inner_text("#answer") == "echo why is it"


@pytest.mark.peer
def test_dark_mode_is_dark(opened):
    assert lightness(opened(), "body") > 0.9
    assert lightness(opened(scheme="dark"), "body") < 0.2


@pytest.mark.peer
def test_what_people_and_models_write_stays_text(opened):
    page = opened()
    question = "<img src=x onerror=document.title='owned'>"
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.wait_for_selector("#result:not([hidden])")
    assert page.inner_text("#answer") == f"echo {question}"
    assert page.locator("#result img").count() == 0
    assert "owned" not in page.title()


@pytest.mark.peer
def test_a_refusal_of_the_server_is_shown(browser, address):
    page = browser.new_page()
    page.goto(address)
    page.fill("#question", "a <|im_end|> b")
    page.press("#question", "Enter")
    page.wait_for_selector("#problem:not([hidden])")
    assert "control token" in page.inner_text("#problem")
    assert page.is_enabled("#ask button")
