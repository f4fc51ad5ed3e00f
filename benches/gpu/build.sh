#!/usr/bin/env bash
# Builds what a machine with a card is to run, into one archive, benches/gpu/bin/binaries.tgz: the program, and the tests of
# kernels and engine. It is small enough to be carried: more than 60 MiB fails. Needs cargo here, and nothing there.
#
#     build.sh [PROFILE]     release, or dev for a try of the script itself
set -euo pipefail
cd "$(dirname "$0")/../.."
profile=${1:-release}
archive=benches/gpu/bin/binaries.tgz
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
max_kib=$((60 * 1024))

options=(--profile "$profile" --message-format=json)
mkdir -p "$bin/kernels" "$bin/engine" "$(dirname "$archive")"

# Of cargo's messages: the name and the file of what was built.
built() {
    sed -n 's/.*"kind":\["'"$1"'"\].*"name":"\([^"]*\)".*"executable":"\([^"]*\)".*/\1 \2/p'
}

cargo build -p quire-router --bin quire "${options[@]}" | built bin | while read -r name file; do
    cp "$file" "$bin/$name"
done
kernel_tests=(embed gather_rows linear logprobs paged_attention peaks rms_norm rope_kv_write rope_table sample)
engine_tests=(parity device_code)
cargo test --no-run -p quire-kernels "${kernel_tests[@]/#/--test=}" "${options[@]}" | built test | while read -r name file; do
    cp "$file" "$bin/kernels/$name"
done
cargo test --no-run -p quire-engine "${engine_tests[@]/#/--test=}" "${options[@]}" | built test | while read -r name file; do
    cp "$file" "$bin/engine/$name"
done

for file in "$bin/quire" "${kernel_tests[@]/#/$bin/kernels/}" "${engine_tests[@]/#/$bin/engine/}"; do
    [ -x "$file" ] || { echo "error: $file was not built" >&2; exit 1; }
    if command -v strip > /dev/null; then strip "$file"; fi
done
tar -C "$bin" -czf "$archive" .
kib=$(du -sk "$archive" | cut -f1)
echo "$archive: $kib KiB"
if [ "$kib" -gt "$max_kib" ]; then
    echo "error: more than $max_kib KiB" >&2
    exit 1
fi
