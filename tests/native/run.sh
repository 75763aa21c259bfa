#!/bin/sh
# The C library alone, under sanitizers: run.sh FOLDER [MUTATIONS]; CC names the compiler.
set -eu
cd "$(dirname "$0")/../.."
folder=$1 mutations=${2:-4000}
source=stages/engines/native/c
mkdir -p "$folder"
if ! printf 'int main(void) { return 0; }' | ${CC:-cc} -xc -fsanitize=address,undefined - -o "$folder/probe"; then
    echo "native-test: skipped, ${CC:-cc} is not a C compiler with sanitizers"
    exit 0
fi
python -m tests.native.images "$folder"
for bits in "-ffp-contract=fast" "-ffp-contract=off -DET_SAME_BITS"; do
    driver=$folder/driver$(printf %s "$bits" | tr -c 'a-z' '_')
    # shellcheck disable=SC2086
    ${CC:-cc} -std=gnu99 -O0 -g -Wall -Wextra -Werror -fno-strict-aliasing -fno-math-errno $bits \
        -fsanitize=address,undefined -fno-sanitize-recover=all -I$source tests/native/driver.c \
        $source/width_*.c $source/check.c $source/image.c $source/run.c $source/optimiser.c $source/heads.c -o "$driver"
    "$driver" run "$folder"/*.image
    if [ "$bits" != "-ffp-contract=fast" ]; then
        sh tests/native/golden.sh "$driver" "$folder"
    fi
    for shared in "$folder"/*.shared.image; do
        "$driver" same "$shared" "${shared%.shared.image}.separate.image"
    done
done
for image in "$folder"/*.shared.image; do
    "$driver" fuzz "$image" "$mutations"
done
