// Closed-loop load: users that each ask, read the whole answer, and ask again.
//
//   load --port 8000 --model demo --users 200 --tokens 64 --stream 1 --ramp-s 1.3 --seconds 8 --drain-s 30
//
// Prints one JSON object. An answer is good only with status 200, every token in order, `[DONE]`
// (streams), and the end of its body. Times: ttft is request to first token; transit is from a
// token's sending, which it tells itself, to its reading here; gap is between tokens of an answer.
#include "common.h"

enum { HEAD, LENGTH, CHUNK_SIZE, CHUNK, CHUNK_END, TRAILER };
enum { CONNECT, RESET, STATUS, TOKENS, UNFINISHED, KINDS };
static const char *kinds[KINDS] = {"connect", "reset", "status", "tokens", "unfinished"};

typedef struct {
  int fd, state, status, seen, mark_len, tail_len, head_len;
  bool busy, ordered, close_after, used;
  size_t left;
  uint64_t asked_ns, last_ns, wake_ns;
  char mark[MARK_BYTES + 1], tail[16], head[4096];
} user_t;

// A histogram of 5 µs steps up to two seconds; the last step holds what is longer.
enum { STEPS = 400000 };
typedef struct { const char *name; uint32_t *steps; uint64_t count; } times_t;
static times_t ttft = {.name = "ttft_ms"}, transit = {.name = "transit_ms"}, gap = {.name = "gap_ms"}, whole = {.name = "whole_ms"};

static struct sockaddr_in address;
static user_t *users;
static int epoll_fd, tokens, busy;
static bool streamed;
static uint64_t end_ns, asked, good, received, failed[KINDS];
static char request[8192], first_failure[300], buffer[1 << 18];
static size_t request_len;

static void note(times_t *times, uint64_t ns) {
  uint64_t step = ns / 5000;
  times->steps[step < STEPS ? step : STEPS - 1]++;
  times->count++;
}

static double percentile(const times_t *times, double percent) {
  uint64_t seen = 0, aim = (uint64_t)((double)times->count * percent / 100);
  for (int step = 0; step < STEPS; step++) {
    seen += times->steps[step];
    if (seen > aim) return step * 0.005;
  }
  return 0;
}

static void drop(user_t *u) {
  if (u->fd >= 0) close(u->fd);
  u->fd = -1;
  u->used = false;
}

static void finished(user_t *u, uint64_t t_ns) {
  u->busy = false;
  busy--;
  if (u->close_after) drop(u);
  u->wake_ns = t_ns;
}

static void fail(user_t *u, int kind, uint64_t t_ns) {
  if (!first_failure[0]) snprintf(first_failure, sizeof first_failure, "%s: status %d, %d tokens, errno %d", kinds[kind], u->status, u->seen, errno);
  failed[kind]++;
  u->close_after = true;
  finished(u, t_ns);
  u->wake_ns = t_ns + 10000000;  // a server that fails is not to be hammered
}

static void ask(user_t *u, uint64_t t_ns) {
  if (!u->busy) {
    asked++;
    busy++;
    u->busy = true;
    u->asked_ns = t_ns;
  }
  u->state = HEAD;
  u->status = u->seen = u->mark_len = u->tail_len = u->head_len = 0;
  u->ordered = true;
  u->close_after = false;
  u->last_ns = 0;
  if (u->fd < 0) {
    // On loopback a connection is made or refused at once, so that it may as well be waited for.
    u->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int one = 1;
    setsockopt(u->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(u->fd, (void *)&address, sizeof address)) { fail(u, CONNECT, t_ns); return; }
    watch(epoll_fd, u->fd, EPOLLIN, u);
  }
  if (send(u->fd, request, request_len, MSG_NOSIGNAL) != (ssize_t)request_len) fail(u, RESET, t_ns);
}

static void complete(user_t *u, uint64_t t_ns) {
  u->used = true;
  bool done = !streamed || (u->tail_len == 14 && !memcmp(u->tail, "data: [DONE]\n\n", 14));
  if (u->status != 200) fail(u, STATUS, t_ns);
  else if (!u->ordered || u->seen != (streamed ? tokens : 1) || !done) fail(u, TOKENS, t_ns);
  else {
    good++;
    note(&whole, t_ns - u->asked_ns);
    finished(u, t_ns);
  }
}

static void token(user_t *u, uint64_t t_ns) {
  u->mark[MARK_BYTES] = 0;
  uint64_t sent_ns = strtoull(u->mark + 1, NULL, 10);
  u->ordered &= u->mark[17] == '#' && atoi(u->mark + 18) == u->seen + 1;
  received++;
  if (!u->seen++) note(&ttft, t_ns - u->asked_ns);
  else note(&gap, t_ns - u->last_ns);
  note(&transit, t_ns > sent_ns ? t_ns - sent_ns : 0);
  u->last_ns = t_ns;
}

static void body(user_t *u, const char *p, size_t n, uint64_t t_ns) {
  if (n >= 14) { memcpy(u->tail, p + n - 14, 14); u->tail_len = 14; }
  else {
    size_t keep = (size_t)u->tail_len + n > 14 ? 14 - n : (size_t)u->tail_len;
    memmove(u->tail, u->tail + u->tail_len - keep, keep);
    memcpy(u->tail + keep, p, n);
    u->tail_len = (int)(keep + n);
  }
  while (n) {
    if (!u->mark_len) {
      const char *at = memchr(p, '@', n);
      if (!at) return;
      n -= (size_t)(at - p);
      p = at;
    }
    size_t k = (size_t)(MARK_BYTES - u->mark_len);
    if (k > n) k = n;
    memcpy(u->mark + u->mark_len, p, k);
    u->mark_len += (int)k;
    p += k;
    n -= k;
    if (u->mark_len == MARK_BYTES) { u->mark_len = 0; token(u, t_ns); }
  }
}

// Take a line that ends with '\n' into u->head; returns the bytes used, and whether it is whole.
static size_t line(user_t *u, const char *p, size_t n, bool *is_whole) {
  const char *end = memchr(p, '\n', n);
  size_t k = end ? (size_t)(end - p) + 1 : n;
  if ((size_t)u->head_len + k >= sizeof u->head) u->head_len = 0;
  memcpy(u->head + u->head_len, p, k);
  u->head_len += (int)k;
  u->head[u->head_len] = 0;
  *is_whole = end != NULL;
  return k;
}

static void head_line(user_t *u, uint64_t t_ns) {
  u->head_len = 0;
  const char *h = u->head;
  if (!u->status) {
    u->status = atoi(h + 9);
    u->left = 0;
  } else if (!strncasecmp(h, "content-length:", 15)) u->left = strtoul(h + 15, NULL, 10);
  else if (!strncasecmp(h, "transfer-encoding:", 18)) u->left = SIZE_MAX;
  else if (!strncasecmp(h, "connection: close", 17)) u->close_after = true;
  else if (h[0] == '\r') {
    u->state = u->left == SIZE_MAX ? CHUNK_SIZE : LENGTH;
    if (u->state == LENGTH && !u->left) complete(u, t_ns);
  }
}

static void feed(user_t *u, const char *p, size_t n, uint64_t t_ns) {
  while (n && u->busy) {
    size_t k = n;
    bool is_whole = false;
    switch (u->state) {
      case HEAD:
        k = line(u, p, n, &is_whole);
        if (is_whole) head_line(u, t_ns);
        break;
      case LENGTH:
      case CHUNK:
        if (k > u->left) k = u->left;
        body(u, p, k, t_ns);
        u->left -= k;
        if (!u->left && u->state == LENGTH) complete(u, t_ns);
        else if (!u->left) { u->state = CHUNK_END; u->left = 2; }
        break;
      case CHUNK_SIZE:
        k = line(u, p, n, &is_whole);
        if (!is_whole) break;
        u->head_len = 0;
        u->left = strtoul(u->head, NULL, 16);
        u->state = u->left ? CHUNK : TRAILER;
        break;
      case CHUNK_END:
        if (k > u->left) k = u->left;
        u->left -= k;
        if (!u->left) u->state = CHUNK_SIZE;
        break;
      case TRAILER:
        k = line(u, p, n, &is_whole);
        if (is_whole) complete(u, t_ns);
        break;
    }
    p += k;
    n -= k;
  }
}

static void readable(user_t *u) {
  if (u->fd < 0) return;
  ssize_t got = recv(u->fd, buffer, sizeof buffer, MSG_DONTWAIT);
  uint64_t t_ns = now_ns();
  if (got > 0) { feed(u, buffer, (size_t)got, t_ns); return; }
  if (got < 0 && errno == EAGAIN) return;
  bool stale = u->busy && u->used && u->state == HEAD && !u->status && !u->head_len;
  drop(u);
  if (stale) ask(u, t_ns);  // the server closed an idle connection while the request was on its way
  else if (u->busy) fail(u, RESET, t_ns);
}

static void report(double seconds) {
  struct rusage own;
  getrusage(RUSAGE_SELF, &own);
  double cpu_s = (double)(own.ru_utime.tv_sec + own.ru_stime.tv_sec) + (double)(own.ru_utime.tv_usec + own.ru_stime.tv_usec) / 1e6;
  printf("{\"asked\":%llu,\"good\":%llu,\"tokens\":%llu,\"seconds\":%.3f,\"cpu_s\":%.3f,\"failed\":{", (unsigned long long)asked, (unsigned long long)good, (unsigned long long)received, seconds, cpu_s);
  for (int kind = 0; kind < KINDS; kind++) printf("%s\"%s\":%llu", kind ? "," : "", kinds[kind], (unsigned long long)failed[kind]);
  printf("},\"first_failure\":\"%s\"", first_failure);
  const times_t *all[] = {&ttft, &transit, &gap, &whole};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    printf(",\"%s\":{\"p50\":%.3f,\"p99\":%.3f}", all[i]->name, percentile(all[i], 50), percentile(all[i], 99));
  printf("}\n");
}

int main(int argc, char **argv) {
  raise_file_limit();
  address = loopback((int)option(argc, argv, "--port"));
  int count = (int)option(argc, argv, "--users");
  tokens = (int)option(argc, argv, "--tokens");
  streamed = option(argc, argv, "--stream") != 0;
  double ramp_s = option(argc, argv, "--ramp-s"), drain_s = option(argc, argv, "--drain-s");
  char text[4096], words[512];
  for (size_t i = 0; i < sizeof words - 1; i++) words[i] = "tell me of meshes "[i % 18];
  words[sizeof words - 1] = 0;
  int size = snprintf(text, sizeof text, "{\"model\":\"%s\",\"messages\":[{\"role\":\"user\",\"content\":\"%s\"}],\"max_tokens\":%d,\"temperature\":0%s}", text_option(argc, argv, "--model"), words, tokens, streamed ? ",\"stream\":true,\"stream_options\":{\"include_usage\":true}" : "");
  request_len = (size_t)snprintf(request, sizeof request, "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\naccept: */*\r\ncontent-length: %d\r\n\r\n%s", size, text);
  times_t *all[] = {&ttft, &transit, &gap, &whole};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) all[i]->steps = calloc(STEPS, sizeof(uint32_t));
  users = calloc((size_t)count, sizeof *users);
  epoll_fd = epoll_create1(EPOLL_CLOEXEC);
  uint64_t began_ns = now_ns(), give_up_ns;
  end_ns = began_ns + (uint64_t)(option(argc, argv, "--seconds") * 1e9);
  give_up_ns = end_ns + (uint64_t)(drain_s * 1e9);
  for (int i = 0; i < count; i++) {
    users[i].fd = -1;
    users[i].wake_ns = began_ns + (uint64_t)(ramp_s * 1e9 * i / count);
  }
  struct epoll_event events[512];
  uint64_t t_ns, swept_ns = 0;
  while ((t_ns = now_ns()) < end_ns || (busy && t_ns < give_up_ns)) {
    // Who has just been answered asks again below; those who wait for a time are looked at each ms.
    if (t_ns < end_ns && t_ns - swept_ns >= 1000000) {
      swept_ns = t_ns;
      for (int i = 0; i < count; i++)
        if (!users[i].busy && users[i].wake_ns <= t_ns) ask(&users[i], t_ns);
    }
    int n = epoll_wait(epoll_fd, events, 512, 1);
    for (int i = 0; i < n; i++) {
      user_t *u = events[i].data.ptr;
      readable(u);
      t_ns = now_ns();
      if (!u->busy && u->wake_ns <= t_ns && t_ns < end_ns) ask(u, t_ns);
    }
  }
  for (int i = 0; i < count; i++)
    if (users[i].busy) fail(&users[i], UNFINISHED, t_ns);
  report((double)(now_ns() - began_ns) / 1e9);
}
