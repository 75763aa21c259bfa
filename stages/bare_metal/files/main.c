/* Predicts and trains: the program around a network that `edgetrain export --format c` wrote (edgetrain_net.h).
 *
 *     predict [LIVE] < SAMPLES              a line per sample: class, probability; labelled ones are counted
 *     train [LIVE [EVERY]] < SAMPLES        one update per batch; saves to LIVE at the end and every EVERY updates
 *     check                                 a made-up picture: hashes that every machine must give, and what it took
 *
 * With --from FILE samples come from a file instead. LIVE is what training leaves (live.bin unless named): two slots,
 * written in turn, so that a power cut loses no more than what came after the last save; training goes on from it.
 *
 * SAMPLES are records: int32 class (-1: unknown), float weight of its loss, int32 1 where it is the last of its batch,
 * then the picture, row by row, channels last: bytes, or floats where ET_NET_BYTES is 0. All little-endian.
 * Nothing is allocated. A picture is never whole in memory. */
#include "edgetrain.h"
#include "edgetrain_net.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef ET_BARE
uint32_t et_ticks(void);     /* cortex-m/start.c: of the system timer, growing */
uint32_t et_stack_used(void);
#else
#include <time.h>
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
static uint32_t et_ticks(void) { return (uint32_t)(clock() / (CLOCKS_PER_SEC / 1000000)); }
#endif

#define CLASSES ET_NET_CLASSES
#define HEAD (CLASSES * (ET_NET_FEATURES + 1)) /* rows of weights, then biases */
#define LOT 4                                  /* samples whose gradients are summed before they join the others */
#define IN_PLACE ET_NET_IN_PLACE               /* updates during the backward pass: the gradient is one piece at a time */
#define GRADIENT (IN_PLACE ? ET_NET_PIECE : ET_NET_LIVE)
#define STATES ET_NET_STATES                   /* values that the optimiser keeps for each that trains */
#define AT_LEAST_1(n) ((n) > 0 ? (n) : 1)
#define ALIGNED __attribute__((aligned(ET_ALIGN)))
enum { DONE = 0, USAGE = 2, BAD_DATA = 65, BAD_FILE = 74 };

#if ET_NET_BYTES
typedef uint8_t pixel;
#else
typedef float pixel;
#endif

static uint8_t context[ET_NET_CONTEXT_BYTES] ALIGNED, arena[AT_LEAST_1(ET_NET_ARENA_BYTES)] ALIGNED;
static float live[AT_LEAST_1(ET_NET_LIVE)] ALIGNED, gradient[AT_LEAST_1(GRADIENT)] ALIGNED;
static float head[HEAD], head_gradient[HEAD];
static float features[ET_NET_FEATURES], pull[ET_NET_FEATURES], scores[CLASSES], residual[CLASSES];
#if ET_NET_BATCH > LOT
static float sum[AT_LEAST_1(ET_NET_LIVE)];
#endif
static float mean[AT_LEAST_1(STATES > 0 ? ET_NET_LIVE : 0)], square[AT_LEAST_1(STATES > 1 ? ET_NET_LIVE : 0)];
static float head_mean[AT_LEAST_1(STATES > 0 ? HEAD : 0)], head_square[AT_LEAST_1(STATES > 1 ? HEAD : 0)];
static pixel row[ET_NET_WIDTH * ET_NET_CHANNELS];
static const float scale[] = ET_NET_SCALE, offset[] = ET_NET_OFFSET;
static const char *const names[] = ET_NET_CLASS_NAMES;
static struct et_net *net;
static FILE *samples;
static int cut_off;
static uint32_t updates, saves, place; /* place: of a sample in its batch */

static int fail(int code, const char *what, const char *why) {
    fprintf(stderr, "edgetrain: %s: %s\n", what, why);
    return code;
}

/* -------------------------------------------------------------------------------------------------------- samples */

struct record { int32_t row; float weight; int32_t last; };

static const void *next_row(void *user, int y) {
    (void)user, (void)y;
    if (cut_off || fread(row, sizeof row, 1, samples) != 1) cut_off = 1, memset(row, 0, sizeof row);
    return row;
}

static const void *made_up_row(void *user, int y) {
    uint32_t *seed = user;
    (void)y;
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        *seed = *seed * 1664525u + 1013904223u;
        row[i] = (pixel)(ET_NET_BYTES ? (float)(*seed >> 24) : (float)(int32_t)*seed / 2147483648.0f);
    }
    return row;
}

/* ------------------------------------------------------------------------------------------------------- training */

/* values -= what the optimiser makes of their gradient g; m and v: its state of these values. */
static void move(float *values, const float *g, float *m, float *v, size_t count) {
    (void)v;
#if ET_NET_OPTIMIZER
    et_adam(values, g, m, v, count, ET_NET_RATE, ET_NET_WEIGHT_DECAY, ET_NET_OPTIMIZER == 2, updates);
#else
    et_sgd(values, g, STATES ? m : 0, count, ET_NET_RATE, ET_NET_MOMENTUM, ET_NET_WEIGHT_DECAY);
#endif
}

static void on_piece(void *user, float *values, const float *g, size_t first, size_t count) {
    (void)user;
    move(values, g, mean + (STATES > 0 ? first : 0), square + (STATES > 1 ? first : 0), count);
}

static void update_all(void) {
#if !IN_PLACE
    float *all = gradient;
#if ET_NET_BATCH > LOT
    all = sum;
#endif
    if (ET_NET_CLIP > 0) {
        const size_t weights = (size_t)CLASSES * ET_NET_FEATURES;
        double squares = et_square_sum(all, ET_NET_LIVE);
        squares += et_square_sum(head_gradient, weights);
        squares += et_square_sum(head_gradient + weights, CLASSES);
        const float factor = et_clip_factor(squares, ET_NET_CLIP);
        for (size_t i = 0; i < ET_NET_LIVE; i++) all[i] *= factor;
        for (size_t i = 0; i < HEAD; i++) head_gradient[i] *= factor;
    }
    move(live, all, mean, square, ET_NET_LIVE);
    memset(all, 0, ET_NET_LIVE * sizeof *all);
#endif
    move(head, head_gradient, head_mean, head_square, HEAD);
    memset(head_gradient, 0, sizeof head_gradient);
}

/* Forward, loss and backward of the sample that et_set_rows reads; its update too where gradients are not held. */
static float learn(const struct record *r, int *in_lot) {
    const size_t d = ET_NET_FEATURES;
    et_prefix(net, 0, 0);
    et_set_seed(net, updates * 0x9e3779b1u + place * 0x85ebca77u); /* what values kept in few bits are rounded by */
    et_forward(net, 0, features);
    place = r->last ? 0 : place + 1;
    et_linear(features, head, head + CLASSES * d, scores, 1, d, CLASSES);
    const float loss = et_softmax_loss(scores, &r->row, &r->weight, residual, 1, CLASSES);
    et_linear_gradients(features, head, residual, head_gradient, head_gradient + CLASSES * d, pull, 1, d, CLASSES);
    if (cut_off || !(loss - loss == 0)) return loss;
    updates += r->last != 0;
    et_backward(net, pull);
#if ET_NET_BATCH > LOT
    if (++*in_lot == LOT || r->last) {
        for (size_t i = 0; i < ET_NET_LIVE; i++) sum[i] += gradient[i];
        memset(gradient, 0, sizeof gradient);
        *in_lot = 0;
    }
#else
    (void)in_lot;
#endif
    if (r->last) update_all();
    return loss;
}

static void begin(void) {
    memcpy(head, edgetrain_net_head, sizeof head);
    memset(head_gradient, 0, sizeof head_gradient);
    memset(mean, 0, sizeof mean), memset(square, 0, sizeof square);
    memset(head_mean, 0, sizeof head_mean), memset(head_square, 0, sizeof head_square);
    updates = place = 0;
    et_reset(net);
}

static int open_net(void) {
    const int code = et_open(&net, edgetrain_net_image, ET_NET_IMAGE_BYTES, context, sizeof context, arena, sizeof arena, live,
                             gradient, 0);
    if (code) return fail(70, "network", et_message(code));
    et_set_input(net, ET_NET_BYTES ? ET_BYTES_HWC : ET_FLOAT_HWC, scale, offset);
    et_set_rows(net, next_row, 0);
    if (IN_PLACE) et_set_update(net, on_piece, 0);
    begin();
    return DONE;
}

/* ---------------------------------------------------------------------------------------------- what training leaves */

#define SLOT_BYTES (32L + 4L * (ET_NET_LIVE + HEAD))

static int read_slot(FILE *file, int slot, uint32_t words[8], int whole) {
    uint32_t mine[8];
    if (fseek(file, slot * SLOT_BYTES, SEEK_SET) || fread(words, 4, 8, file) != 8) return 0;
    et_slot(net, head, HEAD, words[5], mine);
    if (memcmp(words, mine, 6 * 4)) return 0;
    if (!whole) return 1;
    if ((ET_NET_LIVE && fread(live, sizeof(float) * ET_NET_LIVE, 1, file) != 1) || fread(head, sizeof head, 1, file) != 1) return 0;
    et_slot(net, head, HEAD, words[5], mine);
    return !memcmp(words, mine, sizeof mine);
}

/* Go on from a file of slots: 0, and nothing changed where there is none. */
static int load(const char *path) {
    uint32_t words[2][8];
    FILE *file = fopen(path, "rb");
    if (!file) return DONE;
    const int there[2] = {read_slot(file, 0, words[0], 0), read_slot(file, 1, words[1], 0)};
    int newer = there[1] && (!there[0] || words[1][5] > words[0][5]), loaded = 0;
    for (int turn = 0; turn < 2 && !loaded; turn++, newer = !newer)
        if (there[newer] && (loaded = read_slot(file, newer, words[newer], 1))) saves = words[newer][5];
    fclose(file);
    if (loaded) return DONE;
    begin();
    return fail(BAD_DATA, path, "of another network, head or plan, or damaged; move it away to begin anew");
}

static int save(const char *path) {
    uint32_t words[8];
    FILE *file = fopen(path, "r+b");
    if (!file) file = fopen(path, "w+b");
    if (!file) return fail(BAD_FILE, path, "cannot be written");
    et_slot(net, head, HEAD, saves + 1, words);
    int bad = fseek(file, (long)((saves + 1) % 2) * SLOT_BYTES, SEEK_SET) || fwrite(words, sizeof words, 1, file) != 1 ||
              (ET_NET_LIVE && fwrite(live, sizeof(float) * ET_NET_LIVE, 1, file) != 1) ||
              fwrite(head, sizeof head, 1, file) != 1 || fflush(file);
#if defined(__unix__) && !defined(ET_BARE)
    bad = bad || fsync(fileno(file));
#endif
    if (fclose(file) || bad) return fail(BAD_FILE, path, "cannot be written; what it held before is still there");
    saves++;
    return DONE;
}

/* -------------------------------------------------------------------------------------------------------- commands */

static int next_record(struct record *r) {
    const size_t found = fread(r, 1, sizeof *r, samples);
    cut_off = found && found != sizeof *r;
    return found != 0;
}

static int train(const char *path, uint32_t every) {
    struct record r;
    int code = load(path), in_lot = 0, in_batch = 0;
    float loss = 0;
    for (uint32_t number = 0; !code && next_record(&r); number++) {
        if (!cut_off && (r.row < 0 || r.row >= CLASSES)) return fail(BAD_DATA, "samples", "a class that this network does not have");
        if (++in_batch == ET_NET_BATCH && !cut_off && !r.last) return fail(BAD_DATA, "samples", "a batch larger than ET_NET_BATCH");
        if (!cut_off) loss += learn(&r, &in_lot);
        if (cut_off) return fail(BAD_DATA, "samples", "the last one is cut off; what was saved before is kept");
        if (!(loss - loss == 0)) return fail(BAD_DATA, "training", "the loss is no finite number: export with a smaller --lr");
        if (!r.last) continue;
        printf("update %lu: loss %.6f\n", (unsigned long)updates, (double)loss);
        loss = 0, in_batch = 0;
        if (every && updates % every == 0) code = save(path);
    }
    if (!code && in_batch) return fail(BAD_DATA, "samples", "the last batch has no end; what was saved before is kept");
    return code ? code : save(path);
}

static int predict(const char *path, int must_be) {
    struct record r;
    unsigned long labelled = 0, right = 0;
    FILE *there = fopen(path, "rb");
    if (there) fclose(there);
    if (must_be && !there) return fail(66, path, "no such file");
    const int code = load(path);
    if (code) return code;
    while (next_record(&r)) {
        if (!cut_off) et_prefix(net, 0, 0);
        if (cut_off) return fail(BAD_DATA, "samples", "the last one is cut off");
        et_suffix(net, 0, features);
        et_linear(features, head, head + CLASSES * ET_NET_FEATURES, scores, 1, ET_NET_FEATURES, CLASSES);
        int best = 0;
        float total = 0;
        for (int k = 1; k < CLASSES; k++) best = scores[k] > scores[best] ? k : best;
        for (int k = 0; k < CLASSES; k++) total += et_exp(scores[k] - scores[best]);
        printf("%s\t%.4f\n", names[best], 1.0 / (double)total);
        labelled += r.row >= 0, right += r.row == best;
    }
    if (labelled) fprintf(stderr, "edgetrain: %lu of %lu right\n", right, labelled);
    return DONE;
}

static uint32_t hash(const void *data, size_t bytes) { /* FNV-1a */
    const uint8_t *at = data;
    uint32_t value = 2166136261u;
    while (bytes--) value = (value ^ *at++) * 16777619u;
    return value;
}

static int check(void) {
    uint32_t seed = 1, ticks[5];
    struct record r = {0, 1.0f, 1};
    int in_lot = 0;
    et_set_rows(net, made_up_row, &seed);
    ticks[0] = et_ticks();
    et_prefix(net, 0, 0);
    ticks[1] = et_ticks();
    et_forward(net, 0, features);
    ticks[2] = et_ticks();
    printf("features %08lx\n", (unsigned long)hash(features, sizeof features));
    for (int i = 0; i < 3; i++) {
        r.row = i % CLASSES;
        ticks[3] = et_ticks();
        const float loss = learn(&r, &in_lot);
        ticks[4] = et_ticks();
        printf("step %d loss %.6f live %08lx head %08lx\n", i, (double)loss,
               (unsigned long)hash(live, sizeof(float) * ET_NET_LIVE), (unsigned long)hash(head, sizeof head));
    }
    printf("ticks: prefix %lu, forward %lu, whole step %lu\n", (unsigned long)(ticks[1] - ticks[0]),
           (unsigned long)(ticks[2] - ticks[1]), (unsigned long)(ticks[4] - ticks[3]));
    printf("bytes: arena %lu, live values %lu, gradient %lu, state %lu, head %lu\n", (unsigned long)sizeof arena,
           (unsigned long)sizeof live, (unsigned long)sizeof gradient, (unsigned long)(STATES * sizeof live),
           (unsigned long)((2 + STATES) * sizeof head));
#ifdef ET_BARE
    printf("stack %lu\n", (unsigned long)et_stack_used());
#endif
    return DONE;
}

int main(int count, char **words) {
    const char *command = count > 1 ? words[1] : "", *given[2] = {0, 0}, *from = 0;
    int code = open_net(), found = 0;
    for (int i = 2; i < count && !code; i++)
        if (!strcmp(words[i], "--from") && i + 1 < count) from = words[++i];
        else if (found < 2) given[found++] = words[i];
        else code = USAGE;
    samples = stdin;
    if (!code && from && !(samples = fopen(from, "rb"))) code = fail(66, from, "no such file");
    if (code) return code;
    if (!strcmp(command, "train")) code = train(given[0] ? given[0] : "live.bin", given[1] ? (uint32_t)strtoul(given[1], 0, 10) : 0);
    else if (!strcmp(command, "predict")) code = predict(given[0] ? given[0] : "live.bin", given[0] != 0);
    else if (!strcmp(command, "check")) code = check();
    else code = USAGE;
    if (code == USAGE) fprintf(stderr, "usage: predict [LIVE] | train [LIVE [EVERY]] | check   [--from FILE]   < SAMPLES\n");
    if (fflush(stdout)) code = fail(BAD_FILE, "stdout", "cannot be written");
    return code;
}
