"""Chat with an OpenAI-compatible server: budgets, pacing, back-off; a reply is whole, or it is Unscored with a reason.

The key comes from the environment and goes nowhere else: no message, log or exception of ours has it. What a server
writes is data. An endpoint that fails several requests in a row is dead, and no longer asked.
"""

import ipaddress
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from urllib.parse import urlsplit

from runs import UserError
from safety import Unscored

ATTEMPTS = 8  # of one request, over about two minutes, before it is given up
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds of back-off
DEAD_AFTER = 5  # requests given up in a row
PARALLEL = 8
TIMEOUT = 300.0  # seconds without a byte from the server
sleep = time.sleep
_thread = threading.local()  # .stop, an event: set when nobody waits for this thread's requests any more


@dataclass(frozen=True)
class Reply:
    text: str
    finish_reason: str  # stop, length, ...
    tokens_in: int
    tokens_out: int
    thinking: str | None = None  # where the server takes it out of the text


@dataclass(frozen=True)
class Failure:
    reason: str
    again: bool  # may a second attempt do better?
    after: float = 0.0  # seconds that the server asks to wait
    paid: bool = False  # may the server have done the work?


def in_parallel(jobs: list, work: Callable, keep: Callable) -> None:
    """keep(i, work(jobs[i])) for each, in the order in which they end, in the calling thread.

    After an error or Ctrl-C nothing new is sent: an endpoint's chats in these threads end at their next attempt.
    """
    stop = threading.Event()
    threads = ThreadPoolExecutor(PARALLEL, initializer=setattr, initargs=(_thread, "stop", stop))
    try:
        numbers = {threads.submit(work, job): i for i, job in enumerate(jobs)}
        for future in as_completed(numbers):
            keep(numbers[future], future.result())
    finally:
        stop.set()
        threads.shutdown(wait=False, cancel_futures=True)


# ------------------------------------------------------------------------------------------------- what goes in


def checked_url(url: str) -> str:
    """The base URL. Raises UserError for one that would show a key: in clear text, or as a part of the URL."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (raises where it is no number that a port has)
    except ValueError as error:
        raise UserError(f"an endpoint's URL cannot be read: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError("an endpoint's URL must begin with https:// (or http:// on this machine)")
    if parts.username or parts.password or parts.query:
        raise UserError(f"the URL of {parts.hostname} must hold no user, password or query; keys go in the environment")
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise UserError(f"{parts.hostname}: plain http would show key and prompts to the network; use https")
    return url.rstrip("/")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def key_from(variable: str, url: str) -> str:
    key = os.environ.get(variable, "")
    if not key and is_loopback(urlsplit(url).hostname):
        return "none"
    if not key:
        raise UserError(f"{urlsplit(url).hostname} needs a key in the environment variable {variable}")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"{variable} is no key: it holds a blank, a line break or a sign that is not ASCII")
    return key


# ------------------------------------------------------------------------------------------------- what comes out


def read_reply(body: str) -> Reply | Failure:
    """The one choice of a chat completion. Everything that a server can leave out or mistype is a Failure."""
    try:
        value = json.loads(body)
        (choice,), usage = value["choices"], value.get("usage") or {}
        message, finish = choice["message"], choice["finish_reason"]
        text, thinking = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning")
        tokens = [usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens")]
        "".join([text, thinking or "", finish]).encode()  # half a surrogate pair is not text
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Failure("endpoint_bad_reply", again=True, paid=True)
    if any(type(count) is not int or count < 0 for count in tokens):
        return Failure("endpoint_bad_reply", again=True, paid=True)
    if finish == "content_filter":
        return Failure("endpoint_content_filter", again=False, paid=True)
    if not text and finish != "length":
        return Failure("endpoint_no_text", again=False, paid=True)
    return Reply(text, finish, *tokens, thinking)


def seconds_asked(header: str | None) -> float:
    """Retry-After in seconds; a date or nonsense is 0, our own back-off holds then."""
    try:
        return min(max(float(header or 0), 0.0), LONGEST_WAIT)
    except ValueError:
        return 0.0


# ------------------------------------------------------------------------------------------------- the endpoint


class Endpoint:
    """One model on one server. May be called from several threads.

    max_requests counts every request sent, retries too; max_cost is in the currency of the prices, which are for a
    million tokens, and is never passed: what is under way is counted at its dearest. per_minute spaces the requests.
    0 is no limit. `usage` has what was used so far.
    """

    def __init__(
        self, url, model, *, max_requests=0, max_cost=0.0, price_in=0.0, price_out=0.0, per_minute=0, seed=0,
        key_env="OPENAI_API_KEY", timeout=TIMEOUT,
    ):  # fmt: skip
        try:
            import openai
        except ImportError:
            raise UserError("an endpoint needs the openai package: pip install -r requirements-extra.txt") from None
        if max_cost and not (price_in or price_out):
            raise UserError("--max-cost needs --price-in and --price-out, per million tokens")
        self.url, self.model, self.openai = checked_url(url), model, openai
        self.max_requests, self.max_cost, self.prices = max_requests, max_cost, (price_in, price_out)
        self.client = openai.OpenAI(api_key=key_from(key_env, url), base_url=self.url, max_retries=0, timeout=timeout)
        self.usage = {"requests": 0, "failed": 0, "tokens_in": 0, "tokens_out": 0, "cost": 0.0}
        self.gap, self.next_slot = 60 / per_minute if per_minute else 0.0, 0.0
        self.length_key, self.given_up, self.rng = "max_tokens", 0, random.Random(seed)
        self.reserved, self.lock = 0.0, threading.Lock()

    def chat(
        self, messages: list[dict], max_tokens: int, temperature: float = 0.0, seed=None, top_p=None
    ) -> Reply | Unscored:
        """One completion. Raises UserError where no request can ever succeed: a wrong key, a model that is not there.

        `finish_reason` "length" comes back as a Reply; whether a text that was cut off is of use, the caller knows.
        """
        settings = {"temperature": temperature, "seed": seed, "top_p": top_p}
        settings = {name: value for name, value in settings.items() if value is not None}
        dearest = self._price(sum(len(m["content"].encode()) + 64 for m in messages), max_tokens)
        for attempt in range(ATTEMPTS):
            if ended := self._reserve(dearest):
                return Unscored(ended)
            self._pace()
            came = self._send(messages, max_tokens, settings)
            self._settle(came, dearest)
            if isinstance(came, Reply):
                return came
            if not came.again or attempt == ATTEMPTS - 1:
                break
            backoff = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT)
            sleep(max(came.after, backoff * self.rng.uniform(0.5, 1.0)))
        with self.lock:
            alive = came.reason in ("endpoint_content_filter", "endpoint_no_text")
            self.given_up = 0 if alive else self.given_up + 1
        return Unscored(came.reason)

    def _price(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.prices[0] + tokens_out * self.prices[1]) / 1e6

    def _reserve(self, dearest: float) -> str | None:
        """Count one more request, unless a budget has ended: then its name."""
        if hasattr(_thread, "stop") and _thread.stop.is_set():
            return "interrupted"
        with self.lock:
            if self.given_up >= DEAD_AFTER:
                return "endpoint_dead"
            if self.max_requests and self.usage["requests"] >= self.max_requests:
                return "max_requests"
            if self.max_cost and self.usage["cost"] + self.reserved + dearest > self.max_cost:
                return "max_cost"
            self.usage["requests"] += 1
            self.reserved += dearest
        return None

    def _settle(self, came: Reply | Failure, dearest: float) -> None:
        with self.lock:
            self.reserved -= dearest
            if isinstance(came, Failure):
                self.usage["failed"] += 1
                self.usage["cost"] += dearest * came.paid
                return
            self.given_up = 0
            self.usage["tokens_in"] += came.tokens_in
            self.usage["tokens_out"] += came.tokens_out
            counted = came.tokens_in + came.tokens_out > 0  # a server that counts nothing is paid in full
            self.usage["cost"] += self._price(came.tokens_in, came.tokens_out) if counted else dearest

    def _pace(self) -> None:
        with self.lock:
            wait = max(0.0, self.next_slot - time.monotonic())
            self.next_slot = time.monotonic() + wait + self.gap
        if wait:
            sleep(wait)

    def _send(self, messages: list[dict], max_tokens: int, settings: dict) -> Reply | Failure:
        settings = settings | {self.length_key: max_tokens}
        create = self.client.chat.completions.with_raw_response.create
        try:
            return read_reply(create(model=self.model, messages=messages, **settings).http_response.text)
        except self.openai.APIStatusError as error:
            status, after, said = error.status_code, error.response.headers.get("retry-after"), error.response.text
        except self.openai.APITimeoutError:
            return Failure("endpoint_timeout", again=True, paid=True)
        except self.openai.APIConnectionError:
            return Failure("endpoint_connection", again=True, paid=True)
        return self._refused(status, seconds_asked(after), said)

    def _refused(self, status: int, after: float, said: str) -> Failure:
        """What a status of 400 or more means; raised here, outside the handler, so that no request hangs on to it."""
        if status in (401, 403, 404):
            why = {401: "refuses the key", 403: "forbids it", 404: "has no such model or path"}[status]
            raise UserError(f"the endpoint {self.url} {why} (status {status}, model {self.model})")
        if status == 400 and "max_completion_tokens" in said and self.length_key == "max_tokens":
            self.length_key = "max_completion_tokens"  # the newer name of the same limit
            return Failure("endpoint_400", again=True)
        again = status in (408, 409, 429) or status >= 500
        if not again:
            shown = said.replace(self.client.api_key, "(key)")[:300]
            print(f"{self.url}: status {status}: {shown!r}", file=sys.stderr)
        return Failure(f"endpoint_{status}", again, after)
