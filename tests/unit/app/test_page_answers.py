"""What the page makes of answers of every kind, in a real browser: a model's text is untrusted, whatever it holds."""

import json

import pytest

from calibtrain.pipeline.promise import UNLIKE
from calibtrain.pipeline.question import Shapes
from calibtrain.pipeline.reply import REFUSAL
from tests.unit.app.test_live import browser, opened, put  # noqa: F401

server = pytest.importorskip(
    "calibtrain.app.server", reason="FastAPI is not installed (pip install 'calibtrain[serve]')"
)
pytestmark = pytest.mark.peer
HOSTILE = (
    "<script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title = 'owned'\">",
    "[click](javascript:document.title='owned') ![x](http://127.0.0.1:9/x.png) <javascript:alert(1)>",
    "**<b onclick=alert(1)>bold</b>** `<i>code</i>`",
    "```html\n<iframe src='http://127.0.0.1:9'></iframe>\n```",
    "- <svg/onload=alert(1)>\n1. &lt;b&gt;\n> <style>*{display:none}</style>\n# <h1>x</h1>",
    "```\nnever closed <b>",
    "&#60;img src=x&#62; \u202etxt.exe \x00",
    "*" * 4000 + "`" * 4000 + "_" * 4000 + "[" * 4000 + "> " * 4000,
)
WRITTEN = (
    ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
    ("**a** *b* _c_ `d*e*`", "<p><strong>a</strong> <em>b</em> <em>c</em> <code>d*e*</code></p>"),
    ("snake_case_name, 2 * 3 * 4", "<p>snake_case_name, 2 * 3 * 4</p>"),
    ("- a\n- **b**", "<ul><li>a</li><li><strong>b</strong></li></ul>"),
    ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    ("# T\ntext\n---\n> q\n> r", '<p class="heading">T</p><p>text</p><hr><blockquote><p>q\nr</p></blockquote>'),
    ("```py\nif a < b:\n    *c*\n```\nend", '<pre tabindex="0"><code>if a &lt; b:\n    *c*</code></pre><p>end</p>'),
    ("a\r\n\r\nb", "<p>a</p><p>b</p>"),
    ("", ""),
)
ALLOWED = {"P", "STRONG", "EM", "CODE", "PRE", "UL", "OL", "LI", "BLOCKQUOTE", "HR"}
RENDER = """text => {
  const box = document.createElement('div');
  box.append(markdown.render(text));
  document.body.append(box);
  const made = [...box.querySelectorAll('*')];
  const attributes = made.flatMap((one) => one.getAttributeNames());
  return { html: box.innerHTML, text: box.textContent, names: made.map((one) => one.tagName), attributes };
}"""


def test_nothing_that_a_model_writes_becomes_markup(opened):  # noqa: F811
    page = opened()
    for text in HOSTILE:
        found = page.evaluate(RENDER, text)
        assert set(found["names"]) <= ALLOWED
        assert set(found["attributes"]) <= {"tabindex", "class", "start"}
        for angle in ("<script", "<img", "<iframe", "<svg", "<style", "<b>"):
            assert (angle in found["text"]) == (angle in text)
    page.wait_for_timeout(50)
    assert "owned" not in page.title()


def test_markdown_is_rendered(opened):  # noqa: F811
    page = opened()
    for text, html in WRITTEN:
        assert page.evaluate(RENDER, text)["html"] == html


def reply(text, **more):
    common = {
        "question": "q", "tokens": [], "refusal": "I do not know.", "silence": "", "promise": "Certified.", "limit": "",
        "confidence": 0.93, "word": "likely", "sentence": "It is likely to be right (93%)", "abstained": False,
        "best_guess": text, "reply": "", "parts": [], "prediction_set": None,
    }  # fmt: skip
    return common | more


def part(name, text, start, probability, kept=True):
    return {"name": name, "text": text, "start": start, "stop": start + len(text), "probability": probability,
            "word": "likely", "kept": kept}  # fmt: skip


def ask(page, answer):
    """Ask, with `answer` in the place of the server's."""
    page.route("**/api/answer", lambda route: route.fulfill(status=200, content_type="application/json",
                                                            body=json.dumps(answer)))  # fmt: skip
    page.fill("#question", "q")
    page.press("#question", "Enter")
    page.wait_for_selector("#result:not([hidden])")


@pytest.fixture
def by_claims(monkeypatch):
    """Levels whose thresholds, about 0.7, are those of single claims."""
    shown = server._shown
    monkeypatch.setattr(server, "_shown", lambda level: shown(level) | {"claims": True})


def test_claims_are_shaded_one_by_one_and_withheld_ones_are_not_shown(by_claims, opened):  # noqa: F811
    page, text = opened(), "🦊 Lyon is in France. It has nine rivers. <b>It is old.</b>"
    characters = text
    claims = ["Lyon is in France.", "It has nine rivers.", "<b>It is old.</b>"]
    parts = [part("claim", one, characters.index(one), p, kept) for one, p, kept in zip(
        claims, (0.97, 0.2, 0.95), (True, False, True), strict=True)]  # fmt: skip
    ask(page, reply(text, parts=parts))
    assert page.inner_text("#answer") == "🦊 Lyon is in France. 97% [withheld] <b>It is old.</b> 95%"
    assert page.locator("#answer .claim").count() == 2
    assert "rivers" not in page.inner_text("#result")
    assert page.inner_text("#state") == "Answered in part: 1 of 3 withheld"
    assert not page.is_visible("#pieces")  # which are pieces of all that it said
    page.click("#guess summary")
    assert "It has nine rivers. 20%" in page.inner_text("#guess-text")
    assert page.locator("#guess-text .claim.low").inner_text() == "It has nine rivers."
    assert page.inner_text("#reason").startswith("I give 2 of my 3 claims: those from 71% on")
    assert page.inner_text("#promise").startswith("At most 10% of its replies hold a wrong claim.")
    assert not page.is_visible("#measure")
    ask(page, reply(text, question="r", parts=[one | {"probability": 0.1} for one in parts]))
    page.wait_for_selector('#asked:text-is("r")')
    assert page.inner_text("#answer") == REFUSAL


def test_json_is_set_out_with_a_confidence_for_each_field(opened):  # noqa: F811
    page, text = opened(), '{"country":"France","population":"<b>"}'
    parts = [part("country", "France", 12, 0.9), part("population", "<b>", 34, 0.3, kept=False)]
    ask(page, reply(text, parts=parts))
    assert page.inner_text("#answer pre") == '{\n  "country": "France",\n  "population": "<b>"\n}'
    assert page.locator("#answer tbody tr").count() == 2
    assert page.inner_text("#answer tbody tr >> nth=0").split("\t") == ["country", "France", "90%, likely"]


def test_json_of_which_a_part_is_withheld_is_not_set_out_whole(by_claims, opened):  # noqa: F811
    page, text = opened(), '{"country":"France","population":"<b>"}'
    ask(page, reply(text, parts=[part("country", "France", 12, 0.9), part("population", "<b>", 34, 0.3)]))
    assert page.locator("#answer .withheld-row").count() == 1
    assert page.locator("#answer pre").count() == 0
    assert "<b>" not in page.inner_text("#answer")


def test_the_answer_comes_first_and_the_reasoning_is_folded(opened):  # noqa: F811
    page = opened()
    ask(page, reply("12", reply="First **this**.\n\nThen 12.", prediction_set=["12", "<i>13</i>"]))
    assert page.inner_text("#answer") == "12"
    assert not page.is_visible("#reasoning-text")
    page.focus("#reasoning summary")
    page.keyboard.press("Enter")
    assert page.inner_text("#reasoning-text") == "First this.\n\nThen 12."
    assert page.locator("#set-options li").all_inner_texts() == ["12", "<i>13</i>"]
    assert not opened().is_visible("#set")


def test_a_question_unlike_the_graded_ones_is_not_shown_as_if_it_were_covered(opened):  # noqa: F811
    page = opened()
    ask(page, reply("Paris", silence=UNLIKE))
    assert page.inner_text("#silence") == UNLIKE
    assert page.inner_text("#state") == "Not covered by the certificate"
    assert "as measured on other questions" in page.inner_text("#sentence")
    assert "not known" in page.inner_text("#reason")
    assert page.is_visible("#uncovered")
    assert not page.is_visible("#measure")
    ask(page, reply("France", question="r"))
    page.wait_for_selector('#asked:text-is("r")')
    assert not page.is_visible("#silence")
    assert not page.is_visible("#uncovered")
    assert page.is_visible("#measure")


def test_lines_are_kept_and_shift_enter_makes_one(opened):  # noqa: F811
    page, sent = opened(), []
    page.on("request", lambda one: sent.append(one.post_data_json) if "/api/answer" in one.url else None)
    page.click("#question")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.get_attribute("#question", "rows") == "2"
    page.keyboard.press("Enter")
    page.wait_for_selector("#result:not([hidden])")
    assert sent == [{"question": "one\ntwo", "before": [], "options": []}]


def test_a_conversation_goes_on_from_what_was_given_and_starts_anew(opened, answerer, monkeypatch):  # noqa: F811
    monkeypatch.setattr(answerer, "shapes", Shapes(system=None, conversations=True, options=True))
    page, sent = opened(), []
    page.on("request", lambda one: sent.append(one.post_data_json) if "/api/answer" in one.url else None)
    page.click(".system summary")
    page.fill("#system", "Be brief.")
    put(page, "doubt")
    put(page, "and then")
    assert page.inner_text("#thread") == f"You: doubt\nModel: {REFUSAL}"  # not the guess that it kept back
    page.click("#anew")
    put(page, "again")
    system = {"role": "system", "content": "Be brief."}
    before = [{"role": "user", "content": "doubt"}, {"role": "assistant", "content": REFUSAL}]
    assert [one["before"] for one in sent] == [[system], [system, *before], [system]]
    page.fill("#options", " a \n\nb")
    ask(page, reply("a"))  # the echoing model's task takes none
    assert sent[-1]["options"] == ["a", "b"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_told_can_be_read(by_claims, opened, scheme):  # noqa: F811
    page = opened(scheme=scheme)
    claims = [part("claim", "a b", 0, 0.99), part("claim", "c", 4, 0.1, kept=False)]
    ask(page, reply("a b c", parts=claims, silence=UNLIKE))
    for selector in ("#silence", "#state", ".claim", ".withheld", ".claim-chance", "#enter"):
        assert page.eval_on_selector(selector, CONTRAST) >= 4.5, selector
    ask(page, reply('{"k":"v"}', parts=[part("k", "v", 5, 0.9)]))
    page.wait_for_selector(".parts")
    for selector in (".parts caption", ".parts td", "#answer pre"):
        assert page.eval_on_selector(selector, CONTRAST) >= 4.5, selector


CONTRAST = """one => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const over = [];
  for (let at = one; at; at = at.parentElement) over.unshift(getComputedStyle(at).backgroundColor);
  canvas.fillStyle = getComputedStyle(document.body).backgroundColor;
  canvas.fillRect(0, 0, 1, 1);
  for (const colour of over) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
  const back = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  canvas.fillStyle = getComputedStyle(one).color;
  canvas.fillRect(0, 0, 1, 1);
  const front = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const [high, low] = [light(front), light(back)].sort((a, b) => b - a);
  return (high + 0.05) / (low + 0.05);
}"""
