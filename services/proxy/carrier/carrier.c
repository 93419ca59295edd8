/* Carries the usual chunks of streams from replicas' sockets to clients' sockets.
 *
 * A stream is given here once it runs: both sockets, and, if it is armed, what its events have in
 * common. Whatever is not usual is given back whole, with nothing of it written and nothing of it
 * counted: the Python that hands streams in understands everything, this understands only what
 * comes nearly always. So each rule here is a subset of one there (framing.Chunks, tape.usual),
 * and the tests compare the two.
 *
 * A set of sockets is watched by an epoll of its own, which the event loop watches as one file.
 * Nothing here blocks or calls back; of a stream it keeps its token ids and no text. Not for
 * several threads. Errors are values: -1 where there is no memory or no descriptor.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
  IN_BYTES = 1 << 16,   /* of one read; what fills it is not usual */
  OUT_BYTES = IN_BYTES * 2, /* what is retold grows by less than a tenth */
  READY = 128,          /* streams that one look tells of */
  TURN = 16,            /* streams after which there is no further look in this turn of the loop */
  MAX_SIZE_DIGITS = 6,  /* of a chunk's size */
  MAX_ID_DIGITS = 9,    /* of a token id: fits 32 bits */
};

/* Why a stream is given back. */
enum { ENDED = 0, UNUSUAL = 1, SLOW = 2, WHOLE = 3 };

struct stream {
  int up;   /* the replica's socket */
  int down; /* the client's; -1: this place is free */
  uint32_t next_free;
  uint32_t before_bytes, after_bytes;
  char *before; /* an armed stream's events up to their text; then what follows it; else NULL */
  uint32_t *ids;
  uint32_t ids_count, ids_room;
  uint64_t events, chars;
  double heard_s;
};

struct carrier {
  int epoll;
  uint32_t places, first_free;
  int ready, next;
  double now_s; /* when `events` were ready */
  struct stream *streams;
  struct { /* of the stream that was given back, or taken out, last: compiled.Report */
    uint64_t kind, whole, bytes; /* whole: the answer's last chunk came, too */
    const char *data; /* what was not carried */
    uint64_t events, chars, ids_count;
    uint32_t *ids;
  } report;
  struct epoll_event events[READY];
  char in[IN_BYTES];
  char out[OUT_BYTES];
};

static const uint32_t NOWHERE = UINT32_MAX;

struct carrier *carrier_new(void) {
  struct carrier *c = calloc(1, sizeof *c);
  if (c == NULL) return NULL;
  c->first_free = NOWHERE;
  c->epoll = epoll_create1(EPOLL_CLOEXEC);
  if (c->epoll < 0) {
    free(c);
    return NULL;
  }
  return c;
}

int carrier_fd(const struct carrier *c) { return c->epoll; }

const void *carrier_report(const struct carrier *c) { return &c->report; }

/* The time on the clock of Python's loops. */
static double now_s(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static void forget(struct stream *s) {
  free(s->before);
  free(s->ids);
  *s = (struct stream){.up = -1, .down = -1};
}

void carrier_free(struct carrier *c) {
  for (uint32_t place = 0; place < c->places; place++) forget(&c->streams[place]);
  free(c->streams);
  free(c->report.ids);
  close(c->epoll);
  free(c);
}

static bool more_places(struct carrier *c) {
  uint32_t places = c->places ? c->places * 2 : 64;
  struct stream *streams = realloc(c->streams, places * sizeof *streams);
  if (streams == NULL) return false;
  for (uint32_t place = c->places; place < places; place++) {
    streams[place] = (struct stream){.up = -1, .down = -1};
    streams[place].next_free = place + 1 < places ? place + 1 : NOWHERE;
  }
  c->first_free = c->places;
  c->streams = streams;
  c->places = places;
  return true;
}

/* Has the kernel acknowledge every other token, instead of each one as it is read, which costs as
 * much as reading it: the connection counts as interactive, until a token comes 40 ms late. */
static void acknowledge_lazily(int up) {
  int no = 0;
  setsockopt(up, IPPROTO_TCP, TCP_QUICKACK, &no, sizeof no); /* merely dearer without it */
}

/* Takes a stream over; returns its place, or -1. `before_bytes` 0: it is passed on as it is. */
int carrier_add(struct carrier *c, int up, int down, const char *before, uint32_t before_bytes,
                const char *after, uint32_t after_bytes) {
  if (c->first_free == NOWHERE && !more_places(c)) return -1;
  uint32_t place = c->first_free;
  struct stream *s = &c->streams[place];
  uint32_t next_free = s->next_free;
  if (before_bytes) {
    s->before = malloc((size_t)before_bytes + after_bytes);
    if (s->before == NULL) return -1;
    memcpy(s->before, before, before_bytes);
    memcpy(s->before + before_bytes, after, after_bytes);
    s->before_bytes = before_bytes;
    s->after_bytes = after_bytes;
  }
  struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP | EPOLLET, .data.u32 = place};
  if (epoll_ctl(c->epoll, EPOLL_CTL_ADD, up, &event) != 0) {
    forget(s);
    s->next_free = next_free;
    return -1;
  }
  acknowledge_lazily(up);
  s->up = up;
  s->down = down;
  s->heard_s = now_s();
  c->first_free = next_free;
  return (int)place;
}

double carrier_heard_s(const struct carrier *c, uint32_t place) {
  return c->streams[place].heard_s;
}

/* Takes a stream out, and reports what was carried of it; both sockets must be open still. Ids are
 * good until the next stream is taken out. */
void carrier_remove(struct carrier *c, uint32_t place) {
  struct stream *s = &c->streams[place];
  epoll_ctl(c->epoll, EPOLL_CTL_DEL, s->up, NULL);
  free(c->report.ids);
  c->report.events = s->events;
  c->report.chars = s->chars;
  c->report.ids_count = s->ids_count;
  c->report.ids = s->ids;
  s->ids = NULL;
  forget(s);
  s->next_free = c->first_free;
  c->first_free = place;
}

static int digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

/* Finds the payload of the chunk at `at`: false unless it is whole, not the last one, plain, and
 * ends as an event does. */
static bool chunk(const char *at, const char *end, const char **payload, size_t *bytes) {
  size_t size = 0;
  int digits = 0, value;
  while (at < end && digits < MAX_SIZE_DIGITS && (value = digit(*at)) >= 0) {
    size = size * 16 + (size_t)value;
    digits++;
    at++;
  }
  if (!digits || size < 2 || end - at < 4 || (size_t)(end - at - 4) < size) return false;
  if (at[0] != '\r' || at[1] != '\n') return false;
  at += 2;
  if (at[size] != '\r' || at[size + 1] != '\n') return false;
  if (at[size - 2] != '\n' || at[size - 1] != '\n') return false;
  *payload = at;
  *bytes = size;
  return true;
}

static uint64_t count_events(const char *at, size_t bytes) {
  uint64_t events = 0;
  const char *end = at + bytes;
  while ((at = memchr(at, '\n', (size_t)(end - at))) != NULL) {
    if (++at < end && *at == '\n') {
      events++;
      at++;
    }
  }
  return events;
}

static const char LAST_CHUNK[] = "0\r\n\r\n";
enum { LAST_CHUNK_BYTES = sizeof LAST_CHUNK - 1 };

/* Checks a read that is passed on as it is: whole chunks of whole events, and perhaps the last one
 * without trailers (`whole`), with nothing after it. */
static bool pass(struct stream *s, const char *in, size_t bytes, bool *whole) {
  const char *at = in, *end = in + bytes, *payload;
  size_t size;
  uint64_t events = 0;
  while (at < end) {
    *whole = end - at == LAST_CHUNK_BYTES && memcmp(at, LAST_CHUNK, LAST_CHUNK_BYTES) == 0;
    if (*whole) break;
    if (!chunk(at, end, &payload, &size)) return false;
    events += count_events(payload, size);
    at = payload + size + 2;
  }
  s->events += events;
  return true;
}

/* Finds the quote that ends a text without escapes, and counts its characters; NULL where there is
 * none, or where it is not UTF-8 (RFC 3629). */
static const char *text_end(const char *at, const char *end, uint64_t *chars) {
  uint64_t count = 0;
  while (at < end) {
    unsigned char c = (unsigned char)*at;
    if (c == '"') {
      *chars = count;
      return at;
    }
    if (c == '\\') return NULL;
    int more;
    unsigned char low = 0x80, high = 0xBF; /* of the second byte */
    if (c < 0x80) {
      more = 0;
    } else if (c >= 0xC2 && c <= 0xDF) {
      more = 1;
    } else if (c >= 0xE0 && c <= 0xEF) {
      more = 2;
      if (c == 0xE0) low = 0xA0;
      if (c == 0xED) high = 0x9F;
    } else if (c >= 0xF0 && c <= 0xF4) {
      more = 3;
      if (c == 0xF0) low = 0x90;
      if (c == 0xF4) high = 0x8F;
    } else {
      return NULL;
    }
    if (end - at <= more) return NULL;
    at++;
    while (more--) {
      unsigned char next = (unsigned char)*at++;
      if (next < low || next > high) return NULL;
      low = 0x80;
      high = 0xBF;
    }
    count++;
  }
  return NULL;
}

static const char TAIL[] = "]}]}\n\n";
static const char TOLD[] = "null}]}\n\n"; /* instead of "[id" and the tail */
enum { TAIL_BYTES = sizeof TAIL - 1, TOLD_BYTES = sizeof TOLD - 1 };

static bool keep_id(struct stream *s, uint32_t count, uint32_t id) {
  if (count == s->ids_room) {
    uint32_t room = s->ids_room ? s->ids_room * 2 : 16;
    uint32_t *ids = realloc(s->ids, room * sizeof *ids);
    if (ids == NULL) return false;
    s->ids = ids;
    s->ids_room = room;
  }
  s->ids[count] = id;
  return true;
}

static size_t write_size(char *out, size_t size) {
  char digits[sizeof size * 2];
  size_t count = 0;
  do {
    digits[count++] = "0123456789abcdef"[size & 15];
    size >>= 4;
  } while (size);
  for (size_t n = 0; n < count; n++) out[n] = digits[count - 1 - n];
  out[count] = '\r';
  out[count + 1] = '\n';
  return count + 2;
}

/* Writes a read of an armed stream's usual events as the client may see them, without token ids;
 * returns how many bytes that is, 0 where something is not usual. */
static size_t retell(struct stream *s, const char *in, size_t bytes, char *out) {
  const char *at = in, *end = in + bytes, *payload;
  const char *after = s->before + s->before_bytes;
  size_t size, written = 0;
  uint64_t events = 0, chars = 0, text_chars;
  uint32_t count = s->ids_count;
  while (at < end) {
    if (!chunk(at, end, &payload, &size)) return 0;
    if (size < (size_t)s->before_bytes + s->after_bytes + 2 + TAIL_BYTES) return 0;
    const char *event_end = payload + size;
    if (memcmp(payload, s->before, s->before_bytes) != 0) return 0;
    const char *text = payload + s->before_bytes;
    const char *quote = text_end(text, event_end, &text_chars);
    if (quote == NULL || quote == text) return 0;
    const char *token = quote + s->after_bytes;
    if (event_end - token <= TAIL_BYTES) return 0;
    if (memcmp(quote, after, s->after_bytes) != 0) return 0;
    const char *tail = event_end - TAIL_BYTES;
    if (tail - token > MAX_ID_DIGITS || memcmp(tail, TAIL, TAIL_BYTES) != 0) return 0;
    uint32_t id = 0;
    for (const char *d = token; d < tail; d++) {
      if (*d < '0' || *d > '9') return 0;
      id = id * 10 + (uint32_t)(*d - '0');
    }
    if (!keep_id(s, count, id)) return 0;
    count++;
    events++;
    chars += text_chars;
    size_t kept = (size_t)(token - payload) - 1; /* without the bracket before the id */
    written += write_size(out + written, kept + TOLD_BYTES);
    memcpy(out + written, payload, kept);
    memcpy(out + written + kept, TOLD, TOLD_BYTES);
    written += kept + TOLD_BYTES;
    out[written++] = '\r';
    out[written++] = '\n';
    at = event_end + 2;
  }
  s->ids_count = count;
  s->events += events;
  s->chars += chars;
  return written;
}

static bool leave(struct carrier *c, uint64_t kind, const char *data, size_t bytes) {
  c->report.kind = kind;
  c->report.data = data;
  c->report.bytes = bytes;
  return false;
}

/* Hands a read on; false: the stream is to be given back, see `report`. */
static bool hand_on(struct carrier *c, struct stream *s, size_t got) {
  size_t bytes = got;
  const char *out = c->in;
  bool whole = false;
  if (s->before != NULL) {
    out = c->out;
    bytes = retell(s, c->in, got, c->out);
    if (!bytes) return leave(c, UNUSUAL, c->in, got);
  } else if (!pass(s, c->in, got, &whole)) {
    return leave(c, UNUSUAL, c->in, got);
  }
  ssize_t sent = send(s->down, out, bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
  if (sent < 0) sent = 0; /* whatever it is, who writes the rest learns it */
  c->report.whole = whole;
  if ((size_t)sent < bytes) return leave(c, SLOW, out + sent, bytes - (size_t)sent);
  return !whole || leave(c, WHOLE, out, 0);
}

/* Carries all that has come for one stream, of which an edge tells once; false: it is to be given
 * back, see `report`. A read that is short has emptied the socket, unless it came to its end. */
static bool carry(struct carrier *c, struct stream *s, uint32_t edge) {
  ssize_t got;
  do {
    got = recv(s->up, c->in, IN_BYTES, MSG_DONTWAIT);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN) return true;
    if (got <= 0) return leave(c, ENDED, c->in, 0);
    s->heard_s = c->now_s;
    if (got == IN_BYTES) return leave(c, UNUSUAL, c->in, IN_BYTES);
    if (!hand_on(c, s, (size_t)got)) return false;
  } while (got < 0 || edge & (EPOLLRDHUP | EPOLLHUP | EPOLLERR));
  return true;
}

/* Carries what has come, and what comes meanwhile: tokens come in bursts, and the loop's next turn
 * costs more than another look. Returns the place of a stream that must be removed now, and then
 * this be called again; -1 where nothing is left, or others should have their turn. */
int carrier_run(struct carrier *c) {
  for (int carried = 0;; carried++) {
    if (c->next == c->ready) {
      if (carried >= TURN) return -1;
      c->now_s = now_s();
      c->next = 0;
      c->ready = epoll_wait(c->epoll, c->events, READY, 0);
      if (c->ready <= 0) return c->ready = 0, -1;
    }
    struct epoll_event *event = &c->events[c->next++];
    uint32_t place = event->data.u32;
    struct stream *s = &c->streams[place];
    if (s->down >= 0 && !carry(c, s, event->events)) return (int)place;
  }
}
