"""Load on `internvl-jax serve`, over loopback: throughput and latencies, and whether every answer is the right one.

    python benchmarks/serve_load.py [--clients 16] [--seconds 60] [--faults] [--json] [-- SERVE_OPTION ...]

Starts a server (of nano, or of what SERVE_OPTION says) at a free port of 127.0.0.1. First each question is asked
alone, one after another: that is the rate to compare with, and these are the right answers. Then the clients ask
questions at random without a pause, and each answer is compared with the one made alone. With --faults, one request in
five is a client that leaves in the middle, half a body, or a damaged image. At the end the server must be idle, and end
with 0 on SIGTERM. Exits with 1 if an answer is lost or wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from rich.console import Console
from rich.table import Table

import internvl_jax

IMAGES = Path(internvl_jax.__file__).parent / "nano" / "images"
QUESTIONS = ("How many shapes are there?", "Is there a circle?", "图中有几个圆形？", "What is in this image?", "Hello")
LENGTHS = (8, 32, 96)  # tokens of an answer, forced by min_tokens
MAX_SECONDS, MAX_CLIENTS = 3600, 256


@dataclass
class Figures:
    """What happened.

    Attributes:
        first: seconds to the first token of each answer.
        between: mean seconds between the tokens of each answer.
        tokens: of all answers.
        answers: that ended.
        wrong: answers that differ from the one made alone.
        lost: requests without an answer.
        faults: requests that were broken on purpose.
    """

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens: int = 0
    answers: int = 0
    wrong: int = 0
    lost: int = 0
    faults: int = 0

    def summary(self, seconds: float) -> dict[str, float]:
        """The figures as one flat object."""
        return {
            "answers": self.answers,
            "tokens_per_second": self.tokens / seconds,
            **{f"first_token_p{percent}": percentile(self.first, percent) for percent in (50, 95, 99)},
            **{f"inter_token_p{percent}": percentile(self.between, percent) for percent in (50, 95, 99)},
            "wrong": self.wrong,
            "lost": self.lost,
            "faults": self.faults,
        }


def percentile(values: list[float], percent: int) -> float:
    """The percentile of some values; NaN of none."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def make_requests(model: str) -> list[dict[str, Any]]:
    """Questions of mixed lengths, with and without images."""
    requests = []
    for number, question in enumerate(QUESTIONS):
        for length in LENGTHS:
            content: list[dict[str, Any]] = [{"type": "text", "text": question}]
            names = ("shapes.png", "word.png", "digits.png")[: number % 3]
            for name in names:
                data = base64.b64encode((IMAGES / name).read_bytes()).decode()
                content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
            requests.append(
                {
                    "model": model,
                    "messages": [{"role": "user", "content": content}],
                    "max_tokens": length,
                    "extra_body": {"min_tokens": length},
                }
            )
    return requests


async def ask(client: openai.AsyncOpenAI, request: dict[str, Any], figures: Figures) -> str:
    """One streamed answer."""
    started, first, text, tokens = time.monotonic(), None, "", 0
    stream = await client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.monotonic()
            text += chunk.choices[0].delta.content
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    ended = time.monotonic()
    if not tokens:
        raise ValueError("an answer without tokens")
    if first is not None:
        figures.first.append(first - started)
        if tokens > 1:
            figures.between.append((ended - first) / (tokens - 1))
    figures.tokens += tokens
    figures.answers += 1
    return text


async def break_one(client: openai.AsyncOpenAI, request: dict[str, Any], port: int, dice: random.Random) -> None:
    """A request that goes wrong on purpose."""
    kind = dice.choice(("leaves", "half a body", "bad image"))
    if kind == "leaves":
        stream = await client.chat.completions.create(**request, stream=True)
        await anext(aiter(stream))
        await stream.close()
    elif kind == "half a body":
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        writer.write(head + b'Content-Length: 1000\r\n\r\n{"model":')
        await writer.drain()
        writer.close()
    else:
        url = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + dice.randbytes(200)).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
        try:
            await client.chat.completions.create(
                model=request["model"], messages=[{"role": "user", "content": content}], max_tokens=1
            )
        except openai.BadRequestError:
            return
        raise ValueError("a damaged image was answered")


async def load(port: int, args: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """The figures of one request at a time, and of all clients."""
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        requests = make_requests((await client.models.list()).data[0].id)
        right = [await ask(client, request, Figures()) for request in requests]
        alone, started = Figures(), time.monotonic()
        for request, answer in zip(requests, right):
            alone.wrong += await ask(client, request, alone) != answer
        one = alone.summary(time.monotonic() - started)

        figures, started = Figures(), time.monotonic()

        async def keep_asking(seed: int) -> None:
            dice = random.Random(seed)
            while time.monotonic() - started < args.seconds:
                number = dice.randrange(len(requests))
                if args.faults and dice.random() < 0.2:
                    figures.faults += 1
                    await break_one(client, requests[number], port, dice)
                    continue
                try:
                    figures.wrong += await ask(client, requests[number], figures) != right[number]
                except (openai.APIError, ValueError) as error:
                    figures.lost += 1
                    print(f"lost: {error}", file=sys.stderr)
                    await asyncio.sleep(0.1)

        await asyncio.gather(*[keep_asking(seed) for seed in range(args.clients)])
        return one, figures.summary(time.monotonic() - started)


def memory(pid: int) -> float:
    """Resident memory of a process in GiB (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 2**20


def idle(port: int) -> bool:
    """Whether the server holds no request."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        text = page.read().decode()
    held = re.findall(r"^internvl_jax_num_requests_(?:running|waiting)\{.*\} (\S+)", text, re.M)
    return len(held) == 2 and not any(map(float, held))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Start a server, load it, stop it."""
    command = [sys.executable, "-m", "internvl_jax", "serve", "--port", "0", *args.options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        port = 0
        for line in server.stderr:
            if found := re.search(r"listening at http://127\.0\.0\.1:(\d+)/", line):
                port = int(found[1])
            if "ready after" in line:
                break
        if not port:
            raise SystemExit(f"the server did not start: {' '.join(command)}")
        # The log is thrown away, so that the server never waits for its reader.
        drain = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        before = memory(server.pid)
        alone, loaded = asyncio.run(load(port, args))
        deadline = time.monotonic() + 20
        while not (at_rest := idle(port)) and time.monotonic() < deadline:
            time.sleep(0.2)
        after = memory(server.pid)
        server.send_signal(signal.SIGTERM)
        code = server.wait(120)
        drain.wait(20)
    finally:
        server.kill()
    return {
        "alone": alone, "loaded": loaded, "clients": args.clients, "seconds": args.seconds, "idle": at_rest,
        "exit_code": code, "memory_gib": [before, after],
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """Print the figures."""
    table = Table("", "one at a time", f"{result['clients']} clients")
    for name, value in result["loaded"].items():
        cells = [f"{one:,.0f}" if float(one).is_integer() else f"{one:.3g}" for one in (result["alone"][name], value)]
        table.add_row(name.replace("_", " "), *cells)
    console = Console()
    console.print(table)
    before, after = result["memory_gib"]
    console.print(
        f"memory of the server: {before:.2f} GiB before, {after:.2f} after; idle at the end: {result['idle']}; "
        f"exit code after SIGTERM: {result['exit_code']}"
    )


def main() -> int:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16, help=f"at most {MAX_CLIENTS}")
    parser.add_argument("--seconds", type=float, default=60.0, help=f"at most {MAX_SECONDS}")
    parser.add_argument("--faults", action="store_true", help="break one request in five")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("options", nargs="*", metavar="SERVE_OPTION", help="options of serve, after --")
    args = parser.parse_args()
    if not 0 < args.clients <= MAX_CLIENTS or not 0 < args.seconds <= MAX_SECONDS:
        parser.error(f"--clients is 1 to {MAX_CLIENTS}, --seconds up to {MAX_SECONDS}")
    result = run(args)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    loaded = result["loaded"]
    good = loaded["answers"] and not loaded["wrong"] and not loaded["lost"] and result["idle"]
    return 0 if good and result["exit_code"] == 0 and not result["alone"]["wrong"] else 1


if __name__ == "__main__":
    sys.exit(main())
