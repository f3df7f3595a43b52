/*
 * What a test guest does to its data disks while it is being watched.
 *
 *   workload counter DISK [DISK]   one counter, to each disk in turn
 *   workload files DIRECTORY       files made, rewritten, renamed and deleted
 *
 * Both print `TICK <seconds> <count>` up to ten times a second, by the guest's monotonic clock, where
 * <count> is the last round that is on the disks. A failed write ends the program with a line that says so.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    BLOCK = 4096,
    SECTOR = 512,
    COUNTER_AT = 1 << 20,
    BLOCKS_AT = 2 << 20,
    BLOCKS_LENGTH = 8 << 20,
    DISKS = 2,
    FILES = 24,       /* how many rounds a file lives */
    STATES = 4,       /* how many files are replaced over and over */
    FILE_STEP = 1500, /* bytes: sizes that are no multiple of a block */
};
static const double ROUND_SECONDS = 0.02; /* leaves the host most of a processor */
static const double TICK_SECONDS = 0.1;

static volatile sig_atomic_t stopped;

static void stop(int number) {
    (void)number;
    stopped = 1;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void sleep_until(double moment) {
    double left = moment - now();
    if (left > 0) {
        struct timespec time = {.tv_sec = (time_t)left, .tv_nsec = (long)((left - (time_t)left) * 1e9)};
        nanosleep(&time, NULL);
    }
}

__attribute__((noreturn)) static void fail(const char *what) {
    printf("WORKLOAD-FAILED %s: %s\n", what, strerror(errno));
    exit(1);
}

static void tick(unsigned long count) {
    static double last = -1;
    double moment = now();
    if (last < 0 || moment - last >= TICK_SECONDS) {
        printf("TICK %.3f %lu\n", moment, count);
        last = moment;
    }
}

static void write_at(int descriptor, const void *content, size_t length, off_t offset) {
    if (pwrite(descriptor, content, length, offset) != (ssize_t)length)
        fail("pwrite");
}

/* A round that begins late does not hurry the next ones. */
static void pace(double begun) { sleep_until(begun + ROUND_SECONDS); }

struct disk {
    int descriptor;
    unsigned long blocks;
};

static struct disk open_disk(const char *path) {
    struct disk disk = {.descriptor = open(path, O_RDWR | O_DIRECT | O_DSYNC)};
    if (disk.descriptor < 0)
        fail(path);
    off_t room = lseek(disk.descriptor, 0, SEEK_END) - BLOCKS_AT;
    if (room < BLOCK) {
        errno = ENOSPC;
        fail(path);
    }
    disk.blocks = (room < BLOCKS_LENGTH ? room : BLOCKS_LENGTH) / BLOCK;
    return disk;
}

static unsigned long read_counter(int descriptor, char *sector) {
    if (pread(descriptor, sector, SECTOR, COUNTER_AT) != SECTOR)
        fail("pread");
    sector[SECTOR - 1] = 0;
    unsigned long count = 0;
    return sscanf(sector, "count %lu\n", &count) == 1 ? count : 0;
}

static void write_counter(int descriptor, char *sector, unsigned long count) {
    memset(sector, 0, SECTOR);
    snprintf(sector, SECTOR, "count %lu\n", count);
    write_at(descriptor, sector, SECTOR, COUNTER_AT);
}

static void write_block(struct disk disk, char *block, unsigned long count) {
    for (size_t offset = 0; offset < BLOCK; offset += SECTOR)
        snprintf(block + offset, SECTOR, "block of round %lu\n", count);
    write_at(disk.descriptor, block, BLOCK, BLOCKS_AT + (off_t)(count % disk.blocks) * BLOCK);
}

static void run_counter(int number, char **paths) {
    struct disk disks[DISKS];
    char *sector = aligned_alloc(BLOCK, BLOCK), *block = aligned_alloc(BLOCK, BLOCK);
    if (!sector || !block)
        fail("memory");
    memset(block, 0, BLOCK);
    for (int each = 0; each < number; each++)
        disks[each] = open_disk(paths[each]);
    /* A guest that is started again goes on, and first brings the later disks up to the first one. */
    unsigned long count = read_counter(disks[0].descriptor, sector);
    for (int each = 1; count && each < number; each++)
        write_counter(disks[each].descriptor, sector, count);
    while (!stopped) {
        double begun = now();
        count++;
        for (int each = 0; each < number; each++)
            write_block(disks[each], block, count);
        for (int each = 0; each < number; each++)
            write_counter(disks[each].descriptor, sector, count);
        tick(count);
        pace(begun);
    }
}

/* The CRC-32 of zlib. */
static uint32_t checksum(const unsigned char *content, size_t length) {
    static uint32_t table[256];
    if (!table[1])
        for (uint32_t byte = 0; byte < 256; byte++) {
            table[byte] = byte;
            for (int bit = 0; bit < 8; bit++)
                table[byte] = table[byte] & 1 ? table[byte] >> 1 ^ 0xEDB88320 : table[byte] >> 1;
        }
    uint32_t sum = 0xFFFFFFFF;
    while (length--)
        sum = sum >> 8 ^ table[(sum ^ *content++) & 255];
    return ~sum;
}

static void put_all(int descriptor, const void *content, size_t length) {
    if (write(descriptor, content, length) != (ssize_t)length)
        fail("write");
}

/* A file of its round's size and content, after a line with the checksum and the length of that. */
static void write_file(const char *path, unsigned long count) {
    static unsigned char content[(FILES + 1) * FILE_STEP];
    size_t length = (count % FILES + 1) * FILE_STEP;
    uint32_t state = (uint32_t)count * 2654435761u + 1;
    for (size_t at = 0; at < length; at++) {
        state = state * 1664525 + 1013904223;
        content[at] = state >> 24;
    }
    char head[64];
    int headed = snprintf(head, sizeof head, "%08x %zu\n", checksum(content, length), length);
    int descriptor = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (descriptor < 0)
        fail(path);
    put_all(descriptor, head, (size_t)headed);
    put_all(descriptor, content, length);
    if (fsync(descriptor) || close(descriptor))
        fail(path);
}

static char *named(const char *form, unsigned long number) {
    static char names[2][64];
    static int turn;
    turn = !turn;
    snprintf(names[turn], sizeof names[turn], form, number);
    return names[turn];
}

/* Under its own name a file is always whole: it gets the name when its content is on the disk. */
static void replace_file(const char *path, unsigned long count) {
    write_file("new", count);
    if (rename("new", path))
        fail(path);
}

static unsigned long last_round(void) {
    unsigned long count = 0;
    FILE *file = fopen("last", "r");
    if (file) {
        if (fscanf(file, "%lu", &count) != 1)
            count = 0;
        fclose(file);
    }
    return count;
}

/* Written in place: one sector, so never half. */
static void write_last(unsigned long count) {
    static int descriptor = -1;
    char text[32];
    if (descriptor < 0 && (descriptor = open("last", O_WRONLY | O_CREAT, 0644)) < 0)
        fail("last");
    write_at(descriptor, text, (size_t)snprintf(text, sizeof text, "%20lu\n", count), 0);
    if (fsync(descriptor))
        fail("last");
}

static void sync_directory(int directory) {
    if (fsync(directory))
        fail("directory");
}

static void run_files(const char *path) {
    int directory;
    if (chdir(path) || (directory = open(".", O_RDONLY | O_DIRECTORY)) < 0)
        fail(path);
    unsigned long count = last_round();
    while (!stopped) {
        double begun = now();
        count++;
        replace_file(named("round-%lu", count), count);
        replace_file(named("state-%lu", count % STATES), count);
        if (count > FILES && unlink(named("round-%lu", count - FILES)) && errno != ENOENT)
            fail("unlink");
        sync_directory(directory);
        write_last(count);
        tick(count);
        pace(begun);
    }
}

int main(int argc, char **argv) {
    signal(SIGTERM, stop);
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc >= 3 && argc <= 2 + DISKS && !strcmp(argv[1], "counter"))
        run_counter(argc - 2, argv + 2);
    else if (argc == 3 && !strcmp(argv[1], "files"))
        run_files(argv[2]);
    else
        return 2;
    return 0;
}
