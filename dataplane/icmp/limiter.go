package icmp

import (
	"math/rand/v2"

	"github.com/overplane/overplane/dataplane/packet"
)

// Limits says how many errors a worker may send. Zero fields take the defaults.
type Limits struct {
	Rate        int // errors a second, all sources together; default 100
	Burst       int // errors at once after a pause; default 50
	SourceRate  int // errors a second to one source; default a fifth of Rate, at least 1
	SourceBurst int // errors at once to one source after a pause; default a fifth of Burst, at least 1
}

// sourceBuckets is the number of per-source buckets: 250 pods with two addresses each share them two by two. 8 KiB a worker.
const sourceBuckets = 256

// Limiter is one worker's budget of errors: a token bucket for all of them (RFC 1812 section 4.3.2.8, RFC 4443 section 2.4(f)), and smaller ones, picked by a
// keyed hash of the address, so that one source cannot use up the whole. Sources whose hashes meet share a bucket. Fixed memory. Made by NewLimiter; for
// one goroutine.
type Limiter struct {
	all     bucket
	rate    rate
	source  rate
	key     uint64
	sources [sourceBuckets]bucket
}

// bucket is a token bucket in the form of the virtual scheduling algorithm (GCRA): the time at which it is full again.
type bucket struct{ full int64 }

// rate is a token bucket's parameters in nanoseconds.
type rate struct {
	interval  int64 // between two tokens
	tolerance int64 // how far full may lie ahead of now and still leave one token
}

func newRate(perSecond, burst int) rate {
	interval := max(int64(1e9)/int64(perSecond), 1)
	return rate{interval: interval, tolerance: interval * int64(burst-1)}
}

// NewLimiter makes a limiter whose buckets are full.
func NewLimiter(l Limits) *Limiter {
	if l.Rate <= 0 {
		l.Rate = 100
	}
	if l.Burst <= 0 {
		l.Burst = 50
	}
	if l.SourceRate <= 0 {
		l.SourceRate = max(l.Rate/5, 1)
	}
	if l.SourceBurst <= 0 {
		l.SourceBurst = max(l.Burst/5, 1)
	}
	return &Limiter{rate: newRate(l.Rate, l.Burst), source: newRate(l.SourceRate, l.SourceBurst), key: rand.Uint64()}
}

// Allow reports whether an error may be sent to src now, and if so takes it off the budget. now is in nanoseconds of any clock that does not
// go backwards; it may be as coarse as once a poll.
func (l *Limiter) Allow(now int64, src packet.Addr) bool {
	s := &l.sources[l.slot(src)]
	if !s.has(now, l.source) || !l.all.has(now, l.rate) {
		return false
	}
	s.take(now, l.source)
	l.all.take(now, l.rate)
	return true
}

func (b *bucket) has(now int64, r rate) bool { return b.full-now <= r.tolerance }

func (b *bucket) take(now int64, r rate) { b.full = max(b.full, now) + r.interval }

// slot hashes an address. The key keeps a pod from choosing addresses that share another's bucket.
func (l *Limiter) slot(a packet.Addr) int {
	h := (a.Hi ^ l.key) * 0x9e3779b97f4a7c15
	h = (h ^ h>>32 ^ a.Lo) * 0xd6e8feb86659fd93
	h ^= h >> 32
	h *= 0x9e3779b97f4a7c15
	return int(h >> 56)
}
