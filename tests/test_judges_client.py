"""The endpoint client against a scripted server: what it sends, retries, counts and refuses, and where the key goes."""

import logging
import sys
import time
import traceback

import pytest

import judges
from judges import Endpoint, Reply
from runs import UserError
from safety import Unscored
from tests.evaluations import refused
from tests.server import Drop, completion, scripted

HELLO = [{"role": "user", "content": "hello"}]
KEY = "sk-very-secret-1234"
GOOD = (200, completion("hi"))
HI = Reply("hi", "stop", 5)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def chat(script, **settings):
    with scripted(script) as (url, requests):
        return Endpoint(url, "m", timeout=0.4, **settings).chat(HELLO, 20, 0.5), requests


def many(n, script):
    """(outcomes of n chats in parallel, the requests that the server saw)."""
    with scripted(script) as (url, requests):
        endpoint = Endpoint(url, "m")
        outcomes = dict(judges.in_parallel([HELLO] * n, lambda job: endpoint.chat(job, 20)))
    return [outcomes[i] for i in range(n)], requests


def in_turn(*replies):
    """A script that gives these replies in turn, the last one for ever; a callable is called, a Drop raised."""

    def script(number, request):
        reply = replies[min(number, len(replies) - 1)]
        if isinstance(reply, Drop):
            raise reply
        return reply() if callable(reply) else reply

    return script


def slow():
    time.sleep(0.8)
    return 200, completion("too late")


def test_the_wire_format():
    outcome, (request,) = chat(in_turn((200, completion("hi", reasoning_content="well"))), seed=3)
    assert outcome == Reply("hi", "stop", 5, "well") and request["path"] == "/v1/chat/completions"
    assert request["body"] == {"model": "m", "messages": HELLO, "max_tokens": 20, "temperature": 0.5, "seed": 3}
    assert f"Bearer {KEY}" in [value for name, value in request["headers"].items() if name.lower() == "authorization"]


PASSING = {
    "endpoint_429": (429, {"error": {"message": "slow down"}}),
    "endpoint_500": (500, "oops"),
    "endpoint_503": (503, {"error": "busy"}),
    "endpoint_timeout": slow,
    "endpoint_connection": Drop(),
    "endpoint_connection in the middle": Drop("HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n{"),
}


@pytest.mark.parametrize("reason", PASSING)
def test_what_may_pass_is_tried_again_some_times(reason, monkeypatch):
    outcome, requests = chat(in_turn(PASSING[reason], GOOD))
    assert outcome == HI and len(requests) == 2
    monkeypatch.setattr(judges, "RETRIES", 1)
    outcome, requests = chat(in_turn(PASSING[reason]))
    assert outcome == Unscored(reason.split()[0]) and len(requests) == 2


X = completion("x")
BAD_BODIES = [
    *("hello", '{"choices": [{"message": {"conte', "[]", '{"a":' * 100_000, ""),
    *(X | {"choices": []}, X | {"choices": X["choices"] * 2}, {"choices": [{"finish_reason": "stop"}]}),
    *(completion(text) for text in (7, "\ud800", ["a part of no kind"])),
    *(completion("x", finish=None), X | {"usage": {"completion_tokens": "10"}}),
    *(completion("x", tokens=(1, odd)) for odd in (-5, float("inf"))),
]
FINAL = [
    ((400, {"error": {"message": "the temperature", "param": "prompt"}}), Unscored("endpoint_400")),
    ((400, {"error": {"message": "max_tokens is too large"}}), Unscored("endpoint_400")),
    ((422, "no"), Unscored("endpoint_422")),
    ((307, "", {"location": "http://models.example/v1"}), Unscored("endpoint_307")),  # not followed
    *(((200, body), Unscored("endpoint_bad_reply")) for body in BAD_BODIES),
    ((200, completion("bad", finish="content_filter")), Unscored("endpoint_content_filter")),
    ((200, completion(None)), Unscored("endpoint_no_text")),
    ((200, completion("hi", finish="length")), Reply("hi", "length", 5)),
    ((200, completion("hi") | {"usage": {"prompt_tokens": None}}), Reply("hi", "stop", 0)),
    ((200, completion("hi", tokens=(10.0, 5.0))), HI),
    ((200, completion([{"type": "text", "text": "h"}, {"type": "other"}, {"type": "text", "text": "i"}])), HI),
    ((200, completion(None, refusal="I cannot.")), Reply("I cannot.", "stop", 5)),
    ((200, completion(None, finish="length")), Reply("", "length", 5)),
    ((200, completion(None, reasoning_content="well")), Reply("", "stop", 5, "well")),  # an empty answer
]


@pytest.mark.parametrize(("reply", "want"), FINAL)
def test_what_no_second_attempt_can_change_is_asked_once(reply, want):
    outcome, requests = chat(in_turn(reply))
    assert outcome == want and len(requests) == 1


def test_a_setting_that_the_server_refuses_is_dropped_once_and_said(capfd):
    answers = {
        "temperature": {"error": {"message": "Unsupported value", "param": "temperature"}},
        "seed": {"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]},
        "max_tokens": {"error": {"message": "use 'max_completion_tokens' instead of 'max_tokens'"}},
    }

    def script(number, request):
        refused = [name for name in answers if name in request["body"]]
        return (422 if refused[0] == "seed" else 400, answers[refused[0]]) if refused else GOOD

    outcomes, requests = many(9, script)
    assert outcomes == [HI] * 9
    assert requests[-1]["body"] == {"model": "m", "messages": HELLO, "max_completion_tokens": 20}
    err = capfd.readouterr().err.splitlines()
    assert sorted(line.split()[2] for line in err) == ["max_tokens:", "seed:", "temperature:"]


@pytest.mark.parametrize(("status", "words"), [(401, "refuses the key"), (403, "forbids"), (404, "no such model")])
def test_what_no_request_can_pass_ends_the_run(status, words):
    refused(words, chat, in_turn((status, {"error": {"message": f"Incorrect API key provided: {KEY}"}})))
    with pytest.raises(UserError, match=words):  # in one thread: the others stop
        many(500, in_turn((status, {})))


def test_a_dead_endpoint_is_no_longer_asked(monkeypatch):
    monkeypatch.setattr(judges, "RETRIES", 1)
    outcomes, requests = many(60, in_turn((500, "")))
    assert len(requests) <= (judges.DEAD_AFTER + judges.PARALLEL) * 2
    assert outcomes.count(Unscored("endpoint_dead")) >= 60 - judges.DEAD_AFTER - judges.PARALLEL
    with scripted(lambda number, _: (400, "") if number % 2 else GOOD) as (url, requests):  # single failures
        endpoint = Endpoint(url, "m")
        outcomes = [endpoint.chat(HELLO, 20) for _ in range(4 * judges.DEAD_AFTER)]
    assert len(requests) == len(outcomes) and outcomes[-2:] == [HI, Unscored("endpoint_400")]


def test_when_the_iterator_is_closed_no_other_job_is_begun():
    with scripted(lambda number, _: slow() if number else GOOD) as (url, requests):
        endpoint = Endpoint(url, "m")
        outcomes = judges.in_parallel([HELLO] * 99, lambda job: endpoint.chat(job, 20))
        assert next(outcomes)[1] == HI
        outcomes.close()
        time.sleep(1.5)
    assert len(requests) <= judges.PARALLEL + 1


@pytest.mark.parametrize(
    "reply", [(401, {"error": f"bad key {KEY}"}), (400, {"error": f"{KEY}\x1b[2J"}), (500, KEY), (200, KEY), GOOD]
)
def test_the_key_is_never_shown(reply, capfd, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(judges, "RETRIES", 1)
    try:
        outcome, _ = chat(in_turn(reply))
        shown = repr(outcome) + repr(Endpoint("http://localhost:1", "m"))
    except UserError as error:
        assert error.__cause__ is None and error.__context__ is None
        shown = "".join(traceback.format_exception(error)) + repr(error)
    out, err = capfd.readouterr()
    assert KEY not in shown + out + err + caplog.text and "\x1b" not in out + err


@pytest.mark.parametrize("key", ["sk-with-newline\n", "sk with blank", "sk-é", "sk-\x00"])
def test_a_key_that_cannot_be_sent_is_refused_unseen(key, monkeypatch):
    monkeypatch.setattr("os.environ", {"OPENAI_API_KEY": key})
    with pytest.raises(UserError, match="OPENAI_API_KEY is no key") as raised:
        Endpoint("https://models.example/v1", "m")
    assert key.strip() not in str(raised.value)


def test_a_key_is_needed_beyond_this_machine_and_the_package_everywhere(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    message = r"models\.example needs a key in the environment variable OPENAI_API_KEY"
    refused(message, Endpoint, "https://models.example/v1", "m")
    for host in ("localhost", "127.0.0.1", "[::1]"):
        Endpoint(f"http://{host}:1/v1", "m")
    monkeypatch.setitem(sys.modules, "openai", None)
    refused("pip install -r requirements-extra.txt", Endpoint, "http://localhost:1/v1", "m")


BAD_URLS = """http://a.example/v1 http://127.0.0.1.example/v1 https://user:pw@a.example/v1 https://a.example/v1?key=abc
              ftp://a.example a.example/v1 https:// https://[a.example/v1 https://a.example:99999/v1
              https://a.example/v1#abc"""


@pytest.mark.parametrize("url", BAD_URLS.split())
def test_urls_that_would_show_a_key(url):
    with pytest.raises(UserError, match="begin with https:// .*only on this machine.*no user, password or") as raised:
        Endpoint(url, "m")
    assert "pw" not in str(raised.value) and "abc" not in str(raised.value)


LOST = {"completion": "", "tokens": 0, "thinking": "", "answer": None, "finish_reason": "provider"}
REPLIES = {
    "tags": (completion("hm</think>fine"), {"thinking": "hm", "answer": "fine", "finish_reason": "stop"}),
    "split": (completion("fine", reasoning_content="hm"), {"thinking": "hm", "answer": "fine"}),
    "empty": (completion(None, reasoning="hm"), {"thinking": "hm", "answer": "", "finish_reason": "stop"}),
    "plain": (completion("fine"), {"thinking": "", "answer": "fine", "completion": "fine", "tokens": 5}),
    "cut": (completion("hm", finish="length"), {"thinking": "hm", "answer": None, "finish_reason": "length"}),
    "cut split": (completion("", finish="length", reasoning="hm"), {"thinking": "hm", "answer": None}),
    "filter": (completion("x", finish="content_filter"), LOST | {"provider": "endpoint_content_filter"}),
}


def test_what_a_server_samples_is_what_the_engine_would_give():
    script = lambda number, request: (200, REPLIES[request["body"]["messages"][0]["content"]][0])  # noqa: E731
    jobs = [({"id": name, "kind": "benign", "prompt": name, "sample": 1}, seed) for seed, name in enumerate(REPLIES)]
    with scripted(script) as (url, requests):
        found = dict(judges.ask_server(Endpoint(url, "m"), jobs, max_tokens=9, temperature=0.6, top_p=0.9))
    for j, (item, seed) in enumerate(jobs):
        assert found[j].items() >= (item | REPLIES[item["id"]][1]).items(), item["id"]
        (body,) = [r["body"] for r in requests if r["body"]["messages"][0]["content"] == item["prompt"]]
        assert (body["seed"], body["max_tokens"], body["temperature"], body["top_p"]) == (seed, 9, 0.6, 0.9)
        assert judges.failed(found[j]) == (item["id"] == "filter")
