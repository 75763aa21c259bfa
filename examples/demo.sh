#!/usr/bin/env bash
# EdgeTrain from end to end on real data, in about three minutes on two cores. Every step is an ordinary command:
# read it as a tutorial, change it, run it again. Everything it makes stays in demo-out/ (or the folder you name).
set -euo pipefail
cd "$(dirname "$0")/.."
examples=$PWD/examples
out=${1:-demo-out}
seeds=${SEEDS:-0 1 2}
rm -rf "$out" && mkdir -p "$out" && cd "$out"
step() { printf '\n== %s\n' "$*"; }

step "Meta-train a small backbone on letters of many scripts (on a server, once)"
edgetrain pretrain-fsl --arch cnn4-w16 --size 32 --glyphs --epochs 4 --steps 75 --ways 20 --queries 5 --lr 0.3 \
    --validation-tasks 50 --cpus 0,1 -o base.h5

step "What does it cost on this device, layer by layer?"
edgetrain profile base.h5 --plot profile.png -o run.h5

step "The user's data: handwritten digits, which meta-training has never seen"
python "$examples/make_data.py" .
edgetrain pack digits.npz --size 32 --per-class 5 -o support.h5                       # a handful of samples
edgetrain pack digits.npz --size 32 --per-class 40 --skip-per-class 5 -o test.h5      # held out
edgetrain pack digits.npz --size 32 --per-class 125 --skip-per-class 45 -o stream.h5  # what arrives later

step "Few-shot: which layers and channels fit 128 KiB and 15 % of the backward pass? Train only those"
edgetrain evaluate run.h5 test.h5 --support support.h5 --json > before.json
edgetrain score-layers run.h5 --support support.h5 --memory 128KiB --macs 15% --plot plan.png -o run.h5
edgetrain train-sparse run.h5 support.h5 -o adapted.h5
edgetrain evaluate adapted.h5 test.h5

step "Then learn from the stream, three times over: filter and select on one core, training on the other"
for seed in $seeds; do
    cat adapted.h5 stream.h5 stream.h5 stream.h5 |
        edgetrain filter --window 50 --seed "$seed" --cpus 0 |
        edgetrain select --live "live-$seed" --seed "$seed" --cpus 0 |
        edgetrain train-sparse --live "live-$seed" --holdout test.h5 --cpus 1 -o "titan-$seed.h5"
done

step "The same number of random samples; and chosen samples, but every layer training (each as one command)"
for seed in $seeds; do
    random="filter --window 50 --strategy random --seed $seed --cpus 0 | select --strategy random --seed $seed --cpus 0"
    titan="filter --window 50 --seed $seed --cpus 0 | select --seed $seed --cpus 0"
    cat adapted.h5 stream.h5 stream.h5 stream.h5 |
        edgetrain run "$random | train-sparse --holdout test.h5 --cpus 1 -o random-$seed.h5"
    cat adapted.h5 stream.h5 stream.h5 stream.h5 |
        edgetrain run "$titan | train-sparse --full --holdout test.h5 --cpus 1 -o full-$seed.h5"
done

step "What did it bring?"
python "$examples/demo_report.py" .
