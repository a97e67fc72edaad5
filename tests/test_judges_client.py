"""The endpoint client against a scripted server: what it sends, retries, counts and refuses, and where the key goes."""

import logging
import sys
import time
import traceback

import pytest

import client
from client import Endpoint, Reply
from runs import UserError
from safety import Unscored
from tests.server import Drop, completion, scripted

HELLO = [{"role": "user", "content": "hello"}]
KEY = "sk-very-secret-1234"


@pytest.fixture(autouse=True)
def naps(monkeypatch):
    """Back-off is noted, not slept."""
    taken = []
    monkeypatch.setattr(client, "sleep", taken.append)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return taken


def chat(script, **settings):
    """(outcome of one chat, the endpoint, the requests that the server saw)."""
    with scripted(script) as (url, requests):
        endpoint = Endpoint(url, "m", timeout=0.4, **settings)
        return endpoint.chat(HELLO, 20, 0.5), endpoint, requests


def in_turn(*replies):
    """A script that gives these replies in turn, the last one for ever; a callable is called."""

    def script(number, request):
        reply = replies[min(number, len(replies) - 1)]
        return reply() if callable(reply) else reply

    return script


def drop(half=""):
    def reply():
        raise Drop(half)

    return reply


def slow():
    time.sleep(0.8)
    return 200, completion("too late")


GOOD = (200, completion("hi"))


def test_the_wire_format():
    outcome, endpoint, (request,) = chat(in_turn((200, completion("hi", reasoning_content="well"))))
    assert outcome == Reply("hi", "stop", 10, 5, "well")
    assert request["path"] == "/v1/chat/completions"
    assert request["body"] == {"model": "m", "messages": HELLO, "max_tokens": 20, "temperature": 0.5}
    headers = {name.lower(): value for name, value in request["headers"].items()}
    assert headers["authorization"] == f"Bearer {KEY}"
    assert endpoint.usage == {"requests": 1, "failed": 0, "tokens_in": 10, "tokens_out": 5, "cost": 0.0}


def test_a_reply_that_was_cut_off_says_so():
    assert chat(in_turn((200, completion("hi", finish="length"))))[0] == Reply("hi", "length", 10, 5)
    assert chat(in_turn((200, completion(None, finish="length"))))[0] == Reply("", "length", 10, 5)


BAD_BODIES = {
    "no JSON": "hello",
    "cut JSON": '{"choices": [{"message": {"conte',
    "a list": "[]",
    "no choice": {**completion("x"), "choices": []},
    "two choices": {**completion("x"), "choices": completion("x")["choices"] * 2},
    "no message": {"choices": [{"finish_reason": "stop"}]},
    "a number for text": completion(7),
    "no finish reason": completion("x", finish=None),
    "half a surrogate": completion("\ud800"),
    "negative tokens": completion("x", tokens=(1, -5)),
    "tokens in words": {**completion("x"), "usage": {"prompt_tokens": "10"}},
    "deep nesting": '{"a":' * 100_000,
    "nothing": "",
}
TRANSIENT = {name: (200, body) for name, body in BAD_BODIES.items()} | {
    "status 429": (429, {"error": {"message": "slow down"}}),
    "status 500": (500, "oops"),
    "status 503": (503, {"error": "busy"}),
    "slow": slow,
    "dropped": drop(),
    "dropped in the middle": drop("HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n{"),
}


@pytest.mark.parametrize("case", TRANSIENT)
def test_what_may_pass_is_tried_again(case):
    outcome, endpoint, requests = chat(in_turn(TRANSIENT[case], GOOD))
    assert outcome == Reply("hi", "stop", 10, 5) and len(requests) == 2
    assert endpoint.usage["requests"] == 2 and endpoint.usage["failed"] == 1


@pytest.mark.parametrize(
    ("reply", "reason"),
    [(TRANSIENT["status 429"], "endpoint_429"), (TRANSIENT["dropped"], "endpoint_connection")]
    + [(TRANSIENT["no JSON"], "endpoint_bad_reply")],
)
def test_what_does_not_pass_is_unscored_after_some_attempts(reply, reason, naps):
    outcome, endpoint, requests = chat(in_turn(reply))
    assert outcome == Unscored(reason) and len(requests) == client.ATTEMPTS == endpoint.usage["failed"]
    assert len(naps) == client.ATTEMPTS - 1 and all(a < b * 2.01 for a, b in zip(naps, naps[1:], strict=False))
    assert naps[0] >= client.FIRST_WAIT / 2 and naps[-1] > 2 * naps[0]


def test_slow_for_ever_is_a_timeout(monkeypatch):
    monkeypatch.setattr(client, "ATTEMPTS", 1)
    assert chat(in_turn(slow))[0] == Unscored("endpoint_timeout")


@pytest.mark.parametrize(("header", "wait"), [("7", 7), ("1000000", client.LONGEST_WAIT), ("soon", 0), ("-5", 0)])
def test_the_server_says_how_long_to_wait(header, wait, naps):
    chat(in_turn((429, {}, {"retry-after": header}), GOOD))
    assert len(naps) == 1 and (naps[0] == wait if wait else naps[0] <= client.FIRST_WAIT)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((200, completion("bad", finish="content_filter")), "endpoint_content_filter"),
        ((200, completion(None)), "endpoint_no_text"),
        ((400, {"error": {"message": "too long"}}), "endpoint_400"),
        ((422, "no"), "endpoint_422"),
    ],
)
def test_what_cannot_pass_is_asked_once(reply, reason):
    outcome, _, requests = chat(in_turn(reply))
    assert outcome == Unscored(reason) and len(requests) == 1


def test_the_newer_name_of_the_length_limit():
    refusal = (400, {"error": {"message": "use 'max_completion_tokens' instead of 'max_tokens'"}})
    outcome, endpoint, requests = chat(in_turn(refusal, GOOD))
    assert outcome == Reply("hi", "stop", 10, 5)
    assert "max_tokens" not in requests[1]["body"] and requests[1]["body"]["max_completion_tokens"] == 20


@pytest.mark.parametrize(("status", "words"), [(401, "refuses the key"), (403, "forbids"), (404, "no such model")])
def test_what_no_request_can_pass_ends_the_run(status, words):
    with pytest.raises(UserError, match=words):
        chat(in_turn((status, {"error": {"message": f"Incorrect API key provided: {KEY}"}})))


# --- budgets


def many(n, script, **settings):
    """(outcomes of n chats in parallel, the endpoint, the requests that the server saw)."""
    outcomes = [None] * n
    with scripted(script) as (url, requests):
        endpoint = Endpoint(url, "m", **settings)
        client.in_parallel([HELLO] * n, lambda job: endpoint.chat(job, 20), outcomes.__setitem__)
    return outcomes, endpoint, requests


def test_max_requests_counts_retries_and_the_rest_is_unscored():
    outcomes, endpoint, requests = many(12, in_turn((500, ""), GOOD), max_requests=8)
    assert len(requests) == 8 == endpoint.usage["requests"]
    assert sum(isinstance(o, Reply) for o in outcomes) == 7
    assert set(o for o in outcomes if not isinstance(o, Reply)) == {Unscored("max_requests")}


def test_max_cost_is_never_passed():
    outcomes, endpoint, requests = many(
        40, in_turn((200, completion("hi", tokens=(60, 20)))), max_cost=0.002, price_in=1.0, price_out=10.0
    )
    each = (60 * 1.0 + 20 * 10.0) / 1e6
    assert endpoint.usage["cost"] == pytest.approx(each * len(requests)) and endpoint.usage["cost"] <= 0.002
    assert 0 < len(requests) < 40 and outcomes.count(Unscored("max_cost")) == 40 - len(requests)


def test_work_that_may_have_been_done_is_paid_and_refused_work_is_not():
    settings = {"max_cost": 1.0, "price_in": 1.0, "price_out": 1.0}
    _, endpoint, _ = chat(in_turn(drop(), GOOD), **settings)
    assert endpoint.usage["cost"] > 15 / 1e6  # the dropped one at its dearest
    _, endpoint, _ = chat(in_turn((429, {}), GOOD), **settings)
    assert endpoint.usage["cost"] == pytest.approx(15 / 1e6)


def test_a_server_that_counts_no_tokens_is_paid_in_full():
    body = completion("hi")
    del body["usage"]
    outcome, endpoint, _ = chat(in_turn((200, body)), max_cost=1.0, price_in=1.0, price_out=1.0)
    assert outcome == Reply("hi", "stop", 0, 0) and endpoint.usage["cost"] >= 20 / 1e6


def test_a_dead_endpoint_is_no_longer_asked():
    outcomes, _, requests = many(60, in_turn((500, "")))
    assert len(requests) <= (client.DEAD_AFTER + client.PARALLEL) * client.ATTEMPTS
    assert outcomes.count(Unscored("endpoint_dead")) >= 60 - client.DEAD_AFTER - client.PARALLEL


def test_single_failures_do_not_make_an_endpoint_dead():
    with scripted(lambda number, _: (400, "") if number % 2 else GOOD) as (url, requests):
        endpoint = Endpoint(url, "m")
        outcomes = [endpoint.chat(HELLO, 20) for _ in range(4 * client.DEAD_AFTER)]
    assert len(requests) == len(outcomes) and outcomes[-2:] == [Reply("hi", "stop", 10, 5), Unscored("endpoint_400")]


def test_a_storm_of_429_that_passes_loses_nothing():
    outcomes, _, _ = many(20, lambda number, _: (429, {}) if number < 12 else GOOD)
    assert all(isinstance(outcome, Reply) for outcome in outcomes)


def test_the_rate_limit_spaces_the_requests(monkeypatch):
    monkeypatch.setattr(client, "sleep", time.sleep)
    _, _, requests = many(6, in_turn(GOOD), per_minute=600)
    times = sorted(request["time"] for request in requests)
    assert times[-1] - times[0] >= 5 * 0.1 - 0.05


def test_an_error_in_one_thread_stops_the_others():
    with pytest.raises(UserError, match="refuses the key"):
        many(500, in_turn((401, {})))


def test_after_an_interruption_nothing_more_is_sent(monkeypatch):
    monkeypatch.setattr(client, "sleep", lambda seconds: time.sleep(0.05))

    def interrupted(i, outcome):
        raise KeyboardInterrupt

    with scripted(lambda number, _: (500, "") if number else GOOD) as (url, requests):
        endpoint = Endpoint(url, "m")
        with pytest.raises(KeyboardInterrupt):
            client.in_parallel([HELLO] * 99, lambda job: endpoint.chat(job, 20), interrupted)
        time.sleep(0.3)
        sent = len(requests)
        time.sleep(0.3)
    assert sent == len(requests) <= 4 * client.PARALLEL


# --- keys and URLs


def everything_said(capfd, caplog, error=None) -> str:
    out, err = capfd.readouterr()
    return out + err + caplog.text + ("".join(traceback.format_exception(error)) if error else "") + repr(error)


@pytest.mark.parametrize(
    "reply", [(401, {"error": f"bad key {KEY}"}), (400, {"error": f"{KEY}\x1b[2J"}), (500, KEY), (200, KEY), GOOD]
)
def test_the_key_is_never_shown(reply, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    error = None
    try:
        _, endpoint, _ = chat(in_turn(reply), max_requests=2)
    except UserError as raised:
        error = raised
        assert error.__cause__ is None and error.__context__ is None
    else:
        assert KEY not in repr(endpoint) + str(endpoint.usage)
    said = everything_said(capfd, caplog, error)
    assert KEY not in said and "\x1b" not in said


@pytest.mark.parametrize("key", ["sk-with-newline\n", "sk with blank", "sk-é", "sk-\x00"])
def test_a_key_that_cannot_be_sent_is_refused_unseen(key, monkeypatch):
    monkeypatch.setattr("os.environ", {"MY_KEY": key})
    with pytest.raises(UserError, match="MY_KEY is no key") as raised:
        Endpoint("https://models.example/v1", "m", key_env="MY_KEY")
    assert key.strip() not in str(raised.value)


def test_a_key_is_needed_beyond_this_machine(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match=r"models\.example needs a key in the environment variable OPENAI_API_KEY"):
        Endpoint("https://models.example/v1", "m")
    Endpoint("http://localhost:1/v1", "m")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://models.example/v1", "plain http"),
        ("http://127.0.0.1.example/v1", "plain http"),
        ("https://user:pw@models.example/v1", "no user, password"),
        ("https://models.example/v1?key=abc", "no user, password or query"),
        ("ftp://models.example", "https://"),
        ("models.example/v1", "https://"),
        ("https://", "https://"),
        ("https://[models.example/v1", "cannot be read"),
        ("https://user:pw@models.example:99999/v1?key=abc", "cannot be read"),
    ],
)
def test_urls_that_would_show_a_key(url, words):
    with pytest.raises(UserError, match=words) as raised:
        Endpoint(url, "m")
    assert "pw" not in str(raised.value) and "abc" not in str(raised.value)


def test_a_cost_limit_needs_prices():
    with pytest.raises(UserError, match="--price-in"):
        Endpoint("http://localhost:1/v1", "m", max_cost=1.0)


def test_without_the_package_the_user_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="pip install -r requirements-extra.txt"):
        Endpoint("http://localhost:1/v1", "m")
