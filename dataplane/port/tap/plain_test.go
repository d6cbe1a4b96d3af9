package tap

import (
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/port"
)

// TestPlainCarriesSinglePackets moves TCP between devices without header: the stacks behind them finish checksums and cut segments.
func TestPlainCarriesSinglePackets(t *testing.T) {
	needRoot(t)
	pool := newPool(t, 256, 32)
	pools := []*port.Pool{pool}
	a, nsA := createIn(t, Config{Name: "tapa", Pools: pools, Queues: 2, Plain: true}, "10.99.0.1/24", "fd99::1/64")
	b, nsB := createIn(t, Config{Name: "tapb", Pools: pools, Plain: true}, "10.99.0.2/24", "fd99::2/64")
	require.Equal(t, port.Caps{Chains: true, MaxFrame: MaxFrame}, a.Caps())
	w := newWire(t, pool, a, b)
	for _, dst := range []string{"10.99.0.2", "fd99::2"} {
		transfer(t, nsA, nsB, dst, 4<<20)
	}
	w.halt()
	require.Equal(t, 1514, w.longest)
	require.Equal(t, w.packets, w.trains[port.GSONone])
	require.Zero(t, a.Stats())
	requireNoLeak(t, pool)
}

// TestPlainJumboFrames has packets that do not fit a chunk: they are chains without being trains.
func TestPlainJumboFrames(t *testing.T) {
	needRoot(t)
	pool := newPool(t, 256, 32)
	pools := []*port.Pool{pool}
	a, nsA := createIn(t, Config{Name: "tapa", Pools: pools, Plain: true}, "10.99.0.1/24")
	b, nsB := createIn(t, Config{Name: "tapb", Pools: pools, Plain: true}, "10.99.0.2/24")
	ip(t, "-n", nsA, "link", "set", "tapa", "mtu", "9000")
	ip(t, "-n", nsB, "link", "set", "tapb", "mtu", "9000")
	w := newWire(t, pool, a, b)
	transfer(t, nsA, nsB, "10.99.0.2", 4<<20)
	w.halt()
	require.Equal(t, 9014, w.longest)
	require.Equal(t, w.packets, w.trains[port.GSONone])
	requireNoLeak(t, pool)
}

// TestPlainInPlaceOfHeader re-opens a device with and without header in turn, as daemons with other rights would.
func TestPlainInPlaceOfHeader(t *testing.T) {
	needRoot(t)
	pool := newPool(t, 256, 32)
	pools := []*port.Pool{pool}
	a, nsA := createIn(t, Config{Name: "tapa", Pools: pools, Persist: true}, "10.99.0.1/24")
	b, nsB := createIn(t, Config{Name: "tapb", Pools: pools, Persist: true}, "10.99.0.2/24")
	for _, plain := range []bool{false, true, false, true} {
		require.NoError(t, a.Close())
		require.NoError(t, b.Close())
		in(t, nsA, func() (err error) {
			a, err = Reopen(Config{Name: "tapa", Pools: pools, Queues: 2, Plain: plain})
			return err
		})
		in(t, nsB, func() (err error) { b, err = Reopen(Config{Name: "tapb", Pools: pools, Plain: plain}); return err })
		w := newWire(t, pool, a, b)
		transfer(t, nsA, nsB, "10.99.0.2", 4<<20)
		w.halt()
		if plain {
			require.Equal(t, 1514, w.longest)
			require.Equal(t, w.packets, w.trains[port.GSONone])
		} else {
			require.Greater(t, w.longest, 1514)
			require.Less(t, w.trains[port.GSONone], w.packets)
		}
		requireNoLeak(t, pool)
	}
	require.NoError(t, a.Destroy())
	require.NoError(t, b.Destroy())
	require.ErrorIs(t, inErr(nsA, func() error { _, err := ifindex("tapa"); return err }), ErrNotExist)
}

func TestPlainCreation(t *testing.T) {
	needRoot(t)
	ns := newNetNS(t)
	pools := []*port.Pool{newPool(t, 16, 0)}
	exists := func() error { return inErr(ns, func() error { _, err := ifindex("tapp"); return err }) }
	in(t, ns, func() error {
		p, err := Create(Config{Name: "tapp", Pools: pools, Plain: true})
		require.NoError(t, err)
		_, err = Create(Config{Name: "tapp", Pools: pools, Plain: true})
		require.ErrorIs(t, err, ErrExists)
		require.NoError(t, exists(), "the first stays")
		require.NoError(t, p.Close())
		require.ErrorIs(t, exists(), ErrNotExist, "not persistent")

		_, err = Reopen(Config{Name: "tapp", Pools: pools, Plain: true})
		require.ErrorIs(t, err, ErrNotExist)

		p, err = Create(Config{Name: "tapp", Pools: pools, Plain: true, Persist: true})
		require.NoError(t, err)
		require.NoError(t, p.Close())
		require.NoError(t, exists(), "persistent")
		p, err = Reopen(Config{Name: "tapp", Pools: pools, Plain: true})
		require.NoError(t, err)
		require.NoError(t, p.Close())
		require.NoError(t, exists(), "still persistent")
		return nil
	})
}

func TestCapabilities(t *testing.T) {
	needRoot(t)
	for _, c := range Capabilities() {
		require.NoError(t, c.Err, "%s (Linux %s)", c.Name, c.Kernel)
	}
	old := devicePath
	defer func() { devicePath = old }()
	devicePath = "/dev/null" // a stub: it opens, and knows none of the driver's requests
	caps := Capabilities()
	require.Len(t, caps, 3)
	require.NoError(t, caps[0].Err)
	require.ErrorContains(t, caps[1].Err, "features")
	devicePath = os.DevNull + "/nothing"
	require.Error(t, Capabilities()[0].Err)
}
