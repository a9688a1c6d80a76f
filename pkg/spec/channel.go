package spec

import (
	"crypto/sha256"
	"time"
)

// A guest that is cloned from a template can't be told who it is at its birth: it was born before. It is adopted instead.
//
// While it has no token its agent dials with a preface whose token is all zeros. The daemon answers with an adoption:
//
//	bytes 0-31   the boot token
//	bytes 32-95  random bytes for the guest kernel's generator
//
// and the agent, once it has taken both over, with the preface of that token; from then on the connection, and every
// later one, is like any other. Of an agent that was told its token at its birth nothing of this is accepted.
//
// Where the host has no vsock that can be cloned, the agent's connections are streams of one virtio-serial port, which
// carries bytes and knows no beginning: a daemon that comes to it may find the middle of what its predecessor said. So a
// daemon first sends a greeting,
//
//	bytes 0-15   a mark, by which the agent finds it among whatever else comes
//	bytes 16-31  random bytes
//
// and the agent, which looks for the mark all the time, drops whatever was under way and sends the random bytes back,
// before which the daemon ignores everything. After that both speak smux, the agent opening the streams. The mark of an
// agent that has a token is not known to those whose bytes the daemon carries.
// A guest that goes on from a snapshot was somebody before, and proves so to whoever has the snapshot: its agent's next connection
// has the preface of the token that the snapshot's guest had. On it the daemon sends ReadoptionMark and an adoption, and the agent
// answers as above. Its workload's processes are frozen meanwhile.
const (
	AdoptionEntropyLen = 64
	AdoptionLen        = TokenLen + AdoptionEntropyLen
	// ReadoptionMark is the first byte of a connection on which an adoption follows: see HandoverMark for what others begin with.
	ReadoptionMark     = 0xfc
	ChannelMarkLen     = 16
	ChannelGreetingLen = 2 * ChannelMarkLen
	// ChannelVersion of smux has a window for each stream, so that one that nobody reads does not stop the others.
	ChannelVersion = 2
	// ChannelFrame is how much a frame carries at most: what the kernel's driver takes in one piece, with its header.
	ChannelFrame = 32<<10 - 8
	// ChannelStreamBuffer bounds what is on its way in one stream, ChannelBuffer in all of them: more is not accepted
	// from a guest, and each byte of it may cost a hundred when it comes alone.
	ChannelStreamBuffer = 128 << 10
	ChannelBuffer       = 512 << 10
	// ChannelRetry is between two attempts of an agent to read a port that nobody holds at the other end.
	ChannelRetry = 5 * time.Millisecond
)

// ChannelMark is the mark of greetings to the agent of a token; the zero token's is that of agents that have none.
func ChannelMark(token [TokenLen]byte) (mark [ChannelMarkLen]byte) {
	sum := sha256.Sum256(append([]byte("sandboxd channel mark\x00"), token[:]...))
	copy(mark[:], sum[:])
	return mark
}
