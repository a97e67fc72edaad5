"""An OpenAI-compatible server on loopback that does as a test scripts it: good replies, bad ones, none at all."""

import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock


def completion(text, finish="stop", tokens=(10, 5), **message) -> dict:
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


class Drop(Exception):
    """Raised by a script: the connection is closed, without a reply or in the middle of one."""


@contextmanager
def scripted(script):
    """A server whose every POST calls script(number, request); -> (base URL, the requests so far).

    The script returns (status, body) or (status, body, headers); the body is a dict or text. A request is a dict with
    path, headers and body. A client waits hardly before it tries again.
    """
    waits = mock.patch.multiple("openai._base_client", INITIAL_RETRY_DELAY=0.001, MAX_RETRY_DELAY=0.001)
    requests, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            request = {"path": self.path, "headers": dict(self.headers), "body": body}
            with lock:
                requests.append(request)
                number = len(requests) - 1
            try:
                status, reply, *headers = script(number, request)
            except Drop as half:
                if str(half):
                    self.wfile.write(str(half).encode())
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            data = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
            self.send_response(status)
            for name, value in {"content-type": "application/json", **(headers[0] if headers else {})}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        with waits:
            yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
