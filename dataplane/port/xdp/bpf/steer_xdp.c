//go:build ignore

// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * The XDP hook of the steering: frames that are ours go to the AF_XDP socket of the queue they arrived on (an AF_XDP socket receives from
 * no other), all else goes on to the kernel's stack.
 */
#include "steer.h"

struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, STEER_MAX_QUEUES);
	__type(key, __u32);
	__type(value, __u32);
} xsks SEC(".maps");

static __always_inline int steer_xdp(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct steer_config *cfg = steer_get_config();
	__u32 queue = ctx->rx_queue_index;
	__u32 verdict, ask;

	if (!cfg)
		return XDP_PASS;
	verdict = steer_decide(cfg, data, data_end);
	if (verdict == STEER_MORE)
		verdict = STEER_PASSED;
	ask = verdict == STEER_ASK;
	if (ask)
		verdict = STEER_REDIRECTED;
	if (verdict == STEER_REDIRECTED) {
		/*
		 * Passing what is ours would make the host's stack answer it, with a reset or an unreachable: a live flow dies of that,
		 * a lost packet is sent again. A closed socket leaves the map by itself; a hung process does not, hence the heartbeat.
		 */
		if (!bpf_map_lookup_elem(&xsks, &queue))
			verdict = STEER_DROPPED_NO_SOCKET;
		else if (steer_stale(cfg, queue))
			verdict = STEER_DROPPED_STALE;
		/* What may be the host's is, when nobody is there to tell. */
		if (ask && verdict != STEER_REDIRECTED)
			verdict = STEER_PASSED;
	}
	steer_count(verdict);
	switch (verdict) {
	case STEER_REDIRECTED:
		return bpf_redirect_map(&xsks, queue, XDP_DROP);
	case STEER_PASSED:
	case STEER_PASSED_OTHER_MAC:
		return XDP_PASS;
	}
	return XDP_DROP;
}

/* Two sections with one body: a kernel or driver that refuses multi-buffer XDP is given the second. */
SEC("xdp.frags")
int overplane_xdp_frags(struct xdp_md *ctx)
{
	return steer_xdp(ctx);
}

SEC("xdp")
int overplane_xdp(struct xdp_md *ctx)
{
	return steer_xdp(ctx);
}

char _license[] SEC("license") = "Dual BSD/GPL";
