/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Steering: which frames that arrive on the uplink are the data plane's, decided on the bytes alone. The functions take (data, data_end)
 * so that every hook which has them can share the decision; what a hook then does with a frame that is ours is the hook's own file.
 *
 *	frame -> addressed to our NIC? -> IPv4 or IPv6, untagged? -> an address in a pod CIDR? -> sent by a member? -> ours
 *	              no: pass               no: pass                    |                           no: drop
 *	                                                                 | no
 *	                                                                 v
 *	                                              for the node's address? -> TCP, UDP to a translated port? -> ours
 *	                                                   no: pass          |-> SCTP, ESP, GRE of a translated flow? -> ours
 *	                                                                     |-> a fragment, an ICMP error,
 *	                                                                     |   an echo reply in the range? -> ours or the host's: the data plane
 *	                                                                     |                                  finds out and gives back
 *	                                                                     `-> else: pass
 *
 * Two clusters may use the same pod CIDR on one Ethernet segment: frames for the other cluster's nodes reach this NIC by flooding (or
 * because it is promiscuous). They are somebody else's and are never touched: hence the first question.
 */
#ifndef OVERPLANE_STEER_H
#define OVERPLANE_STEER_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define STEER_MAX_PREFIXES 8	  /* pod CIDRs per family */
#define STEER_MAX_MEMBERS 16384	  /* Ethernet addresses of the cluster's nodes */
#define STEER_MAX_QUEUES 256	  /* uplink receive queues */
#define STEER_MAX_WORKERS 64
#define STEER_HEARTBEAT_STRIDE 8  /* u64s between two workers' heartbeats: a cache line each */

#define STEER_PORT_WORDS (65536 / 64) /* of one protocol's bitmap of ports */

#define STEER_FLAG_ROUTED 1	  /* the gateway is the only Ethernet neighbour that may send us pods' packets */
#define STEER_FLAG_OUTSIDE 4	  /* the gateway may send pods packets from addresses that are no pods' */
#define STEER_FLAG_TRANSLATE 2	  /* packets for node4 and node6 may be replies to translated ones */

#define STEER_MAX_FLOWS 65536	  /* translated flows of protocols without ports of ours */
#define STEER_MAX_EXTENSIONS 4	  /* IPv6 extension headers that are looked behind, in at most */
#define STEER_EXTENSION_BYTES 256 /* so many bytes */

/* The mark of frames that the data plane gave back to the host: they pass. */
#define STEER_MARK_HOST 0x0b5e0001
/* The mark of frames that workers send by a device of the TUN/TAP driver. */
#define STEER_MARK_OUT 0x0b5e0002

/* Index of the per-CPU counters. The Go side has the same list (counterNames); a test compares the two. */
enum steer_counter {
	STEER_REDIRECTED,	   /* ours, given to a socket */
	STEER_PASSED,		   /* for this host: not ours */
	STEER_PASSED_OTHER_MAC,	   /* addressed to another interface, or to a group */
	STEER_DROPPED_NOT_MEMBER,  /* pod addresses, from an Ethernet address that may not use them */
	STEER_DROPPED_NO_SOCKET,   /* ours, but no socket is bound to the queue */
	STEER_DROPPED_STALE,	   /* ours, but the queue's worker stopped beating */
	STEER_COUNTERS,
};

/* Verdict, no counter: redirected while somebody is there to tell, passed otherwise. */
#define STEER_ASK 100
/* Verdict, no counter: more of the frame must be readable; passed where that cannot be had. */
#define STEER_MORE 101

struct steer_prefix4 {
	__u32 addr; /* network byte order, as loaded from a header */
	__u32 mask;
};

struct steer_prefix6 {
	__u64 addr[2]; /* network byte order, as loaded from a header */
	__u64 mask[2];
};

struct steer_config {
	__u64 heartbeat_limit_ns; /* 0: never stale */
	__u32 workers;		  /* queue q belongs to worker q % workers */
	__u32 flags;
	__u8 uplink_mac[8];	  /* 6 bytes and 2 of zero; all zero: nothing is ours */
	__u8 gateway_mac[8];
	__u32 prefixes4;	  /* used entries of prefix4 */
	__u32 prefixes6;
	struct steer_prefix4 prefix4[STEER_MAX_PREFIXES];
	struct steer_prefix6 prefix6[STEER_MAX_PREFIXES];
	__u32 node4;		  /* the addresses that translated packets leave with, network byte order; 0: none */
	__u16 echo_first;	  /* identifiers of translated echo requests, host byte order, both included */
	__u16 echo_last;
	__u64 node6[2];
};

struct steer_mac {
	__u8 addr[8]; /* 6 bytes and 2 of zero */
};

/* A translated flow that is recognised by more than a port of the node's: its far end, as packets from there show it, network byte order. */
struct steer_flow {
	__u64 remote[2]; /* IPv4: the address in the first 4 bytes, and zeros */
	__u16 remote_port, node_port; /* SCTP; else 0 */
	__u8 proto;
	__u8 family; /* 4 or 6 */
	__u16 zero;
};

/*
 * The configuration is replaced as a whole: the writer fills the entry that is not active, then flips active. An update of an array
 * element is a plain memcpy in the kernel, so writing the active one would show torn prefixes to a running program.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct steer_config);
} config SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} active SEC(".maps");

/* Room for two full sets: one is added before the other is removed. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2 * STEER_MAX_MEMBERS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct steer_mac);
	__type(value, __u32);
} members SEC(".maps");

/* Bitmaps of the translated ports: TCP's, then UDP's. Ports that the node's own sockets hold are not in them. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2 * STEER_PORT_WORDS);
	__type(key, __u32);
	__type(value, __u64);
} ports SEC(".maps");

/* Flows of SCTP, ESP and GRE that workers translate. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, STEER_MAX_FLOWS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct steer_flow);
	__type(value, __u32);
} flows SEC(".maps");

/* CLOCK_MONOTONIC nanoseconds of each worker's last beat, written through a shared mapping. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, STEER_MAX_WORKERS * STEER_HEARTBEAT_STRIDE);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, __u64);
} heartbeats SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, STEER_COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

static __always_inline void steer_count(__u32 counter)
{
	__u64 *n = bpf_map_lookup_elem(&counters, &counter);

	if (n)
		*n += 1;
}

static __always_inline struct steer_config *steer_get_config(void)
{
	__u32 zero = 0, *slot;

	slot = bpf_map_lookup_elem(&active, &zero);
	if (!slot)
		return NULL;
	return bpf_map_lookup_elem(&config, slot);
}

static __always_inline int steer_mac_equal(const void *frame_mac, const __u8 *mac)
{
	return *(__u32 *)frame_mac == *(__u32 *)mac && *(__u16 *)(frame_mac + 4) == *(__u16 *)(mac + 4);
}

static __always_inline int steer_in_prefixes4(const struct steer_config *cfg, __u32 addr)
{
#pragma unroll
	for (int i = 0; i < STEER_MAX_PREFIXES; i++) {
		if (i >= cfg->prefixes4)
			return 0;
		if ((addr & cfg->prefix4[i].mask) == cfg->prefix4[i].addr)
			return 1;
	}
	return 0;
}

static __always_inline int steer_in_prefixes6(const struct steer_config *cfg, __u64 hi, __u64 lo)
{
#pragma unroll
	for (int i = 0; i < STEER_MAX_PREFIXES; i++) {
		if (i >= cfg->prefixes6)
			return 0;
		if ((hi & cfg->prefix6[i].mask[0]) == cfg->prefix6[i].addr[0] &&
		    (lo & cfg->prefix6[i].mask[1]) == cfg->prefix6[i].addr[1])
			return 1;
	}
	return 0;
}

/* steer_translated decides on a frame for the node's address by its L4 header. flow holds the far end's address. */
static __always_inline __u32 steer_translated(const struct steer_config *cfg, struct steer_flow *flow, void *l4, void *data_end)
{
	__u8 *h = l4, proto = flow->proto;
	__u16 id;

	if (l4 + 8 > data_end)
		return STEER_PASSED;
	switch (proto) {
	case IPPROTO_TCP:
	case IPPROTO_UDP: {
		__u16 port = bpf_ntohs(*(__u16 *)(l4 + 2));
		__u32 word = (port >> 6) + (proto == IPPROTO_UDP ? STEER_PORT_WORDS : 0);
		__u64 *bits = bpf_map_lookup_elem(&ports, &word);

		return bits && (*(volatile __u64 *)bits >> (port & 63) & 1) ? STEER_REDIRECTED : STEER_PASSED;
	}
	case IPPROTO_SCTP:
		flow->remote_port = *(__u16 *)l4;
		flow->node_port = *(__u16 *)(l4 + 2);
		/* fallthrough */
	case IPPROTO_ESP:
	case IPPROTO_GRE:
		return bpf_map_lookup_elem(&flows, flow) ? STEER_REDIRECTED : STEER_PASSED;
	case IPPROTO_ICMP:
		id = bpf_ntohs(*(__u16 *)(l4 + 4));
		if (h[0] == 3 || h[0] == 4 || h[0] == 11 || h[0] == 12)
			return STEER_ASK;
		return h[0] == 0 && id >= cfg->echo_first && id <= cfg->echo_last ? STEER_ASK : STEER_PASSED;
	case IPPROTO_ICMPV6:
		id = bpf_ntohs(*(__u16 *)(l4 + 4));
		if (h[0] >= 1 && h[0] <= 4)
			return STEER_ASK;
		return h[0] == 129 && id >= cfg->echo_first && id <= cfg->echo_last ? STEER_ASK : STEER_PASSED;
	}
	return STEER_PASSED;
}

/* steer_node4 and steer_node6 decide on frames without pod addresses. */
static __always_inline __u32 steer_node4(const struct steer_config *cfg, void *ip, void *data_end)
{
	__u32 size = (*(__u8 *)ip & 15) * 4;
	struct steer_flow flow = {};

	if (!(cfg->flags & STEER_FLAG_TRANSLATE) || !cfg->node4 || *(__u32 *)(ip + 16) != cfg->node4 || size < 20)
		return STEER_PASSED;
	if (*(__u16 *)(ip + 6) & bpf_htons(0x3fff))
		return STEER_ASK;
	*(__u32 *)flow.remote = *(__u32 *)(ip + 12);
	flow.family = 4;
	flow.proto = *(__u8 *)(ip + 9);
	return steer_translated(cfg, &flow, ip + size, data_end);
}

static __always_inline __u32 steer_node6(const struct steer_config *cfg, void *ip, void *data_end)
{
	__u8 next = *(__u8 *)(ip + 6);
	struct steer_flow flow = {};
	__u32 off = 40;

	if (!(cfg->flags & STEER_FLAG_TRANSLATE) || !(cfg->node6[0] | cfg->node6[1]) || *(__u64 *)(ip + 24) != cfg->node6[0] ||
	    *(__u64 *)(ip + 32) != cfg->node6[1])
		return STEER_PASSED;
#pragma unroll
	for (int i = 0; i < STEER_MAX_EXTENSIONS; i++) {
		void *x = ip + off;

		/* A routing header is not for the data plane, which refuses them. */
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_DSTOPTS && next != IPPROTO_AH)
			break;
		if (x + 8 > data_end)
			return STEER_MORE;
		off += next == IPPROTO_AH ? (*(__u8 *)(x + 1) + 2) * 4 : (*(__u8 *)(x + 1) + 1) * 8;
		if (off > 40 + STEER_EXTENSION_BYTES)
			return STEER_PASSED;
		next = *(__u8 *)x;
	}
	if (next == IPPROTO_FRAGMENT)
		return STEER_ASK;
	if (off > 40 && ip + off + 8 > data_end)
		return STEER_MORE;
	flow.remote[0] = *(__u64 *)(ip + 8);
	flow.remote[1] = *(__u64 *)(ip + 16);
	flow.family = 6;
	flow.proto = next;
	return steer_translated(cfg, &flow, ip + off, data_end);
}

/*
 * steer_decide returns STEER_REDIRECTED for a frame that is ours, STEER_ASK for one that may be, STEER_MORE if
 * it ends too early, or the counter that says what else becomes of it. A frame too short to
 * tell passes: the host's stack refuses it. Tagged frames belong to VLAN devices of the host and pass.
 */
static __always_inline __u32 steer_decide(const struct steer_config *cfg, void *data, void *data_end)
{
	int src_is_pod, dst_is_pod;
	struct steer_mac mac = {};
	__u32 otherwise;
	__u16 proto;

	if (data + ETH_HLEN > data_end)
		return STEER_PASSED;
	if ((*(__u8 *)data & 1) || !steer_mac_equal(data, cfg->uplink_mac))
		return STEER_PASSED_OTHER_MAC;

	proto = *(__u16 *)(data + 12);
	if (proto == bpf_htons(ETH_P_IP)) {
		void *ip = data + ETH_HLEN;

		if (ip + 20 > data_end)
			return STEER_PASSED;
		src_is_pod = steer_in_prefixes4(cfg, *(__u32 *)(ip + 12));
		dst_is_pod = steer_in_prefixes4(cfg, *(__u32 *)(ip + 16));
		otherwise = steer_node4(cfg, ip, data_end);
	} else if (proto == bpf_htons(ETH_P_IPV6)) {
		void *ip = data + ETH_HLEN;

		if (ip + 40 > data_end)
			return STEER_PASSED;
		src_is_pod = steer_in_prefixes6(cfg, *(__u64 *)(ip + 8), *(__u64 *)(ip + 16));
		dst_is_pod = steer_in_prefixes6(cfg, *(__u64 *)(ip + 24), *(__u64 *)(ip + 32));
		otherwise = steer_node6(cfg, ip, data_end);
	} else {
		return STEER_PASSED;
	}
	if (!src_is_pod && !dst_is_pod)
		return otherwise;

	/* What outside sees pods' own addresses answers to them; the data plane knows who that is. */
	if ((cfg->flags & STEER_FLAG_OUTSIDE) && !src_is_pod && steer_mac_equal(data + ETH_ALEN, cfg->gateway_mac))
		return STEER_REDIRECTED;
	if (cfg->flags & STEER_FLAG_ROUTED) {
		if (!src_is_pod || !steer_mac_equal(data + ETH_ALEN, cfg->gateway_mac))
			return STEER_DROPPED_NOT_MEMBER;
		return STEER_REDIRECTED;
	}
	*(__u32 *)mac.addr = *(__u32 *)(data + ETH_ALEN);
	*(__u16 *)(mac.addr + 4) = *(__u16 *)(data + ETH_ALEN + 4);
	if (!bpf_map_lookup_elem(&members, &mac))
		return STEER_DROPPED_NOT_MEMBER;
	return STEER_REDIRECTED;
}

/*
 * steer_worker_stale reports whether a worker stopped. The coarse clock is a few nanoseconds to read and a few milliseconds behind, and a
 * beat may be newer than the clock that was read before it: hence the signed comparison.
 */
static __always_inline int steer_worker_stale(const struct steer_config *cfg, __u32 worker)
{
	__u32 slot = worker * STEER_HEARTBEAT_STRIDE;
	__u64 *beat = bpf_map_lookup_elem(&heartbeats, &slot);

	if (!beat)
		return 1;
	return (__s64)(bpf_ktime_get_coarse_ns() - *(volatile __u64 *)beat) > (__s64)cfg->heartbeat_limit_ns;
}

/* steer_stale reports whether the worker that owns queue stopped. */
static __always_inline int steer_stale(const struct steer_config *cfg, __u32 queue)
{
	__u32 workers = cfg->workers;

	if (!cfg->heartbeat_limit_ns || !workers)
		return 0;
	return steer_worker_stale(cfg, queue % workers);
}

/* steer_all_stale reports whether every worker stopped: for hooks that do not know which of them a frame will go to. */
static __always_inline int steer_all_stale(const struct steer_config *cfg)
{
	if (!cfg->heartbeat_limit_ns || !cfg->workers)
		return 0;
	for (__u32 i = 0; i < STEER_MAX_WORKERS && i < cfg->workers; i++) {
		if (!steer_worker_stale(cfg, i))
			return 0;
	}
	return 1;
}

#endif
