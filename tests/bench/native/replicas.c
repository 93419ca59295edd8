// Plays several vLLM replicas in one thread, cheaply enough that what stands before them is measured.
//
//   replicas --count 4
//
// Prints the ports as one JSON list and serves until killed. POST is answered as vLLM 0.32 answers
// a chat completion: streamed or whole, with token ids where asked for and null where not, with
// usage where asked for. The prompt's ids are as many as its bytes over four. A prompt that says
// "ttft_ms=50 itl_ms=20" has its first token after the first time, each next one after the second;
// a whole answer comes at once.
#include "common.h"

#define BUFFER_BYTES (256 << 10)
#define EVENT_BYTES 640
// Every token of a stream is the same event with other digits in it: its ids have six digits.
enum { ID_DIGITS = 6, NEVER = -1 };

typedef struct conn {
  int fd;
  char *in;
  size_t in_len, in_cap;
  bool streaming, with_ids, with_usage, gone;
  int tokens, sent, prompt_tokens, itl_ticks;
  uint64_t arrived_ns;
  struct conn *next;
  int event_len, mark_at, id_at;
  char id[80], model[80], event[EVENT_BYTES];
} conn_t;

// Who is due in which tick of a millisecond: a wheel, longer than any pause.
enum { SLOTS = 1 << 16 };
static struct { conn_t *head, *tail; } wheel[SLOTS];
static uint64_t tick;
static int pending, epoll_fd, created_s;
static uint64_t offset_ns;
static char out[BUFFER_BYTES];

static void schedule(conn_t *c, uint64_t at_tick) {
  conn_t **end = wheel[at_tick % SLOTS].head ? &wheel[at_tick % SLOTS].tail->next : &wheel[at_tick % SLOTS].head;
  c->next = NULL;
  *end = wheel[at_tick % SLOTS].tail = c;
  pending++;
}

static void release(conn_t *c) {
  if (c->fd >= 0) close(c->fd);
  c->fd = -1;
  c->gone = true;
  if (c->streaming) return;  // freed when its turn comes
  free(c->in);
  free(c);
}

// What is sent here never fills a socket's buffer; whoever lets it is not worth measuring.
static bool transmit(conn_t *c, const char *bytes, size_t size) {
  if (send(c->fd, bytes, size, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)size) return true;
  c->streaming = false;
  release(c);
  return false;
}

static const char *value_of(const char *body, const char *key) {
  const char *at = strstr(body, key);
  if (!at) return "";
  at += strlen(key);
  while (*at == ' ' || *at == ':') at++;
  return at;
}

// Add one event, in a chunk of its own as uvicorn sends it, at `at`; returns the new end.
static size_t chunk(char *to, size_t at, const char *event, size_t size) {
  at += (size_t)sprintf(to + at, "%zx\r\n", size);
  memcpy(to + at, event, size);
  memcpy(to + at + size, "\r\n", 2);
  return at + size + 2;
}

static int token_id(int number) { return 100000 + number * 7919 % 50000; }

static size_t identity(char *event, const conn_t *c, const char *object) {
  return (size_t)sprintf(event, "\"id\":\"chatcmpl-%s\",\"object\":\"%s\",\"created\":%d,\"model\":\"%s\",", c->id, object, created_s, c->model);
}

static size_t prompt_ids(char *event, const conn_t *c) {
  if (!c->with_ids) return (size_t)sprintf(event, "null");
  size_t n = 0;
  for (int i = 0; i < c->prompt_tokens; i++) n += (size_t)sprintf(event + n, "%c%d", i ? ',' : '[', token_id(i));
  return n + (size_t)sprintf(event + n, "]");
}

static size_t role_event(size_t at, const conn_t *c) {
  static char event[BUFFER_BYTES / 2];
  size_t n = (size_t)sprintf(event, "data: {");
  n += identity(event + n, c, "chat.completion.chunk");
  n += (size_t)sprintf(event + n, "\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null}],\"prompt_token_ids\":");
  n += prompt_ids(event + n, c);
  n += (size_t)sprintf(event + n, "}\n\n");
  return chunk(out, at, event, n);
}

// Write one token's event; the places of its mark and id are kept, to write others in them.
static size_t token_event(char *to, conn_t *c, bool last) {
  char event[EVENT_BYTES - 16], size[16];
  size_t n = (size_t)sprintf(event, "data: {");
  n += identity(event + n, c, "chat.completion.chunk");
  n += (size_t)sprintf(event + n, "\"choices\":[{\"index\":0,\"delta\":{\"content\":\" ");
  size_t mark_at = n;
  n += (size_t)sprintf(event + n, "%*s\"},\"logprobs\":null,\"finish_reason\":%s,\"token_ids\":", MARK_BYTES, "", last ? "\"length\",\"stop_reason\":null" : "null");
  size_t id_at = n + 1;
  n += (size_t)(c->with_ids ? sprintf(event + n, "[%*s]", ID_DIGITS, "") : sprintf(event + n, "null"));
  n += (size_t)sprintf(event + n, "}]%s}\n\n", last && !c->with_usage ? ",\"system_fingerprint\":\"vllm-0.32.0-bench\"" : "");
  int before = sprintf(size, "%zx\r\n", n);
  c->mark_at = before + (int)mark_at;
  c->id_at = c->with_ids ? before + (int)id_at : NEVER;
  c->event_len = (int)chunk(to, 0, event, n);
  return (size_t)c->event_len;
}

static void stamp(char *event, const conn_t *c) {
  uint64_t t_ns = now_ns(), own_us = c->sent == 1 ? (t_ns - c->arrived_ns) / 1000 : 0;
  write_mark(event + c->mark_at, t_ns, c->sent, own_us);
  if (c->id_at != NEVER) write_digits(event + c->id_at, ID_DIGITS, (uint64_t)token_id(c->sent));
}

static size_t usage(char *event, const conn_t *c) {
  return (size_t)sprintf(event, "\"usage\":{\"prompt_tokens\":%d,\"total_tokens\":%d,\"completion_tokens\":%d,\"prompt_tokens_details\":null}", c->prompt_tokens, c->prompt_tokens + c->tokens, c->tokens);
}

static size_t closing_events(size_t at, const conn_t *c) {
  char event[1024];
  if (c->with_usage) {
    size_t n = (size_t)sprintf(event, "data: {");
    n += identity(event + n, c, "chat.completion.chunk");
    n += (size_t)sprintf(event + n, "\"choices\":[],\"system_fingerprint\":\"vllm-0.32.0-bench\",");
    n += usage(event + n, c);
    n += (size_t)sprintf(event + n, "}\n\n");
    at = chunk(out, at, event, n);
  }
  at = chunk(out, at, "data: [DONE]\n\n", 14);
  memcpy(out + at, "0\r\n\r\n", 5);
  return at + 5;
}

static void next_token(conn_t *c) {
  bool last = ++c->sent >= c->tokens;
  if (c->sent > 1 && !last) {
    stamp(c->event, c);
    if (transmit(c, c->event, (size_t)c->event_len)) schedule(c, tick + (uint64_t)c->itl_ticks);
    return;
  }
  size_t n = 0;
  if (c->sent == 1) {
    n = (size_t)sprintf(out, "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n");
    n = role_event(n, c);
  }
  size_t event_at = n;
  n += token_event(out + n, c, last);
  stamp(out + event_at, c);
  if (last) {
    n = closing_events(n, c);
    c->streaming = false;
  } else {
    memcpy(c->event, out + event_at, n - event_at);
  }
  if (transmit(c, out, n) && !last) schedule(c, tick + (uint64_t)c->itl_ticks);
}

static bool whole_answer(conn_t *c) {
  static char body[BUFFER_BYTES / 2];
  char mark[MARK_BYTES + 1] = "";
  uint64_t t_ns = now_ns();
  write_mark(mark, t_ns, 1, (t_ns - c->arrived_ns) / 1000);
  size_t n = (size_t)sprintf(body, "{");
  n += identity(body + n, c, "chat.completion");
  n += (size_t)sprintf(body + n, "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"Yes.%s\",\"refusal\":null,\"annotations\":null,\"audio\":null,\"function_call\":null,\"tool_calls\":[],\"reasoning\":null},\"logprobs\":null,\"finish_reason\":\"length\",\"stop_reason\":null,\"token_ids\":%s}],\"service_tier\":null,\"system_fingerprint\":\"vllm-0.32.0-bench\",",
                       mark, c->with_ids ? "[100000]" : "null");
  c->tokens = 1;
  n += usage(body + n, c);
  n += (size_t)sprintf(body + n, ",\"prompt_logprobs\":null,\"prompt_token_ids\":");
  n += prompt_ids(body + n, c);
  n += (size_t)sprintf(body + n, ",\"kv_transfer_params\":null}");
  size_t at = (size_t)sprintf(out, "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-length: %zu\r\ncontent-type: application/json\r\n\r\n", n);
  memcpy(out + at, body, n);
  return transmit(c, out, at + n);
}

static void copy_word(char *to, size_t size, const char *from) {
  size_t n = strcspn(from, "\",\r\n} ");
  if (n >= size) n = size - 1;
  memcpy(to, from, n);
  to[n] = 0;
}

static double setting(const char *body, const char *key) {
  const char *at = strstr(body, key);
  return at ? atof(at + strlen(key)) : 0;
}

static bool is_true(const char *body, const char *key) { return !strncmp(value_of(body, key), "true", 4); }

// Answer the request of which head and body are complete.
static void answer(conn_t *c, const char *method, const char *body, size_t body_len, uint64_t t_ns) {
  if (memcmp(method, "POST", 4)) {
    size_t n = (size_t)sprintf(out, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
    transmit(c, out, n);
    return;
  }
  const char *model = value_of(body, "\"model\"");
  copy_word(c->model, sizeof c->model, *model == '"' ? model + 1 : model);
  c->with_ids = is_true(body, "\"return_token_ids\"");
  c->with_usage = is_true(body, "\"include_usage\"");
  const char *most = value_of(body, "\"max_tokens\"");
  c->tokens = atoi(*most ? most : value_of(body, "\"max_completion_tokens\""));  // a router may rename it
  if (c->tokens < 1) c->tokens = 1;
  c->prompt_tokens = (int)(body_len / 4);
  c->sent = 0;
  c->arrived_ns = t_ns;
  if (!is_true(body, "\"stream\"")) { whole_answer(c); return; }
  c->streaming = true;
  c->itl_ticks = (int)(setting(body, "itl_ms=") * 1e6 / TICK_NS);
  if (c->itl_ticks < 1) c->itl_ticks = 1;
  uint64_t first = (t_ns + (uint64_t)(setting(body, "ttft_ms=") * 1e6)) / TICK_NS + 1;
  schedule(c, first > tick ? first : tick + 1);
}

// Read what matters of a head: the end of it, the length of the body, and the request's id.
static const char *read_head(conn_t *c, size_t *body_len) {
  *body_len = 0;
  strcpy(c->id, "none");
  for (const char *line = c->in, *end; (end = strchr(line, '\n')); line = end + 1) {
    if (line[0] == '\r') return end + 1;
    if ((line[0] | 32) == 'c' && !strncasecmp(line, "content-length:", 15)) *body_len = strtoul(line + 15, NULL, 10);
    else if ((line[0] | 32) == 'x' && !strncasecmp(line, "x-request-id: ", 14)) copy_word(c->id, sizeof c->id, line + 14);
  }
  return NULL;
}

static void readable(conn_t *c) {
  if (c->in_cap - c->in_len < 4096) {
    c->in_cap = c->in_cap ? 2 * c->in_cap : 8192;
    c->in = realloc(c->in, c->in_cap);
    if (!c->in) die("realloc");
  }
  uint64_t t_ns = 0;
  ssize_t got = receive(c->fd, c->in + c->in_len, c->in_cap - c->in_len - 1, offset_ns, &t_ns);
  if (got <= 0) {
    if (got < 0 && errno == EAGAIN) return;
    release(c);
    return;
  }
  c->in_len += (size_t)got;
  c->in[c->in_len] = 0;
  size_t body_len;
  const char *body = read_head(c, &body_len);
  if (!body || c->in_len < (size_t)(body - c->in) + body_len) return;
  c->in_len = 0;  // nobody here sends a request before the answer to the last one
  answer(c, c->in, body, body_len, t_ns);
}

static void run_due(void) {
  for (uint64_t now = now_ns() / TICK_NS; tick < now;) {
    tick++;
    conn_t *c = wheel[tick % SLOTS].head;
    wheel[tick % SLOTS].head = wheel[tick % SLOTS].tail = NULL;
    while (c) {
      conn_t *next = c->next;
      pending--;
      if (!c->gone) next_token(c);
      else { c->streaming = false; release(c); }
      c = next;
    }
  }
}

// Wait for requests, to the next tick if somebody is due in one.
static int wait_events(struct epoll_event *events, int most) {
  struct timespec rest = {.tv_nsec = TICK_NS - now_ns() % TICK_NS};
  int n = epoll_pwait2(epoll_fd, events, most, pending ? &rest : NULL, NULL);
  offset_ns = clock_offset_ns();
  if (!pending) tick = now_ns() / TICK_NS;
  return n;
}

int main(int argc, char **argv) {
  raise_file_limit();
  int count = (int)option(argc, argv, "--count");
  tick = now_ns() / TICK_NS;
  created_s = (int)time(NULL);
  epoll_fd = epoll_create1(EPOLL_CLOEXEC);
  int *listening = calloc((size_t)count, sizeof *listening);
  for (int i = 0; i < count; i++) {
    listening[i] = tcp_socket();
    struct sockaddr_in address = loopback(0);
    socklen_t size = sizeof address;
    if (bind(listening[i], (void *)&address, size) || listen(listening[i], 4096)) die("listen");
    getsockname(listening[i], (void *)&address, &size);
    printf("%s%d", i ? "," : "[", ntohs(address.sin_port));
    watch(epoll_fd, listening[i], EPOLLIN, &listening[i]);
  }
  printf("]\n");
  fflush(stdout);
  struct epoll_event events[512];
  for (;;) {
    int n = wait_events(events, 512);
    for (int i = 0; i < n; i++) {
      int *who = events[i].data.ptr;
      if (who >= listening && who < listening + count) {
        int fd;
        while ((fd = accept4(*who, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
          conn_t *c = calloc(1, sizeof *c);
          c->fd = fd;
          watch(epoll_fd, fd, EPOLLIN, c);
        }
      } else {
        readable(events[i].data.ptr);
      }
    }
    run_due();
  }
}
