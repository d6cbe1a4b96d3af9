package xdp

import "testing"

// FuzzXDPAttr parses arbitrary bytes as the kernel's attribute.
func FuzzXDPAttr(f *testing.F) {
	f.Add([]byte{5, 0, 2, 0, 1, 0, 0, 0, 8, 0, 4, 0, 42, 0, 0, 0})
	f.Add([]byte{8, 0, 4, 0, 42, 0})
	f.Add([]byte{0, 0, 4, 0})
	f.Fuzz(func(t *testing.T, b []byte) { xdpAttrProgram(b) })
}

func TestXDPAttr(t *testing.T) {
	if got := xdpAttrProgram([]byte{5, 0, 2, 0, 1, 0, 0, 0, 8, 0, 4, 0, 42, 0, 0, 0}); got != 42 {
		t.Errorf("program %d, want 42", got)
	}
}
