/* What engine.c and load.c share: the clock, bytes that grow, and looking for text in bytes that hold no terminator. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/resource.h>
#include <time.h>

#define CHAT_PATH "/v1/chat/completions"

typedef struct {
    char *data;
    size_t len, cap;
} Bytes;

static inline void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(1);
}

static inline int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static inline void reserve(Bytes *bytes, size_t more) {
    if (bytes->len + more <= bytes->cap) return;
    bytes->cap = (bytes->len + more) * 2;
    bytes->data = realloc(bytes->data, bytes->cap);
    if (!bytes->data) die("out of memory");
}

static inline void append(Bytes *bytes, const void *data, size_t len) {
    reserve(bytes, len);
    memcpy(bytes->data + bytes->len, data, len);
    bytes->len += len;
}

static inline void appendf(Bytes *bytes, const char *format, ...) {
    va_list args;
    reserve(bytes, 1024);
    va_start(args, format);
    int len = vsnprintf(bytes->data + bytes->len, bytes->cap - bytes->len, format, args);
    va_end(args);
    if (len < 0 || (size_t)len >= bytes->cap - bytes->len) die("a text is too long");
    bytes->len += len;
}

/* Remove the first `count` bytes. */
static inline void drop(Bytes *bytes, size_t count) {
    bytes->len -= count;
    memmove(bytes->data, bytes->data + count, bytes->len);
}

/* Behind `text` in data[0..len), or NULL. */
static inline const char *behind(const char *data, size_t len, const char *text) {
    const char *at = memmem(data, len, text, strlen(text));
    return at ? at + strlen(text) : NULL;
}

/* The value of a header in data[0..len), which ends with an empty line: behind its colon and spaces, or NULL. */
static inline const char *header(const char *data, size_t len, const char *name) {
    size_t size = strlen(name);
    for (const char *line = data; (line = behind(line, data + len - line, "\r\n"));) {
        if ((size_t)(data + len - line) > size && line[size] == ':' && !strncasecmp(line, name, size)) {
            line += size + 1;
            return line + strspn(line, " ");
        }
    }
    return NULL;
}

/* The value of the JSON member `"name":` in data[0..len), spaces skipped, or NULL. A quotation within a prompt does not
   match: its quotes are escaped. */
static inline const char *member(const char *data, size_t len, const char *name) {
    char key[64];
    const char *end = data + len;
    snprintf(key, sizeof key, "\"%s\"", name);
    for (const char *at = data; (at = behind(at, end - at, key));) {
        while (at < end && *at == ' ') at++;
        if (at < end && *at == ':') {
            for (at++; at < end && *at == ' ';) at++;
            return at < end ? at : NULL;
        }
    }
    return NULL;
}

static inline void many_files(void) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}
