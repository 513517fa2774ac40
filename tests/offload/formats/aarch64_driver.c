/* Calls the kernels on an emulated processor, in memory that the test shares with it: `driver FILE ADDRESS SIZE` maps
 * the file where the test has mapped it, so the test's addresses are good here, too.
 *
 * Each line that comes in is a call: a function's name, a float, and eight whole numbers, some of which are addresses.
 * Those go to the registers x0 to x7 and the float to s0, whatever the function takes. What it returns is printed.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef int (*Function)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float);

#define FOR_ALL(X)                                                                                                     \
    X(level_choose) X(plain_products) X(columns_products) X(nf4_products) X(nf4_round) X(nf4_experts) X(attention)     \
    X(rms_norm) X(plain_experts) X(combine) X(token_heads) X(token_sublayer) X(route) X(nf4_pack) X(nf4_unpack)            \
    X(nested_upper) X(nested_fill) X(nested_weights)

#define DECLARED(name) void name(void);
FOR_ALL(DECLARED)

#define NAMED(name) {#name, (Function)(void (*)(void))name},
static const struct {
    const char *name;
    Function function;
} functions[] = {FOR_ALL(NAMED)};

int main(int count, char **arguments) {
    if (count != 4)
        return 2;
    const int file = open(arguments[1], O_RDWR);
    void *address = (void *)(uintptr_t)strtoull(arguments[2], 0, 10);
    const size_t size = strtoull(arguments[3], 0, 10);
    if (mmap(address, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) != address)
        return 3;
    char name[32];
    float number;
    long long a[8];
    while (scanf("%31s %f %lld %lld %lld %lld %lld %lld %lld %lld", name, &number, a, a + 1, a + 2, a + 3, a + 4, a + 5,
                 a + 6, a + 7) == 10)
        for (size_t i = 0; i < sizeof functions / sizeof *functions; i++)
            if (!strcmp(functions[i].name, name))
                printf("%s %d\n", name, functions[i].function(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], number));
    return 0;
}
