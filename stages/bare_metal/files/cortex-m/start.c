/* Start of a Cortex-M program under semihosting: sets up memory and the FPU, and takes main's words from the debugger.
 * For a board of your own: its clocks come before main; without a debugger, read and write where main.c uses files. */
#include <stdint.h>
#include <stdlib.h>

extern uint32_t data_start[], data_end[], data_load[], bss_start[], bss_end[], stack_top[];
int main(int count, char **words);
void initialise_monitor_handles(void);
void _init(void);
void _fini(void);
void _init(void) {}
void _fini(void) {}

enum { WORDS = 8, LINE = 256, PAINTED = 8192 /* bytes of stack that can be told to have been used */ };
#define PAINT 0xa5a5a5a5u
static volatile uint32_t rounds;
static uint32_t *stack_low;

static void hang(void) {
    for (;;) {}
}

static void on_tick(void) { rounds++; }

/* Ticks of the processor's clock, or of the one that its SysTick counts. */
uint32_t et_ticks(void);
uint32_t et_ticks(void) {
    volatile uint32_t *const systick = (volatile uint32_t *)0xe000e010;
    if (!(systick[0] & 1)) {
        systick[1] = 0xffffff, systick[2] = 0, systick[0] = 7;
        while (!systick[2]) {} /* the first round begins with a count of 0 */
    }
    for (;;) {
        const uint32_t before = rounds, count = systick[2];
        if (before == rounds) return before * 0x1000000u - count;
    }
}

/* Bytes of the stack that have been in use since the start; PAINTED where it were more. */
uint32_t et_stack_used(void);
uint32_t et_stack_used(void) {
    const uint32_t *at = stack_low;
    while (at < stack_top && *at == PAINT) at++;
    return (uint32_t)((const char *)stack_top - (const char *)at);
}

/* The command line, by semihosting's call 0x15, cut at blanks. */
static int words_of(char *line, char **words) {
    struct { char *at; int length; } block = {line, LINE};
    register int call __asm__("r0") = 0x15;
    register void *argument __asm__("r1") = &block;
    __asm__ volatile("bkpt 0xab" : "+r"(call) : "r"(argument) : "memory");
    int count = 0, inside = 0;
    if (call) return 0;
    for (char *c = line; *c && count < WORDS; c++) {
        if (*c == ' ') *c = 0, inside = 0;
        else if (!inside) words[count++] = c, inside = 1;
    }
    return count;
}

__attribute__((noreturn)) static void begin(void) {
    static char line[LINE], *words[WORDS + 1];
    initialise_monitor_handles();
    const int count = words_of(line, words);
    exit(main(count, words));
}

__attribute__((noreturn)) void reset(void);
__attribute__((noreturn)) void reset(void) {
    *(volatile uint32_t *)0xe000ed88 |= 0xfu << 20; /* the FPU is on */
    __asm__ volatile("dsb\nisb");
    for (uint32_t *to = data_start, *from = data_load; to < data_end;) *to++ = *from++;
    for (uint32_t *to = bss_start; to < bss_end;) *to++ = 0;
    uint32_t *sp;
    __asm__ volatile("mov %0, sp" : "=r"(sp));
    stack_low = stack_top - PAINTED / 4;
    for (volatile uint32_t *at = stack_low; at < sp - 16; at++) *at = PAINT;
    begin();
}

__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {
    stack_top, (const void *)reset, (const void *)hang, (const void *)hang, (const void *)hang, (const void *)hang,
    (const void *)hang, 0, 0, 0, 0, (const void *)hang, 0, 0, (const void *)hang, (const void *)on_tick};
