package xdp

import (
	"fmt"
	"testing"

	asavie "github.com/asavie/xdp"
	"github.com/stretchr/testify/require"
)

// TestInteropAsavie puts an independent AF_XDP implementation on the far end: it checks what we send, and sends it back to us.
func TestInteropAsavie(t *testing.T) {
	for _, queues := range []int{1, 2} {
		t.Run(fmt.Sprintf("queues=%d", queues), func(t *testing.T) {
			v := newVeth(t, queues, 1500)
			s := openSteered(t, v, steeredConfig{workers: queues})
			peers := make([]*asavie.Socket, queues)
			in(t, v.far, func() {
				prog, err := asavie.NewProgram(queues)
				require.NoError(t, err)
				require.NoError(t, prog.Attach(v.farIndex))
				t.Cleanup(func() { _ = prog.Close() })
				for q := range peers {
					peers[q], err = asavie.NewSocket(v.farIndex, q, &asavie.SocketOptions{
						NumFrames: 1024, FrameSize: 2048, FillRingNumDescs: 256, CompletionRingNumDescs: 256, RxRingNumDescs: 256, TxRingNumDescs: 256,
					})
					require.NoError(t, err)
					t.Cleanup(func() { _ = peers[q].Close() })
					require.NoError(t, prog.Register(q, peers[q].FD()))
					peers[q].Fill(peers[q].GetDescs(peers[q].NumFreeFillSlots()))
				}
			})
			const packets, burst = 10000, 24
			for i := 0; i < packets; i += burst {
				q := i / burst % queues
				back := map[uint32][]byte{}
				want := map[uint32][]byte{}
				for k := i; k < i+burst; k++ {
					seq := uint32(k)
					want[seq] = ipFrame(v.nearMAC, v.farMAC, pod4, remote4, length(k, 1500), seq)
					back[seq] = ipFrame(v.farMAC, v.nearMAC, remote4, pod4, length(k, 1500), seq)
					s.transmit(t, q, want[seq])
				}
				s.queues[q].Flush()
				for len(want) > 0 {
					n, _, err := peers[q].Poll(2000)
					require.NoError(t, err)
					require.NotZero(t, n, "%d packets of %d missing", len(want), i)
					for _, d := range peers[q].Receive(n) {
						b := peers[q].GetFrame(d)
						require.Equal(t, want[seqOf(b)], b)
						delete(want, seqOf(b))
					}
					peers[q].Fill(peers[q].GetDescs(peers[q].NumFreeFillSlots()))
				}

				descs := peers[q].GetDescs(burst)
				require.Len(t, descs, burst)
				for k := range descs {
					b := back[uint32(i+k)]
					descs[k].Len = 2048
					descs[k].Len = uint32(copy(peers[q].GetFrame(descs[k]), b))
				}
				require.Equal(t, burst, peers[q].Transmit(descs))
				for peers[q].NumTransmitted() > 0 {
					_, _, err := peers[q].Poll(0)
					require.NoError(t, err)
				}
				done := s.poll(func(p []byte, on int) bool {
					require.Equal(t, q, on, "received on the queue it was sent from")
					require.Equal(t, back[seqOf(p)], p)
					delete(back, seqOf(p))
					return len(back) == 0
				}, 2000)
				require.True(t, done, "%d packets of %d missing", len(back), i)
			}
			s.requireNoLeak(t)
		})
	}
}
