package xdp

import (
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestMemory(t *testing.T) {
	m, err := NewMemory(1<<20 + 100)
	require.NoError(t, err)
	require.Len(t, m.Bytes(), 1<<20+100)
	m.Bytes()[1<<20] = 7
	require.ErrorIs(t, unix.Ftruncate(m.FD(), 10), unix.EPERM, "sealed")

	// Another process is given the descriptor.
	fd, err := unix.FcntlInt(uintptr(m.FD()), unix.F_DUPFD_CLOEXEC, 0)
	require.NoError(t, err)
	require.NoError(t, m.Close())
	require.NoError(t, m.Close(), "twice")
	m, err = OpenMemory(fd)
	require.NoError(t, err)
	require.Len(t, m.Bytes(), 1<<20+100)
	require.Equal(t, byte(7), m.Bytes()[1<<20])
	require.NoError(t, m.Close())

	_, err = NewMemory(0)
	require.ErrorContains(t, err, "at least one")
	f, err := os.CreateTemp(t.TempDir(), "")
	require.NoError(t, err)
	defer f.Close()
	_, err = OpenMemory(int(f.Fd()))
	require.ErrorContains(t, err, memoryName)
}

func TestHugeMemory(t *testing.T) {
	m, err := NewHugeMemory(3 << 20)
	if err != nil {
		require.ErrorContains(t, err, "reserve 2 huge pages of 2 MiB")
		t.Skip(err)
	}
	require.Len(t, m.Bytes(), 3<<20)
	require.NoError(t, m.Close())
}
