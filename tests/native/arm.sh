#!/bin/sh
# The golden bits on Arm, 64 and 32 bits wide, in an emulator: arm.sh FOLDER, which run.sh has filled with images.
set -eu
cd "$(dirname "$0")/../.."
folder=$1
source=stages/engines/native/c
for machine in aarch64-linux-gnu:qemu-aarch64-static arm-linux-gnueabihf:qemu-arm-static; do
    compiler=${machine%%:*}-gcc emulator=${machine##*:}
    if ! command -v "$compiler" > /dev/null || ! command -v "$emulator" > /dev/null; then
        echo "native-arm: skipped, no $compiler or no $emulator (Debian: gcc-${machine%%:*}, qemu-user-static)"
        continue
    fi
    neon=$([ "$compiler" = arm-linux-gnueabihf-gcc ] && echo -mfpu=neon-vfpv4 || true)
    # shellcheck disable=SC2086
    "$compiler" -std=gnu99 -O2 -static -Wall -Wextra -Werror -fno-strict-aliasing -fno-math-errno $neon \
        -ffp-contract=off -DET_SAME_BITS -I$source tests/native/driver.c $source/width_*.c $source/check.c \
        $source/image.c $source/run.c $source/optimiser.c $source/heads.c -o "$folder/driver-${machine%%:*}"
    sh tests/native/golden.sh "$emulator $folder/driver-${machine%%:*}" "$folder"
    echo "native-arm: ${machine%%:*} gives the golden bits"
done
