package snat

import (
	"sync/atomic"
	"unsafe"
)

// cast views memory as n values of T, a type without pointers. The memory is a page-aligned mapping that the caller keeps for as long as the slice is used,
// starts at a multiple of T's alignment and holds at least n values: asserted here.
func cast[T any](mem []byte, n int) []T {
	var v T
	if n == 0 {
		return nil
	}
	p := unsafe.Pointer(unsafe.SliceData(mem))
	if uintptr(n)*unsafe.Sizeof(v) > uintptr(len(mem)) || uintptr(p)%unsafe.Alignof(v) != 0 {
		panic("snat: table does not fit its memory")
	}
	return unsafe.Slice((*T)(p), n)
}

// sizeOf is the size of a T in bytes.
func sizeOf[T any]() int {
	var v T
	return int(unsafe.Sizeof(v))
}

// headWord is the first 8 bytes of a record: ports, protocol and flags. A record lies in a page-aligned mapping at a multiple of its 64
// bytes, so that the word is aligned as 64-bit atomic stores ask.
func headWord(r *record) *uint64 { return (*uint64)(unsafe.Pointer(r)) }

// publish stores a record's key and flags, all at once and after everything else of it.
func publish(r *record, k *tuple, flags uint8) {
	head := record{inPort: k.inPort, remPort: k.remPort, extPort: k.extPort, proto: k.proto, flags: flags}
	atomic.StoreUint64(headWord(r), *headWord(&head))
}

// retire marks a record as not in use before anything else of it changes.
func retire(r *record) { atomic.StoreUint64(headWord(r), 0) }
