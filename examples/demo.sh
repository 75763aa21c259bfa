#!/usr/bin/env bash
# EdgeTrain from end to end on real data, in about three minutes on two cores. Every step is an ordinary command:
# read it as a tutorial, change it, run it again. Everything it makes stays in demo-out/ (or the folder you name).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-demo-out}
seeds=${SEEDS:-0 1 2}
rm -rf "$out" && mkdir -p "$out"
python examples/make_data.py "$out"
cd "$out"

step() { printf '\n== %s\n' "$*"; }

step "Meta-train a small backbone on letters (on a server, once)"
edgetrain pretrain-fsl --arch cnn4-w32 --glyphs --epochs 6 --steps 60 -o base.h5

step "What does it cost on this device, layer by layer?"
edgetrain profile base.h5 --plot profile.png -o run.h5

step "Bring the user's data: handwritten digits, never seen in meta-training"
edgetrain pack digits.npz --size 28 --per-class 5 -o support.h5                     # a handful of samples
edgetrain pack digits.npz --size 28 --per-class 40 --skip-per-class 5 -o test.h5    # held out
edgetrain pack digits.npz --size 28 --per-class 125 --skip-per-class 45 -o stream.h5  # the stream to learn from

step "Which layers and channels to train within 256 KiB and a third of the backward compute?"
edgetrain score-layers run.h5 --support support.h5 --memory 256KiB --macs 33% --plot plan.png -o run.h5

step "Learn from the stream: filter and select on one core, training on the other"
for seed in $seeds; do
    cat run.h5 stream.h5 |
        edgetrain filter --window 25 --keep 20 --seed "$seed" --cpus 0 |
        edgetrain select --batch 5 --live "live-$seed" --seed "$seed" --cpus 0 |
        edgetrain train-sparse --live "live-$seed" --holdout test.h5 --holdout-every 5 --cpus 1 -o "titan-$seed.h5"
done

step "The same, with random samples, and with every layer training"
for seed in $seeds; do
    cat run.h5 stream.h5 |
        edgetrain run "filter --window 25 --keep 20 --strategy random --seed $seed --cpus 0 -q |
                       select --batch 5 --strategy random --seed $seed --cpus 0 -q |
                       train-sparse --holdout test.h5 --holdout-every 5 --cpus 1 -q -o random-$seed.h5"
    cat run.h5 stream.h5 |
        edgetrain run "filter --window 25 --keep 20 --seed $seed --cpus 0 -q |
                       select --batch 5 --seed $seed --cpus 0 -q |
                       train-sparse --full --holdout test.h5 --holdout-every 5 --cpus 1 -q -o full-$seed.h5"
done

step "What did it bring?"
edgetrain train-sparse run.h5 support.h5 --iterations 1 --lr 0 -q -o before.h5        # prototypes only, no training
edgetrain evaluate before.h5 test.h5
for model in titan random full; do
    for seed in $seeds; do edgetrain evaluate "$model-$seed.h5" test.h5 --json > "$model-$seed.json"; done
done
python ../examples/demo_report.py .
