// SPDX-License-Identifier: GPL-2.0
/*
 * A disk with inline encryption, for tests: no disk that a test machine has offers it, and no program of userspace makes
 * bios with an encryption context.
 *
 * The disk, /dev/crypto_disk, lies in memory. What a bio with a context writes is stored encrypted under the context's
 * key and data unit number, and what such a bio reads is decrypted. The cipher is none: a byte is changed by the key, its
 * data unit and its place in that. It is enough to tell whether key and number came through unchanged.
 *
 * Bios with a context are made by writing to the parameter `io`:
 *
 *   write DEVICE SECTOR KEY DUN COUNT    writes COUNT units of 4 KiB of known content, as one bio
 *   read DEVICE SECTOR KEY DUN COUNT     reads them, and fails with EILSEQ if that is not what they hold
 *
 * KEY is the byte of which the key is made, and the content depends on the data unit number alone.
 */

#include <linux/bio.h>
#include <linux/blk-crypto.h>
#include <linux/blk-crypto-profile.h>
#include <linux/blkdev.h>
#include <linux/module.h>
#include <linux/vmalloc.h>

#define UNIT 4096u
#define MAX_UNITS 64u

static unsigned int mib = 16;
module_param(mib, uint, 0444);
MODULE_PARM_DESC(mib, "size of the disk");

static struct gendisk *disk;
static u8 *content;
/* Allocated, as lockdep wants it of what is initialised with a key of its own. */
static struct blk_crypto_profile *profile;

static u8 pad(const struct bio_crypt_ctx *ctx, unsigned int at)
{
	u64 dun = ctx->bc_dun[0] + at / UNIT;

	return ctx->bc_key->bytes[at % ctx->bc_key->size] + dun * 31 + at % UNIT / 7;
}

static void crypto_disk_submit_bio(struct bio *bio)
{
	const struct bio_crypt_ctx *ctx = bio_crypt_ctx(bio);
	u8 *at = content + (bio->bi_iter.bi_sector << SECTOR_SHIFT);
	unsigned int done = 0;
	struct bvec_iter iter;
	struct bio_vec bvec;

	switch (bio_op(bio)) {
	case REQ_OP_READ:
	case REQ_OP_WRITE:
		break;
	default:
		bio_io_error(bio);
		return;
	}
	bio_for_each_segment(bvec, bio, iter) {
		u8 *memory = bvec_kmap_local(&bvec);
		unsigned int n;

		for (n = 0; n < bvec.bv_len; n++, done++) {
			u8 mask = ctx ? pad(ctx, done) : 0;

			if (op_is_write(bio_op(bio)))
				at[done] = memory[n] ^ mask;
			else
				memory[n] = at[done] ^ mask;
		}
		kunmap_local(memory);
	}
	bio_endio(bio);
}

static const struct block_device_operations crypto_disk_fops = {
	.owner = THIS_MODULE,
	.submit_bio = crypto_disk_submit_bio,
};

/* What unit `dun` of a file holds. */
static void fill(u8 *unit, u64 dun)
{
	unsigned int n;

	for (n = 0; n < UNIT; n++)
		unit[n] = dun * 7 + n / 16 + n;
}

static int transfer(struct block_device *bdev, bool write, u64 sector, u8 key_byte, u64 dun, unsigned int count)
{
	u64 duns[BLK_CRYPTO_DUN_ARRAY_SIZE] = { dun };
	struct blk_crypto_key *key;
	u8 *buffer, *expected, bytes[64];
	struct bio *bio;
	unsigned int n;
	int ret = -ENOMEM;

	buffer = kmalloc_array(count + 1, UNIT, GFP_KERNEL);
	key = kzalloc(sizeof(*key), GFP_KERNEL);
	if (!buffer || !key)
		goto out;
	expected = buffer + count * UNIT;
	for (n = 0; n < count && write; n++)
		fill(buffer + n * UNIT, dun + n);
	/* The two halves of such a key must differ. */
	for (n = 0; n < sizeof(bytes); n++)
		bytes[n] = key_byte + n * 3;
	ret = blk_crypto_init_key(key, bytes, sizeof(bytes), BLK_CRYPTO_KEY_TYPE_RAW, BLK_ENCRYPTION_MODE_AES_256_XTS,
				  sizeof(u64), UNIT, BLK_CRYPTO_CFG_ALLOW_HW);
	if (ret)
		goto out;
	ret = blk_crypto_start_using_key(bdev, key);
	if (ret)
		goto out;
	bio = bio_alloc(bdev, count, write ? REQ_OP_WRITE : REQ_OP_READ, GFP_KERNEL);
	bio->bi_iter.bi_sector = sector;
	for (n = 0; n < count; n++)
		bio_add_virt_nofail(bio, buffer + n * UNIT, UNIT);
	bio_crypt_set_ctx(bio, key, duns, GFP_KERNEL);
	/* Submitted as it is, so that nobody but a disk can en- or decrypt it. */
	ret = submit_bio_wait(bio);
	bio_put(bio);
	for (n = 0; n < count && !write && !ret; n++) {
		fill(expected, dun + n);
		if (memcmp(buffer + n * UNIT, expected, UNIT))
			ret = -EILSEQ;
	}
	blk_crypto_evict_key(bdev, key);
out:
	kfree_sensitive(key);
	kfree(buffer);
	return ret;
}

static int io_set(const char *value, const struct kernel_param *kp)
{
	char what[8], path[64];
	unsigned int key, count;
	struct file *file;
	u64 sector, dun;
	bool write;
	int ret;

	if (sscanf(value, "%7s %63s %llu %u %llu %u", what, path, &sector, &key, &dun, &count) != 6)
		return -EINVAL;
	write = !strcmp(what, "write");
	if ((!write && strcmp(what, "read")) || key > U8_MAX || !count || count > MAX_UNITS)
		return -EINVAL;
	file = bdev_file_open_by_path(path, BLK_OPEN_READ | BLK_OPEN_WRITE, NULL, NULL);
	if (IS_ERR(file))
		return PTR_ERR(file);
	ret = transfer(file_bdev(file), write, sector, key, dun, count);
	bdev_fput(file);
	return ret;
}

static const struct kernel_param_ops io_ops = { .set = io_set };
module_param_cb(io, &io_ops, NULL, 0200);
MODULE_PARM_DESC(io, "write|read DEVICE SECTOR KEY DUN COUNT");

static int __init crypto_disk_init(void)
{
	struct queue_limits limits = { .physical_block_size = UNIT };
	int ret;

	content = vzalloc((size_t)mib << 20);
	if (!content)
		return -ENOMEM;
	profile = kzalloc(sizeof(*profile), GFP_KERNEL);
	ret = profile ? blk_crypto_profile_init(profile, 0) : -ENOMEM;
	if (ret)
		goto out_free;
	profile->max_dun_bytes_supported = sizeof(u64);
	profile->key_types_supported = BLK_CRYPTO_KEY_TYPE_RAW;
	profile->modes_supported[BLK_ENCRYPTION_MODE_AES_256_XTS] = UNIT;
	disk = blk_alloc_disk(&limits, NUMA_NO_NODE);
	if (IS_ERR(disk)) {
		ret = PTR_ERR(disk);
		goto out_profile;
	}
	disk->fops = &crypto_disk_fops;
	strscpy(disk->disk_name, "crypto_disk");
	set_capacity(disk, (sector_t)mib << (20 - SECTOR_SHIFT));
	blk_crypto_register(profile, disk->queue);
	ret = add_disk(disk);
	if (!ret)
		return 0;
	put_disk(disk);
out_profile:
	blk_crypto_profile_destroy(profile);
out_free:
	kfree(profile);
	vfree(content);
	return ret;
}
module_init(crypto_disk_init);

static void __exit crypto_disk_exit(void)
{
	del_gendisk(disk);
	put_disk(disk);
	blk_crypto_profile_destroy(profile);
	kfree(profile);
	vfree(content);
}
module_exit(crypto_disk_exit);

MODULE_DESCRIPTION("a disk with inline encryption, for tests");
MODULE_LICENSE("GPL");
