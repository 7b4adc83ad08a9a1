/* A fake engine that answers like vLLM's OpenAI server and costs next to nothing: one thread on epoll.

       engine PORT [--model NAME] [--models N] [--delay-us N] [--interval-us N]

   What a chat takes stands in its prompt, so that one engine serves every scenario at once:

       [bench ID DELAY_US INTERVAL_US TOKENS]

   The answer begins after DELAY_US. Its text is "ID.0 ID.1 ... ", so that whoever asked sees whether it is whole and
   whose it is. A stream brings a token in each event; those behind the first come with the engine's steps, which all
   streams of one INTERVAL_US share, as in continuous batching; within a step they are written one after the other,
   about as far apart as a server in Python writes them. INTERVAL_US 0 means without pause: the streams in turn write a
   few tokens at a time, since a write for each would make the engine the bottleneck. A chat without this line gets
   --delay-us, --interval-us and its max_tokens. Also answered: /health, /version, /v1/models (NAME, NAME-1, ... if
   there are N), /metrics. */
#include "common.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define MAX_BODY (256u << 20)
#define MAX_HEAD (64u << 10)
#define APART_NS 40000 /* between two writes of a step: about what bench/proxy.py needs for an event */
#define AT_A_TIME 4    /* tokens in a write of a stream without pause */
#define PAUSE_ABOVE (64u << 10) /* of unsent bytes: a stream whose reader is slow waits */

typedef struct {
    int fd, slot, writing, closing; /* slot: its place among the timers, -1 without one */
    Bytes in, out;
    size_t sent;
    int64_t due, interval; /* ns */
    int stream, usage, begun;
    long token, tokens, prompt_tokens;
    char id[40], model[128];
} Connection;

static const char *model = "sim";
static int models = 1, poller;
static long default_delay_us, default_interval_us, answered, generated, running;
static int64_t next_write; /* of a step */
static Bytes scratch;

/* --- timers: a binary heap by due time --- */
static Connection **heap;
static int timers, heap_cap;

static void place(Connection *c, int slot) { heap[slot] = c, c->slot = slot; }

static void sift(Connection *c, int slot) {
    for (; slot && heap[(slot - 1) / 2]->due > c->due; slot = (slot - 1) / 2) place(heap[(slot - 1) / 2], slot);
    for (int child; (child = 2 * slot + 1) < timers; slot = child) {
        if (child + 1 < timers && heap[child + 1]->due < heap[child]->due) child++;
        if (heap[child]->due >= c->due) break;
        place(heap[child], slot);
    }
    place(c, slot);
}

static void wake_at(Connection *c, int64_t due) {
    c->due = due;
    if (c->slot < 0 && timers == heap_cap) {
        heap = realloc(heap, (heap_cap = heap_cap * 2 + 64) * sizeof *heap);
        if (!heap) die("out of memory");
    }
    sift(c, c->slot < 0 ? timers++ : c->slot);
}

/* When the first timer is due: a stream within a step waits for those before it to be written. */
static int64_t first_due(void) {
    const Connection *c = heap[0];
    return c->begun && c->interval && c->token && c->due < next_write ? next_write : c->due;
}

static void no_timer(Connection *c) {
    int slot = c->slot;
    if (slot < 0) return;
    c->slot = -1;
    Connection *last = heap[--timers];
    if (last != c) sift(last, slot);
}

/* --- writing --- */
static void watch(Connection *c, int writing) {
    if (c->writing == writing) return;
    c->writing = writing;
    struct epoll_event event = {.events = EPOLLIN | (writing ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event);
}

/* Send what is unsent and then `data`; keep what the kernel does not take. */
static void put(Connection *c, const char *data, size_t len) {
    if (c->out.len == c->sent && len) {
        ssize_t n = send(c->fd, data, len, MSG_NOSIGNAL);
        if (n > 0) data += n, len -= n;
    }
    if (len) append(&c->out, data, len);
    while (c->sent < c->out.len) {
        ssize_t n = send(c->fd, c->out.data + c->sent, c->out.len - c->sent, MSG_NOSIGNAL);
        if (n <= 0) break;
        c->sent += n;
    }
    if (c->sent == c->out.len) c->sent = c->out.len = 0;
    watch(c, c->out.len > 0);
}

static void answer(Connection *c, int status, const char *type, const char *body, size_t len) {
    Bytes text = {0};
    appendf(&text, "HTTP/1.1 %d %s\r\nserver: uvicorn\r\ncontent-length: %zu\r\ncontent-type: %s\r\n\r\n", status,
            status == 200 ? "OK" : "Error", len, type);
    append(&text, body, len);
    put(c, text.data, text.len);
    free(text.data);
}

static void refuse(Connection *c, int status, const char *why) {
    char body[256];
    int len = snprintf(body, sizeof body, "{\"error\":{\"message\":\"%s\",\"type\":\"BadRequest\",\"code\":%d}}", why,
                       status);
    answer(c, status, "application/json", body, len);
}

/* --- answers to chats --- */
static void usage(Bytes *to, const Connection *c) {
    appendf(to, "\"usage\":{\"prompt_tokens\":%ld,\"total_tokens\":%ld,\"completion_tokens\":%ld}", c->prompt_tokens,
            c->prompt_tokens + c->tokens, c->tokens);
}

static void whole_answer(Connection *c) {
    scratch.len = 0;
    appendf(
        &scratch,
        "{\"id\":\"chatcmpl-%s\",\"object\":\"chat.completion\",\"created\":1764000000,\"model\":\"%s\",\"choices\":"
        "[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"",
        c->id, c->model);
    for (long k = 0; k < c->tokens; k++) appendf(&scratch, "%s.%ld ", c->id, k);
    appendf(&scratch,
            "\",\"refusal\":null,\"annotations\":null,\"audio\":null,\"function_call\":null,\"tool_calls\":[],"
            "\"reasoning_content\":null},\"logprobs\":null,\"finish_reason\":\"length\",\"stop_reason\":null}],"
            "\"service_tier\":null,\"system_fingerprint\":null,");
    usage(&scratch, c);
    appendf(&scratch, ",\"prompt_logprobs\":null,\"kv_transfer_params\":null}");
    answer(c, 200, "application/json", scratch.data, scratch.len);
    generated += c->tokens;
}

/* Put an event into `to`, as a chunk of its own. `rest`: of its choices, or what stands in their place. */
static void event(Bytes *to, const Connection *c, const char *rest) {
    char text[1024];
    int len = snprintf(text, sizeof text,
                       "data: {\"id\":\"chatcmpl-%s\",\"object\":\"chat.completion.chunk\",\"created\":1764000000,"
                       "\"model\":\"%s\",\"choices\":[%s}\n\n",
                       c->id, c->model, rest);
    appendf(to, "%x\r\n%s\r\n", (unsigned)len, text);
}

static void next_token(Connection *c, Bytes *to) {
    char rest[256];
    snprintf(
        rest, sizeof rest,
        "{\"index\":0,\"delta\":{\"content\":\"%s.%ld \"},\"logprobs\":null,\"finish_reason\":%s,\"token_ids\":null}]",
        c->id, c->token, c->token + 1 == c->tokens ? "\"length\",\"stop_reason\":null" : "null");
    event(to, c, rest);
    c->token++, generated++;
}

static void next_request(Connection *c);

static void end_chat(Connection *c) {
    no_timer(c);
    running--, answered++, c->begun = 0;
    next_request(c);
}

/* The due time of `c` has come. */
static void step(Connection *c, int64_t now) {
    if (!c->stream) {
        whole_answer(c);
        end_chat(c);
        return;
    }
    if (c->out.len - c->sent > PAUSE_ABOVE) {
        wake_at(c, now + 1000000);
        return;
    }
    if (c->interval && c->token) next_write = now + APART_NS;
    scratch.len = 0;
    if (c->token == 0) {
        appendf(&scratch, "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                          "transfer-encoding: chunked\r\n\r\n");
        event(&scratch, c,
              "{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":"
              "null}]");
    }
    next_token(c, &scratch);
    for (int more = 1; !c->interval && more < AT_A_TIME && c->token < c->tokens; more++) next_token(c, &scratch);
    if (c->token < c->tokens) {
        put(c, scratch.data, scratch.len);
        wake_at(c, c->interval ? (c->due / c->interval + 1) * c->interval : now + 1);
        return;
    }
    if (c->usage) {
        Bytes rest = {0};
        appendf(&rest, "],");
        usage(&rest, c);
        appendf(&rest, "%c", 0);
        event(&scratch, c, rest.data);
        free(rest.data);
    }
    appendf(&scratch, "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
    put(c, scratch.data, scratch.len);
    end_chat(c);
}

static int is_true(const char *value) { return value && *value == 't'; }

static void begin_chat(Connection *c, const char *body, size_t len) {
    const char *line = behind(body, len, "[bench "), *name = member(body, len, "model");
    const char *limit = member(body, len, "max_tokens"), *end = body + len;
    long delay_us = default_delay_us, interval_us = default_interval_us;
    c->tokens = limit ? atol(limit) : 16;
    if (!line || sscanf(line, "%32s %ld %ld %ld]", c->id, &delay_us, &interval_us, &c->tokens) != 4)
        snprintf(c->id, sizeof c->id, "%016lx", (unsigned long)answered + running);
    if (c->tokens < 1) c->tokens = 1;
    size_t size = 0;
    if (name && *name == '"')
        for (name++; name + size < end && name[size] != '"' && size < sizeof c->model - 1;) size++;
    if (size) snprintf(c->model, sizeof c->model, "%.*s", (int)size, name);
    else snprintf(c->model, sizeof c->model, "%s", model);
    c->stream = is_true(member(body, len, "stream"));
    c->usage = is_true(member(body, len, "include_usage"));
    c->prompt_tokens = len / 4;
    c->token = 0, c->begun = 1, running++;
    c->interval = interval_us * 1000;
    wake_at(c, now_ns() + delay_us * 1000);
}

/* --- requests --- */
static void page(Connection *c, const char *path) {
    Bytes body = {0};
    if (!strcmp(path, "/health")) {
        answer(c, 200, "text/plain", "", 0);
    } else if (!strcmp(path, "/version")) {
        answer(c, 200, "application/json", "{\"version\":\"0.11.0\"}", 20);
    } else if (!strcmp(path, "/v1/models")) {
        appendf(&body, "{\"object\":\"list\",\"data\":[");
        for (int number = 0; number < models; number++) {
            appendf(&body, "%s{\"id\":\"%s", number ? "," : "", model);
            if (number) appendf(&body, "-%d", number);
            appendf(&body,
                    "\",\"object\":\"model\",\"created\":1764000000,\"owned_by\":\"vllm\",\"max_model_len\":16777216}");
        }
        appendf(&body, "]}");
        answer(c, 200, "application/json", body.data, body.len);
    } else if (!strcmp(path, "/metrics")) {
        appendf(&body,
                "vllm:num_requests_running{model_name=\"%s\"} %ld\nvllm:num_requests_waiting{model_name=\"%s\"} 0\n",
                model, running, model);
        appendf(
            &body,
            "vllm:generation_tokens_total{model_name=\"%s\"} %ld\nvllm:request_success_total{model_name=\"%s\"} %ld\n",
            model, generated, model, answered);
        answer(c, 200, "text/plain; version=0.0.4", body.data, body.len);
    } else {
        refuse(c, 404, "Not Found");
    }
    free(body.data);
}

/* Take the next request from what has been read, if it is complete and no other is under way. */
static void next_request(Connection *c) {
    while (!c->begun && !c->closing) {
        const char *end = behind(c->in.data, c->in.len, "\r\n\r\n");
        if (!end) {
            if (c->in.len > MAX_HEAD) c->closing = 1;
            return;
        }
        size_t head = end - c->in.data, body = 0;
        const char *length = header(c->in.data, head, "content-length");
        if (length) body = strtoul(length, NULL, 10);
        if (body > MAX_BODY || header(c->in.data, head, "transfer-encoding")) {
            refuse(c, 411, "a length of at most 256 MiB is needed");
            c->closing = 1;
            return;
        }
        if (c->in.len < head + body) {
            reserve(&c->in, head + body - c->in.len);
            return;
        }
        char method[8] = "", path[256] = "";
        sscanf(c->in.data, "%7s %255s", method, path);
        if (!strcmp(method, "GET")) page(c, path);
        else if (!strcmp(path, CHAT_PATH)) begin_chat(c, c->in.data + head, body);
        else refuse(c, 404, "Not Found");
        drop(&c->in, head + body);
    }
}

static void end_connection(Connection *c) {
    no_timer(c);
    running -= c->begun;
    close(c->fd);
    free(c->in.data);
    free(c->out.data);
    free(c);
}

static void readable(Connection *c) {
    reserve(&c->in, 16384);
    ssize_t n = recv(c->fd, c->in.data + c->in.len, c->in.cap - c->in.len - 1, 0);
    if (n > 0) {
        c->in.len += n;
        c->in.data[c->in.len] = 0; /* for what reads numbers */
        next_request(c);
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
        c->closing = 1;
    }
}

static void accept_all(int listener) {
    for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0;) {
        int on = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        Connection *c = calloc(1, sizeof *c);
        if (!c) die("out of memory");
        c->fd = fd, c->slot = -1;
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
        epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
    }
}

static int listen_on(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 4096))
        die("port %d: %s", port, strerror(errno));
    return fd;
}

/* Sleep until something can be read or written or a timer is due. */
static int wait_for(struct epoll_event *events, int max, int alarm_fd) {
    int64_t due = timers ? first_due() : 0;
    if (timers && due <= now_ns()) return epoll_wait(poller, events, max, 0);
    struct itimerspec when = {0};
    if (timers) when.it_value.tv_sec = due / 1000000000, when.it_value.tv_nsec = due % 1000000000;
    timerfd_settime(alarm_fd, TFD_TIMER_ABSTIME, &when, NULL);
    return epoll_wait(poller, events, max, -1);
}

int main(int argc, char **argv) {
    if (argc < 2) die("usage: engine PORT [--model NAME] [--models N] [--delay-us N] [--interval-us N]");
    for (int i = 2; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--model")) model = argv[i + 1];
        else if (!strcmp(argv[i], "--models")) models = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--delay-us")) default_delay_us = atol(argv[i + 1]);
        else if (!strcmp(argv[i], "--interval-us")) default_interval_us = atol(argv[i + 1]);
        else die("%s is no option", argv[i]);
    }
    signal(SIGPIPE, SIG_IGN);
    many_files();
    poller = epoll_create1(EPOLL_CLOEXEC);
    int listener = listen_on(atoi(argv[1])), alarm_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct epoll_event watched = {.events = EPOLLIN, .data.ptr = &listener}, events[256];
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &watched);
    watched.data.ptr = &alarm_fd;
    epoll_ctl(poller, EPOLL_CTL_ADD, alarm_fd, &watched);
    for (;;) {
        int n = wait_for(events, 256, alarm_fd);
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr == &alarm_fd) {
                uint64_t expired;
                if (read(alarm_fd, &expired, sizeof expired) < 0) continue;
            } else if (events[i].data.ptr == &listener) {
                accept_all(listener);
            } else {
                Connection *c = events[i].data.ptr;
                if (events[i].events & EPOLLOUT) put(c, "", 0);
                if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) readable(c);
                if (c->closing) end_connection(c);
            }
        }
        int64_t now = now_ns();
        while (timers && first_due() <= now) step(heap[0], now);
    }
}
