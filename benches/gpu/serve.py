#!/usr/bin/env python3
"""Starts `quire serve`, waits until it is ready, loads it with `quire bench serve`, and writes figures as JSON.

    serve.py QUIRE MODEL [--ready-only | --streams N --input-tokens N --output-tokens N] -- SETTINGS... -- FILE

The server is ended by its process id. Needs Python's standard library only.
"""
import argparse
import json
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request


def is_ready(url):
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=1) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(quire, model, settings, log):
    """A server that is ready, its address, and how many seconds that took."""
    port, grpc = free_port(), free_port()
    command = [quire, "serve", model, *settings, "--http", f"127.0.0.1:{port}", "--grpc", f"127.0.0.1:{grpc}"]
    began = time.monotonic()
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    while not is_ready(url):
        if server.poll() is not None:
            log.seek(0)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
            sys.exit(reason(lines[-1]) if lines else f"the server ended with {server.returncode}")
        time.sleep(0.005)
    return server, url, time.monotonic() - began


def reason(line):
    """What a line of the log says, which is JSON where nobody looks on."""
    try:
        return json.loads(line)["message"]
    except (ValueError, KeyError, TypeError):
        return line


def stop(server):
    server.terminate()
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def resident_mb(pid):
    status = pathlib.Path(f"/proc/{pid}/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return found and int(found[1]) / 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quire")
    parser.add_argument("model")
    parser.add_argument("--ready-only", action="store_true")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=960)
    own, _, rest = " ".join(sys.argv[1:]).partition(" -- ")
    arguments = parser.parse_args(own.split())
    settings, _, file = rest.rpartition(" -- ")
    figures = {"part": "ready" if arguments.ready_only else "served"}
    with tempfile.TemporaryFile() as log:
        server, url, seconds = start(arguments.quire, arguments.model, settings.split(), log)
        try:
            figures.update(ready_seconds=seconds, resident_mb=resident_mb(server.pid))
            if not arguments.ready_only:
                load = [arguments.quire, "bench", "serve", "--url", url, "--concurrency", str(arguments.streams)]
                load += ["--requests", str(arguments.streams), "--input-tokens", str(arguments.input_tokens)]
                load += ["--output-tokens", str(arguments.output_tokens), "--warmup", "4", "--json"]
                # Once to record every size of a batch, once to measure.
                for run in ["first", "figures"]:
                    with tempfile.NamedTemporaryFile() as json_file:
                        subprocess.run([*load, json_file.name], check=True, stdout=subprocess.DEVNULL)
                        figures[run] = json.loads(pathlib.Path(json_file.name).read_text())
        finally:
            stop(server)
    pathlib.Path(file).write_text(json.dumps(figures, indent=1) + "\n")
    print(f"ready after {figures['ready_seconds']:.2f} s")
    if "figures" in figures:
        print(f"{figures['figures']['output_tokens_per_second']:.0f} output tokens/s")


if __name__ == "__main__":
    main()
