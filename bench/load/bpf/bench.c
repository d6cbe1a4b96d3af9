//go:build ignore

// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// The benchmarks' generator and sink. They share no code with the data plane.
//
//   bench_send   run by BPF_PROG_RUN on frames of the kernel's own: writes the headers anew (the kernel recycles frames without resetting
//                them), a port pair that takes turns among the flows, and the time; transmits
//   bench_sink   tc ingress of the receiving device: counts what carries the mark, sorts it by its age, and drops it
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define HEADERS 42 // bytes of Ethernet, IPv4 and UDP
#define MARK 0x6f767062 // "ovpb"
#define BUCKETS 1024 // 16 for each power of two

struct payload {
	__u32 mark;
	__u64 sent_ns; // CLOCK_MONOTONIC
} __attribute__((packed));

volatile const __u64 headers[6]; // and 6 bytes more, which the payload overwrites
volatile const __u32 flows = 1;
// Flows differ in the source port and, beyond so many, in the destination's.
volatile const __u32 source_ports = 1000;

__u32 turn;

SEC("xdp")
int bench_send(struct xdp_md *ctx)
{
	__u8 *data = (__u8 *)(long)ctx->data;
	__u8 *end = (__u8 *)(long)ctx->data_end;
	__u64 *words = (__u64 *)data;
	if (data + HEADERS + sizeof(struct payload) > end)
		return XDP_ABORTED;
	for (int i = 0; i < 6; i++)
		words[i] = headers[i];
	if (flows > 1) {
		__u32 n = turn + 1;
		if (n >= flows)
			n = 0;
		turn = n;
		__u16 *ports = (__u16 *)(data + 34);
		ports[0] = bpf_htons(bpf_ntohs(ports[0]) + n % source_ports);
		ports[1] = bpf_htons(bpf_ntohs(ports[1]) + n / source_ports);
	}
	struct payload *p = (struct payload *)(data + HEADERS);
	p->mark = MARK;
	p->sent_ns = bpf_ktime_get_ns();
	return XDP_TX;
}

struct tally {
	__u64 packets, bytes;
	__u64 age[BUCKETS];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tally);
} tallies SEC(".maps");

static __always_inline __u32 bucket(__u64 v)
{
	__u32 e = 0;
	if (v < 16)
		return v;
	// e: the position of the highest bit, less 4
	if (v >> 36) { e += 32; }
	if (v >> (e + 20)) { e += 16; }
	if (v >> (e + 12)) { e += 8; }
	if (v >> (e + 8)) { e += 4; }
	if (v >> (e + 6)) { e += 2; }
	if (v >> (e + 5)) { e += 1; }
	return (e + 1) * 16 + ((v >> e) & 15);
}

SEC("tc/ingress")
int bench_sink(struct __sk_buff *skb)
{
	struct payload p;
	// A device without Ethernet header would be a bug of the harness.
	if (bpf_skb_load_bytes(skb, HEADERS, &p, sizeof(p)) || p.mark != MARK)
		return -1; // TC_ACT_UNSPEC
	__u32 zero = 0;
	struct tally *t = bpf_map_lookup_elem(&tallies, &zero);
	if (!t)
		return -1;
	// A GSO frame that a TAP's owner wrote has a segment size, but nobody has counted its segments yet.
	__u32 n = 1;
	if (skb->gso_segs > 1)
		n = skb->gso_segs;
	else if (skb->gso_size && skb->len > HEADERS)
		n = (skb->len - HEADERS + skb->gso_size - 1) / skb->gso_size;
	__u64 now = bpf_ktime_get_ns();
	__u32 b = bucket(now > p.sent_ns ? now - p.sent_ns : 0);
	t->packets += n;
	t->bytes += skb->len;
	if (b < BUCKETS)
		t->age[b] += n;
	return 2; // TC_ACT_SHOT
}

char _license[] SEC("license") = "Dual BSD/GPL";
