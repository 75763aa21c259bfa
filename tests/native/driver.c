/* Tests of the C library alone, built with sanitizers (make native-test): every buffer is an allocation of exactly its
 * size, so a step that leaves one is seen.
 *
 *     driver run IMAGE...          hashes of features and gradients, the same for every width where rounding is fixed,
 *                                  and the same when the arena was poisoned before each pass
 *     driver same IMAGE IMAGE      two images of one net give the same hashes (one buffer per value, or shared)
 *     driver fuzz IMAGE COUNT      deterministic mutations, the checksum made right again: refused, or run within bounds
 */
#include "edgetrain.h"
#include "internal.h"
#include <stdio.h>
#include <stdlib.h>

static void *allocate(size_t bytes) {
    void *memory = 0;
    if (posix_memalign(&memory, ET_ALIGN, bytes ? bytes : 1)) exit(2);
    memset(memory, 0, bytes);
    return memory;
}

struct image { uint8_t *data; uint64_t bytes; };

static struct image read_image(const char *path) {
    struct image image;
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END)) exit(2);
    image.bytes = (uint64_t)ftell(file), image.data = allocate(image.bytes);
    rewind(file);
    if (fread(image.data, 1, image.bytes, file) != image.bytes) exit(2);
    fclose(file);
    return image;
}

static uint32_t random_state = 1;
static uint32_t next_random(void) { return random_state = random_state * 1664525u + 1013904223u; }

struct pixels { const float *hwc; size_t row; };
static const void *row_of(void *user, int row) {
    const struct pixels *p = user;
    float *alone = allocate(p->row * sizeof(float)); /* so that reading beyond a row is seen; freed with the next */
    static float *last;
    free(last);
    memcpy(last = alone, p->hwc + (size_t)row * p->row, p->row * sizeof(float));
    return alone;
}
static void step_piece(void *user, float *live, const float *gradient, size_t first, size_t count) {
    (void)first, et_sgd(live, gradient, 0, count, *(const float *)user, 0, 0);
}

/* One update of one sample as a small device makes it: the picture row by row, a gradient of one piece. Features after. */
static uint32_t run_small(const uint8_t *data, uint64_t bytes, int width, int poison, const float *input, const float *pull) {
    struct et_sizes sizes;
    struct et_net *net;
    et_inspect(data, bytes, &sizes);
    const struct et_header *h = (const void *)data;
    void *context = allocate(sizes.context_bytes), *arena = allocate(sizes.arena_bytes);
    float *live = allocate((size_t)sizes.live * 4), *gradient = allocate((size_t)sizes.piece * 4);
    float *features = allocate((size_t)sizes.features * 4), *hwc = allocate((size_t)sizes.input * 4);
    const size_t channels = h->input_channels, pixels = sizes.input / channels;
    struct pixels rows = {hwc, channels * h->input_width};
    float rate = 0.01f;
    uint32_t hash = 0;
    for (size_t p = 0; p < pixels; p++)
        for (size_t c = 0; c < channels; c++) hwc[p * channels + c] = input[c * pixels + p];
    if (!et_open(&net, data, bytes, context, sizes.context_bytes, arena, sizes.arena_bytes, live, gradient, width)) {
        memset(arena, poison, sizes.arena_bytes);
        if (et_set_rows(net, row_of, &rows) != ET_BAD_ARGUMENT) exit(3); /* channels first: no */
        et_set_input(net, ET_FLOAT_HWC, 0, 0);
        if (et_set_rows(net, row_of, &rows) || et_set_update(net, step_piece, &rate)) exit(3);
        et_reset(net);
        et_prefix(net, 0, 0), et_forward(net, 0, features), et_backward(net, pull);
        et_prefix(net, 0, 0), et_suffix(net, 0, features);
        hash = et_crc(0, features, (uint64_t)sizes.features * 4);
    }
    free(context), free(arena), free(live), free(gradient), free(features), free(hwc);
    return hash;
}

struct result { int code; uint32_t features, gradients, live; };

/* Everything that a net can do, once; poison: the byte that fills the arena before each pass. */
static struct result run_all(const uint8_t *data, uint64_t bytes, int width, int poison) {
    struct result result = {0, 0, 0, 0};
    struct et_sizes sizes;
    struct et_net *net;
    if ((result.code = et_inspect(data, bytes, &sizes))) return result;
    if (sizes.arena_bytes > 1u << 20 || sizes.input > 1u << 14 || sizes.sums > 1u << 20) { result.code = ET_SMALL; return result; }
    void *context = allocate(sizes.context_bytes), *arena = allocate(sizes.arena_bytes), *kept = allocate(sizes.kept_bytes);
    const size_t gradients = (size_t)sizes.live + sizes.sums;
    float *live = allocate((size_t)sizes.live * 4), *gradient = allocate(gradients * 4);
    float *input = allocate((size_t)sizes.input * 4), *boundary = allocate((size_t)sizes.boundary * 4);
    float *features = allocate((size_t)sizes.features * 4), *pull = allocate((size_t)sizes.features * 4);
    const float head[2] = {1.5f, -2.5f};
    uint32_t slot[8], other[8];
    result.code = et_open(&net, data, bytes, context, sizes.context_bytes, arena, sizes.arena_bytes, live, gradient, width);
    if (!result.code) {
        et_reset(net);
        for (uint32_t i = 0; i < sizes.input; i++) input[i] = (float)((int)(i * 2654435761u >> 24) - 128) / 64.0f;
        for (uint32_t i = 0; i < sizes.features; i++) pull[i] = (float)((int)(i * 37 % 41) - 20) / 64.0f;
        memset(arena, poison, sizes.arena_bytes);
        et_prefix(net, input, boundary);
        memset(arena, poison, sizes.arena_bytes);
        et_forward(net, boundary, features);
        et_keep(net, kept);
        memset(arena, poison, sizes.arena_bytes);
        et_restore(net, kept);
        et_backward(net, pull);
        result.features = et_crc(0, features, (uint64_t)sizes.features * 4);
        result.gradients = et_crc(0, gradient, (uint64_t)gradients * 4);
        et_sgd(live, gradient, 0, sizes.live, 0.01f, 0, 0);
        et_slot(net, head, 2, 7, slot);
        if (slot[7] != et_crc(et_crc(et_crc(0, slot, 28), live, (uint64_t)sizes.live * 4), head, 8)) result.code = 99;
        if (slot[1] != sizes.plan || slot[3] != sizes.live || slot[4] != 2 || slot[5] != 7) result.code = 99;
        et_slot(net, head, 2, 8, other);
        if (other[7] == slot[7]) result.code = 99;
        et_prefix(net, input, 0); /* and once more with everything left in the arena */
        et_suffix(net, 0, features);
        result.live = et_crc(0, features, (uint64_t)sizes.features * 4);
        if (sizes.sums ? !et_set_update(net, step_piece, 0)
                       : run_small(data, bytes, width, poison, input, pull) != result.live) result.code = 98;
    }
    free(context), free(arena), free(kept), free(live), free(gradient), free(input), free(boundary), free(features);
    free(pull);
    return result;
}

static int differ(struct result a, struct result b) {
    return a.code || b.code || a.features != b.features || a.gradients != b.gradients || a.live != b.live;
}

static int run_image(const char *path) {
    const struct image image = read_image(path);
    const struct result first = run_all(image.data, image.bytes, 1, 0);
    int failed = first.code;
    printf("%s: features %08x gradients %08x after a step %08x\n", path, first.features, first.gradients, first.live);
    for (int width = 1; width <= et_width(); width *= 2) {
        const struct result plain = run_all(image.data, image.bytes, width, 0);
        if (plain.code == ET_NO_WIDTH) continue;
        if (differ(plain, run_all(image.data, image.bytes, width, 0xff))) failed = printf("poison shows, width %d\n", width);
        if (et_same_bits() && differ(first, plain)) failed = printf("other bits at width %d\n", width);
    }
    free(image.data);
    return failed;
}

static int same(const char *one, const char *other) {
    const struct image a = read_image(one), b = read_image(other);
    const int failed = differ(run_all(a.data, a.bytes, 0, 0), run_all(b.data, b.bytes, 0, 0));
    if (failed) printf("%s and %s differ\n", one, other);
    free(a.data), free(b.data);
    return failed;
}

static void mutate(uint8_t *data, uint64_t bytes) {
    struct et_header *h = (struct et_header *)(void *)data;
    const uint64_t steps = h->steps_at + (uint64_t)h->steps * sizeof(struct et_step);
    for (uint32_t times = 1 + next_random() % 3; times; times--) {
        const int in_header = next_random() % 8 == 0;
        const uint64_t low = in_header ? 16 : h->steps_at, high = in_header ? sizeof *h : MIN(steps, bytes);
        if (low + 4 > high || high > bytes) return;
        const uint64_t at = low + next_random() % ((high - low) / 4) * 4;
        uint32_t word;
        memcpy(&word, data + at, 4);
        switch (next_random() % 6) {
        case 0: word ^= 1u << (next_random() % 32); break;
        case 1: word += 1; break;
        case 2: word -= 1; break;
        case 3: word = next_random() % 64; break;
        case 4: word = next_random(); break;
        default: word *= 2; break;
        }
        memcpy(data + at, &word, 4);
    }
}

static int fuzz(const char *path, int count) {
    const struct image image = read_image(path);
    int refused = 0, ran = 0, truncated = 0;
    for (int i = 0; i < count; i++) {
        uint8_t *copy = allocate(image.bytes);
        memcpy(copy, image.data, image.bytes);
        mutate(copy, image.bytes);
        const uint32_t sum = et_crc(0, copy + 16, image.bytes - 16);
        memcpy(copy + 12, &sum, 4);
        *(run_all(copy, image.bytes, i % 2 ? 0 : 4, 0).code ? &refused : &ran) += 1;
        const uint64_t cut = next_random() % image.bytes;
        uint8_t *part = allocate(cut);
        memcpy(part, image.data, cut);
        truncated += run_all(part, cut, 0, 0).code != 0;
        free(copy), free(part);
    }
    printf("%s: %d mutations refused, %d run within bounds; %d of %d cuts refused\n", path, refused, ran, truncated, count);
    free(image.data);
    return truncated != count || refused == 0;
}

int main(int count, char **arguments) {
    int failed = 0;
    if (count > 2 && !strcmp(arguments[1], "run"))
        for (int i = 2; i < count; i++) failed |= run_image(arguments[i]);
    else if (count == 4 && !strcmp(arguments[1], "same"))
        failed = same(arguments[2], arguments[3]);
    else if (count == 4 && !strcmp(arguments[1], "fuzz"))
        failed = fuzz(arguments[2], atoi(arguments[3]));
    else
        return 2;
    return failed ? 1 : 0;
}
