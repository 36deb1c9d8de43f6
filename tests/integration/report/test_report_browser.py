"""``report.html`` in a browser: hostile data, keyboard, filters, runs without answers."""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from fanfold.backends.inputs.item_store import NamedRows, load_rows
from fanfold.backends.storage.run_folder import RunFolder
from fanfold.tests.journals import write_journal
from fanfold.tests.support.command_server import Command, run_command

from .browser import Page, find_browser, open_browser

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed"),
    pytest.mark.xdist_group("report browser"),  # its tests share runs
]

HOSTILE = [
    "</script><script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "javascript:alert(1)",
    "\u202eright to left\u2066",
    "null \x00 escape \x1b[31m",
    '=HYPERLINK("http://example.org","click")',
    '"><svg onload=alert(1)>',
    "{{ 7 * 7 }} {% raw %} ${7*7}",
    "<!-- ]]> -->",
    "&lt;b&gt; &amp; \u2028",
    "' onfocus=alert(1) autofocus='",
    "long " * 200_000,
]
FIELD = "<img src=y onerror=alert(2)>"
KINDS = ["</svg></style><script>alert(3)</script>", "javascript:alert(4)", "\u202eevil"]
PROPERTIES = {
    FIELD: {"type": "string"},
    "score": {"type": "number"},
    "kind": {"type": "string", "enum": KINDS},
}


def answer(number: int) -> dict[str, Any]:
    """Return the completion for a row: hostile in the answer, the reasoning and the refusal."""
    text = HOSTILE[number % len(HOSTILE)]
    content = json.dumps({FIELD: text, "score": number / 10, "kind": KINDS[number % 3]})
    if number % 5 == 4:
        content = text  # no JSON: the item fails with this text
    message = {"role": "assistant", "content": content, "reasoning_content": text}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A model server whose answers are hostile, in a thread; its URL."""
    ready, box = threading.Event(), list[Any]()

    async def complete(request: web.Request) -> web.Response:
        content = (await request.json())["messages"][0]["content"]
        return web.json_response(answer(int(content.partition(" ")[0])))

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "<b>m</b>"}]})

    async def serve() -> None:
        app, stop = web.Application(client_max_size=1 << 30), asyncio.Event()
        app.router.add_post("/v1/chat/completions", complete)
        app.router.add_get("/v1/models", models)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        box.extend([runner.addresses[0][1], stop, asyncio.get_running_loop()])
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(60)
    port, stop, loop = box
    yield f"http://127.0.0.1:{port}/v1"
    loop.call_soon_threadsafe(stop.set)
    thread.join()


def fanfold(folder: Path, *arguments: str, code: int = 0) -> str:
    found = run_command(Command(arguments, cwd=str(folder)))
    assert found.returncode == code, found.stderr
    return found.stderr


def make_run(folder: Path, config: dict[str, Any], rows: list[dict[str, Any]], code: int) -> Path:
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "c.yaml").write_text(json.dumps({"input": {"path": "in.jsonl", "id": "id"}} | config))
    fanfold(folder, "run", "c.yaml", "--out", "run", "--quiet", code=code)
    fanfold(folder, "report", "run")
    return folder / "run" / "report.html"


@pytest.fixture(scope="module")
def hostile(server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"id": f"{n} {text[:60]}", "number": n, "text": text, FIELD: text, "tags": [text[:99]]}
        for n, text in enumerate(HOSTILE * 2)
    ]
    config = {
        "name": "hostile",
        "task": {
            "prompt": "{number} {text}",
            "schema": {"type": "object", "properties": PROPERTIES, "required": ["score"]},
            "repairs": 0,
        },
        "endpoints": {"urls": [server]},
        "reduce": [
            {"op": "top_k", "field": "score", "k": 30, "show": ["text", FIELD]},
            {"op": "histogram", "field": "kind"},
            {"op": "collect", "field": f"output.{FIELD}"},
        ],
    }
    return make_run(tmp_path_factory.mktemp("hostile"), config, rows, 3)


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Page]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        async with open_browser(Path(folder)) as page:
            await page.set_size(1400, 1000)
            await page.open(path)
            yield page


def check_harmless(page: Page) -> None:
    assert page.dialogs() == []
    assert page.violations() == []
    assert [url for url in page.requested() if not url.startswith("file:")] == []
    assert not [event for event in page.events if event["method"] == "Runtime.exceptionThrown"]


READY = "document.getElementById('table').dataset.ready"
ROWS = "[...document.querySelectorAll('.row')].sort((a, b) => a.offsetTop - b.offsetTop)"
OUTPUT = "document.querySelector('.tools output').value"


async def test_hostile_data_stays_text(hostile: Path) -> None:
    assert hostile.stat().st_size < 1_000_000  # although the texts have many million characters
    async with opened(hostile) as page:
        await page.wait_for(READY)
        assert await page.evaluate("document.title") == "hostile \u2013 fanfold report"
        found = await page.evaluate(f"{ROWS}.map((row) => row.textContent)")
        assert len(found) == len(HOSTILE) * 2
        for text in HOSTILE[:3]:
            assert any(text in line for line in found)
        assert any("\\u202eright to left\\u2066" in line for line in found)
        await page.evaluate("document.querySelector('.view').focus()")
        for n in range(len(HOSTILE)):
            await page.press("Enter")
            wanted = HOSTILE[n][:40] if n not in (3, 4, 9) else str(n)
            await page.wait_for(
                f"(document.querySelector('.pane h3')?.textContent ?? '').startsWith('{n} ')"
            )
            assert wanted in await page.evaluate("document.querySelector('.pane').textContent")
            await page.press("ArrowDown")
        for button in ("sort", "menu"):
            count = await page.evaluate(f"document.querySelectorAll('.column .{button}').length")
            assert count > 5
            for n in range(count):
                await page.evaluate(f"document.querySelectorAll('.column .{button}')[{n}].click()")
                await page.evaluate(
                    "document.querySelectorAll('.popup input, .popup button').length"
                )
        await page.evaluate(
            "document.querySelectorAll('details').forEach((d) => { d.open = true; })"
        )
        tags = await page.evaluate(
            "[...new Set([...document.querySelectorAll('*')].map((e) => e.localName))]"
        )
        assert not {"img", "iframe", "object", "embed", "link", "base", "form"} & set(tags)
        links = "[...document.querySelectorAll('[href], [src]')].map((e) => e.getAttribute('href'))"
        assert all(link.startswith("#") for link in await page.evaluate(links))
        handlers = (
            "[...document.querySelectorAll('*')].flatMap((e) => [...e.attributes])"
            ".filter((a) => a.name.startsWith('on') || a.name === 'autofocus').length"
        )
        assert await page.evaluate(handlers) == 0
        assert await page.evaluate("document.querySelectorAll('svg text').length") > 0
        scripts = "[...document.scripts].filter((e) => !e.type).length"
        assert await page.evaluate(scripts) == 1
        check_harmless(page)


async def test_the_policy_refuses_other_scripts(hostile: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.html"
    extra = "<script>document.title = 'run'</script><img src='http://127.0.0.1:9/x.png'>"
    changed.write_text(hostile.read_text().replace("</footer>", f"</footer>{extra}"))
    async with opened(changed) as page:
        await page.wait_for(READY)
        assert await page.evaluate("document.title") != "run"
        assert len(page.violations()) == 2


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kinds = ["red", "green", "blue"]
    rows = [{"id": f"i{n:03}", "text": f"text {n}", "kind": kinds[n % 3]} for n in range(300)]
    config = {
        "name": "plain",
        "task": {
            "system": "Be brief",
            "prompt": "Say {text}",
            "schema": {
                "type": "object",
                "required": ["score"],
                "properties": {"score": {"type": "number", "minimum": 0, "maximum": 1}},
            },
        },
        "endpoints": {"simulated": {"nodes": 2, "time_scale": 50}},
    }
    return make_run(tmp_path_factory.mktemp("plain"), config, rows, 0)


async def test_the_table_by_keyboard_and_by_clicks(plain: Path) -> None:
    async with opened(plain) as page:
        await page.wait_for(READY)
        assert await page.evaluate(OUTPUT) == "300 items"
        assert await page.evaluate("document.querySelectorAll('.row').length") < 80  # those in view
        await page.evaluate("document.querySelector('.view').focus()")
        for key in ("End", "Enter"):
            await page.press(key)
        heading = "document.querySelector('.pane h3')?.textContent"
        await page.wait_for(f"{heading} === 'i299'")
        text = await page.evaluate("document.querySelector('.pane').textContent")
        for part in ("Be brief", "Say text 299", "answered", "127.0.0.1"):
            assert part in text
        await page.press("ArrowUp")
        await page.wait_for(f"{heading} === 'i298'")
        await page.press("Escape")
        await page.wait_for("document.querySelector('.pane').hidden")

        await page.press("/", "/")
        assert await page.evaluate("document.activeElement.type") == "search"
        await page.call("Input.insertText", text="TEXT 29")
        await page.wait_for(f"{OUTPUT} === '11 of 300 items'")  # 29 and 290 to 299
        await page.evaluate(
            "[...document.querySelectorAll('.levels button')]"
            ".find((b) => b.textContent.startsWith('red')).click()"
        )
        assert await page.evaluate(OUTPUT) == "3 of 300 items"
        await page.evaluate("[...document.querySelectorAll('.tools button')].at(-1).click()")
        assert await page.evaluate(OUTPUT) == "300 items"

        score = (
            "[...document.querySelectorAll('.column')]"
            ".find((c) => c.textContent.startsWith('score'))"
        )
        await page.evaluate(f"{score}.querySelector('.sort').click()")
        values = f"{ROWS}.slice(0, 20).map((r) => Number(r.children[2].textContent))"
        rising = await page.evaluate(values)
        assert rising == sorted(rising)
        await page.evaluate(f"{score}.querySelector('.sort').click()")
        falling = await page.evaluate(values)
        assert falling == sorted(falling, reverse=True)
        assert falling[0] > rising[-1]
        await page.evaluate(
            f"{score}.querySelectorAll('.hit')[3]"
            ".dispatchEvent(new MouseEvent('click', {bubbles: true}))"
        )
        assert 0 < int((await page.evaluate(OUTPUT)).split()[0]) < 100
        check_harmless(page)


async def test_a_run_in_which_all_items_failed(tmp_path: Path) -> None:
    config = {
        "name": "failed",
        "task": {"prompt": "Say {text}"},
        "endpoints": {"simulated": {"nodes": 1, "time_scale": 50, "faults": [{"kind": "refusal"}]}},
    }
    rows = [{"id": f"PMID-{30_000_000 + n}-WWWWWW", "text": f"text {n}"} for n in range(12)]
    async with opened(make_run(tmp_path, config, rows, 3)) as page:
        await page.wait_for(READY)
        text = await page.evaluate("document.body.innerText")
        for part in ("No item has an answer", "12 items failed", "run.yaml --from "):
            assert part in text
        finding = await page.evaluate("document.getElementById('finding').innerText")
        assert "RefusedAnswerError" in finding
        ids = f"{ROWS}.map((row) => row.firstChild)"
        assert await page.evaluate(f"{ids}.length") == len(rows)
        assert await page.evaluate(f"{ids}.every((cell) => cell.scrollWidth <= cell.clientWidth)")
        check_harmless(page)


LARGE = 100_000


def make_large(folder: Path) -> Path:
    """Return the page of a run of 100,000 molecules with five numbers; one of them was asked.

    The other records are copies of its record with answers of their own.
    """
    names = ("score", "log_s", "mass", "area", "charge")
    numbers = {name: {"type": "number"} for name in names}
    schema = {"type": "object", "required": list(names), "properties": numbers}
    config = {
        "task": {"prompt": "Judge {smiles}", "schema": schema},
        "endpoints": {"simulated": {"nodes": 1, "time_scale": 50}},
    }
    make_run(folder, config, [{"id": "0", "smiles": "C"}], 0)
    run = RunFolder(folder / "run")
    about = run.read_provenance()
    (file,) = run.journal.glob("*.jsonl")
    record = json.loads(file.read_text().splitlines()[1])
    rows = NamedRows("molecules", ((str(n), {"smiles": to_smiles(n)}) for n in range(LARGE)))
    load_rows(run.items, rows)

    def answers() -> Iterator[dict[str, Any]]:
        chance = random.Random(1)
        for n in range(LARGE):
            output = {name: round(chance.gauss(0, 9), 4) for name in names}
            question = f"{n:032x}"
            changes = {"index": n, "id": str(n), "output": output, "question": question}
            yield record | changes | {"latency_s": round(chance.uniform(0.5, 2), 3)}

    write_journal(file, answers(), about["run"])
    run.aggregate.unlink()  # it says how far the journal was read
    run.write_provenance(about | {"input": about["input"] | {"items": LARGE}})
    fanfold(folder, "report", "run")
    return run.path / "report.html"


def to_smiles(number: int) -> str:
    """Return a text like a SMILES of 60 characters, another one for each number."""
    parts = ["C", "c1ccccc1", "N", "O", "C(=O)", "Cl", "(F)", "S", "[nH]", "#N"]
    digits = f"{number:05}" * 4
    return "".join(parts[int(digit)] for digit in digits)[:54] + f"{number:06}"


@pytest.mark.long
async def test_a_page_of_100_000_rows(tmp_path: Path) -> None:
    """Its size and memory; the time is printed, because other work shares the machine."""
    path = make_large(tmp_path)
    size = path.stat().st_size
    assert size <= 40_000_000
    async with opened(path) as page:
        milliseconds = await page.wait_for(READY)
        assert await page.evaluate(OUTPUT) == f"{LARGE:,} items"
        assert await page.evaluate("document.querySelectorAll('.row').length") < 80
        heap = await page.heap_bytes()
        check_harmless(page)
    print(f"\n{size / 1e6:.1f} MB, heap {heap / 1e6:.0f} MB, first rows after {milliseconds} ms")
    assert heap <= 1_000_000_000
