// Package controller is the program overplane-controller without its command line: a configuration from the environment, and the life of the process.
//
//	Load ─> Run: store ─> server ─> listeners for nodes, operators, metrics ─> ready ─> until the context ends: streams end, the lead is given up
package controller
