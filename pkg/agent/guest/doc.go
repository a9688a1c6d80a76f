// Package guest is what runs inside a sandbox: the agent, PID 1 behind either wall. It builds the container's root, starts
// processes, confines them, keeps their output until it is acknowledged and says how they ended.
//
// The agent runs in one of three forms of the same program:
//
//   - RunContainer: PID 1 of a set of namespaces, given its root and its listening socket by the container runtime.
//   - RunVM: PID 1 of a guest kernel, dialling the daemon over vsock.
//   - RunStage: the child between the agent's fork and the workload's execve. It confines itself (confine.go) and turns
//     into the workload, or does a copy.
//
// Lock order: Service.mu, process.mu, children.mu. ring.mu and input.mu are leaves.
package guest
