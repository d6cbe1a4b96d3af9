package load

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/stretchr/testify/require"
)

// The buckets of the sink's histogram cover every value once, and are no wider than a sixteenth of it.
func TestBuckets(t *testing.T) {
	last := time.Duration(-1)
	for b := range buckets {
		top := bucketTop(b)
		if top < 0 {
			break // beyond what a duration holds
		}
		require.Greater(t, top, last)
		if b > 16 {
			require.LessOrEqual(t, float64(top-last), float64(last)/16+1)
		}
		last = top
	}
	require.Greater(t, last, time.Hour)
}

func TestQuantiles(t *testing.T) {
	var tally Tally
	require.Zero(t, tally.Quantile(0.5))
	tally.age[10], tally.age[20] = 90, 10
	require.Equal(t, bucketTop(10), tally.Quantile(0.5))
	require.Equal(t, bucketTop(20), tally.Quantile(0.99))
	require.Equal(t, bucketTop(20), tally.Quantile(1))
	require.Zero(t, tally.Since(tally).Quantile(0.5))
}

func TestRoundTripQuantiles(t *testing.T) {
	require.Zero(t, RoundTrips(nil).Quantile(0.5))
	r := RoundTrips{1, 2, 3, 4}
	require.Equal(t, time.Duration(3), r.Quantile(0.5))
	require.Equal(t, time.Duration(4), r.Quantile(1))
}

func TestFramesAreGood(t *testing.T) {
	a := Endpoint{Addr: netip.MustParseAddr("10.244.1.2"), MAC: []byte{2, 0, 0, 0, 0, 1}, Next: []byte{2, 0, 0, 0, 0, 2}}
	f := frame(a, netip.MustParseAddr("10.244.1.3"), 64, 1, 2)
	require.Len(t, f, 64)
	p := gopacket.NewPacket(f, layers.LayerTypeEthernet, gopacket.DecodeStreamsAsDatagrams)
	require.Nil(t, p.ErrorLayer())
	ip := p.Layer(layers.LayerTypeIPv4).(*layers.IPv4)
	require.EqualValues(t, 50, ip.Length)
	sum := ip.Checksum
	buf := gopacket.NewSerializeBuffer()
	require.NoError(t, ip.SerializeTo(buf, gopacket.SerializeOptions{ComputeChecksums: true}))
	require.Equal(t, sum, ip.Checksum)
	require.EqualValues(t, 30, p.Layer(layers.LayerTypeUDP).(*layers.UDP).Length)
}

func TestBusyTime(t *testing.T) {
	const first = "cpu  0 0 0 100 0 0 0 0\ncpu0 10 0 5 50 0 0 0 0 0 0\ncpu1 10 0 5 50 0 0 0 0 0 0\nintr 1 2\n"
	const second = "cpu  0 0 0 100 0 0 0 0\ncpu0 10 0 5 100 25 0 0 0 0 0\ncpu1 10 0 5 150 0 0 0 0 0 0\n"
	now := time.Now()
	a, err := parseCPU(first, now)
	require.NoError(t, err)
	b, err := parseCPU(second, now.Add(time.Second))
	require.NoError(t, err)
	require.Equal(t, 250*time.Millisecond, b.Busy(a), "of core 0, which was idle for half and waiting for a quarter of the second; core 1 was idle all of it")
	_, err = parseCPU("intr 1 2\n", now)
	require.Error(t, err)
}
