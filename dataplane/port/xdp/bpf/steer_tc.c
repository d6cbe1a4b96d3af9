//go:build ignore

// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * The tc hooks of the steering, for uplinks that are driven through a device of the TUN/TAP driver:
 *
 *	wire -> uplink's ingress, after GRO: whole frames --- not ours ---> next program, kernel's stack
 *	                 | ours
 *	                 v
 *	        device, transmitted = readable by a worker
 *
 *	worker writes -> device's ingress --- all of it ---> uplink, transmitted: the NIC segments
 *
 * And for uplinks of every kind, on the host port:
 *
 *	worker writes -> host port's ingress --- as it came from the wire ---> uplink's ingress, marked: the kernel's stack
 *	                      | else
 *	                      v
 *	                 kernel's stack
 *
 *	kernel's stack -> uplink's egress --- with a pod's source ---> host port, transmitted = readable by a worker
 *	                      | else
 *	                      v
 *	                    wire
 *
 * A frame keeps its Ethernet header, its GSO metadata and its unfinished checksum both ways, and no kernel table is asked. Without a
 * reader the device has no carrier and drops.
 */
#include "steer.h"

/* The values of enum tcx_action_base (Linux 6.6), which cls_bpf in direct-action mode understands as well. */
#define ACT_NEXT -1 /* the next program or filter decides */
#define ACT_SHOT 2

/* Set before loading. */
volatile const __u32 uplink_ifindex;
volatile const __u32 device_ifindex;
volatile const __u8 host_gateway[8]; /* the data plane's Ethernet address at the host port, 6 bytes and 2 of zero */

#define STEER_HEADERS (ETH_HLEN + 60 + 8) /* what steer_decide reads at most, IPv6 extension headers aside */
#define STEER_ALL_HEADERS (ETH_HLEN + 40 + STEER_EXTENSION_BYTES + 8)

SEC("tc")
int overplane_tc_in(struct __sk_buff *skb)
{
	struct steer_config *cfg = steer_get_config();
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	__u32 verdict, ask;

	if (!cfg)
		return ACT_NEXT;
	/* The data plane has seen it already. */
	if (skb->mark == STEER_MARK_HOST) {
		skb->mark = 0;
		return ACT_NEXT;
	}
	/* The kernel took the tag out of the frame: it is a VLAN device's. */
	if (skb->vlan_present) {
		steer_count(STEER_PASSED);
		return ACT_NEXT;
	}
	/* Drivers may leave headers in pages, out of a program's reach. */
	if (data + STEER_HEADERS > data_end) {
		__u32 want = skb->len < STEER_HEADERS ? skb->len : STEER_HEADERS;

		bpf_skb_pull_data(skb, want);
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
	}
	verdict = steer_decide(cfg, data, data_end);
	if (verdict == STEER_MORE) {
		__u32 want = skb->len < STEER_ALL_HEADERS ? skb->len : STEER_ALL_HEADERS;

		bpf_skb_pull_data(skb, want);
		verdict = steer_decide(cfg, (void *)(long)skb->data, (void *)(long)skb->data_end);
		if (verdict == STEER_MORE)
			verdict = STEER_PASSED;
	}
	ask = verdict == STEER_ASK;
	if (ask)
		verdict = STEER_REDIRECTED;
	/* The device chooses the queue, by flow, and with it the worker: what it cannot deliver it drops. */
	if (verdict == STEER_REDIRECTED && steer_all_stale(cfg))
		verdict = ask ? STEER_PASSED : STEER_DROPPED_STALE;
	steer_count(verdict);
	switch (verdict) {
	case STEER_REDIRECTED:
		return bpf_redirect(device_ifindex, 0);
	case STEER_PASSED:
	case STEER_PASSED_OTHER_MAC:
		return ACT_NEXT;
	}
	return ACT_SHOT;
}

SEC("tc")
int overplane_tc_out(struct __sk_buff *skb)
{
	skb->mark = STEER_MARK_OUT;
	return bpf_redirect(uplink_ifindex, 0);
}

/*
 * Frames that the kernel itself sends by the uplink with a pod's address: to a service whose backend is another node, or somewhere outside, which the kernel routes by
 * the uplink. The data plane is to send them, since it alone knows that their replies must come back to the kernel.
 */
SEC("tc")
int overplane_tc_kernel(struct __sk_buff *skb)
{
	struct steer_config *cfg = steer_get_config();
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	int pod = 0;
	__u16 proto;

	if (!cfg)
		return ACT_NEXT;
	if (skb->mark == STEER_MARK_OUT) { /* a worker's */
		skb->mark = 0;
		return ACT_NEXT;
	}
	if (skb->vlan_present)
		return ACT_NEXT;
	if (data + ETH_HLEN + 40 > data_end) {
		__u32 want = skb->len < ETH_HLEN + 40 ? skb->len : ETH_HLEN + 40;

		bpf_skb_pull_data(skb, want);
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
	}
	if (data + ETH_HLEN + 20 > data_end)
		return ACT_NEXT;
	proto = *(__u16 *)(data + 12);
	if (proto == bpf_htons(ETH_P_IP))
		pod = steer_in_prefixes4(cfg, *(__u32 *)(data + ETH_HLEN + 12));
	else if (proto == bpf_htons(ETH_P_IPV6) && data + ETH_HLEN + 40 <= data_end)
		pod = steer_in_prefixes6(cfg, *(__u64 *)(data + ETH_HLEN + 8), *(__u64 *)(data + ETH_HLEN + 16));
	if (!pod)
		return ACT_NEXT;
	bpf_skb_store_bytes(skb, 0, (const void *)host_gateway, ETH_ALEN, 0);
	return bpf_redirect(device_ifindex, 0);
}

/*
 * What the data plane gives back to the host has the uplink's address as its destination, as it had on the wire; what it routes to the host has the host
 * port's own. The stack gets it by the uplink, so that rp_filter and sockets bound to the uplink see what they would have seen.
 */
SEC("tc")
int overplane_tc_host(struct __sk_buff *skb)
{
	struct steer_config *cfg = steer_get_config();
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;

	if (!cfg || data + ETH_HLEN > data_end || !steer_mac_equal(data, cfg->uplink_mac))
		return ACT_NEXT;
	skb->mark = STEER_MARK_HOST;
	return bpf_redirect(uplink_ifindex, BPF_F_INGRESS);
}

char _license[] SEC("license") = "Dual BSD/GPL";
