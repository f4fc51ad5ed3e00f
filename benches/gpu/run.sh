#!/usr/bin/env bash
# Runs on a machine with a card what build.sh made, without cargo and without a network: correctness first, then figures.
#
#     run.sh [--out FOLDER] [--archive FILE.tgz] [--bin FOLDER] [--limit SECONDS] [PART ...]
#
# All parts, or those that are named, in the order below; --limit is for each of them instead of its own. The archive holds all of
# the folder as it is behind each part, for machines that give few files back.
#
# Each part has a time limit of its own and writes its JSON at once, so that whatever ends the run leaves what was done until
# then. table.py makes a table of the folder. Where there is no driver every part says so in one line.
set -uo pipefail

# Name, seconds, what it is.
parts="
facts      20   the card, its driver, and what else is installed
modules   240   device code assembled for the first time, and taken from its cache
kernels   240   every operation against its meaning
parity    180   every model of the fixtures: logits within bounds, tokens equal to the CPU's
bits      180   the first promise, in batches of 1 to 256
attention  60   decode attention, and that of prompts
skinny     90   products of 1 to 64 rows
large      60   products of 2,048 to 8,192 rows
peers      90   the same shapes by torch, where it is installed
model     180   Llama-3.1-8B's shape, random weights: decoding behind 1,024 tokens, and a prompt of 1,024
ready      90   from exec to ready, with device code in its cache
served    150   the same model through HTTP, 256 streams
formats   160   fp8, int8, int4 and the caches of int8 and fp8
generate  150   the same shape by transformers, where it is installed
"

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=${OUT:-$here/out}
bin=$here/bin
limit=
archive=
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2; shift 2 ;;
        --bin) bin=$2; shift 2 ;;
        --limit) limit=$2; shift 2 ;;
        --archive) archive=$2; shift 2 ;;
        --help | -h) sed -n '2,12s/^# \{0,1\}//p' "$0"; echo "$parts"; exit 0 ;;
        -*) echo "error: unknown option $1" >&2; exit 2 ;;
        *) break ;;
    esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
bin=$(cd "$bin" 2>/dev/null && pwd) || { echo "error: no binaries: run build.sh where there is cargo" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -f "$bin/binaries.tgz" ]; then
    mkdir "$work/bin"
    tar -C "$work/bin" -xzf "$bin/binaries.tgz" || exit 2
    bin=$work/bin
fi
if [ -x "$bin/quire" ] && ! said=$("$bin/quire" --version 2>&1); then
    echo "error: the program does not run here, was it built for an older system? $said" >&2
    exit 2
fi
# Where tests keep device code too.
modules=${TMPDIR:-/tmp}/quire-cuda
model=$work/llama-3.1-8b
mkdir -p "$model"
cp "$here/llama-3.1-8b/config.json" "$root/router/demo/tokenizer.json" "$root/router/demo/tokenizer_config.json" "$model"
settings=(--device cuda --engine.module-cache "$modules" --load-format dummy --dtype bf16 --max-model-len 2048
    --max-num-seqs 256 --max-num-batched-tokens 2048 --no-prefix-cache)

now() { date +%s.%N; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.3f", b - a }'; }

# Standard input as a JSON string.
json_string() {
    printf '"'
    tr -d '\000-\010\013-\037' | sed -e 's/\\/\\\\/g' -e 's/"/\\"/g' -e 's/\t/\\t/g' | awk 'NR > 1 { printf "\\n" } { printf "%s", $0 }'
    printf '"'
}

# The part did not do what it is for: said in one line, and in its JSON.
skip() {
    echo "$1: skipped: $2"
    printf '{"part": "%s", "skipped": %s}\n' "$1" "$(printf '%s' "$2" | json_string)" > "$out/$1.json"
}

# Tests of a crate whose names have `on_a_card`, each in a process of its own: what breaks a card's context breaks one test.
# part, seconds, crate, pattern of names, binaries.
run_tests() {
    local part=$1 limit=$2 crate=$3 pattern=$4 began tests=() passed=0 failed=0
    shift 4
    began=$(now)
    for binary in "$@"; do
        for name in $(cd "$root/$crate" && "$bin/$crate/$binary" --list 2> /dev/null | sed -n 's/: test$//p' | grep on_a_card | grep -E "$pattern"); do
            local left start status seconds log=$work/log
            left=$(awk -v a="$began" -v b="$(now)" -v l="$limit" 'BEGIN { printf "%d", l - (b - a) }')
            if [ "$left" -lt 1 ]; then
                status="no time" seconds=0
            else
                start=$(now)
                (cd "$root/$crate" && timeout -k 5 "$left" "$bin/$crate/$binary" --exact "$name" --nocapture) > "$log" 2>&1
                case $? in
                    0) status=passed ;;
                    124 | 137) status="timed out" ;;
                    *) status=failed ;;
                esac
                seconds=$(since "$start")
                if [ "$status" = passed ] && grep -q '^skipped: ' "$log"; then
                    skip "$part" "$(sed -n 's/^skipped: //p' "$log" | head -n 1)"
                    return
                fi
            fi
            local said
            said=$({ [ "$status" = passed ] && grep -E '^deviates|: [0-9.e-]+$' "$log" || tail -n 12 "$log"; } 2> /dev/null | json_string)
            tests+=("{\"name\": \"$binary $name\", \"status\": \"$status\", \"seconds\": $seconds, \"said\": $said}")
            if [ "$status" = passed ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "$part: $binary $name: $status"; fi
            { printf '{"part": "%s", "passed": %d, "failed": %d, "tests": [\n' "$part" "$passed" "$failed"
              local separator=""
              for test in "${tests[@]}"; do printf '%s  %s' "$separator" "$test"; separator=$',\n'; done
              printf '\n]}\n'; } > "$out/$part.json"
        done
    done
    echo "$part: $passed passed, $failed failed, $(since "$began") s"
}

# A command that writes JSON to the file that it is given last. part, seconds, command.
run_bench() {
    local part=$1 limit=$2 began status file=$work/$1.json log=$work/log
    shift 2
    began=$(now)
    rm -f "$file"
    timeout -k 5 "$limit" "$@" "$file" > "$log" 2>&1
    status=$?
    if [ -s "$file" ]; then
        mv "$file" "$out/$part.json"
        cat "$log"
        echo "$part: $(since "$began") s"
    elif [ "$status" = 124 ] || [ "$status" = 137 ]; then
        cat "$log"
        skip "$part" "not done in $limit s"
    else
        skip "$part" "$(grep -v '^ *$' "$log" | tail -n 1)"
    fi
}

quire() { "$bin/quire" "$@"; }
ops() { run_bench "$1" "$2" "$bin/quire" bench ops --device cuda --engine.module-cache "$modules" "${@:3}" --json; }
python() { # part, seconds, script and arguments
    if command -v python3 > /dev/null; then run_bench "$1" "$2" python3 "$here/${@:3:1}" "${@:4}"; else skip "$1" "no python3 here"; fi
}

part_facts() {
    local smi driver torch
    smi=$(nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.max.sm,clocks.max.mem --format=csv,noheader 2> /dev/null | head -n 1)
    torch=$(timeout 60 python3 -c 'import torch; print(torch.__version__)' 2> /dev/null)
    if [ -z "$smi" ]; then
        skip facts "nvidia-smi lists no card"
        return
    fi
    printf '{"part": "facts", "card": %s, "torch": %s, "kernel": %s, "cores": %s, "date": "%s"}\n' \
        "$(printf '%s' "$smi" | json_string)" "$(printf '%s' "$torch" | json_string)" "$(uname -r | json_string)" \
        "$(nproc)" "$(date -u +%F)" > "$out/facts.json"
    echo "$smi"
}

part_modules() {
    local cold warm start tiny=(bench ops --device cuda --op linear --linear 128x128 --rows 1 --data-mib 1 --milliseconds 1)
    rm -rf "$modules"
    start=$(now)
    if ! timeout "$1" "$bin/quire" "${tiny[@]}" --engine.module-cache "$modules" --json "$work/tiny.json" > "$work/log" 2>&1; then
        skip modules "$(tail -n 1 "$work/log")"
        return
    fi
    cold=$(since "$start")
    start=$(now)
    timeout "$1" "$bin/quire" "${tiny[@]}" --engine.module-cache "$modules" --json "$work/tiny.json" > "$work/log" 2>&1
    warm=$(since "$start")
    printf '{"part": "modules", "cold_seconds": %s, "warm_seconds": %s}\n' "$cold" "$warm" > "$out/modules.json"
    echo "modules: $cold s cold, $warm s warm"
}

part_kernels() { run_tests kernels "$1" kernels . embed gather_rows rms_norm rope_table rope_kv_write linear paged_attention sample logprobs peaks; }
part_parity() { run_tests parity "$1" engine 'prefill|greedy|logits|cpu_does' parity device_code; }
part_bits() { run_tests bits "$1" engine same_bits device_code; }
part_attention() { ops attention "$1" --op attention --sequences 32x4096,256x1024,1x1024,1x8192,1x1024x1024,1x4096x8192; }
part_skinny() { ops skinny "$1" --op linear --linear 6144x4096,4096x4096,28672x4096:gate-up,4096x14336,128256x4096 --rows 1,8,16,32,64 --milliseconds 120; }
part_large() { ops large "$1" --op linear --rows 2048,4096,8192 --milliseconds 400; }
part_formats() { ops formats "$1" --formats fp8,int8,int4 --cache int8,fp8 --rows 1,16,64 --milliseconds 100; }
part_peers() { python peers "$1" peers.py ops; }
part_generate() { python generate "$1" peers.py generate "$model"; }
part_model() {
    run_bench model "$1" "$bin/quire" bench model "$model" "${settings[@]}" --prompt 1024 --batch 1,32,256 --depth 544,1024 --steps 32 --json
}
part_ready() { python ready "$1" serve.py "$bin/quire" "$model" --ready-only -- "${settings[@]}" --; }
part_served() { python served "$1" serve.py "$bin/quire" "$model" --streams 256 --input-tokens 64 --output-tokens 960 -- "${settings[@]}" --; }

names=$(awk 'NF { print $1 }' <<< "$parts")
for name in "$@"; do
    grep -qx "$name" <<< "$names" || { echo "error: there is no part $name" >&2; exit 2; }
done
[ $# -gt 0 ] || set -- $names
for name in $names; do
    if [[ " $* " == *" $name "* ]]; then
        "part_$name" "${limit:-$(awk -v name="$name" '$1 == name { print $2 }' <<< "$parts")}"
        if [ -n "$archive" ]; then
            # Moved to its place when it is whole.
            tar -C "$out" -czf "$work/archive" . && mv "$work/archive" "$archive"
        fi
    fi
done
