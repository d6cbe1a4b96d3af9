// Package bpf holds the steering programs: their C source, the objects compiled from it, and the Go types generated for their maps. Users
// need no compiler; who changes the C runs go generate with clang and libbpf's headers installed, and commits what it writes.
package bpf

// Both multiarch folders are named so that the command is the same on every machine; a missing one is ignored.
//go:generate go tool bpf2go -target bpfel -cflags "-O2 -g -Wall -Werror -I/usr/include/x86_64-linux-gnu -I/usr/include/aarch64-linux-gnu" -type steer_config -type steer_prefix4 -type steer_prefix6 -type steer_mac -type steer_flow -no-global-types Steer steer_xdp.c
//go:generate go tool bpf2go -target bpfel -cflags "-O2 -g -Wall -Werror -I/usr/include/x86_64-linux-gnu -I/usr/include/aarch64-linux-gnu" -no-global-types TC steer_tc.c
