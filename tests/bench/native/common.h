// What both programs need: the time, also that of a packet's arrival, sockets, and clear failures.
//
// Both programs act in ticks of a millisecond and read times of arrival from the kernel, so that
// they may look late without measuring late: a wake-up for every token would cost more than it.
#ifndef REDMESH_BENCH_COMMON_H
#define REDMESH_BENCH_COMMON_H
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

// Each token carries a mark in its text: '@', when it was sent (monotonic ns), '#', its number, '~',
// and for how long the replica had the request before its first token (µs; 0 in later tokens).
enum { SENT_DIGITS = 16, NUMBER_DIGITS = 5, OWN_DIGITS = 7 };
enum { NUMBER_AT = 1 + SENT_DIGITS, OWN_AT = NUMBER_AT + 1 + NUMBER_DIGITS };
enum { MARK_BYTES = OWN_AT + 1 + OWN_DIGITS };
#define TICK_NS 1000000u

static inline void write_digits(char *to, int width, uint64_t value) {
  while (width--) {
    to[width] = (char)('0' + value % 10);
    value /= 10;
  }
}

static inline uint64_t read_digits(const char *from, int width) {
  uint64_t value = 0;
  while (width--) value = value * 10 + (uint64_t)(*from++ - '0');
  return value;
}

static inline void write_mark(char *to, uint64_t sent_ns, int number, uint64_t own_us) {
  to[0] = '@';
  write_digits(to + 1, SENT_DIGITS, sent_ns);
  to[NUMBER_AT] = '#';
  write_digits(to + NUMBER_AT + 1, NUMBER_DIGITS, (uint64_t)number);
  to[OWN_AT] = '~';
  write_digits(to + OWN_AT + 1, OWN_DIGITS, own_us);
}

static inline uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

// What has to be taken from the kernel's time of arrival to make it monotonic.
static inline uint64_t clock_offset_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec - now_ns();
}

static inline void want_arrival_times(int fd) {
  int one = 1;
  setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPNS, &one, sizeof one);
}

// As recv(), with the monotonic time at which the last byte read came to this socket.
static inline ssize_t receive(int fd, void *to, size_t size, uint64_t offset_ns, uint64_t *arrived_ns) {
  union { struct cmsghdr head; char bytes[64]; } control;
  struct iovec data = {.iov_base = to, .iov_len = size};
  struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
  ssize_t got = recvmsg(fd, &message, MSG_DONTWAIT);
  if (got <= 0) return got;
  struct cmsghdr *c = CMSG_FIRSTHDR(&message);
  if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_TIMESTAMPNS) {
    struct timespec t;
    memcpy(&t, CMSG_DATA(c), sizeof t);
    *arrived_ns = (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec - offset_ns;
  } else {
    *arrived_ns = now_ns();
  }
  return got;
}

static inline void die(const char *what) {
  fprintf(stderr, "bench: %s: %s\n", what, strerror(errno));
  exit(1);
}

static inline struct sockaddr_in loopback(int port) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

static inline int tcp_socket(void) {
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) die("socket (more open files may be needed: ulimit -n)");
  int one = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  want_arrival_times(fd);
  return fd;
}

static inline void watch(int epoll, int fd, uint32_t events, void *who) {
  struct epoll_event event = {.events = events, .data.ptr = who};
  if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0) die("epoll_ctl");
}

static inline void raise_file_limit(void) {
  struct rlimit limit;
  getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

// The value of a numeric option `--name value`; exits where there is none.
static inline double option(int argc, char **argv, const char *name) {
  for (int i = 1; i + 1 < argc; i += 2)
    if (!strcmp(argv[i], name)) return atof(argv[i + 1]);
  fprintf(stderr, "bench: %s is missing\n", name);
  exit(2);
}

static inline const char *text_option(int argc, char **argv, const char *name) {
  for (int i = 1; i + 1 < argc; i += 2)
    if (!strcmp(argv[i], name)) return argv[i + 1];
  fprintf(stderr, "bench: %s is missing\n", name);
  exit(2);
}
#endif
