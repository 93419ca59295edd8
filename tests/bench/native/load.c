// The load: users that each ask, read the whole answer, and ask again; or requests at a rate.
//
//   load --port 8000 --model demo --users 200 --rate 0 --tokens 64 --stream 1 --ttft-ms 50 --itl-ms 20
//        --ramp-s 1.3 --seconds 8 --drain-s 30
//
// With a rate, requests come at random (Poisson) whatever the answers do, the same ones in each run,
// and `users` is how many may be in flight. The times are told to the replicas in the prompt.
//
// Prints one JSON object. An answer is good only with status 200, every token in order, `[DONE]`
// (streams), and the end of its body. Times: ttft is request to first token; added is ttft less what
// the replica itself took, so that it is the time on the way, both ways; transit is from a token's
// sending, which it tells itself, to its arrival here; jitter is by how much transit differs from the
// token before; gap is between tokens of an answer; whole is request to the end.
#include "common.h"

enum { CONNECTING, HEAD, LENGTH, CHUNK_SIZE, CHUNK, CHUNK_END, TRAILER };
enum { CONNECT, RESET, STATUS, TOKENS, UNFINISHED, UNSTARTED, KINDS };
static const char *kinds[KINDS] = {"connect", "reset", "status", "tokens", "unfinished", "unstarted"};
static const uint64_t PENALTY_NS = 10000000;  // a server that fails is not to be hammered

typedef struct user {
  int fd, state, status, seen, mark_len, tail_len, head_len;
  bool busy, ordered, close_after, used;
  size_t left;
  uint64_t asked_ns, last_ns, transit_ns, wake_ns;
  struct user *next;
  char mark[MARK_BYTES], tail[16], head[1024];
} user_t;

// A histogram of 5 µs steps up to two seconds; the last step holds what is longer.
enum { STEPS = 400000 };
typedef struct { const char *name; uint32_t *steps; uint64_t count; } times_t;
static times_t ttft = {.name = "ttft_ms"}, added = {.name = "added_ms"}, transit = {.name = "transit_ms"},
               jitter = {.name = "jitter_ms"}, gap = {.name = "gap_ms"}, whole = {.name = "whole_ms"};
static times_t *const all_times[] = {&ttft, &added, &transit, &jitter, &gap, &whole};
enum { ALL_TIMES = sizeof all_times / sizeof *all_times };

static struct sockaddr_in address;
static user_t *users, *idle, *punished, **punished_end = &punished;
static int epoll_fd, tokens, busy, busy_most;
static bool streamed, closed_loop;
static uint64_t end_ns, offset_ns, asked, good, received, failed[KINDS];
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

static uint64_t since(uint64_t later_ns, uint64_t earlier_ns) { return later_ns > earlier_ns ? later_ns - earlier_ns : 0; }

static void drop(user_t *u) {
  if (u->fd >= 0) close(u->fd);
  u->fd = -1;
  u->used = false;
}

static void end_answer(user_t *u) {
  u->busy = false;
  busy--;
  if (u->close_after) drop(u);
}

static void complain(int kind, int status, int seen) {
  if (!first_failure[0]) snprintf(first_failure, sizeof first_failure, "%s: status %d, %d tokens, errno %d", kinds[kind], status, seen, errno);
  failed[kind]++;
}

static void fail(user_t *u, int kind) {
  complain(kind, u->status, u->seen);
  u->close_after = true;
  end_answer(u);
  u->wake_ns = now_ns() + PENALTY_NS;
  u->next = NULL;
  *punished_end = u;
  punished_end = &u->next;
}

static void ask(user_t *u);

static void succeed(user_t *u, uint64_t t_ns) {
  good++;
  note(&whole, since(t_ns, u->asked_ns));
  end_answer(u);
  if (!closed_loop) { u->next = idle; idle = u; }
  else if (now_ns() < end_ns) ask(u);
}

static void transmit(user_t *u) {
  u->state = HEAD;
  if (send(u->fd, request, request_len, MSG_NOSIGNAL) != (ssize_t)request_len) fail(u, RESET);
}

static void begin(user_t *u) {
  u->status = u->seen = u->mark_len = u->tail_len = u->head_len = 0;
  u->ordered = true;
  u->close_after = false;
  if (u->fd >= 0) { transmit(u); return; }
  u->fd = tcp_socket();
  u->state = CONNECTING;
  if (connect(u->fd, (void *)&address, sizeof address) && errno != EINPROGRESS) { fail(u, CONNECT); return; }
  watch(epoll_fd, u->fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, u);
  struct pollfd now = {.fd = u->fd, .events = POLLOUT};  // on loopback it is made by now, as a rule
  if (poll(&now, 1, 0) == 1 && now.revents == POLLOUT) transmit(u);
}

static void ask(user_t *u) {
  asked++;
  if (++busy > busy_most) busy_most = busy;
  u->busy = true;
  u->asked_ns = now_ns();
  begin(u);
}

static void complete(user_t *u, uint64_t t_ns) {
  u->used = true;
  bool done = !streamed || (u->tail_len == 14 && !memcmp(u->tail, "data: [DONE]\n\n", 14));
  if (u->status != 200) fail(u, STATUS);
  else if (!u->ordered || u->seen != (streamed ? tokens : 1) || !done) fail(u, TOKENS);
  else succeed(u, t_ns);
}

static void token(user_t *u, uint64_t t_ns) {
  const char *mark = u->mark;
  uint64_t transit_ns = since(t_ns, read_digits(mark + 1, SENT_DIGITS));
  u->ordered &= mark[NUMBER_AT] == '#' && mark[OWN_AT] == '~';
  u->ordered &= read_digits(mark + NUMBER_AT + 1, NUMBER_DIGITS) == (uint64_t)u->seen + 1;
  received++;
  note(&transit, transit_ns);
  if (!u->seen++) {
    uint64_t ttft_ns = since(t_ns, u->asked_ns);
    note(&ttft, ttft_ns);
    note(&added, since(ttft_ns, read_digits(mark + OWN_AT + 1, OWN_DIGITS) * 1000));
  } else {
    note(&gap, since(t_ns, u->last_ns));
    note(&jitter, transit_ns > u->transit_ns ? transit_ns - u->transit_ns : u->transit_ns - transit_ns);
  }
  u->transit_ns = transit_ns;
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

// Take a line that ends with '\n' into u->head, as much of it as there is room for; returns the bytes
// used, and whether it is whole.
static size_t line(user_t *u, const char *p, size_t n, bool *is_whole) {
  const char *end = memchr(p, '\n', n);
  size_t k = end ? (size_t)(end - p) + 1 : n, room = sizeof u->head - 1 - (size_t)u->head_len;
  if (room > k) room = k;
  memcpy(u->head + u->head_len, p, room);
  u->head_len += (int)room;
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
  uint64_t good_before = good;
  while (n && u->busy && good == good_before) {
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

static void broken(user_t *u) {
  bool stale = u->busy && u->used && u->state == HEAD && !u->status && !u->head_len;
  drop(u);
  if (stale) begin(u);  // the server closed an idle connection while the request was on its way
  else if (u->busy) fail(u, RESET);
}

// Edges tell of what came once: all of it is read, which less than a full buffer says it is.
static void ready(user_t *u, uint32_t events) {
  if (u->fd < 0) return;
  if (u->state == CONNECTING) {
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(u->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    errno = error;
    if (error) fail(u, CONNECT);
    else if (events & EPOLLOUT) transmit(u);
    return;
  }
  bool closing = events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR);
  ssize_t got;
  do {
    uint64_t t_ns = 0;
    got = receive(u->fd, buffer, sizeof buffer, offset_ns, &t_ns);
    if (got > 0) feed(u, buffer, (size_t)got, t_ns);
    else if (got == 0 || errno != EAGAIN) { broken(u); return; }
  } while (got > 0 && (got == sizeof buffer || closing) && u->fd >= 0);
}

static void report(double seconds) {
  struct rusage own;
  getrusage(RUSAGE_SELF, &own);
  double cpu_s = (double)(own.ru_utime.tv_sec + own.ru_stime.tv_sec) + (double)(own.ru_utime.tv_usec + own.ru_stime.tv_usec) / 1e6;
  printf("{\"asked\":%llu,\"good\":%llu,\"tokens\":%llu,\"in_flight\":%d,\"seconds\":%.3f,\"cpu_s\":%.3f,\"failed\":{", (unsigned long long)asked, (unsigned long long)good, (unsigned long long)received, busy_most, seconds, cpu_s);
  for (int kind = 0; kind < KINDS; kind++) printf("%s\"%s\":%llu", kind ? "," : "", kinds[kind], (unsigned long long)failed[kind]);
  printf("},\"first_failure\":\"%s\"", first_failure);
  for (int i = 0; i < ALL_TIMES; i++)
    printf(",\"%s\":{\"p50\":%.3f,\"p99\":%.3f}", all_times[i]->name, percentile(all_times[i], 50), percentile(all_times[i], 99));
  printf("}\n");
}

static void write_request(int argc, char **argv) {
  char text[4096], words[512];
  int n = snprintf(words, sizeof words, "ttft_ms=%g itl_ms=%g ", option(argc, argv, "--ttft-ms"), option(argc, argv, "--itl-ms"));
  for (int i = n; i < (int)sizeof words - 1; i++) words[i] = "tell me of meshes "[i % 18];
  words[sizeof words - 1] = 0;
  int size = snprintf(text, sizeof text, "{\"model\":\"%s\",\"messages\":[{\"role\":\"user\",\"content\":\"%s\"}],\"max_tokens\":%d,\"temperature\":0%s}", text_option(argc, argv, "--model"), words, tokens, streamed ? ",\"stream\":true,\"stream_options\":{\"include_usage\":true}" : "");
  request_len = (size_t)snprintf(request, sizeof request, "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\naccept: */*\r\ncontent-length: %d\r\n\r\n%s", size, text);
}

// Seconds to the next request: drawn anew for each, the same row in every run.
static double pause_s(double rate) {
  static uint64_t state = 88172645463325252u;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return -log(((double)(state >> 11) + 1) / 9007199254740993.0) / rate;
}

int main(int argc, char **argv) {
  raise_file_limit();
  address = loopback((int)option(argc, argv, "--port"));
  int count = (int)option(argc, argv, "--users"), started = 0;
  double rate = option(argc, argv, "--rate");
  tokens = (int)option(argc, argv, "--tokens");
  streamed = option(argc, argv, "--stream") != 0;
  closed_loop = rate == 0;
  write_request(argc, argv);
  for (int i = 0; i < ALL_TIMES; i++) all_times[i]->steps = calloc(STEPS, sizeof(uint32_t));
  users = calloc((size_t)count, sizeof *users);
  for (int i = 0; i < count; i++) users[i].fd = -1;
  epoll_fd = epoll_create1(EPOLL_CLOEXEC);
  uint64_t began_ns = now_ns(), give_up_ns, t_ns;
  uint64_t ramp_ns = (uint64_t)(option(argc, argv, "--ramp-s") * 1e9), next_ns = began_ns;
  end_ns = began_ns + (uint64_t)(option(argc, argv, "--seconds") * 1e9);
  give_up_ns = end_ns + (uint64_t)(option(argc, argv, "--drain-s") * 1e9);
  struct epoll_event events[1024];
  while ((t_ns = now_ns()) < end_ns || (busy && t_ns < give_up_ns)) {
    for (; closed_loop && started < count && t_ns < end_ns && next_ns <= t_ns; next_ns = began_ns + ramp_ns * (uint64_t)started / (uint64_t)count)
      ask(&users[started++]);
    for (; !closed_loop && next_ns <= t_ns && t_ns < end_ns; next_ns += (uint64_t)(pause_s(rate) * 1e9)) {
      user_t *u = idle;
      if (u) idle = u->next;
      else if (started < count) u = &users[started++];
      if (u) ask(u); else { asked++; complain(UNSTARTED, 0, 0); }
    }
    while (punished && punished->wake_ns <= t_ns) {
      user_t *u = punished;
      punished = u->next;
      if (!punished) punished_end = &punished;
      if (!closed_loop) { u->next = idle; idle = u; }
      else if (t_ns < end_ns) ask(u);
    }
    offset_ns = clock_offset_ns();
    int n;
    if (streamed) {
      // Tokens are fetched once a tick, half a tick after the replicas' own: the kernel has noted
      // when each of them came.
      struct timespec tick = {.tv_nsec = TICK_NS - (now_ns() + TICK_NS / 2) % TICK_NS};
      nanosleep(&tick, NULL);
    }
    do {
      n = epoll_wait(epoll_fd, events, 1024, streamed ? 0 : 1);
      for (int i = 0; i < n; i++) ready(events[i].data.ptr, events[i].events);
    } while (n == 1024);
  }
  for (int i = 0; i < count; i++)
    if (users[i].busy) fail(&users[i], UNFINISHED);
  report((double)(now_ns() - began_ns) / 1e9);
}
