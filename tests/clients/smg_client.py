"""The gateway of the package `smg` in front of a running server: it drives the engine over gRPC, and answers what the server does."""

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

http, grpc = sys.argv[1:]
question = {"messages": [{"role": "user", "content": "What is 7 + 5?"}], "temperature": 0, "max_tokens": 32}


def ask(address, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


model = json.loads(ask(http, "/v1/models"))["data"][0]["id"]
question["model"] = model
ports = [free_port(), free_port()]
gateway = subprocess.Popen(
    [
        os.path.join(os.path.dirname(sys.executable), "smg"), "launch", "--host", "127.0.0.1", "--port", str(ports[0]),
        "--worker-urls", f"grpc://{grpc}", "--prometheus-host", "127.0.0.1", "--prometheus-port", str(ports[1]),
        "--log-level", "error",
    ],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
)
try:
    address = f"http://127.0.0.1:{ports[0]}"
    # It takes the server's tokenizer over, and answers from then on.
    for _ in range(100):
        assert gateway.poll() is None, f"the gateway ended with {gateway.returncode}"
        try:
            answer = json.loads(ask(address, "/v1/chat/completions", question))
            break
        except OSError:
            time.sleep(0.2)
    else:
        raise AssertionError("the gateway never answered")
    direct = json.loads(ask(http, "/v1/chat/completions", question))
    text = direct["choices"][0]["message"]["content"]
    assert text and answer["choices"][0]["message"]["content"] == text, (answer, direct)
    assert answer["choices"][0]["finish_reason"] == "stop", answer
    assert answer["usage"]["prompt_tokens"] == direct["usage"]["prompt_tokens"], (answer, direct)
    lines = ask(address, "/v1/chat/completions", {**question, "stream": True}).splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert lines and "data: [DONE]" in lines, lines
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]) == text
finally:
    gateway.kill()
    gateway.wait()
print("smg", importlib.metadata.version("smg"), "fine")
