"""The demo page in a real browser.

To load it takes long, so one loaded page is asked for much. How each test leaves it is
photographed into the folder that the environment variable MOONDREAM_SCREENSHOTS names, if it does.
"""

import base64
import contextlib
import io
import os
import re

import pytest
from browsers import NEEDS, PATIENCE_MS, chromium
from canned import client_of
from PIL import Image

import moondream_async as md
from moondream_async.web import DemoPage

expect = pytest.importorskip("playwright.async_api", reason=NEEDS).expect

pytestmark = pytest.mark.slow  # to start a browser takes seconds

SKILLS = ("caption", "query", "detect", "point", "segment", "chat")
FIELDS = {"query": "question", "detect": "object", "point": "object", "segment": "object"}
FIELDS["chat"] = "message"
CIRCLE = (60, 180, 220, 340)  # where the red circle is in the sample, in pixels
SIZE = (640, 480)
TIMES = "\N{MULTIPLICATION SIGN}"
MARK = (0x7C, 0x3A, 0xED)
BEGUN = f"A bright 640{TIMES}480"  # three words of the simulator's caption
SCREENSHOTS = os.environ.get("MOONDREAM_SCREENSHOTS")


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
async def window():
    """One for all tests: it is opening windows and tabs that takes the time."""
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    async with chromium(*camera) as browser:
        window = await browser.new_context(permissions=["clipboard-read", "clipboard-write"])
        window.set_default_timeout(PATIENCE_MS)
        await window.new_page()
        yield window


@pytest.fixture
async def page(client, photo):
    async with DemoPage(client, photo, simulated=True, port=0) as page:
        yield page


class Tab:
    """A tab with the page in it, and what a test does there."""

    def __init__(self, tab):
        self.tab = tab
        self.complaints = []
        self.hosts = set()
        self._listeners = {
            "console": self._note,
            "pageerror": lambda error: self.complaints.append(str(error)),
            "request": lambda request: self.hosts.add(origin(request.url)),
        }
        for name, listener in self._listeners.items():
            tab.on(name, listener)
        self.find = tab.locator
        self.button = lambda name: tab.get_by_role("button", name=name)
        self.answer = tab.locator("#answer")
        self.error = tab.get_by_role("alert")
        self.state = tab.locator("#state")
        self.start = tab.locator("#ask")
        self.stop = self.button("Stop")
        self.name = tab.locator("#picture-name")
        self.code = tab.locator("#code")
        self.examples = tab.locator("#examples button")
        self.places = tab.locator("#places button")
        self.edges = tab.locator("#shapes .edge")
        self.labels = tab.locator("#labels span")
        self.turns = tab.locator("#conversation li")

    def _note(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    async def leave(self):
        """Forget what was asked, go nowhere, which ends what is on its way, and listen no more."""
        # The next page may get the same port, and would begin with what was asked in this one.
        await self.tab.evaluate("location.protocol === 'http:' && sessionStorage.clear()")
        await self.tab.goto("about:blank")
        for name, listener in self._listeners.items():
            self.tab.remove_listener(name, listener)

    async def open(self, url):
        await self.tab.goto(url)
        await expect(self.code).not_to_be_empty()  # which is the last thing to be there

    async def choose(self, skill):
        await self.tab.get_by_role("radio", name=skill.title(), exact=True).check(force=True)

    async def ask(self, skill="caption", **fields):
        await self.choose(skill)
        for name, value in fields.items():
            await self.find(f"[name={name}]").fill(value)
        await self.start.click()

    async def asked(self, skill="caption", **fields):
        await self.ask(skill, **fields)
        await self.shows(state=re.compile("^Done"))

    async def until_done(self):
        await expect(self.start).to_be_visible()

    async def shows(self, **parts):
        for name, text in parts.items():
            await expect(getattr(self, name)).to_have_text(text)

    async def resize(self, width, height):
        await self.tab.set_viewport_size({"width": width, "height": height})

    async def has_mark(self, x, y):
        """Whether something is drawn within a few pixels of that place in the sample picture."""
        shot = Image.open(io.BytesIO(await self.find("#frame").screenshot()))
        scale = shot.width / SIZE[0]
        x, y = x * scale, y * scale
        area = shot.convert("RGB").crop((x - 8, y - 8, x + 8, y + 8))
        return any(
            max(abs(one - two) for one, two in zip(colour, MARK, strict=True)) < 24
            for _, colour in area.getcolors(1000)
        )


def origin(url):
    return "/".join(url.removeprefix("blob:").split("/")[:3])


@pytest.fixture
async def bare_tab(window, page, request):  # the page is there until the tab has left it
    """A tab with nothing in it yet, whose complaints nobody minds."""
    tab = Tab(window.pages[0])
    await tab.resize(1280, 800)
    await tab.tab.emulate_media(color_scheme="light", reduced_motion="no-preference")
    yield tab
    if SCREENSHOTS:
        await tab.tab.screenshot(path=f"{SCREENSHOTS}/{request.node.name}.png", full_page=True)
    await tab.leave()


@pytest.fixture
async def tab(bare_tab, page):
    """A tab with the page in it, which asks no one but its own server, and never complains."""
    await bare_tab.open(page.url)
    yield bare_tab
    assert bare_tab.complaints == []
    assert bare_tab.hosts == {origin(page.url)}


@pytest.fixture
async def tab_of(bare_tab, photo):
    """Opens the page of a test's own client."""
    async with contextlib.AsyncExitStack() as stack:

        async def tab_of(client, **options):
            await stack.enter_async_context(client)
            page = await stack.enter_async_context(DemoPage(client, photo, port=0, **options))
            stack.push_async_callback(bare_tab.leave)
            await bare_tab.open(page.url)
            return bare_tab

        yield tab_of


async def assert_cut_off(request):
    """The page's reader has gone, and the connection to the server with it."""
    await request.ended.wait()
    assert request.disconnected


# -- the beginning ------------------------------------------------------------------------

CONTROLS = {"button", "checkbox", "radio", "spinbutton", "textbox", "image", "log", "region"}


async def test_page_says_that_no_model_looks_and_can_be_used_by_name_and_by_keyboard(
    tab, client, photo
):
    by_role = tab.tab.get_by_role
    await expect(by_role("heading", level=1)).to_have_count(1)
    await expect(tab.tab.get_by_text("No model is looking at the picture")).to_be_visible()
    await expect(tab.name).to_have_text(f"sample.jpg, 640 {TIMES} 480")
    await expect(by_role("img", name="sample.jpg")).to_be_visible()

    press = tab.tab.keyboard.press
    outline = "(element) => getComputedStyle(element).outlineStyle"
    await press("Tab")
    await expect(tab.button("Choose a picture")).to_be_focused()
    for _ in ("photo", "live", "skill"):
        await press("Tab")
    await expect(by_role("radio", name="Caption")).to_be_focused()
    assert await tab.find("[value=caption] + span").evaluate(outline) == "solid"
    await press("ArrowRight")
    await press("Tab")
    await expect(tab.tab.get_by_label("Question")).to_be_focused()
    await tab.tab.keyboard.type("Where is the sun?")  # replaces what was selected by Tab
    await press("Enter")
    await expect(tab.answer).to_have_text((await client.query(photo, "Where is the sun?")).answer)
    await expect(tab.tab.get_by_label("Question")).to_be_focused()
    for _ in range(await tab.examples.count() + 2):  # and the checkbox
        await press("Tab")
    await expect(tab.start).to_be_focused()
    assert await tab.start.evaluate(outline) == "solid"

    tools = await tab.tab.context.new_cdp_session(tab.tab)
    await tab.tab.get_by_text("Settings").click()
    for skill in SKILLS:
        await tab.choose(skill)
        assert (await tab.examples.count() > 1) == (skill != "caption")
        nodes = (await tools.send("Accessibility.getFullAXTree"))["nodes"]
        controls = [
            (node["role"]["value"], node.get("name", {}).get("value", "").strip())
            for node in nodes
            if not node["ignored"] and node["role"]["value"] in CONTROLS
        ]
        assert len(controls) > 12
        assert [role for role, name in controls if not name] == []
        names = [name for role, name in controls if role in ("button", "textbox", "spinbutton")]
        assert len(names) == len({*names})


# -- an answer being written --------------------------------------------------------------


async def test_text_is_shown_as_it_is_written_and_heard_in_whole_sentences(tab, simulator):
    held = simulator.script.caption(["A c", "at. ", "It sl", "eeps."], hold_after=3)
    heard = tab.answer.locator("span:not([aria-hidden])")  # in a live region
    await expect(tab.answer).to_have_attribute("aria-live", "polite")
    await tab.ask()
    await tab.shows(answer="A cat. It sl", state="Writing")
    await expect(tab.stop).to_be_visible()
    assert await heard.all_text_contents() == ["A cat. "]
    held.release()
    await tab.shows(state="Done", answer="A cat. It sleeps.")
    assert await heard.all_text_contents() == ["A cat. ", "It sleeps."]
    await expect(tab.find("#first")).to_have_text(re.compile(r"^\d+\.\d\d s$"))
    await expect(tab.find("#pace")).to_have_text(re.compile(r"^\d+\.\d chunks/s$"))
    await expect(tab.find("#count")).to_have_text("4")
    await expect(tab.find("#request")).not_to_be_empty()


async def test_stop_closes_the_connection_and_keeps_the_text(tab, simulator):
    animation = "(tail) => getComputedStyle(tail, '::after').animationName"
    for how, motion, blinks in (("button", "no-preference", "blink"), ("Escape", "reduce", "none")):
        simulator.faults.append("stall=3")
        await tab.tab.emulate_media(reduced_motion=motion)
        await tab.ask()
        await expect(tab.answer).to_have_text(BEGUN)
        assert await tab.answer.locator("[aria-hidden]").evaluate(animation) == blinks
        await expect(tab.stop).to_be_focused()
        await (tab.stop.click() if how == "button" else tab.tab.keyboard.press(how))
        await assert_cut_off(simulator.requests[-1])
        await expect(tab.state).to_contain_text("Stopped")
        await tab.shows(answer=BEGUN, error="")
        await expect(tab.start).to_be_focused()
    for skill in ("caption", "detect"):  # whose model still thinks
        simulator.faults.append("slow_start=1000")
        asked = len(simulator.requests)
        await tab.ask(skill)
        await simulator.wait_until(lambda asked=asked: len(simulator.requests) > asked)
        await expect(tab.state).to_contain_text("Waiting")
        await tab.stop.click()
        await assert_cut_off(simulator.requests[-1])
        await expect(tab.state).to_contain_text("Stopped")
    await tab.asked()  # and all goes well again


async def test_closing_the_tab_closes_the_connection(window, page, simulator):
    simulator.faults.append("stall=3")
    tab = Tab(await window.new_page())
    await tab.open(page.url)
    await tab.ask()
    await expect(tab.answer).not_to_be_empty()
    await tab.tab.close()
    await assert_cut_off(simulator.requests[0])


LINE = "It goes on, and on, and on, over more than one line of the page. "
LONG_ANSWER = [f"{number}. {LINE}\n\n" for number in range(60)]
# Whether nothing covers the end of an element.
SHOWS_ITS_END = """(element) => {
  const { left, bottom } = element.getBoundingClientRect();
  return element.contains(document.elementFromPoint(left + 1, bottom - 1));
}"""


async def test_a_long_answer_is_followed_until_the_reader_scrolls_away(tab, simulator):
    held = simulator.script.caption([*LONG_ANSWER, *LONG_ANSWER, "The end."], hold_after=60)
    await tab.resize(360, 740)
    await tab.ask()
    written = tab.answer.locator("li").nth(59)
    await expect(written).to_be_in_viewport()
    assert await written.evaluate(SHOWS_ITS_END)
    await expect(tab.stop).to_be_in_viewport(ratio=1)
    await expect(tab.find("#frame")).to_be_in_viewport(ratio=1)
    await tab.tab.mouse.wheel(0, -1500)
    await expect(written).not_to_be_in_viewport()
    seen = tab.answer.locator("li").nth(10)
    where = await seen.bounding_box()
    held.release()
    await tab.until_done()
    await expect(tab.answer).to_contain_text("The end.")
    assert await seen.bounding_box() == where


SCROLL_AS_SOON_AS_ASKED = """() => new Promise((done) => {
  addEventListener("scroll", done, { once: true });
  document.getElementById("form").requestSubmit();
  scrollTo(0, 0);
})"""


async def test_an_answer_is_followed_though_the_page_moved_as_it_was_asked(tab, simulator):
    await tab.resize(360, 740)
    for reader_leaves in (False, False, True):
        held = simulator.script.chat([*LONG_ANSWER, "The end."], hold_after=0)
        await tab.choose("chat")
        await tab.find("[name=message]").fill("And then?")
        await tab.tab.evaluate(SCROLL_AS_SOON_AS_ASKED)  # as a wheel that was still turning does
        if reader_leaves:
            await tab.tab.mouse.wheel(0, 20)
            await tab.tab.wait_for_function("scrollY > 0")
        held.release()
        await tab.until_done()
        await expect(tab.state).to_have_text("Done")
        end = expect(tab.find("li.assistant").last.get_by_text("The end."))
        await (end.not_to_be_in_viewport if reader_leaves else end.to_be_in_viewport)()


MARKDOWN = """# Two cats

They are **very *small***, and `alert`.
<img src=x onerror="alert(1)"> <script>alert(2)</script>

1. The first _sleeps_.
2. The second \\*doesn't\\*, see [this](javascript:alert(3)).
   - on a red_sofa_of_theirs

> Quoted

```python
print("**no**")
```
"""
SHOWN = (
    "<h3>Two cats</h3>",
    "<strong>very <em>small</em></strong>",
    "<code>alert</code>",
    '&lt;img src=x onerror="alert(1)"&gt; &lt;script&gt;alert(2)&lt;/script&gt;',
    "The first <em>sleeps</em>.",
    "The second *doesn't*, see this (javascript:alert(3)).",
    "on a red_sofa_of_theirs",
    "<blockquote>Quoted</blockquote>",
    '<pre>print("**no**")</pre>',
)


async def test_markdown_is_shown_as_it_is_meant_however_it_is_cut(tab, simulator):
    for cut in (1, 1000):
        pieces = [MARKDOWN[at : at + cut] for at in range(0, len(MARKDOWN), cut)]
        simulator.script.caption(pieces)
        await tab.asked()
        html = re.sub(r"</?span>|\n(?=</)", "", await tab.answer.inner_html())
        assert [each for each in SHOWN if each not in html] == [], cut
        tags = set(re.findall(r"<(\w+)", html))
        assert tags == {"h3", "p", "strong", "em", "code", "ol", "ul", "li", "blockquote", "pre"}
        heard = await tab.answer.locator("span:not([aria-hidden])").all_text_contents()
        assert "The first sleeps." in map(str.strip, heard)


# -- what goes wrong ----------------------------------------------------------------------

FAULTS = [  # what had arrived, what is said of the fault, and what can be done
    ("error_event=2", "A bright", "Inference failed", "Ask again"),
    ("cut=2", "A bright", "ended before", "Ask again"),
    ("bad_json=2", "A bright", "", "Ask again"),
    ("status=401", "", "401", "MOONDREAM_API_KEY"),
    ("status=404", "", "404", "/v1"),
    ("status=413", "", "413", "smaller picture"),
    ("status=429", "", "429", "Wait a few seconds"),
    ("status=500", "", "500", "Wait a few seconds"),
]


async def test_page_names_its_server_and_says_below_what_had_arrived_what_can_be_done(
    tab_of, simulator
):
    tab = await tab_of(client_of(simulator), name="/home/me/cat.jpg", model="m")
    await expect(tab.tab.get_by_text(f"Answers come from {simulator.endpoint}")).to_be_visible()
    await expect(tab.name).to_contain_text("cat.jpg")
    code = await tab.code.inner_text()
    assert [each for each in ('"/home/me/cat.jpg"', 'model="m"') if each not in code] == []
    for fault, arrived, said, remedy in FAULTS:
        simulator.faults.append(fault)
        await tab.ask()
        await expect(tab.error.locator("p").first).to_contain_text(said)
        await expect(tab.error.locator("p").last).to_contain_text(remedy)
        await expect(tab.answer).to_have_text(arrived)
        await expect(tab.state).to_contain_text("Failed")
        await tab.until_done()
    await tab.asked()
    await expect(tab.error).to_be_empty()


async def test_a_server_that_is_gone_is_named_and_so_is_the_pages_own(
    tab_of, nobody, client, photo
):
    tab = await tab_of(md.MoondreamClient(endpoint=nobody, max_retries=0))
    await tab.ask()
    for said in (nobody, "Connection refused", "moondream-async serve"):
        await expect(tab.error).to_contain_text(said)
    await expect(tab.error).not_to_contain_text("Errno")
    async with DemoPage(client, photo, port=0) as page:
        await tab.open(page.url)
    await tab.ask()
    await expect(tab.error).to_contain_text("Is it still running?")
    await expect(tab.error).to_contain_text("moondream-async demo --web")


# -- what each skill shows ----------------------------------------------------------------


async def test_what_is_asked_is_what_the_form_says(tab, client, photo, simulator):
    await tab.tab.get_by_role("radio", name="Long").check(force=True)
    await tab.ask("caption")
    await expect(tab.answer).to_have_text((await client.caption(photo, length="long")).caption)
    await tab.until_done()

    await tab.choose("query")
    question = await tab.examples.nth(1).text_content()
    await tab.examples.nth(1).click()  # which asks it
    await expect(tab.answer).to_have_text((await client.query(photo, question)).answer)
    await expect(tab.find("[name=question]")).to_have_value(question)
    await tab.until_done()

    await tab.tab.get_by_role("checkbox", name="Let the model think first").check()
    await tab.ask("query")
    thought = await client.query(photo, question, reasoning=True)
    await tab.tab.get_by_text("What the model thought").click()
    await expect(tab.find("#thoughts p")).to_have_text(thought.reasoning.text)
    places = [place for each in thought.reasoning.grounding for place in each.points]
    await expect(tab.find("#labels i")).to_have_count(len(places))
    await tab.until_done()

    await tab.tab.get_by_text("Settings").click()
    await tab.tab.get_by_label("At most, tokens").fill("3")
    await tab.tab.get_by_label("Temperature").fill("0.5")
    for skill, settings in (
        ("query", {"max_tokens": 3, "temperature": 0.5}),
        ("detect", {"temperature": 0.5}),
    ):
        await tab.asked(skill)
        assert simulator.requests[-1].body["settings"] == settings


async def test_what_is_found_is_drawn_where_it_is(tab, client, photo, simulator):
    left, top, right, bottom = CIRCLE

    await tab.ask("detect", object="red circle")
    await expect(tab.answer).to_contain_text("Found “red circle” from (0.09, 0.38)")
    assert await tab.has_mark(left, top)
    assert await tab.has_mark(right, bottom)
    assert not await tab.has_mark((left + right) / 2, (top + bottom) / 2)
    await expect(tab.labels).to_have_text("red circle")

    await tab.ask("point", object="red circle")
    await expect(tab.answer).to_contain_text("Found “red circle” at (0.22, 0.54)")
    assert await tab.has_mark(140, 260)
    assert not await tab.has_mark(left, 260)

    found = await client.segment(photo, "red circle")
    await tab.ask("segment", object="red circle")
    await expect(tab.answer).to_contain_text("Outlined “red circle” from (0.09, 0.38)")
    await expect(tab.find("#outline p")).to_be_hidden()  # which is nothing to read
    await tab.tab.get_by_text("The outline as an SVG path").click()
    await expect(tab.find("#outline p")).to_have_text(found.path)
    await expect(tab.find("#shapes .coarse")).to_have_count(0)
    assert await tab.edges.get_attribute("d") == found.path
    for place in ((left, 260), (right, 260), (140, top), (140, bottom)):
        assert await tab.has_mark(*place)

    for skill in ("point", "segment"):
        await tab.ask(skill, object="unicorn")
        await expect(tab.answer).to_contain_text("Found no “unicorn”")
        await expect(tab.find("#shapes > *, #labels > *")).to_have_count(0)
        await tab.until_done()

    simulator.faults.append("stall=30")  # while it is written, the outline is coarse
    await tab.ask("segment", object="red circle")
    coarse = tab.find("#shapes .coarse .edge")
    await expect(coarse).to_have_attribute("d", re.compile(r"^M [\d.]+ [\d.]+( L [\d. ]+){5,}"))


async def test_detect_numbers_what_it_finds_but_for_a_crowd(tab, client, photo, simulator):
    found = await client.detect(photo, "shape")
    await tab.ask("detect", object="shape")
    await expect(tab.edges).to_have_count(len(found.objects))
    labels = await tab.labels.all_text_contents()
    assert labels == [str(number + 1) for number in range(len(found.objects))]
    await expect(tab.answer).to_contain_text(f"Found “shape” {len(found.objects)} times")
    await expect(tab.places).to_have_count(len(found.objects))
    await expect(tab.places.nth(1)).to_have_text("2. from (0.09, 0.38) to (0.34, 0.71)")

    crowd = [(x / 20, y / 10, x / 20 + 0.04, y / 10 + 0.08) for x in range(20) for y in range(10)]
    simulator.script.detect(crowd)
    await tab.ask("detect", object="leaf")
    await expect(tab.answer).to_have_text("Found “leaf” 200 times.")
    await expect(tab.labels).to_have_count(0)
    await tab.places.nth(41).hover()
    await expect(tab.labels).to_have_text("42")  # the one that is picked out
    await tab.places.first.focus()
    await expect(tab.labels).to_have_text("1")
    await tab.tab.keyboard.press("ArrowDown")  # the list is one stop of the keyboard's
    await expect(tab.places.nth(1)).to_be_focused()
    await expect(tab.labels).to_have_text("2")
    await tab.tab.keyboard.press("Tab")
    await expect(tab.labels).to_have_count(0)
    assert (await tab.find("#places").bounding_box())["height"] < 300


async def test_chat_keeps_its_history_of_what_was_answered_until_it_is_begun_anew(tab, simulator):
    simulator.faults.append("error_event=0")
    await tab.ask("chat", message="Which colours are there?")
    await expect(tab.error).to_contain_text("Inference failed")
    await expect(tab.turns).to_have_count(0)
    await expect(tab.find("[name=message]")).to_have_value("Which colours are there?")
    await tab.asked("chat")
    await tab.asked("chat", message="How many areas?")
    await expect(tab.tab.get_by_role("log", name="Conversation").locator("li")).to_have_count(4)
    turns = await tab.turns.all_text_contents()
    assert turns[::2] == ["Which colours are there?", "How many areas?"]
    first, *others = simulator.requests[-1].body["messages"]
    assert [part["type"] for part in first["content"]] == ["text", "image_url"]
    assert [turn["content"] for turn in others] == turns[1:3]
    await tab.button("New conversation").click()
    await expect(tab.turns).to_have_count(0)
    await tab.asked("chat", message="And now?")
    assert len(simulator.requests[-1].body["messages"]) == 1


async def test_a_reload_keeps_what_was_asked_and_of_which_picture(tab, picture, simulator):
    await bring(tab, "drop", picture)
    await expect(tab.name).to_contain_text("green.png")
    await tab.asked("chat", message="Which **colours**?")
    await tab.find("[name=reasoning]").check()
    await tab.choose("query")
    await tab.find("[name=question]").fill("Where is it?")
    await tab.tab.reload()
    await expect(tab.name).to_have_text(f"green.png, 90 {TIMES} 60")
    await expect(tab.tab.get_by_role("radio", name="Query")).to_be_checked()
    await expect(tab.find("[name=question]")).to_have_value("Where is it?")
    await expect(tab.find("[name=reasoning]")).to_be_checked()
    await tab.asked("query")
    assert simulator.requests[-1].images == [picture]
    await tab.choose("chat")
    await expect(tab.turns).to_have_count(2)
    await expect(tab.turns.first).to_have_text("Which **colours**?")
    other = await tab.tab.context.new_page()  # another tab begins anew
    await other.goto(tab.tab.url)
    await expect(other.locator("#picture-name")).to_contain_text("sample.jpg")
    await other.close()


# -- moving pictures ----------------------------------------------------------------------


async def test_live_asks_about_the_newest_frame_with_whichever_skill_and_ends_with_the_tab(
    tab, simulator
):
    await tab.choose("detect")
    await tab.find("[name=object]").fill("green")
    live = tab.button("Live")
    await live.click()
    await expect(tab.edges.first).to_be_visible()
    await expect(live).to_have_attribute("aria-pressed", "true")
    await expect(tab.find("#age")).to_have_text(re.compile(r"^\d\.\d\d s old$"))
    await expect(tab.find("#speed")).to_have_text(re.compile(r"^\d+\.\d frames/s$"))
    await expect(tab.name).to_have_text("What the camera sees")
    simulator.faults.append("slow_start=1000")  # while one is asked about, none is encoded
    asked = len(simulator.requests)
    await simulator.wait_until(lambda: len(simulator.requests) > asked)
    held = len(simulator.requests)
    await tab.tab.evaluate(FRAMES_SHOWN, 10)
    assert len(simulator.requests) == held
    await tab.stop.click()
    await assert_cut_off(simulator.requests[-1])
    await expect(tab.state).to_have_text("Stopped")
    await expect(tab.name).to_contain_text("sample.jpg")
    await expect(tab.find("#shapes > *")).to_have_count(0)
    assert await tab.tab.evaluate("() => window.encoded ?? 0") == 0
    await assert_camera_off(tab)

    await tab.tab.reload()  # which encodes again
    await live.click()
    for skill in ("caption", "query"):
        await tab.choose(skill)
        await expect(tab.answer).not_to_be_empty()
    for skill in ("point", "segment"):
        await tab.choose(skill)
        await tab.find("[name=object]").fill("green")
        await expect(tab.find("#shapes > *, #labels i").first).to_be_visible()
        await tab.find("[name=object]").fill("unicorn")
        await expect(tab.answer).to_have_text("Found no “unicorn”.")
    await tab.tab.keyboard.press("Escape")
    await expect(tab.state).to_have_text("Stopped")
    await live.click()
    await expect(tab.find("#speed")).not_to_be_empty()
    await tab.tab.evaluate(HIDE)
    await expect(tab.state).to_have_text("Stopped: the tab was hidden")
    await expect(tab.start).to_be_visible()
    await assert_camera_off(tab)


async def assert_camera_off(tab, video="#moving"):
    assert await tab.find(video).evaluate("(video) => video.srcObject") is None


HIDE = """() => {
  Object.defineProperty(document, "hidden", { value: true, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
  delete document.hidden;
}"""
FRAMES_SHOWN = """(count) => new Promise((done) => {
  const video = document.getElementById("moving");
  HTMLCanvasElement.prototype.toBlob = () => { window.encoded = (window.encoded ?? 0) + 1; };
  const next = () => (count-- > 0 ? video.requestVideoFrameCallback(next) : done());
  next();
})"""


async def test_live_goes_on_after_an_error_and_ends_with_one_that_lasts(bare_tab, page, simulator):
    tab = bare_tab
    await tab.open(page.url)
    simulator.faults.append("error_event=0")
    simulator.faults.append("status=400,times=always")
    await tab.choose("caption")
    await tab.button("Live").click()
    await expect(tab.error).to_contain_text("Inference failed")
    await expect(tab.error).to_contain_text("400")
    await expect(tab.state).to_have_text("Failed")
    await expect(tab.start).to_be_visible()


@pytest.fixture
def video():
    """A second of a red square, as a file that browsers play."""
    av = pytest.importorskip("av", reason="needs the extra video")
    picture = Image.new("RGB", (160, 120), "white")
    picture.paste((220, 30, 30), (50, 30, 110, 90))
    file = io.BytesIO()
    with av.open(file, "w", format="webm") as container:
        stream = container.add_stream("libvpx", rate=20)
        stream.width, stream.height, stream.pix_fmt = *picture.size, "yuv420p"
        for _ in range(20):
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return {"name": "red.webm", "mimeType": "video/webm", "buffer": file.getvalue()}


async def test_a_photo_is_taken_with_the_camera_and_a_video_is_asked_about_as_it_plays(tab, video):
    await tab.button("Take a photo").click()
    dialog = tab.tab.get_by_role("dialog", name="Take a photo")
    await expect(dialog).to_be_visible()
    await dialog.get_by_role("button", name="Take it").click()
    await expect(tab.name).to_contain_text("photo.jpg")
    await expect(dialog).to_be_hidden()
    await assert_camera_off(tab, "#camera video")
    await tab.asked()

    await tab.choose("detect")
    await tab.find("[name=object]").fill("red")
    await tab.find("#file").set_input_files(video)
    await expect(tab.name).to_have_text("red.webm")
    await expect(tab.edges.first).to_be_visible()
    await tab.stop.click()
    await expect(tab.state).to_have_text("Stopped")


# -- pictures -----------------------------------------------------------------------------


@pytest.fixture
def picture():
    """A picture of 90 by 60 pixels, as a file."""
    file = io.BytesIO()
    Image.new("RGB", (90, 60), (20, 150, 50)).save(file, "PNG")
    return file.getvalue()


BRING = """([kind, data, name, type]) => {
  const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
  const brought = new DataTransfer();
  brought.items.add(new File([bytes], name, { type }));
  const Kind = kind === "paste" ? ClipboardEvent : DragEvent;
  const field = kind === "paste" ? "clipboardData" : "dataTransfer";
  const options = { [field]: brought, bubbles: true, cancelable: true };
  const target = document.getElementById("frame");
  if (kind === "drop") target.dispatchEvent(new Kind("dragenter", options));
  target.dispatchEvent(new Kind(kind, options));
}"""


async def bring(tab, how, data, name="green.png", kind="image/png"):
    if how == "choose":
        async with tab.tab.expect_file_chooser() as chooser:
            await tab.button("Choose a picture").click()
        files = {"name": name, "mimeType": kind, "buffer": data}
        await (await chooser.value).set_files(files)
    else:
        await tab.tab.evaluate(BRING, [how, base64.b64encode(data).decode(), name, kind])


async def test_a_picture_is_shown_sent_and_named_and_one_that_is_none_is_refused(
    tab, picture, simulator, tmp_path
):
    for how in ("choose", "drop", "paste"):
        await bring(tab, how, picture, name=f"{how}.png")
        await expect(tab.name).to_have_text(f"{how}.png, 90 {TIMES} 60")
        await expect(tab.find("body")).not_to_have_class(re.compile("dropping"))
        await tab.asked()
        assert simulator.requests[-1].images == [picture]
        assert f'"{how}.png"' in await tab.code.inner_text()

    asked = len(simulator.requests)
    await bring(tab, "drop", b"no picture", name="notes.png")
    await expect(tab.error).to_contain_text("notes.png is no picture")
    await bring(tab, "drop", b"no video", name="x.webm", kind="video/webm")
    await expect(tab.error).to_contain_text("x.webm is no video")
    await expect(tab.start).to_be_visible()
    huge = tmp_path / "huge.png"
    huge.write_bytes(picture)
    os.truncate(huge, 34 << 20)
    await tab.find("#file").set_input_files(huge)
    await expect(tab.error).to_contain_text("huge.png has 34 MB; up to 32 MB can be sent")
    await expect(tab.name).to_contain_text("paste.png")
    assert len(simulator.requests) == asked

    simulator.faults.append("stall=3")
    await tab.ask("chat")
    await expect(tab.find("#conversation li.assistant")).not_to_be_empty()
    await bring(tab, "drop", picture)  # which ends the answer about the one before
    await assert_cut_off(simulator.requests[-1])
    await expect(tab.name).to_contain_text("green.png")
    await expect(tab.turns).to_have_count(0)


# -- everybody ----------------------------------------------------------------------------

LONG = "the yellow shape, which has quite a long name here, and goes on"
SCREENS = {  # of a phone, of a larger one, two columns, a phone that lies, a desk
    (320, 568): SKILLS,
    (360, 740): ("caption",),
    (640, 700): ("chat", "detect"),
    (740, 360): ("caption", "detect", "chat"),
    (1280, 800): ("detect",),
}
CONTRASTS = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((each) => each / 255)
    .map((each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4))
    .reduce((sum, each, index) => sum + each * [0.2126, 0.7152, 0.0722][index], 0);
  const ground = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = parse(getComputedStyle(each).backgroundColor);
      if (colour[3] !== 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const words = [...element.childNodes].some((each) => each.nodeType === 3 && each.data.trim());
    if (!words || !element.checkVisibility()) continue;
    const [a, b] = [luminance(parse(getComputedStyle(element).color)), luminance(ground(element))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.outerHTML.slice(0, 80)]);
  }
  return found;
}"""


async def assert_readable(tab):
    """In light and in dark, each word is dark enough on what is behind it, or light enough."""
    for scheme in ("light", "dark"):
        await tab.tab.emulate_media(color_scheme=scheme)
        contrasts = await tab.tab.evaluate(CONTRASTS)
        assert len(contrasts) > 15
        assert [each for each in contrasts if each[0] < 4.5] == [], scheme
        ground = await tab.tab.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", ground))) / 3
        assert (brightness > 200) == (scheme == "light")


async def test_answers_are_in_view_on_every_screen_and_readable_in_light_and_dark(tab, simulator):
    simulator.faults.append("error_event=9")
    await tab.ask()
    await expect(tab.error).not_to_be_empty()
    await assert_readable(tab)
    for (width, height), skills in SCREENS.items():
        await tab.resize(width, height)
        for skill in skills:
            await tab.tab.evaluate("scrollTo(0, 0)")
            if await tab.turns.count():
                await tab.button("New conversation").click()
            field = FIELDS.get(skill)
            await tab.asked(skill, **({field: LONG} if field else {}))
            place = tab.turns.last if skill == "chat" else tab.answer
            await expect(place).to_be_in_viewport(ratio=0.9)
            if field == "object":
                await expect(tab.labels).to_be_in_viewport(ratio=1)
                await expect(tab.find("#frame")).to_be_in_viewport(ratio=0.9)
            wide = await tab.tab.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, skill
            if width == 320:
                await assert_readable(tab)


# -- the same in Python -------------------------------------------------------------------


ODD = "Say \"no\" \\ \N{BALLOON} ${x} 'é' </script> green shape"
ANSWERED = {"chat": "#conversation li.assistant", "segment": "#outline p"}


async def test_the_python_lines_that_are_copied_get_the_same_answer(tab, picture, run_python):
    await tab.tab.get_by_text("Settings").click()
    await tab.tab.get_by_label("Temperature").fill("0.25")
    for skill in ("query", "detect", "point", "segment", "caption", "chat"):
        if skill == "caption":  # and from here on, of a picture of one's own
            await bring(tab, "choose", picture)
            await expect(tab.name).to_contain_text("green.png")
        await tab.choose(skill)
        if skill in FIELDS:
            await tab.find(f"[name={FIELDS[skill]}]").fill(ODD)
        await tab.button("Copy").click()
        await expect(tab.button("Copied")).to_be_visible()
        code = await tab.tab.evaluate("navigator.clipboard.readText()")
        assert code == await tab.code.text_content()
        await tab.start.click()
        await tab.until_done()
        await expect(tab.error).to_be_empty()
        shown = await tab.find(ANSWERED.get(skill, "#answer")).text_content()

        printed = await run_python(code)
        if skill in ("detect", "point"):
            assert len(printed) == await tab.labels.count() >= 1, code
        else:
            assert printed[2 if skill == "segment" else 0] == shown, code
        assert max(map(len, code.splitlines())) <= 100


@pytest.fixture
def run_python(picture, tmp_path, monkeypatch, capsys):
    """Runs a program beside the picture; gives the lines that it printed."""
    (tmp_path / "green.png").write_bytes(picture)
    monkeypatch.chdir(tmp_path)

    async def run_python(code):
        namespace = {}
        exec(compile(code.replace("asyncio.run(main())", ""), "<page>", "exec"), namespace)
        await namespace["main"]()
        return capsys.readouterr().out.splitlines()

    return run_python


# -- other pages --------------------------------------------------------------------------


async def test_other_pages_of_this_machine_cannot_ask(bare_tab, page, simulator):
    await bare_tab.tab.goto(f"{simulator.origin}/nothing-there")
    post = """async (url) => {
      const body = '{"skill": "caption"}\\n';
      return fetch(url, { method: "POST", mode: "no-cors", body }).then(() => true, () => false);
    }"""
    assert not await bare_tab.tab.evaluate(post, f"{page.url}ask")
    assert {request.method for request in simulator.requests} == {"GET"}
