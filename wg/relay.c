/* A wide-area link between UDP endpoints on one machine: delay, jitter, rate, loss, and a bounded queue.
 *
 *   relay [--fifo] [--seed N] [--shape SHAPE] --pair LISTEN_A PEER_A LISTEN_B PEER_B [--ab SHAPE] [--ba SHAPE] ...
 *
 * Each address is IPv4:PORT. A sends to LISTEN_A what is meant for B, and hears B from there; likewise B. So
 * each end sees the relay where it would see the other, and the datagrams pass unread. Port 0 of a PEER stands
 * for the one it last sent from.
 *
 * SHAPE is a list such as delay=10,jitter=0.5,rate=100,loss=0.1,queue=50: one-way delay and jitter in ms, rate
 * in Mbit/s counted at the IP layer (0: none), loss in percent, and how much the queue before the rate may
 * hold, in ms. Order is kept: jitter never lets a datagram overtake. --shape sets what later pairs start
 * from; --ab and --ba change one direction of the pair before them.
 *
 * Prints "ready" when all sockets are bound. SIGUSR1 begins and ends a blackout; SIGUSR2 prints one line of
 * counters (JSON); SIGTERM and SIGINT print it and end the program. It also ends when its parent does.
 *
 * Lateness (leaving after the due time) is in the counters: under load it is what decides whether a
 * measurement made through the relay means anything. --fifo asks for a real-time class, which the program can
 * be trusted with because it sleeps between datagrams.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    PAIRS = 64,           /* at most, on one relay */
    BATCH = 64,           /* datagrams per system call */
    LARGEST = 2048,       /* a datagram; WireGuard's are at most 1500 - 28 */
    GRAIN = 16,           /* records in a ring start at multiples of this */
    NO_RATE_RING = 16 << 20, /* bytes in flight per direction where no rate bounds them */
    HEADERS = 28,         /* IPv4 and UDP, which count for the rate */
    SOCKET_BUFFER = 4 << 20
};

struct shape {
    double delay_ms, jitter_ms, rate_mbit, loss_percent, queue_ms;
};

/* What waits in a ring: this and then the datagram, together a multiple of GRAIN, never across the ring's end. */
struct record {
    int64_t due; /* ns */
    uint32_t size;
    uint32_t skip; /* nothing here nor up to the ring's end: go on at its start */
};

/* One direction: datagrams that came in on `from` and leave by `to`, towards that side's peer. */
struct direction {
    struct shape shape;
    unsigned char *ring;
    uint64_t capacity, head, tail; /* head and tail only grow; where they point is modulo capacity */
    int64_t link_free, last_due;
    uint64_t packets, bytes, lost, dropped, refused, strangers;
    uint64_t late_sum_ns;
    int64_t late_max_ns;
};

struct side {
    int socket;
    struct sockaddr_in listen, peer;
    int learns; /* the port of its peer */
    struct direction out; /* what this side's peer sends, on its way to the other side */
    struct side *other;
};

static struct side sides[2 * PAIRS];
static struct pollfd polls[2 * PAIRS];
static int side_count;
static volatile sig_atomic_t blackout, wants_counters, wants_end;
static uint64_t random_state = 0x9e3779b97f4a7c15u;

static void on_signal(int number)
{
    if (number == SIGUSR1)
        blackout = !blackout;
    else if (number == SIGUSR2)
        wants_counters = 1;
    else
        wants_end = 1;
}

static void fail(const char *what, const char *which)
{
    fprintf(stderr, "relay: %s: %s%s%s\n", which, what, errno ? ": " : "", errno ? strerror(errno) : "");
    exit(2);
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* xorshift64*; in [0, 1). Good enough to lose packets by, and the same for the same seed. */
static double uniform(void)
{
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (double)((random_state * 0x2545f4914f6cdd1du) >> 11) / 9007199254740992.0;
}

static struct sockaddr_in read_address(const char *text, long least)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    char host[64];
    const char *colon = strrchr(text, ':');
    char *end;
    errno = 0;
    if (!colon || (size_t)(colon - text) >= sizeof host)
        fail("must be IPv4:PORT", text);
    memcpy(host, text, (size_t)(colon - text));
    host[colon - text] = 0;
    long port = strtol(colon + 1, &end, 10);
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1 || end == colon + 1 || *end || port < least || port > 65535)
        fail("must be IPv4:PORT", text);
    address.sin_port = htons((uint16_t)port);
    return address;
}

static void read_shape(const char *text, struct shape *shape)
{
    const struct {
        const char *name;
        double *value;
        double most;
    } known[] = {
        {"delay=", &shape->delay_ms, 10000},     {"jitter=", &shape->jitter_ms, 10000},
        {"rate=", &shape->rate_mbit, 100000},    {"loss=", &shape->loss_percent, 100},
        {"queue=", &shape->queue_ms, 10000},
    };
    const char *at = text;
    errno = 0;
    while (*at) {
        size_t i;
        for (i = 0; i < sizeof known / sizeof *known; i++) {
            size_t length = strlen(known[i].name);
            if (strncmp(at, known[i].name, length) == 0) {
                char *end;
                double value = strtod(at + length, &end);
                /* written so that a NaN is refused too */
                if (end == at + length || !(value >= 0 && value <= known[i].most) || (*end && *end != ','))
                    fail("bad value in shape", text);
                *known[i].value = value;
                at = *end ? end + 1 : end;
                break;
            }
        }
        if (i == sizeof known / sizeof *known)
            fail("a shape is made of delay=, jitter=, rate=, loss= and queue=", text);
    }
}

static void add_side(struct side *side, struct side *other, const char *listen, const char *peer, struct shape shape)
{
    int yes = 1, size = SOCKET_BUFFER;
    side->listen = read_address(listen, 1);
    side->peer = read_address(peer, 0);
    side->learns = side->peer.sin_port == 0;
    side->other = other;
    side->out.shape = shape;
    errno = 0;
    side->socket = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (side->socket < 0 || setsockopt(side->socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes) < 0)
        fail("no socket", listen);
    /* The forced sizes pass the system's limit but need a privilege; without it, take what is allowed. */
    if (setsockopt(side->socket, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size) < 0)
        (void)setsockopt(side->socket, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    if (setsockopt(side->socket, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size) < 0)
        (void)setsockopt(side->socket, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    errno = 0;
    if (bind(side->socket, (struct sockaddr *)&side->listen, sizeof side->listen) < 0)
        fail("cannot listen there", listen);
}

/* Memory for what the link can hold: delay and queue at full rate, twice over for the records' own bytes. */
static void make_ring(struct direction *d)
{
    const struct shape *s = &d->shape;
    double held = s->rate_mbit * 125.0 * (s->delay_ms + s->jitter_ms + s->queue_ms);
    d->capacity = s->rate_mbit > 0 ? (uint64_t)(held * 2) + (256 << 10) : NO_RATE_RING;
    d->capacity -= d->capacity % GRAIN;
    d->ring = malloc(d->capacity);
    if (!d->ring)
        fail("no memory for what this shape keeps in flight", "--shape");
}

static struct record *record_at(const struct direction *d, uint64_t where)
{
    return (struct record *)(void *)(d->ring + where % d->capacity);
}

static uint64_t record_room(size_t size)
{
    return (sizeof(struct record) + size + GRAIN - 1) / GRAIN * GRAIN;
}

/* The first record at or after `where`, past the gap that may be left at the ring's end. */
static uint64_t past_gap(const struct direction *d, uint64_t where)
{
    if (where != d->tail && record_at(d, where)->skip)
        where += d->capacity - where % d->capacity;
    return where;
}

/* Room for one more record, or NULL. */
static struct record *claim(struct direction *d, size_t size)
{
    uint64_t room = record_room(size), to_end = d->capacity - d->tail % d->capacity;
    uint64_t gap = to_end < room ? to_end : 0;
    if (d->tail + gap + room - d->head > d->capacity)
        return NULL;
    if (gap) {
        record_at(d, d->tail)->skip = 1;
        d->tail += gap;
    }
    struct record *record = record_at(d, d->tail);
    d->tail += room;
    return record;
}

/* A datagram of `size` bytes has come: decide whether and when it leaves. Returns its record, or NULL. */
static struct record *admit(struct direction *d, int64_t now, size_t size)
{
    const struct shape *s = &d->shape;
    int64_t start = now, due;
    if (blackout || uniform() * 100.0 < s->loss_percent) {
        d->lost++;
        return NULL;
    }
    if (s->rate_mbit > 0) {
        int64_t busy = (int64_t)((double)(size + HEADERS) * 8000.0 / s->rate_mbit);
        if (d->link_free > now)
            start = d->link_free;
        if ((double)(start - now) > s->queue_ms * 1e6) {
            d->dropped++;
            return NULL;
        }
        start = d->link_free = start + busy;
    }
    struct record *record = claim(d, size);
    if (!record) {
        d->dropped++;
        return NULL;
    }
    due = start + (int64_t)(s->delay_ms * 1e6 + (uniform() * 2.0 - 1.0) * s->jitter_ms * 1e6);
    if (due < d->last_due)
        due = d->last_due;
    d->last_due = due;
    *record = (struct record){.due = due, .size = (uint32_t)size};
    return record;
}

static void take_in(struct side *side)
{
    static unsigned char buffers[BATCH][LARGEST];
    static struct sockaddr_in senders[BATCH];
    static struct iovec pieces[BATCH];
    static struct mmsghdr messages[BATCH];
    for (int i = 0; i < BATCH; i++) {
        pieces[i] = (struct iovec){buffers[i], LARGEST};
        messages[i].msg_hdr = (struct msghdr){
            .msg_name = &senders[i], .msg_namelen = sizeof senders[i], .msg_iov = &pieces[i], .msg_iovlen = 1};
    }
    int got = recvmmsg(side->socket, messages, BATCH, MSG_DONTWAIT, NULL);
    int64_t now = now_ns();
    for (int i = 0; i < got; i++) {
        struct direction *d = &side->out;
        if (senders[i].sin_addr.s_addr != side->peer.sin_addr.s_addr || (messages[i].msg_hdr.msg_flags & MSG_TRUNC)) {
            d->strangers++;
            continue;
        }
        if (side->learns)
            side->peer.sin_port = senders[i].sin_port;
        struct record *record = admit(d, now, messages[i].msg_len);
        if (record)
            memcpy(record + 1, buffers[i], messages[i].msg_len);
    }
}

/* Send what is due; the time at which the next is, or INT64_MAX. */
static int64_t let_out(struct side *side)
{
    static struct iovec pieces[BATCH];
    static struct mmsghdr messages[BATCH];
    struct direction *d = &side->out;
    struct side *to = side->other;
    while (d->head != d->tail) {
        int64_t now = now_ns();
        uint64_t at = d->head;
        int ready = 0;
        while (at != d->tail && ready < BATCH) {
            at = past_gap(d, at);
            struct record *record = record_at(d, at);
            int64_t late = now - record->due;
            if (late < 0) {
                if (ready == 0)
                    return record->due;
                break;
            }
            pieces[ready] = (struct iovec){record + 1, record->size};
            messages[ready].msg_hdr = (struct msghdr){.msg_name = &to->peer,
                                                      .msg_namelen = sizeof to->peer,
                                                      .msg_iov = &pieces[ready],
                                                      .msg_iovlen = 1};
            d->late_sum_ns += (uint64_t)late;
            if (late > d->late_max_ns)
                d->late_max_ns = late;
            d->bytes += record->size;
            at += record_room(record->size);
            ready++;
        }
        int sent = sendmmsg(to->socket, messages, (unsigned)ready, MSG_DONTWAIT);
        if (sent < ready)
            /* A full buffer, or nobody at the other end: a network would lose it, so do we. */
            d->refused += (uint64_t)(ready - (sent < 0 ? 0 : sent));
        d->packets += (uint64_t)ready;
        d->head = at;
    }
    return INT64_MAX;
}

static void print_counters(void)
{
    printf("[");
    for (int i = 0; i < side_count; i++) {
        struct direction *d = &sides[i].out;
        char from[INET_ADDRSTRLEN], to[INET_ADDRSTRLEN];
        inet_ntop(AF_INET, &sides[i].peer.sin_addr, from, sizeof from);
        inet_ntop(AF_INET, &sides[i].other->peer.sin_addr, to, sizeof to);
        printf("%s{\"from\": \"%s:%d\", \"to\": \"%s:%d\", \"packets\": %llu, \"bytes\": %llu, \"lost\": %llu, "
               "\"dropped\": %llu, \"refused\": %llu, \"strangers\": %llu, \"late_mean_us\": %.1f, "
               "\"late_max_us\": %.1f}",
               i ? ", " : "", from, ntohs(sides[i].peer.sin_port), to, ntohs(sides[i].other->peer.sin_port),
               (unsigned long long)d->packets, (unsigned long long)d->bytes, (unsigned long long)d->lost,
               (unsigned long long)d->dropped, (unsigned long long)d->refused, (unsigned long long)d->strangers,
               d->packets ? (double)d->late_sum_ns / (double)d->packets / 1e3 : 0.0, (double)d->late_max_ns / 1e3);
    }
    printf("]\n");
    fflush(stdout);
}

int main(int count, char **words)
{
    struct shape start = {.queue_ms = 100};
    sigset_t watched, before;
    int fifo = 0;

    prctl(PR_SET_PDEATHSIG, SIGTERM, 0, 0, 0);
    prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
    for (int i = 1; i < count; i++) {
        errno = 0;
        if (!strcmp(words[i], "--fifo")) {
            fifo = 1;
        } else if (!strcmp(words[i], "--seed") && i + 1 < count) {
            random_state = strtoull(words[++i], NULL, 0) * 2 + 1; /* never zero */
        } else if (!strcmp(words[i], "--shape") && i + 1 < count) {
            read_shape(words[++i], &start);
        } else if (!strcmp(words[i], "--pair") && i + 4 < count && side_count < 2 * PAIRS) {
            struct side *a = &sides[side_count], *b = a + 1;
            add_side(a, b, words[i + 1], words[i + 2], start);
            add_side(b, a, words[i + 3], words[i + 4], start);
            side_count += 2;
            i += 4;
        } else if (!strcmp(words[i], "--ab") && i + 1 < count && side_count) {
            read_shape(words[++i], &sides[side_count - 2].out.shape);
        } else if (!strcmp(words[i], "--ba") && i + 1 < count && side_count) {
            read_shape(words[++i], &sides[side_count - 1].out.shape);
        } else {
            fail("not understood here; see the head of relay.c", words[i]);
        }
    }
    if (!side_count) {
        errno = 0;
        fail("at least one is needed", "--pair");
    }
    if (fifo) {
        struct sched_param level = {.sched_priority = 1};
        if (sched_setscheduler(0, SCHED_FIFO, &level) < 0)
            fprintf(stderr, "relay: no real-time class (%s); expect milliseconds of lateness under load\n",
                    strerror(errno));
    }

    /* Signals arrive only inside ppoll, so none is missed between the test and the wait. */
    sigemptyset(&watched);
    struct sigaction action = {.sa_handler = on_signal};
    const int numbers[] = {SIGUSR1, SIGUSR2, SIGTERM, SIGINT};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        sigaddset(&watched, numbers[i]);
        sigaction(numbers[i], &action, NULL);
    }
    sigprocmask(SIG_BLOCK, &watched, &before);
    for (int i = 0; i < side_count; i++)
        make_ring(&sides[i].out);
    for (int i = 0; i < side_count; i++)
        polls[i] = (struct pollfd){.fd = sides[i].socket, .events = POLLIN};
    printf("ready\n");
    fflush(stdout);

    while (!wants_end) {
        int64_t next = INT64_MAX;
        for (int i = 0; i < side_count; i++) {
            int64_t due = let_out(&sides[i]);
            if (due < next)
                next = due;
        }
        struct timespec wait = {0, 0}, *patience = NULL;
        if (next != INT64_MAX) {
            int64_t left = next - now_ns();
            if (left > 0)
                wait = (struct timespec){left / 1000000000, left % 1000000000};
            patience = &wait;
        }
        if (ppoll(polls, (nfds_t)side_count, patience, &before) > 0)
            for (int i = 0; i < side_count; i++)
                if (polls[i].revents)
                    take_in(&sides[i]);
        if (wants_counters) {
            wants_counters = 0;
            print_counters();
        }
    }
    print_counters();
    return 0;
}
