package guest

import "time"

// Limits of what one sandbox's agent keeps and waits for. The daemon relies on the first two (agent.proto says them).
const (
	// maxOutputBytes is how much unacknowledged output the agent keeps for one process, both streams together. Past it
	// the process waits in write(2).
	maxOutputBytes = 1 << 20
	// maxCallBytes is the most data one ReadOutput or WriteInput carries. A ttrpc message holds 4 MiB.
	maxCallBytes = 1 << 20
	// chunkCost is what a chunk counts for beside its bytes, so that a process that writes single bytes to alternating
	// streams can't make the agent's own bookkeeping large.
	chunkCost = 64
	// maxWait bounds a long poll, as agent.proto says.
	maxWait = 60 * time.Second
	// inputWait is how long WriteInput waits for a process that does not read, before it tells how far it got.
	inputWait = 10 * time.Second
	// stageTimeout bounds the way from fork to execve. It takes milliseconds; only a file system that hangs makes it long.
	stageTimeout = 30 * time.Second
	// maxGrace bounds the time between SIGTERM and SIGKILL at shutdown, as agent.proto says.
	maxGrace = 600 * time.Second
	// killWait is how long a shutdown waits for killed processes to be gone. A process in an uninterruptible sleep may
	// take longer; the end of PID 1 ends it too.
	killWait = 5 * time.Second
	// closeWait is how long answers under way may take to leave when the agent ends.
	closeWait = 2 * time.Second
	// maxProcesses is how many processes, running or not released, the table holds.
	maxProcesses = 4096
	// maxReleased is how many released ids are remembered: far more than calls can be under way.
	maxReleased = 4096
	// maxConfigBytes bounds the JSON of an OCI config or process.
	maxConfigBytes = 2 << 20
	// maxIDLen bounds the ids the daemon chooses.
	maxIDLen = 128
)
