#!/bin/sh
# The bits that every machine gives: golden.sh COMMAND FOLDER [GOLDEN], where COMMAND runs a driver that was built with
# -DET_SAME_BITS and FOLDER holds the images. After a change of what the kernels sum in which order, the new file that
# is named below takes the place of the old one.
set -eu
command=$1 folder=$2 golden=${3:-tests/native/golden.txt}
# shellcheck disable=SC2086
$command run "$folder"/*.shared.image | sed "s|^$folder/||" > "$folder/golden.txt"
diff -u "$golden" "$folder/golden.txt" || { echo "native-test: other bits than $golden: see $folder/golden.txt"; exit 1; }
