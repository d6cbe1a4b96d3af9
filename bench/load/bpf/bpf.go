// Package bpf holds the benchmarks' BPF programs, a generator and a sink: their C source, the object compiled from it, and the Go types
// generated for it. Users need no compiler; who changes the C runs go generate with clang and libbpf's headers installed, and commits what it writes.
package bpf

//go:generate go tool bpf2go -target bpfel -cflags "-O2 -g -Wall -Werror -I/usr/include/x86_64-linux-gnu -I/usr/include/aarch64-linux-gnu" -no-global-types Bench bench.c
