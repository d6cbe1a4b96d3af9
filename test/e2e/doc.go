// Package e2e has the end-to-end suites: real daemons in a lab on this machine, real devices, real sockets as pods. Everything is
// in its tests; they need root and skip, with the reason, without it. Each makes its own lab under a name that starts with "ovpt": most
// of them wait for something most of the time, and so several run at once (go test -parallel).
//
//	go test ./test/e2e            all, with 1 GiB transfers
//	go test -short ./test/e2e     64 MiB transfers
//	OVERPLANE_E2E=full go test -timeout 4h ./test/e2e
//	                              the whole suite on every rung, and floods, connections and transfers of address translation at full length
//
// The programs under test are built on the way, or taken from the folder that OVERPLANE_BIN names.
package e2e
