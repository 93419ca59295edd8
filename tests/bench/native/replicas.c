// Plays several vLLM replicas in one thread, cheaply enough that what stands before them is measured.
//
//   replicas --count 4 --ttft-ms 50 --itl-ms 20
//
// Prints the ports as one JSON list and serves until killed. POST is answered as vLLM 0.32 answers
// a chat completion: streamed or whole, with token ids where asked for and null where not, with
// usage where asked for. The prompt's ids are as many as its bytes over four. A stream's first token
// comes after the first time, each next one after the second; a whole answer comes at once.
#include "common.h"

#define BUFFER_BYTES (256 << 10)

typedef struct conn {
  int fd;
  char *in;
  size_t in_len, in_cap;
  bool streaming, with_ids, with_usage;
  int tokens, sent, prompt_tokens;
  char id[80], model[80];
  uint64_t due_ns;
  struct conn *next;
  bool queued, gone;
} conn_t;

// Streams in order of what is due: both times are constant, so that each queue sorts itself.
typedef struct { conn_t *head, *tail; } queue_t;
static queue_t first, following;
static uint64_t ttft_ns, itl_ns;
static int epoll_fd, created_s;
static char out[BUFFER_BYTES];

static void push(queue_t *queue, conn_t *c, uint64_t due_ns) {
  c->due_ns = due_ns;
  c->next = NULL;
  c->queued = true;
  if (queue->tail) queue->tail->next = c; else queue->head = c;
  queue->tail = c;
}

static conn_t *pop(queue_t *queue) {
  conn_t *c = queue->head;
  queue->head = c->next;
  if (!queue->head) queue->tail = NULL;
  c->queued = false;
  return c;
}

static void release(conn_t *c) {
  if (c->fd >= 0) close(c->fd);
  c->fd = -1;
  c->gone = true;
  if (c->queued) return;  // freed when its turn comes
  free(c->in);
  free(c);
}

// What is sent here never fills a socket's buffer; whoever lets it is not worth measuring.
static bool transmit(conn_t *c, size_t size) {
  if (send(c->fd, out, size, MSG_NOSIGNAL) == (ssize_t)size) return true;
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
static size_t chunk(size_t at, const char *event, size_t size) {
  at += (size_t)sprintf(out + at, "%zx\r\n", size);
  memcpy(out + at, event, size);
  memcpy(out + at + size, "\r\n", 2);
  return at + size + 2;
}

static size_t identity(char *event, const conn_t *c, const char *object) {
  return (size_t)sprintf(event, "\"id\":\"chatcmpl-%s\",\"object\":\"%s\",\"created\":%d,\"model\":\"%s\",", c->id, object, created_s, c->model);
}

static size_t prompt_ids(char *event, const conn_t *c) {
  if (!c->with_ids) return (size_t)sprintf(event, "null");
  size_t n = 0;
  for (int i = 0; i < c->prompt_tokens; i++) n += (size_t)sprintf(event + n, "%c%d", i ? ',' : '[', 1000 + i * 7919 % 120000);
  return n + (size_t)sprintf(event + n, "]");
}

static size_t role_event(size_t at, const conn_t *c) {
  static char event[BUFFER_BYTES / 2];
  size_t n = (size_t)sprintf(event, "data: {");
  n += identity(event + n, c, "chat.completion.chunk");
  n += (size_t)sprintf(event + n, "\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null}],\"prompt_token_ids\":");
  n += prompt_ids(event + n, c);
  n += (size_t)sprintf(event + n, "}\n\n");
  return chunk(at, event, n);
}

static size_t token_event(size_t at, const conn_t *c, uint64_t t_ns, bool last) {
  char event[1024], ids[16] = "null";
  if (c->with_ids) sprintf(ids, "[%d]", 1000 + c->sent * 7919 % 120000);
  size_t n = (size_t)sprintf(event, "data: {");
  n += identity(event + n, c, "chat.completion.chunk");
  n += (size_t)sprintf(event + n, "\"choices\":[{\"index\":0,\"delta\":{\"content\":\" " MARK_FORMAT "\"},\"logprobs\":null,\"finish_reason\":%s,\"token_ids\":%s}]%s}\n\n",
                       (unsigned long long)t_ns, c->sent, last ? "\"length\",\"stop_reason\":null" : "null", ids, last && !c->with_usage ? ",\"system_fingerprint\":\"vllm-0.32.0-bench\"" : "");
  return chunk(at, event, n);
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
    at = chunk(at, event, n);
  }
  at = chunk(at, "data: [DONE]\n\n", 14);
  memcpy(out + at, "0\r\n\r\n", 5);
  return at + 5;
}

static void next_token(conn_t *c, uint64_t t_ns) {
  size_t n = 0;
  if (!c->sent) {
    n = (size_t)sprintf(out, "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n");
    n = role_event(n, c);
  }
  bool last = ++c->sent >= c->tokens;
  n = token_event(n, c, t_ns, last);
  if (last) {
    n = closing_events(n, c);
    c->streaming = false;
  }
  if (transmit(c, n) && !last) push(&following, c, t_ns + itl_ns);
}

static bool whole_answer(conn_t *c) {
  static char body[BUFFER_BYTES / 2];
  size_t n = (size_t)sprintf(body, "{");
  n += identity(body + n, c, "chat.completion");
  n += (size_t)sprintf(body + n, "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"Yes." MARK_FORMAT "\",\"refusal\":null,\"annotations\":null,\"audio\":null,\"function_call\":null,\"tool_calls\":[],\"reasoning\":null},\"logprobs\":null,\"finish_reason\":\"length\",\"stop_reason\":null,\"token_ids\":%s}],\"service_tier\":null,\"system_fingerprint\":\"vllm-0.32.0-bench\",",
                       (unsigned long long)now_ns(), 1, c->with_ids ? "[1000]" : "null");
  c->tokens = 1;
  n += usage(body + n, c);
  n += (size_t)sprintf(body + n, ",\"prompt_logprobs\":null,\"prompt_token_ids\":");
  n += prompt_ids(body + n, c);
  n += (size_t)sprintf(body + n, ",\"kv_transfer_params\":null}");
  size_t at = (size_t)sprintf(out, "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-length: %zu\r\ncontent-type: application/json\r\n\r\n", n);
  memcpy(out + at, body, n);
  return transmit(c, at + n);
}

static void copy_word(char *to, size_t size, const char *from) {
  size_t n = strcspn(from, "\",\r\n} ");
  if (n >= size) n = size - 1;
  memcpy(to, from, n);
  to[n] = 0;
}

// Answer the request of which head and body are complete; false if the connection has ended.
static bool answer(conn_t *c, const char *head, const char *body, size_t body_len, uint64_t t_ns) {
  if (memcmp(head, "POST", 4)) {
    size_t n = (size_t)sprintf(out, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
    return transmit(c, n);
  }
  const char *id = strcasestr(head, "\r\nx-request-id: ");
  copy_word(c->id, sizeof c->id, id ? id + 16 : "none");
  const char *model = value_of(body, "\"model\"");
  copy_word(c->model, sizeof c->model, *model == '"' ? model + 1 : model);
  c->with_ids = !strncmp(value_of(body, "\"return_token_ids\""), "true", 4);
  c->with_usage = !strncmp(value_of(body, "\"include_usage\""), "true", 4);
  const char *most = value_of(body, "\"max_tokens\"");
  c->tokens = atoi(*most ? most : value_of(body, "\"max_completion_tokens\""));  // a router may rename it
  if (c->tokens < 1) c->tokens = 1;
  c->prompt_tokens = (int)(body_len / 4);
  c->sent = 0;
  if (strncmp(value_of(body, "\"stream\""), "true", 4)) return whole_answer(c);
  c->streaming = true;
  push(&first, c, t_ns + ttft_ns);
  return true;
}

static void readable(conn_t *c, uint64_t t_ns) {
  if (c->in_cap - c->in_len < 4096) {
    c->in_cap = c->in_cap ? 2 * c->in_cap : 8192;
    c->in = realloc(c->in, c->in_cap);
    if (!c->in) die("realloc");
  }
  ssize_t got = recv(c->fd, c->in + c->in_len, c->in_cap - c->in_len - 1, 0);
  if (got <= 0) {
    if (got < 0 && errno == EAGAIN) return;
    release(c);
    return;
  }
  c->in_len += (size_t)got;
  c->in[c->in_len] = 0;
  char *end = strstr(c->in, "\r\n\r\n");
  if (!end) return;
  char *length = strcasestr(c->in, "\r\ncontent-length:");
  size_t body_len = length && length < end ? strtoul(length + 17, NULL, 10) : 0;
  size_t total = (size_t)(end + 4 - c->in) + body_len;
  if (c->in_len < total) return;
  c->in_len = 0;  // nobody here sends a request before the answer to the last one
  answer(c, c->in, end + 4, body_len, t_ns);
}

static void run_due(queue_t *queue) {
  while (queue->head) {
    uint64_t t_ns = now_ns();
    if (queue->head->due_ns > t_ns) return;
    conn_t *c = pop(queue);
    if (c->gone) release(c); else next_token(c, t_ns);
  }
}

static int wait_ms(void) {
  uint64_t due_ns = UINT64_MAX;
  if (first.head) due_ns = first.head->due_ns;
  if (following.head && following.head->due_ns < due_ns) due_ns = following.head->due_ns;
  if (due_ns == UINT64_MAX) return -1;
  uint64_t t_ns = now_ns();
  return due_ns <= t_ns ? 0 : (int)((due_ns - t_ns + 999999) / 1000000);
}

int main(int argc, char **argv) {
  raise_file_limit();
  int count = (int)option(argc, argv, "--count");
  ttft_ns = (uint64_t)(option(argc, argv, "--ttft-ms") * 1e6);
  itl_ns = (uint64_t)(option(argc, argv, "--itl-ms") * 1e6);
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
    int n = epoll_wait(epoll_fd, events, 512, wait_ms());
    uint64_t t_ns = now_ns();
    for (int i = 0; i < n; i++) {
      int *who = events[i].data.ptr;
      if (who >= listening && who < listening + count) {
        int fd;
        while ((fd = accept4(*who, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
          int one = 1;
          setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
          conn_t *c = calloc(1, sizeof *c);
          c->fd = fd;
          watch(epoll_fd, fd, EPOLLIN, c);
        }
      } else {
        readable(events[i].data.ptr, t_ns);
      }
    }
    run_due(&first);
    run_due(&following);
  }
}
