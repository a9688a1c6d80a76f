// Package guest is what runs inside a sandbox: the agent, PID 1 behind either wall. It builds the container's root, starts
// processes, confines them, keeps their output until it is acknowledged and says how they ended.
//
// The agent runs in one of three forms of the same program:
//
//   - RunContainer: PID 1 of a set of namespaces, given its root and its listening socket by the container runtime.
//   - RunVM: PID 1 of a guest kernel, dialling the daemon over vsock.
//   - RunStage: a copy of a tree, in or out.
//
// A process of the workload is a fork of the agent, which confines itself (confine.go) by system calls alone (child.go).
//
// Lock order: Service.mu, process.mu, children.mu. ring.mu and input.mu are leaves.
package guest
