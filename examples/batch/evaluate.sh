#!/usr/bin/env bash
# Few-shot tasks over the processors of one machine: N processes, every N-th task each, then one table.
#   bash examples/batch/evaluate.sh base.h5 omniglot.h5 results 4 --tasks 40 --methods none,full,tinytrain
set -euo pipefail
base=$1 samples=$2 results=$3 shards=$4
shift 4
mkdir -p "$results"
jobs=()
for ((i = 0; i < shards; i++)); do
    edgetrain evaluate "$base" "$samples" --cpus "$i" --shard "$i/$shards" --rows "$results/shard$i.jsonl" \
        --quiet "$@" >/dev/null &
    jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job"; done
files=()
for ((i = 0; i < shards; i++)); do files+=("$results/shard$i.jsonl"); done
edgetrain evaluate --merge "${files[@]}"
