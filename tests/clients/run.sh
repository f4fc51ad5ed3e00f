#!/usr/bin/env bash
# Published clients against a server with the demo model. Makes a virtual environment once (target/clients); without a Python
# registry it says so and is done. Usage: tests/clients/run.sh [path of the program]
set -euo pipefail
cd "$(dirname "$0")/../.."
program=${1:-target/debug/quire}
environment=target/clients

skip() { echo "clients: skipped: $1"; exit 0; }
command -v python3 > /dev/null || skip "there is no python3"
[ -x "$program" ] || { echo "clients: $program is not built"; exit 1; }
if [ ! -e "$environment/.ready" ]; then
    python3 -m venv "$environment" > /dev/null 2>&1 || skip "python3 makes no virtual environments"
    timeout 70 "$environment/bin/pip" install --quiet --disable-pip-version-check --retries 1 --timeout 10 \
        --requirement tests/clients/requirements.txt > "$environment/pip.log" 2>&1 \
        || skip "their packages could not be installed: $(tail -n 1 "$environment/pip.log")"
    touch "$environment/.ready"
fi

log=$(mktemp)
"$program" serve --http 127.0.0.1:0 --grpc 127.0.0.1:0 2> "$log" &
server=$!
trap 'kill "$server" 2> /dev/null || true; wait "$server" 2> /dev/null || true; rm -f "$log"' EXIT
for _ in $(seq 200); do
    grep -q '"ready"\|ready$\|ready ' "$log" && break
    kill -0 "$server" 2> /dev/null || { cat "$log"; exit 1; }
    sleep 0.1
done
http=$(grep -o 'HTTP on http://[0-9.:]*' "$log" | head -n 1 | cut -d' ' -f3)
grpc=$(grep -o 'gRPC on [0-9.:]*' "$log" | head -n 1 | cut -d' ' -f3)
for client in openai anthropic ollama; do
    timeout 60 "$environment/bin/python" "tests/clients/${client}_client.py" "$http"
done
for client in triton engine; do
    timeout 60 "$environment/bin/python" "tests/clients/${client}_client.py" "$grpc"
done
