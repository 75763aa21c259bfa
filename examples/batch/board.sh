#!/usr/bin/env bash
# Learn from a sensor on a small board (Raspberry Pi class), for days: cores pinned, memory bounded, restarts survived.
#
#   sensor | bash examples/batch/board.sh run.h5 adapted.h5 state
#
# `sensor` is any program that writes sample blocks (examples/sensor.py plays one). With four cores, core 0 is left to the
# system and the sensor, core 1 filters and selects, cores 2 and 3 train; with fewer they share. The sensor never waits
# (--pace demand), selection uses the time that training leaves it (--until-ready), and the frozen layers run on its core
# (--send features; leave it out with SEND=samples for plans that train the first layer). The state folder holds the
# live versions and a checkpoint every 20 updates: started again, the script goes on from there with the samples that
# come. Ctrl-C or SIGTERM finishes the running update and writes the model.
set -euo pipefail
run=$1 out=$2 state=${3:-state}
case $(nproc) in
    1) choose=0 train=0 ;;
    2 | 3) choose=0 train=1 ;;
    *) choose=1 train=2,3 ;;
esac
mkdir -p "$state"
resume=
if [ -f "$state/check.h5" ]; then
    resume="--resume '$state/check.h5' --continued"
else
    rm -rf "$state/live"
fi
exec edgetrain run "
    filter --run '$run' --pace demand --window ${WINDOW:-30} --keep ${KEEP:-30} --cpus $choose |
    select --batch 10 --live '$state/live' --until-ready --send ${SEND:-features} --cpus $choose $resume |
    train-sparse --live '$state/live' --checkpoint '$state/check.h5' --checkpoint-every 20 --cpus $train $resume
        --metrics '$state/updates.jsonl' -o '$out'"
