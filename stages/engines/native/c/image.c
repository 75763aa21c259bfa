/* Program images: opening, checking, and saved live values. */
#include "internal.h"

/* CRC-32 as zlib has it, 32 bits at a time: table[k][n] is what a half byte n does once 4 k more bits have passed. */
uint32_t et_crc(uint32_t crc, const void *data, uint64_t bytes) {
    static const uint32_t table[8][16] = {
        {0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,
         0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c},
        {0x00000000, 0x77073096, 0xee0e612c, 0x990951ba, 0x076dc419, 0x706af48f, 0xe963a535, 0x9e6495a3,
         0x0edb8832, 0x79dcb8a4, 0xe0d5e91e, 0x97d2d988, 0x09b64c2b, 0x7eb17cbd, 0xe7b82d07, 0x90bf1d91},
        {0x00000000, 0x4ac21251, 0x958424a2, 0xdf4636f3, 0xf0794f05, 0xbabb5d54, 0x65fd6ba7, 0x2f3f79f6,
         0x3b83984b, 0x71418a1a, 0xae07bce9, 0xe4c5aeb8, 0xcbfad74e, 0x8138c51f, 0x5e7ef3ec, 0x14bce1bd},
        {0x00000000, 0x191b3141, 0x32366282, 0x2b2d53c3, 0x646cc504, 0x7d77f445, 0x565aa786, 0x4f4196c7,
         0xc8d98a08, 0xd1c2bb49, 0xfaefe88a, 0xe3f4d9cb, 0xacb54f0c, 0xb5ae7e4d, 0x9e832d8e, 0x87981ccf},
        {0x00000000, 0x1c26a370, 0x384d46e0, 0x246be590, 0x709a8dc0, 0x6cbc2eb0, 0x48d7cb20, 0x54f16850,
         0xe1351b80, 0xfd13b8f0, 0xd9785d60, 0xc55efe10, 0x91af9640, 0x8d893530, 0xa9e2d0a0, 0xb5c473d0},
        {0x00000000, 0x01c26a37, 0x0384d46e, 0x0246be59, 0x0709a8dc, 0x06cbc2eb, 0x048d7cb2, 0x054f1685,
         0x0e1351b8, 0x0fd13b8f, 0x0d9785d6, 0x0c55efe1, 0x091af964, 0x08d89353, 0x0a9e2d0a, 0x0b5c473d},
        {0x00000000, 0x5019579f, 0xa032af3e, 0xf02bf8a1, 0x9b14583d, 0xcb0d0fa2, 0x3b26f703, 0x6b3fa09c,
         0xed59b63b, 0xbd40e1a4, 0x4d6b1905, 0x1d724e9a, 0x764dee06, 0x2654b999, 0xd67f4138, 0x866616a7},
        {0x00000000, 0xb8bc6765, 0xaa09c88b, 0x12b5afee, 0x8f629757, 0x37def032, 0x256b5fdc, 0x9dd738b9,
         0xc5b428ef, 0x7d084f8a, 0x6fbde064, 0xd7018701, 0x4ad6bfb8, 0xf26ad8dd, 0xe0df7733, 0x58631056}};
    const uint8_t *at = data;
    crc = ~crc;
    for (; bytes >= 4; bytes -= 4, at += 4) {
        const uint32_t w = crc ^ (at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24);
        crc = table[7][w & 15] ^ table[6][(w >> 4) & 15] ^ table[5][(w >> 8) & 15] ^ table[4][(w >> 12) & 15] ^
              table[3][(w >> 16) & 15] ^ table[2][(w >> 20) & 15] ^ table[1][(w >> 24) & 15] ^ table[0][w >> 28];
    }
    for (; bytes; bytes--, at++) {
        crc = table[0][(crc ^ *at) & 15] ^ (crc >> 4);
        crc = table[0][(crc ^ (*at >> 4)) & 15] ^ (crc >> 4);
    }
    return ~crc;
}

const char *et_message(int code) {
    static const char *const messages[] = {"done", "not a program image", "a program image of another version",
        "a truncated program image", "a damaged program image (its checksum differs)",
        "a program image with impossible sizes", "a program image with a step that leaves its buffers",
        "a program image that needs a newer library", "memory too small", "memory that is not aligned to 64 bytes",
        "vectors of a width that this processor does not have", "an argument that makes no sense",
        "a value that could not be paged"};
    return code >= 0 && code < (int)(sizeof messages / sizeof *messages) ? messages[code] : "an unknown error";
}

static int section(const struct et_header *h, uint64_t at, uint64_t bytes) {
    return at % 4 == 0 && at >= h->header_bytes && at + bytes <= h->image_bytes;
}

static int parts_fit(const struct et_header *h, const struct et_part *parts) {
    uint64_t boundary = 0, kept = 0;
    const uint64_t count = (uint64_t)h->boundaries + h->kept_parts;
    for (uint64_t i = 0; i < count; i++) {
        if ((uint64_t)parts[i].at + parts[i].length > h->arena) return 0;
        *(i < h->boundaries ? &boundary : &kept) += parts[i].length;
    }
    return boundary == h->boundary && kept == h->kept;
}

static int header_fits(const struct et_header *h) {
    const uint64_t most = (uint64_t)1 << 30;
    if (h->header_bytes != sizeof *h || h->flags) return h->flags ? ET_UNSUPPORTED : ET_BAD_HEADER;
    if (h->arena > most || h->constants > most || h->live > most || h->sums > most || h->kept > most ||
        h->zeros > h->constants)
        return ET_BAD_HEADER;
    if (!h->input_channels || !h->input_height || !h->input_width || !h->features) return ET_BAD_HEADER;
    if (h->input_channels > most || h->input_height > most || h->input_width > most) return ET_BAD_HEADER;
    if ((uint64_t)h->prefix + h->suffix + h->backward != h->steps || h->constants_at % ET_ALIGN) return ET_BAD_HEADER;
    if (!section(h, h->steps_at, (uint64_t)h->steps * sizeof(struct et_step)) ||
        !section(h, h->constants_at, (uint64_t)h->constants * 4) || !section(h, h->live_at, (uint64_t)h->live * 4) ||
        !section(h, h->parts_at, ((uint64_t)h->boundaries + h->kept_parts) * sizeof(struct et_part)))
        return ET_TRUNCATED;
    return ET_OK;
}

/* The most that one step of the backward pass adds to the gradients. */
static uint32_t piece(const struct et_header *h, const uint8_t *base) {
    const struct et_step *steps = (const struct et_step *)(const void *)(base + h->steps_at);
    uint32_t most = 0;
    for (uint32_t i = h->prefix + h->suffix; i < h->steps; i++) most = MAX(most, et_piece(steps + i));
    return most;
}

/* Floats that are paged for one sample. */
static uint32_t pages(const struct et_header *h, const uint8_t *base) {
    const struct et_step *steps = (const struct et_step *)(const void *)(base + h->steps_at);
    uint32_t most = 0;
    for (uint32_t i = 0; i < h->steps; i++)
        if (steps[i].kind == ET_PAGE_OUT || steps[i].kind == ET_PAGE_IN)
            most = MAX(most, (uint32_t)steps[i].a0 + (uint32_t)steps[i].n);
    return most;
}

int et_inspect(const void *image, uint64_t bytes, struct et_sizes *sizes) {
    const struct et_header *h = image;
    const uint8_t *base = image;
    int code;
    if (!image || (uintptr_t)image % ET_ALIGN) return image ? ET_UNALIGNED : ET_BAD_ARGUMENT;
    if (bytes < sizeof *h) return ET_TRUNCATED;
    if (h->magic != ET_MAGIC) return ET_BAD_MAGIC;
    if (h->version != ET_VERSION) return ET_BAD_VERSION;
    if (h->image_bytes > bytes || h->image_bytes < sizeof *h) return ET_TRUNCATED;
    if (et_crc(0, base + 16, h->image_bytes - 16) != h->checksum) return ET_BAD_CHECKSUM;
    if ((code = header_fits(h))) return code;
    const float *constants = (const float *)(const void *)(base + h->constants_at);
    for (uint32_t i = 0; i < h->zeros; i++)
        if (constants[i] != 0) return ET_BAD_HEADER;
    if (!parts_fit(h, (const struct et_part *)(const void *)(base + h->parts_at))) return ET_BAD_HEADER;
    if ((code = et_check_steps(h, (const struct et_step *)(const void *)(base + h->steps_at), constants))) return code;
    if (sizes) {
        sizes->context_bytes = sizeof(struct et_net), sizes->arena_bytes = (uint64_t)h->arena * 4;
        sizes->kept_bytes = (uint64_t)h->kept * 4, sizes->constant_bytes = (uint64_t)h->constants * 4;
        sizes->image_bytes = h->image_bytes;
        sizes->input = h->input_channels * h->input_height * h->input_width, sizes->boundary = h->boundary;
        sizes->features = h->features, sizes->live = h->live, sizes->steps = h->steps, sizes->plan = h->plan;
        sizes->sums = h->sums, sizes->piece = piece(h, base);
        sizes->pages = pages(h, base);
    }
    return ET_OK;
}

static const struct et_kernels *kernels_of(int width) {
#ifdef ET_X86
    __builtin_cpu_init();
    if (width == 16)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") ? &et_kernels_16 : 0;
    if (width == 8) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &et_kernels_8 : 0;
#endif
#ifdef ET_HAS_4
    if (width == 4) return &et_kernels_4;
#endif
    return width == 1 ? &et_kernels_1 : 0;
}

int et_version(void) { return ET_VERSION; }
int et_width(void) {
    int width = 16;
    while (!kernels_of(width)) width /= 2;
    return width;
}

int et_same_bits(void) {
#ifdef ET_SAME_BITS
    return 1;
#else
    return 0;
#endif
}

int et_open(struct et_net **result, const void *image, uint64_t bytes, void *context, uint64_t context_bytes,
            void *arena, uint64_t arena_bytes, float *live, float *gradient, int width) {
    struct et_sizes sizes;
    const struct et_kernels *kernels = kernels_of(width ? width : et_width());
    const uint8_t *base = image;
    struct et_net *net = context;
    const int code = et_inspect(image, bytes, &sizes);
    if (code) return code;
    if (!result || !context || !arena || (sizes.live && !live)) return ET_BAD_ARGUMENT;
    if (context_bytes < sizes.context_bytes || arena_bytes < sizes.arena_bytes) return ET_SMALL;
    if (((uintptr_t)context | (uintptr_t)arena | (uintptr_t)live | (uintptr_t)gradient) % ET_ALIGN) return ET_UNALIGNED;
    if (!kernels) return ET_NO_WIDTH;
    memset(net, 0, sizeof *net);
    net->header = image, net->kernels = kernels;
    net->steps = (const struct et_step *)(const void *)(base + net->header->steps_at);
    net->parts = (const struct et_part *)(const void *)(base + net->header->parts_at);
    net->space[ET_ARENA] = arena;
    net->space[ET_CONSTANT] = (float *)(uintptr_t)(base + net->header->constants_at); /* never written: check.c */
    net->space[ET_LIVE] = live, net->space[ET_GRADIENT] = gradient;
    net->pages = sizes.pages;
    *result = net;
    return ET_OK;
}

void et_reset(struct et_net *net) {
    const struct et_header *h = net->header;
    if (h->live) memcpy(net->space[ET_LIVE], (const uint8_t *)h + h->live_at, (size_t)h->live * 4);
    if (h->live && net->space[ET_GRADIENT] && !net->update) memset(net->space[ET_GRADIENT], 0, (size_t)h->live * 4);
}

int et_set_input(struct et_net *net, int input, const float *scale, const float *offset) {
    if (input < ET_FLOAT_CHW || input > ET_BYTES_HWC || (input == ET_BYTES_HWC && (!scale || !offset)))
        return ET_BAD_ARGUMENT;
    net->input = input, net->scale = scale, net->offset = offset;
    return ET_OK;
}

void et_keep(struct et_net *net, void *kept) {
    const struct et_header *h = net->header;
    uint8_t *to = kept;
    for (uint32_t i = h->boundaries; i < h->boundaries + h->kept_parts; i++) {
        memcpy(to, net->space[ET_ARENA] + net->parts[i].at, (size_t)net->parts[i].length * 4);
        to += (size_t)net->parts[i].length * 4;
    }
}

void et_restore(struct et_net *net, const void *kept) {
    const struct et_header *h = net->header;
    const uint8_t *from = kept;
    for (uint32_t i = h->boundaries; i < h->boundaries + h->kept_parts; i++) {
        memcpy(net->space[ET_ARENA] + net->parts[i].at, from, (size_t)net->parts[i].length * 4);
        from += (size_t)net->parts[i].length * 4;
    }
}

int et_set_rows(struct et_net *net, et_rows *rows, void *user) {
    if (rows && net->input == ET_FLOAT_CHW) return ET_BAD_ARGUMENT;
    net->rows = rows, net->rows_user = user;
    return ET_OK;
}

int et_set_update(struct et_net *net, et_update *update, void *user) {
    if (update && net->header->sums) return ET_BAD_ARGUMENT;
    net->update = update, net->update_user = user;
    return ET_OK;
}

void et_slot(const struct et_net *net, const float *head, size_t head_floats, uint32_t number, uint32_t words[8]) {
    const struct et_header *h = net->header;
    const uint32_t made[7] = {~ET_MAGIC, h->plan, h->checksum, h->live, (uint32_t)head_floats, number, 0};
    memcpy(words, made, sizeof made);
    words[7] = et_crc(et_crc(et_crc(0, made, sizeof made), net->space[ET_LIVE], (uint64_t)h->live * 4), head, head_floats * 4);
}
