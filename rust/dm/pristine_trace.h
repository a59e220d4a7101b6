/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The tracepoints, /sys/kernel/tracing/events/pristine/. They are called from Rust (trace.rs), which looks at the
 * static key first.
 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM pristine

#if !defined(PRISTINE_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define PRISTINE_TRACE_H

#include <linux/blk_types.h>
#include <linux/kdev_t.h>
#include <linux/tracepoint.h>

#ifndef PRISTINE_TRACE_HELPERS
#define PRISTINE_TRACE_HELPERS
#define pristine_show_op(op)						\
	__print_symbolic(op,						\
		{ (__force u32)REQ_OP_READ, "read" },			\
		{ (__force u32)REQ_OP_WRITE, "write" },			\
		{ (__force u32)REQ_OP_FLUSH, "flush" },			\
		{ (__force u32)REQ_OP_DISCARD, "discard" },		\
		{ (__force u32)REQ_OP_SECURE_ERASE, "secure-erase" },	\
		{ (__force u32)REQ_OP_WRITE_ZEROES, "write-zeroes" })

#define pristine_show_flags(flags)					\
	__print_flags(flags, "|",					\
		{ (__force u32)REQ_PREFLUSH, "preflush" },		\
		{ (__force u32)REQ_FUA, "fua" },			\
		{ (__force u32)REQ_NOWAIT, "nowait" },			\
		{ (__force u32)REQ_ATOMIC, "atomic" })

/* As `Decision` in trace.rs. */
#define pristine_show_decision(decision)				\
	__print_symbolic(decision,					\
		{ 0, "remap" }, { 1, "defer" }, { 2, "release" },	\
		{ 3, "again" }, { 4, "error" }, { 5, "done" })
#endif

/* What became of a bio. `release` is the end of `defer`. */
TRACE_EVENT(pristine_map,
	TP_PROTO(struct bio *bio, unsigned int decision),
	TP_ARGS(bio, decision),
	TP_STRUCT__entry(
		__field(dev_t, dev)
		__field(u64, sector)
		__field(u32, sectors)
		__field(u32, opf)
		__field(unsigned int, decision)
	),
	TP_fast_assign(
		__entry->dev = bio_dev(bio);
		__entry->sector = bio->bi_iter.bi_sector;
		__entry->sectors = bio_sectors(bio);
		__entry->opf = (__force u32)bio->bi_opf;
		__entry->decision = decision;
	),
	TP_printk("%d,%d %s %llu + %u flags=%s: %s",
		  MAJOR(__entry->dev), MINOR(__entry->dev),
		  pristine_show_op(__entry->opf & (__force u32)REQ_OP_MASK),
		  __entry->sector, __entry->sectors, pristine_show_flags(__entry->opf),
		  pristine_show_decision(__entry->decision))
);

/* A record is durable; the extents that it announces are hot. */
TRACE_EVENT(pristine_commit,
	TP_PROTO(u32 dev, u64 seq, u32 extents),
	TP_ARGS(dev, seq, extents),
	TP_STRUCT__entry(
		__field(u32, dev)
		__field(u64, seq)
		__field(u32, extents)
	),
	TP_fast_assign(
		__entry->dev = dev;
		__entry->seq = seq;
		__entry->extents = extents;
	),
	TP_printk("%d,%d record=%llu extents=%u", MAJOR(__entry->dev), MINOR(__entry->dev),
		  __entry->seq, __entry->extents)
);

TRACE_EVENT(pristine_checkpoint_begin,
	TP_PROTO(u32 dev, u64 hot, u64 log),
	TP_ARGS(dev, hot, log),
	TP_STRUCT__entry(
		__field(u32, dev)
		__field(u64, hot)
		__field(u64, log)
	),
	TP_fast_assign(
		__entry->dev = dev;
		__entry->hot = hot;
		__entry->log = log;
	),
	TP_printk("%d,%d hot=%llu log=%llu", MAJOR(__entry->dev), MINOR(__entry->dev),
		  __entry->hot, __entry->log)
);

/* `seq` is 0 for a checkpoint that failed. */
TRACE_EVENT(pristine_checkpoint_end,
	TP_PROTO(u32 dev, u64 seq, int error),
	TP_ARGS(dev, seq, error),
	TP_STRUCT__entry(
		__field(u32, dev)
		__field(u64, seq)
		__field(int, error)
	),
	TP_fast_assign(
		__entry->dev = dev;
		__entry->seq = seq;
		__entry->error = error;
	),
	TP_printk("%d,%d checkpoint=%llu error=%d", MAJOR(__entry->dev), MINOR(__entry->dev),
		  __entry->seq, __entry->error)
);

/* The device turns read-only. */
TRACE_EVENT(pristine_fail,
	TP_PROTO(u32 dev, const char *why, u32 length),
	TP_ARGS(dev, why, length),
	TP_STRUCT__entry(
		__field(u32, dev)
		__dynamic_array(char, why, length + 1)
	),
	TP_fast_assign(
		__entry->dev = dev;
		memcpy(__get_dynamic_array(why), why, length);
		((char *)__get_dynamic_array(why))[length] = '\0';
	),
	TP_printk("%d,%d %s", MAJOR(__entry->dev), MINOR(__entry->dev), __get_str(why))
);

#endif

/* Must be outside the protection. */
#undef TRACE_INCLUDE_PATH
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_PATH .
#define TRACE_INCLUDE_FILE pristine_trace
#include <trace/define_trace.h>
