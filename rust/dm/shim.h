/* SPDX-License-Identifier: GPL-2.0 */
/*
 * C side of rust/dm: what the headers offer only as macros or inline functions, and the objects that C
 * must own (work items, the notifier). Nothing here knows what the target does.
 */
#ifndef PRISTINE_SHIM_H
#define PRISTINE_SHIM_H

#include <linux/blkdev.h>
#include <linux/device-mapper.h>

struct dm_io_client;
struct pristine_jobs;
struct pristine_hooks;
struct tracepoint;

/* Macros with casts, which bindgen cannot read. */
enum {
	PRISTINE_STS_RESOURCE = (__force int)BLK_STS_RESOURCE,
	PRISTINE_STS_IOERR = (__force int)BLK_STS_IOERR,
	PRISTINE_STS_AGAIN = (__force int)BLK_STS_AGAIN,
	PRISTINE_STS_REQUEUE = (__force int)BLK_STS_DM_REQUEUE,
	PRISTINE_MODE_READ = (__force int)BLK_OPEN_READ,
	PRISTINE_MODE_WRITE = (__force int)BLK_OPEN_WRITE,
};

/* Runs job `id` of `data`; in a worker that may sleep, with allocations kept from recursing into I/O. */
typedef void (*pristine_job_fn)(void *data, unsigned int id);
/* Called once when the machine is about to restart, halt or power off. */
typedef void (*pristine_reboot_fn)(void);

void pristine_bio_set_dev(struct bio *bio, struct block_device *bdev);
void pristine_bio_fail(struct bio *bio, blk_status_t status);
void pristine_bio_end(struct bio *bio);
/*
 * Copies into all of the bio's pages; there must be as many bytes at `from`. Not if the device below has to do
 * something with them: check their integrity, or decipher them.
 */
bool pristine_bio_fill(struct bio *bio, const void *from);

/*
 * Bios that come back to the target when the device below has answered them. Each bio of a target with hooks
 * carries a tag, which must be set before it is read.
 */
struct pristine_hooks *pristine_hooks_create(struct dm_target *ti, struct pristine_jobs *jobs, unsigned int job);
void pristine_hooks_destroy(struct pristine_hooks *hooks);
void pristine_hooks_set_tag(struct bio *bio, u64 tag);
u64 pristine_hooks_tag(struct bio *bio);
/* Submits a bio that job `job` finds with pristine_hooks_take() when it has ended. */
void pristine_hooks_submit(struct pristine_hooks *hooks, struct bio *bio);
/* Takes one bio that has ended; NULL if there is none. */
struct bio *pristine_hooks_take(struct pristine_hooks *hooks);

u64 pristine_bdev_sectors(struct block_device *bdev);
bool pristine_bdev_read_only(struct block_device *bdev);

/* Reads or writes `count` sectors of kernel memory (kmalloc or vmalloc) and waits. */
int pristine_dm_rw(struct dm_io_client *client, struct block_device *bdev, u64 sector, u64 count,
		   void *memory, bool write, bool preflush, bool fua);
struct dm_io_client *pristine_dm_io_create(int *error);
void pristine_dm_io_destroy(struct dm_io_client *client);
/* Makes all that was written durable. */
int pristine_flush(struct dm_io_client *client, struct block_device *bdev);
/* Makes sectors zero, in whatever way the device likes best. */
int pristine_zero(struct block_device *bdev, u64 sector, u64 count);
u64 pristine_now_us(void);
/* Whether no signal came before the time was over. */
bool pristine_sleep_ms(unsigned int ms);
bool pristine_is_noflush(struct dm_target *ti);

struct pristine_jobs *pristine_jobs_create(unsigned int count, pristine_job_fn fn);
void pristine_jobs_start(struct pristine_jobs *jobs, void *data);
void pristine_jobs_queue(struct pristine_jobs *jobs, unsigned int id, unsigned int delay_ms, bool earlier);
/* Lets those run who wait for this CPU; whether there were any. */
bool pristine_give_way(void);
bool pristine_jobs_wait(struct pristine_jobs *jobs, unsigned int id, unsigned int ms);
void pristine_jobs_stop(struct pristine_jobs *jobs);
void pristine_jobs_destroy(struct pristine_jobs *jobs);

int pristine_reboot_register(pristine_reboot_fn fn);
void pristine_reboot_unregister(void);

unsigned int pristine_noio_enter(void);
void pristine_noio_leave(unsigned int flags);

void pristine_table_dev(struct dm_target *ti, unsigned int *major, unsigned int *minor);
void pristine_table_uevent(struct dm_target *ti, const char *pair);
void pristine_synchronize_rcu_expedited(void);
bool pristine_capable_admin(void);
/* Whether a message may be printed now; says later how many were not. */
bool pristine_may_print(void);
/* Copies words that others may change meanwhile, little-endian; returns the bits set in them. */
u32 pristine_copy_words(u8 *to, const u64 *words, size_t count);
/* Sorts numbers, smallest first. */
void pristine_sort(u64 *numbers, size_t count);
u32 pristine_crc32c(u32 crc, const void *data, size_t len);

/* Of pristine_trace.h, where bindgen does not see them through the macros. */
extern struct tracepoint __tracepoint_pristine_map;
extern struct tracepoint __tracepoint_pristine_commit;
extern struct tracepoint __tracepoint_pristine_checkpoint_begin;
extern struct tracepoint __tracepoint_pristine_checkpoint_end;
extern struct tracepoint __tracepoint_pristine_fail;
void rust_do_trace_pristine_map(struct bio *bio, unsigned int decision);
void rust_do_trace_pristine_commit(u32 dev, u64 seq, u32 extents);
void rust_do_trace_pristine_checkpoint_begin(u32 dev, u64 hot, u64 log);
void rust_do_trace_pristine_checkpoint_end(u32 dev, u64 seq, int error);
void rust_do_trace_pristine_fail(u32 dev, const char *why, u32 length);

#endif
