// SPDX-License-Identifier: GPL-2.0
/* See shim.h. */

#include <linux/blk-crypto.h>
#include <linux/blk-integrity.h>
#include <linux/capability.h>
#include <linux/crc32c.h>
#include <linux/delay.h>
#include <linux/dm-io.h>
#include <linux/ktime.h>
#include <linux/mm.h>
#include <linux/ratelimit.h>
#include <linux/rcupdate.h>
#include <linux/reboot.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/sched/stat.h>
#include <linux/slab.h>
#include <linux/sort.h>
#include <linux/unaligned.h>
#include <linux/workqueue.h>

#include "shim.h"

void pristine_bio_set_dev(struct bio *bio, struct block_device *bdev)
{
	bio_set_dev(bio, bdev);
}

void pristine_bio_fail(struct bio *bio, blk_status_t status)
{
	bio->bi_status = status;
	bio_endio(bio);
}

void pristine_bio_end(struct bio *bio)
{
	bio_endio(bio);
}

bool pristine_bio_fill(struct bio *bio, const void *from)
{
	struct bvec_iter iter;
	struct bio_vec bv;

	if (bio_integrity(bio) || bio_has_crypt_ctx(bio))
		return false;
	bio_for_each_segment(bv, bio, iter) {
		memcpy_to_bvec(&bv, from);
		from += bv.bv_len;
	}
	return true;
}

/* Hooks -------------------------------------------------------------------------------------------- */

/* What a bio carries for the target, in front of it. */
struct pristine_hook {
	u64 tag;
	struct pristine_hooks *hooks;
	bio_end_io_t *end_io;
	void *private;
};

struct pristine_hooks {
	/* Taken in interrupts. */
	spinlock_t lock;
	struct bio_list ended;
	struct pristine_jobs *jobs;
	unsigned int job;
};

static struct pristine_hook *pristine_hook(struct bio *bio)
{
	return dm_per_bio_data(bio, sizeof(struct pristine_hook));
}

struct pristine_hooks *pristine_hooks_create(struct dm_target *ti, struct pristine_jobs *jobs, unsigned int job)
{
	struct pristine_hooks *hooks = kzalloc(sizeof(*hooks), GFP_KERNEL);

	if (!hooks)
		return NULL;
	spin_lock_init(&hooks->lock);
	bio_list_init(&hooks->ended);
	hooks->jobs = jobs;
	hooks->job = job;
	ti->per_io_data_size = sizeof(struct pristine_hook);
	/* Flushes must come, also when the device below needs none. */
	ti->flush_supported = true;
	return hooks;
}

void pristine_hooks_destroy(struct pristine_hooks *hooks)
{
	kfree(hooks);
}

void pristine_hooks_set_tag(struct bio *bio, u64 tag)
{
	pristine_hook(bio)->tag = tag;
}

u64 pristine_hooks_tag(struct bio *bio)
{
	return pristine_hook(bio)->tag;
}

static void pristine_hook_end(struct bio *bio)
{
	struct pristine_hook *hook = pristine_hook(bio);
	struct pristine_hooks *hooks = hook->hooks;
	unsigned long flags;

	bio->bi_end_io = hook->end_io;
	bio->bi_private = hook->private;
	spin_lock_irqsave(&hooks->lock, flags);
	bio_list_add(&hooks->ended, bio);
	/* Within the lock: once the bio is taken, the hooks may go. */
	pristine_jobs_queue(hooks->jobs, hooks->job, 0, true);
	spin_unlock_irqrestore(&hooks->lock, flags);
}

void pristine_hooks_submit(struct pristine_hooks *hooks, struct bio *bio)
{
	struct pristine_hook *hook = pristine_hook(bio);

	hook->hooks = hooks;
	hook->end_io = bio->bi_end_io;
	hook->private = bio->bi_private;
	bio->bi_end_io = pristine_hook_end;
	submit_bio_noacct(bio);
}

struct bio *pristine_hooks_take(struct pristine_hooks *hooks)
{
	struct bio *bio;

	spin_lock_irq(&hooks->lock);
	bio = bio_list_pop(&hooks->ended);
	spin_unlock_irq(&hooks->lock);
	return bio;
}

u64 pristine_bdev_sectors(struct block_device *bdev)
{
	return bdev_nr_sectors(bdev);
}

bool pristine_bdev_read_only(struct block_device *bdev)
{
	return bdev_read_only(bdev);
}

/* I/O of the metadata ------------------------------------------------------------------------------ */

int pristine_dm_rw(struct dm_io_client *client, struct block_device *bdev, u64 sector, u64 count,
		   void *memory, bool write, bool preflush, bool fua)
{
	bool vmalloc = is_vmalloc_addr(memory);
	struct dm_io_region region = {
		.bdev = bdev,
		.sector = sector,
		.count = count,
	};
	struct dm_io_request request = {
		.bi_opf = (write ? REQ_OP_WRITE : REQ_OP_READ) | REQ_SYNC | REQ_META |
			  (preflush ? REQ_PREFLUSH : 0) | (fua ? REQ_FUA : 0),
		.mem.type = vmalloc ? DM_IO_VMA : DM_IO_KMEM,
		.notify.fn = NULL,
		.client = client,
	};

	if (vmalloc)
		request.mem.ptr.vma = memory;
	else
		request.mem.ptr.addr = memory;
	return dm_io(&request, 1, &region, NULL, NULL, IOPRIO_DEFAULT);
}

int pristine_flush(struct dm_io_client *client, struct block_device *bdev)
{
	struct dm_io_region region = {
		.bdev = bdev,
	};
	struct dm_io_request request = {
		.bi_opf = REQ_OP_WRITE | REQ_PREFLUSH | REQ_SYNC,
		.mem.type = DM_IO_KMEM,
		.client = client,
	};

	return dm_io(&request, 1, &region, NULL, NULL, IOPRIO_DEFAULT);
}

int pristine_zero(struct block_device *bdev, u64 sector, u64 count)
{
	return blkdev_issue_zeroout(bdev, sector, count, GFP_NOIO, 0);
}

struct dm_io_client *pristine_dm_io_create(int *error)
{
	struct dm_io_client *client = dm_io_client_create();

	if (IS_ERR(client)) {
		*error = PTR_ERR(client);
		return NULL;
	}
	return client;
}

void pristine_dm_io_destroy(struct dm_io_client *client)
{
	dm_io_client_destroy(client);
}

/* Jobs --------------------------------------------------------------------------------------------- */

struct pristine_job {
	struct delayed_work work;
	struct pristine_jobs *jobs;
};

struct pristine_jobs {
	struct workqueue_struct *queue;
	pristine_job_fn fn;
	void *data;
	/* Set once by stop; orders against queueing. */
	spinlock_t lock;
	bool running;
	unsigned int count;
	struct pristine_job job[] __counted_by(count);
};

static void pristine_job_run(struct work_struct *work)
{
	struct pristine_job *job = container_of(to_delayed_work(work), struct pristine_job, work);
	struct pristine_jobs *jobs = job->jobs;
	unsigned int flags = memalloc_noio_save();

	jobs->fn(jobs->data, job - jobs->job);
	memalloc_noio_restore(flags);
}

struct pristine_jobs *pristine_jobs_create(unsigned int count, pristine_job_fn fn)
{
	struct pristine_jobs *jobs = kzalloc(struct_size(jobs, job, count), GFP_KERNEL);
	unsigned int i;

	if (!jobs)
		return NULL;
	jobs->count = count;
	/* One worker for each job may sleep in I/O while another job must get on. */
	jobs->queue = alloc_workqueue("dm_pristine", WQ_MEM_RECLAIM | WQ_UNBOUND, count);
	if (!jobs->queue) {
		kfree(jobs);
		return NULL;
	}
	spin_lock_init(&jobs->lock);
	jobs->fn = fn;
	for (i = 0; i < count; i++) {
		jobs->job[i].jobs = jobs;
		INIT_DELAYED_WORK(&jobs->job[i].work, pristine_job_run);
	}
	return jobs;
}

void pristine_jobs_start(struct pristine_jobs *jobs, void *data)
{
	spin_lock_irq(&jobs->lock);
	jobs->data = data;
	jobs->running = true;
	spin_unlock_irq(&jobs->lock);
}

/* With `earlier`, a job that is already due later is moved forward; otherwise it keeps its time. */
void pristine_jobs_queue(struct pristine_jobs *jobs, unsigned int id, unsigned int delay_ms, bool earlier)
{
	unsigned long delay = msecs_to_jiffies(delay_ms);
	unsigned long flags;

	if (id >= jobs->count)
		return;
	spin_lock_irqsave(&jobs->lock, flags);
	if (jobs->running) {
		if (earlier)
			mod_delayed_work(jobs->queue, &jobs->job[id].work, delay);
		else
			queue_delayed_work(jobs->queue, &jobs->job[id].work, delay);
	}
	spin_unlock_irqrestore(&jobs->lock, flags);
}

/*
 * yield() and not cond_resched(), which gives way only to those that the scheduler prefers already: the caller has
 * reason to believe that they are about to hand it work, and keeps count of whether they did.
 */
bool pristine_give_way(void)
{
	if (single_task_running())
		return false;
	yield();
	return true;
}

/*
 * Waits until the job is neither due nor running, `ms` at most; whether it got there. For the way down only,
 * hence the polling: it must end even when the device below never answers.
 */
bool pristine_jobs_wait(struct pristine_jobs *jobs, unsigned int id, unsigned int ms)
{
	unsigned long end = jiffies + msecs_to_jiffies(ms);

	if (id >= jobs->count)
		return true;
	while (work_busy(&jobs->job[id].work.work)) {
		if (time_after(jiffies, end))
			return false;
		msleep(5);
	}
	return true;
}

void pristine_jobs_stop(struct pristine_jobs *jobs)
{
	unsigned int i;

	spin_lock_irq(&jobs->lock);
	jobs->running = false;
	spin_unlock_irq(&jobs->lock);
	for (i = 0; i < jobs->count; i++)
		cancel_delayed_work_sync(&jobs->job[i].work);
}

void pristine_jobs_destroy(struct pristine_jobs *jobs)
{
	pristine_jobs_stop(jobs);
	destroy_workqueue(jobs->queue);
	kfree(jobs);
}

/* Reboot ------------------------------------------------------------------------------------------- */

static pristine_reboot_fn pristine_on_reboot;

static int pristine_reboot_call(struct notifier_block *nb, unsigned long action, void *unused)
{
	unsigned int flags = memalloc_noio_save();

	pristine_on_reboot();
	memalloc_noio_restore(flags);
	return NOTIFY_DONE;
}

static struct notifier_block pristine_reboot_block = {
	.notifier_call = pristine_reboot_call,
};

int pristine_reboot_register(pristine_reboot_fn fn)
{
	pristine_on_reboot = fn;
	return register_reboot_notifier(&pristine_reboot_block);
}

void pristine_reboot_unregister(void)
{
	unregister_reboot_notifier(&pristine_reboot_block);
}

/* The rest ----------------------------------------------------------------------------------------- */

unsigned int pristine_noio_enter(void)
{
	return memalloc_noio_save();
}

void pristine_noio_leave(unsigned int flags)
{
	memalloc_noio_restore(flags);
}

void pristine_table_dev(struct dm_target *ti, unsigned int *major, unsigned int *minor)
{
	dev_t dev = disk_devt(dm_disk(dm_table_get_md(ti->table)));

	*major = MAJOR(dev);
	*minor = MINOR(dev);
}

/* Wakes those who wait for the device's events, and sends a change uevent with `pair` (KEY=value). */
void pristine_table_uevent(struct dm_target *ti, const char *pair)
{
	struct mapped_device *md = dm_table_get_md(ti->table);
	char *envp[] = { (char *)pair, NULL };

	dm_table_event(ti->table);
	kobject_uevent_env(&disk_to_dev(dm_disk(md))->kobj, KOBJ_CHANGE, envp);
}

u64 pristine_now_us(void)
{
	return ktime_to_us(ktime_get());
}

bool pristine_sleep_ms(unsigned int ms)
{
	return msleep_interruptible(ms) == 0;
}

bool pristine_is_noflush(struct dm_target *ti)
{
	return dm_noflush_suspending(ti);
}

void pristine_synchronize_rcu_expedited(void)
{
	synchronize_rcu_expedited();
}

bool pristine_capable_admin(void)
{
	return capable(CAP_SYS_ADMIN);
}

bool pristine_may_print(void)
{
	static DEFINE_RATELIMIT_STATE(limit, DEFAULT_RATELIMIT_INTERVAL, DEFAULT_RATELIMIT_BURST);

	return __ratelimit(&limit);
}

/* In C for hweight64(), which is one instruction on machines that have it. */
u32 pristine_copy_words(u8 *to, const u64 *words, size_t count)
{
	u32 ones = 0;

	for (size_t i = 0; i < count; i++) {
		u64 word = READ_ONCE(words[i]);

		put_unaligned_le64(word, to + i * sizeof(word));
		ones += hweight64(word);
	}
	return ones;
}

static int pristine_compare(const void *a, const void *b)
{
	u64 left = *(const u64 *)a, right = *(const u64 *)b;

	return left < right ? -1 : left > right;
}

void pristine_sort(u64 *numbers, size_t count)
{
	sort(numbers, count, sizeof(*numbers), pristine_compare, NULL);
}

u32 pristine_crc32c(u32 crc, const void *data, size_t len)
{
	return crc32c(crc, data, len);
}
