/* A load generator: one thread on epoll, clients that each have one chat under way, every answer checked.

       load --port P [--clients N] [--seconds S] [--warmup S] [--stream 1] [--min-tokens N] [--max-tokens N]
            [--delay-us N] [--interval-us N] [--prompt-bytes N] [--model NAME] [--models N] [--seed N] [--silence S]

   Clients start spread over half of the warm-up and go on without a pause. It prints "begin" when the window of
   --seconds begins and "end" when it ends, lets what is under way finish, and prints what it saw as JSON.

   The engine (engine.c) answers with a marker taken from each prompt. Anything but the whole right answer ends the run
   with a sentence on standard error and code 1: a wrong marker, a missing or doubled token, a short body, a stream
   without usage or [DONE], a refused or closed connection, no byte for --silence seconds. */
#include "common.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define PROMPTS 64
#define MAX_HEAD (64u << 10)
#define MAX_BODY (64u << 20)

enum state { IDLE, HEAD, BODY, SIZE, DATA, DATA_END, TRAILER };

typedef struct {
    int fd, writing, done, usage;
    enum state state;
    uint64_t id;
    long tokens, token;
    int64_t sent_at, last_token_at, last_byte_at; /* ns */
    size_t left;                                  /* of a body or chunk */
    Bytes head, text;                             /* of the answer; text: the body, or a stream's unfinished line */
    struct iovec out[3];                          /* head and start of the request, filler, its end */
    char start[768], end[256];
} Client;

typedef struct {
    uint32_t *values; /* 100 ns: 7 minutes at most */
    size_t count, cap;
} Samples;

static int port, clients_count = 1, stream, models = 1;
static double seconds = 3, warmup = 1, silence = 60;
static long min_tokens = 32, max_tokens = 32, delay_us, interval_us, prompt_bytes = 1000, seed = 1;
static const char *model = "sim";
static char *filler, expected_text[64];
static int poller, measuring, stopping;
static long requests, tokens;
static Samples latencies, firsts, gaps;
static uint64_t next_id, draw_state;
static int64_t now;

static void sample(Samples *to, int64_t ns) {
    if (!measuring) return;
    if (to->count == to->cap &&
        !(to->values = realloc(to->values, (to->cap = to->cap * 2 + 4096) * sizeof *to->values)))
        die("out of memory");
    to->values[to->count++] = ns / 100 > UINT32_MAX ? UINT32_MAX : ns / 100;
}

static uint64_t draw(void) { /* xorshift64* (Vigna 2016) */
    draw_state ^= draw_state >> 12, draw_state ^= draw_state << 25, draw_state ^= draw_state >> 27;
    return draw_state * 2685821657736338717ULL;
}

static void wrong(const Client *c, const char *what, const char *data, size_t len) {
    die("request %016lx: %s: %.*s", (unsigned long)c->id, what, (int)(len < 400 ? len : 400), data);
}

/* --- requests --- */
static void send_rest(Client *c) {
    while (c->out[2].iov_len) {
        struct iovec *first = c->out;
        while (!first->iov_len) first++;
        ssize_t n = writev(c->fd, first, c->out + 3 - first);
        if (n < 0 && errno != EAGAIN) wrong(c, "the server took no request", strerror(errno), strlen(strerror(errno)));
        if (n < 0) break;
        for (; n; first++) {
            size_t part = (size_t)n < first->iov_len ? (size_t)n : first->iov_len;
            first->iov_base = (char *)first->iov_base + part, first->iov_len -= part, n -= part;
        }
    }
    int writing = c->out[2].iov_len > 0;
    if (writing != c->writing) {
        struct epoll_event event = {.events = EPOLLIN | (writing ? EPOLLOUT : 0), .data.ptr = c};
        epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event);
        c->writing = writing;
    }
}

static void ask(Client *c) {
    char body[512], name[160];
    c->id = next_id++, c->token = 0, c->done = c->usage = 0;
    c->tokens = min_tokens + draw() % (max_tokens - min_tokens + 1);
    c->head.len = c->text.len = 0, c->state = HEAD;
    long which = draw() % models;
    snprintf(name, sizeof name, which ? "%s-%ld" : "%s", model, which);
    /* Prompts differ from their beginning on, so that no cache of prefixes sees a single one. */
    int begun = snprintf(body, sizeof body,
                         "{\"model\":\"%s\",\"max_tokens\":%ld,\"ignore_eos\":true,%s\"messages\":[{\"role\":\"user\","
                         "\"content\":\"%d: ",
                         name, c->tokens, stream ? "\"stream\":true,\"stream_options\":{\"include_usage\":true}," : "",
                         (int)(draw() % PROMPTS));
    int ended = snprintf(c->end, sizeof c->end, " [bench %016lx %ld %ld %ld]\"}]}", (unsigned long)c->id, delay_us,
                         interval_us, c->tokens);
    int head =
        snprintf(c->start, sizeof c->start,
                 "POST " CHAT_PATH
                 " HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\nContent-Length: %ld\r\n\r\n%s",
                 port, begun + prompt_bytes + ended, body);
    if (begun >= (int)sizeof body || ended >= (int)sizeof c->end || head >= (int)sizeof c->start)
        die("the model's name is too long");
    c->out[0] = (struct iovec){c->start, head}, c->out[1] = (struct iovec){filler, prompt_bytes},
    c->out[2] = (struct iovec){c->end, ended};
    c->sent_at = c->last_byte_at = c->last_token_at = now_ns();
    send_rest(c);
}

/* --- answers --- */

/* Check the tokens in a JSON string that begins at `at`, and count them. */
static void check_content(Client *c, const char *at, const char *end) {
    while (at < end && *at != '"') {
        int len = snprintf(expected_text, sizeof expected_text, "%016lx.%ld ", (unsigned long)c->id, c->token);
        if (c->token == c->tokens) wrong(c, "more tokens than asked for", at, end - at);
        if (end - at < len || memcmp(at, expected_text, len)) wrong(c, "not the token that comes next", at, end - at);
        if (stream) {
            sample(c->token ? &gaps : &firsts, now - (c->token ? c->last_token_at : c->sent_at));
            tokens += measuring;
        }
        c->last_token_at = now, c->token++, at += len;
    }
    if (at == end) wrong(c, "a text without an end", at - 1, 1);
}

static void check_usage(Client *c, const char *data, size_t len) {
    const char *count = member(data, len, "completion_tokens");
    if (!count) return;
    if (atol(count) != c->tokens) wrong(c, "usage of another answer", data, len);
    c->usage = 1;
}

static void answered(Client *c) {
    if (!stream) {
        const char *body = c->text.data;
        const char *content = c->text.len ? member(body, c->text.len, "content") : NULL;
        if (!content || body[0] != '{' || body[c->text.len - 1] != '}')
            wrong(c, "a body that is no whole chat", body, c->text.len);
        check_content(c, content + 1, body + c->text.len);
        check_usage(c, body, c->text.len);
        tokens += measuring ? c->tokens : 0;
    } else if (!c->done) {
        wrong(c, "a stream without [DONE]", "", 0);
    }
    if (c->token != c->tokens) wrong(c, "fewer tokens than asked for", c->text.data, c->text.len);
    if (!c->usage) wrong(c, "no usage", c->text.data, c->text.len);
    sample(&latencies, now - c->sent_at);
    requests += measuring;
    c->state = IDLE;
}

static void event_line(Client *c, const char *line, size_t len) {
    if (len && line[len - 1] == '\r') len--;
    if (!len || *line == ':') return; /* the end of an event; a comment */
    if (len < 5 || memcmp(line, "data:", 5)) wrong(c, "a line that is no data", line, len);
    if (c->done) wrong(c, "an event behind [DONE]", line, len);
    if (behind(line, len, "[DONE]")) {
        c->done = 1;
        return;
    }
    if (memchr(line, '}', len) == NULL || line[len - 1] != '}') wrong(c, "an event that is no whole JSON", line, len);
    const char *content = member(line, len, "content");
    if (content && *content == '"') check_content(c, content + 1, line + len);
    check_usage(c, line, len);
}

static void body_bytes(Client *c, const char *data, size_t len) {
    if (c->text.len + len > MAX_BODY) wrong(c, "an endless body", data, len);
    if (!stream) {
        append(&c->text, data, len);
        return;
    }
    for (const char *end; (end = memchr(data, '\n', len));) {
        size_t part = end - data;
        if (c->text.len) {
            append(&c->text, data, part);
            event_line(c, c->text.data, c->text.len);
            c->text.len = 0;
        } else {
            event_line(c, data, part);
        }
        data += part + 1, len -= part + 1;
    }
    append(&c->text, data, len);
}

static void whole_head(Client *c) {
    const char *head = c->head.data, *value;
    if (c->head.len < 12 || memcmp(head, "HTTP/1.1 200", 12)) wrong(c, "an answer that is not 200", head, c->head.len);
    if ((value = header(head, c->head.len, "connection")) && !strncasecmp(value, "close", 5))
        wrong(c, "the server closes the connection", head, c->head.len);
    if ((value = header(head, c->head.len, "transfer-encoding")) && !strncasecmp(value, "chunked", 7)) c->state = SIZE;
    else if ((value = header(head, c->head.len, "content-length"))) c->state = BODY, c->left = strtoul(value, NULL, 10);
    else wrong(c, "an answer with neither a length nor chunks", head, c->head.len);
    c->head.len = 0;
    if (c->state == BODY && !c->left) answered(c);
}

/* Take bytes of the head, or of a chunk's size or end, up to a line's end; whether that has come. */
static int line_read(Client *c, const char **data, size_t *len, const char *end) {
    while (*len) {
        append(&c->head, (*data)++, 1), (*len)--;
        if (c->head.len > MAX_HEAD) wrong(c, "an endless head", c->head.data, c->head.len);
        size_t size = strlen(end);
        if (c->head.len >= size && !memcmp(c->head.data + c->head.len - size, end, size)) {
            append(&c->head, "", 1), c->head.len--; /* for what reads numbers */
            return 1;
        }
    }
    return 0;
}

static void received(Client *c, const char *data, size_t len) {
    while (len) {
        size_t part;
        switch (c->state) {
        case IDLE:
            wrong(c, "bytes behind the end of the answer", data, len);
            break;
        case HEAD:
            if (line_read(c, &data, &len, "\r\n\r\n")) whole_head(c);
            break;
        case BODY:
        case DATA:
            part = len < c->left ? len : c->left;
            body_bytes(c, data, part);
            data += part, len -= part, c->left -= part;
            if (!c->left && c->state == BODY) answered(c);
            else if (!c->left) c->state = DATA_END;
            break;
        case SIZE:
            if (!line_read(c, &data, &len, "\r\n")) break;
            char *end;
            c->left = strtoul(c->head.data, &end, 16);
            if (end == c->head.data) wrong(c, "a chunk without a size", c->head.data, c->head.len);
            c->head.len = 0, c->state = c->left ? DATA : TRAILER;
            break;
        case DATA_END:
        case TRAILER:
            if (!line_read(c, &data, &len, "\r\n")) break;
            part = c->head.len, c->head.len = 0;
            if (c->state == DATA_END && part != 2) wrong(c, "a chunk longer than its size", c->head.data, part);
            if (c->state == DATA_END) c->state = SIZE;
            else if (part == 2) answered(c);
            break;
        }
    }
}

static void readable(Client *c) {
    static char buffer[1 << 18];
    ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n < 0) wrong(c, "the connection broke", strerror(errno), strlen(strerror(errno)));
    if (n == 0)
        wrong(c,
              c->state == IDLE ? "the server closed an idle connection"
                               : "the server closed the connection before its answer was complete",
              "", 0);
    now = c->last_byte_at = now_ns();
    received(c, buffer, n);
    if (c->state == IDLE && !stopping) ask(c);
}

/* --- the run --- */
static void connect_client(Client *c) {
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int on = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&address, sizeof address))
        die("no connection to port %d: %s", port, strerror(errno));
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event);
}

static int ascending(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void print_samples(const char *name, Samples *of) {
    printf(",\"%s\":{", name);
    if (of->count) {
        qsort(of->values, of->count, sizeof *of->values, ascending);
        for (int percent = 50, first = 1; percent; percent = percent == 50 ? 90 : percent == 90 ? 99 : 0, first = 0)
            printf("%s\"p%d\":%.1f", first ? "" : ",", percent, of->values[(of->count - 1) * percent / 100] / 10.0);
    }
    printf("}");
}

static void say(const char *line) {
    puts(line);
    fflush(stdout);
}

static void options(int argc, char **argv) {
    for (int i = 1; i + 1 < argc; i += 2) {
        const char *name = argv[i], *value = argv[i + 1];
        if (!strcmp(name, "--port")) port = atoi(value);
        else if (!strcmp(name, "--clients")) clients_count = atoi(value);
        else if (!strcmp(name, "--seconds")) seconds = atof(value);
        else if (!strcmp(name, "--warmup")) warmup = atof(value);
        else if (!strcmp(name, "--stream")) stream = atoi(value);
        else if (!strcmp(name, "--min-tokens")) min_tokens = atol(value);
        else if (!strcmp(name, "--max-tokens")) max_tokens = atol(value);
        else if (!strcmp(name, "--delay-us")) delay_us = atol(value);
        else if (!strcmp(name, "--interval-us")) interval_us = atol(value);
        else if (!strcmp(name, "--prompt-bytes")) prompt_bytes = atol(value);
        else if (!strcmp(name, "--model")) model = value;
        else if (!strcmp(name, "--models")) models = atoi(value);
        else if (!strcmp(name, "--seed")) seed = atol(value);
        else if (!strcmp(name, "--silence")) silence = atof(value);
        else die("%s is no option", name);
    }
    if (!port || clients_count < 1 || min_tokens < 1 || max_tokens < min_tokens || prompt_bytes < 0 || models < 1)
        die("--port is needed, and sensible numbers");
}

int main(int argc, char **argv) {
    static const char text[] = "Tell me of the sea and its ships. ";
    options(argc, argv);
    many_files();
    draw_state = seed * 0x9E3779B97F4A7C15ULL + 1;
    next_id = ((uint64_t)now_ns() ^ (uint64_t)getpid() << 40) & ~0xffffULL;
    filler = malloc(prompt_bytes + 1);
    Client *clients = calloc(clients_count, sizeof *clients);
    if (!filler || !clients) die("out of memory");
    for (long i = 0; i < prompt_bytes; i++) filler[i] = text[i % (sizeof text - 1)];
    poller = epoll_create1(EPOLL_CLOEXEC);
    for (int i = 0; i < clients_count; i++) connect_client(&clients[i]);

    int64_t start = now = now_ns(), begin = start + warmup * 1e9, end = 0, checked = start,
            step = warmup * 5e8 / clients_count;
    int started = 0, under_way = 1;
    while (under_way) {
        struct epoll_event events[256];
        int pause_ms = started < clients_count ? 1 : 5, n;
        /* A window begins once every client has started. */
        while (started < clients_count && now >= start + started * step) ask(&clients[started++]);
        if (!measuring && !end && started == clients_count && now >= begin) {
            say("begin");
            now = begin = now_ns(), measuring = 1, end = begin + seconds * 1e9;
        }
        if (measuring && now >= end) {
            end = now, measuring = 0, stopping = 1;
            say("end");
        }
        n = epoll_wait(poller, events, 256, pause_ms);
        for (int i = 0; i < n; i++) {
            Client *c = events[i].data.ptr;
            if (events[i].events & EPOLLOUT) send_rest(c);
            if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) readable(c);
        }
        now = now_ns();
        if (stopping || now - checked > 200000000) {
            checked = now, under_way = !stopping;
            for (int i = 0; i < started; i++) {
                under_way |= clients[i].state != IDLE;
                if (clients[i].state != IDLE && now - clients[i].last_byte_at > silence * 1e9)
                    wrong(&clients[i], "no byte of the answer came for too long", "", 0);
            }
        }
    }
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    printf("{\"requests\":%ld,\"tokens\":%ld,\"seconds\":%.6f,\"cpu_s\":%.6f", requests, tokens, (end - begin) / 1e9,
           used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6);
    print_samples("latency_us", &latencies);
    print_samples("first_us", &firsts);
    print_samples("gap_us", &gaps);
    say("}");
    return 0;
}
