package icmp

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/packet"
)

// goldenBucket is a token bucket as the textbooks have it.
type goldenBucket struct {
	tokens, burst, perSecond float64
	last                     int64
}

func (g *goldenBucket) allow(now int64) bool {
	g.tokens = min(g.burst, g.tokens+float64(now-g.last)/1e9*g.perSecond)
	g.last = now
	if g.tokens < 1 {
		return false
	}
	g.tokens--
	return true
}

func TestLimiterIsATokenBucket(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for _, l := range []Limits{{Rate: 100, Burst: 50, SourceRate: 1000, SourceBurst: 1000}, {Rate: 1000, Burst: 1, SourceRate: 1000, SourceBurst: 1}, {Rate: 8, Burst: 16, SourceRate: 8, SourceBurst: 16}} {
		limiter := NewLimiter(l)
		model := goldenBucket{tokens: float64(l.Burst), burst: float64(l.Burst), perSecond: float64(l.Rate)}
		now := int64(r.Uint32())
		model.last = now
		mismatches := 0
		for range 20_000 {
			// Steps of whole and half token intervals, and now and then a pause.
			now += int64(r.IntN(3)) * int64(time.Second) / int64(2*l.Rate)
			if r.IntN(500) == 0 {
				now += int64(time.Minute)
			}
			if limiter.Allow(now, router4) != model.allow(now) {
				mismatches++ // the model's floating-point token may be a hair short
			}
		}
		require.LessOrEqual(t, mismatches, 40, "%+v", l)
	}
}

func TestLimiterDefaults(t *testing.T) {
	l := NewLimiter(Limits{})
	sent := 0
	for i := range 10_000 { // each from a source of its own
		if l.Allow(1e12, packet.Addr{Hi: 0xfd << 56, Lo: uint64(i)}) {
			sent++
		}
	}
	require.Equal(t, 50, sent, "the burst")
	for ms := range int64(10_000) {
		if l.Allow(1e12+ms*1e6, packet.Addr{Hi: 0xfd << 56, Lo: uint64(ms)}) {
			sent++
		}
	}
	require.InDelta(t, 50+10*100, sent, 2, "the rate, over ten seconds")
}

// One pod that does nothing but provoke errors gets its share and leaves the rest to others.
func TestLimiterIsFairToOtherSources(t *testing.T) {
	l := NewLimiter(Limits{})
	greedy, quiet := packet.AddrFrom4(0x0af40102), packet.AddrFrom4(0x0af40103)
	for l.slot(quiet) == l.slot(greedy) { // one time in 256
		quiet.Lo++
	}
	var fromGreedy, fromQuiet int
	for ms := range int64(10_000) {
		for range 100 {
			if l.Allow(ms*1e6, greedy) {
				fromGreedy++
			}
		}
		if ms%100 == 50 && l.Allow(ms*1e6, quiet) {
			fromQuiet++
		}
	}
	require.InDelta(t, 10+10*20, fromGreedy, 2)
	require.Equal(t, 100, fromQuiet)
}

func TestLimiterSpreadsSources(t *testing.T) {
	l := NewLimiter(Limits{})
	var used [sourceBuckets]int
	for i := range 250 {
		used[l.slot(packet.AddrFrom4(0x0af40100+uint32(i)))]++
		used[l.slot(packet.Addr{Hi: 0xfd12_3456_789a_0000, Lo: 1<<32 | uint64(i)})]++
	}
	empty, most := 0, 0
	for _, n := range used {
		most = max(most, n)
		if n == 0 {
			empty++
		}
	}
	// 500 balls in 256 bins leave 36 empty on average, and 8 in the fullest.
	require.Less(t, empty, 90)
	require.Less(t, most, 16)
	require.NotEqual(t, l.key, NewLimiter(Limits{}).key, "the key is random")
}

func TestLimiterAllocatesNothing(t *testing.T) {
	l := NewLimiter(Limits{})
	now := int64(0)
	require.Zero(t, testing.AllocsPerRun(100, func() {
		now += 1e6
		l.Allow(now, router6)
	}))
}

func BenchmarkLimiter(b *testing.B) {
	l := NewLimiter(Limits{})
	now := int64(0)
	for b.Loop() {
		now += 1000
		l.Allow(now, router4)
	}
}
