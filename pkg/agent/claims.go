package agent

import (
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// maxCallBytes is the most data of one call: agent.proto.
	maxCallBytes = 1 << 20
	// readBytes is how much output is asked for at once: a quarter of what the agent keeps, so that the process goes on
	// writing while it travels. Larger answers cost more than they save (64 MiB took 0.50 s of processor time in pieces
	// of 256 KiB, 0.63 s in pieces of 1 MiB).
	readBytes = 256 << 10
	// maxChunks bounds the pieces of one answer. The agent's own bookkeeping lets it keep 16 Ki of them at most.
	maxChunks = 16 << 10
	// maxClockLead is how far ahead of the host's clock an agent's may be.
	maxClockLead = 5 * time.Minute
	// maxName bounds version strings and the like, in bytes.
	maxName = 128
)

// text makes a string of the sandbox harmless to print and store: bounded, valid, and without control characters that a
// terminal or a log would obey.
func text(s string, limit int) string {
	if len(s) > limit {
		s = s[:limit]
		for !utf8.ValidString(s) && len(s) > 0 && !utf8.RuneStart(s[len(s)-1]) {
			s = s[:len(s)-1]
		}
	}
	return strings.Map(func(r rune) rune {
		switch {
		case r == utf8.RuneError:
			return '?'
		case r == '\n' || r == '\t':
			return ' '
		case !unicode.IsPrint(r):
			return -1
		}
		return r
	}, s)
}

// earliest is before anything this program ever did: a time before it comes from a clock that was never set.
var earliest = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)

// clockTime is an agent's time stamp, or the host's where that makes no sense.
func clockTime(t *timestamppb.Timestamp) time.Time {
	now := time.Now()
	if t.CheckValid() != nil {
		return now
	}
	if at := t.AsTime(); at.After(earliest) && at.Before(now.Add(maxClockLead)) {
		return at
	}
	return now
}

// chunksOf checks an answer to ReadOutput that asked for at most limit bytes.
func chunksOf(r *agentv1.ReadOutputResponse, limit int) ([]Chunk, bool, error) {
	if len(r.Chunks) > maxChunks {
		return nil, false, protocolError("%d chunks of output at once", len(r.Chunks))
	}
	var out []Chunk
	for _, c := range r.Chunks {
		if len(c.GetData()) == 0 || len(c.Data) > limit {
			return nil, false, protocolError("a chunk of %d bytes where at most %d were asked for", len(c.GetData()), limit)
		}
		limit -= len(c.Data)
		if c.Stream != agentv1.Stream_STREAM_STDOUT && c.Stream != agentv1.Stream_STREAM_STDERR {
			return nil, false, protocolError("output stream %d", c.Stream)
		}
		out = append(out, Chunk{Stream: uint8(c.Stream), Time: clockTime(c.Time), Data: c.Data})
	}
	return out, r.Eof, nil
}

// exitOf checks an answer to Wait that says that the process ended.
func exitOf(r *agentv1.WaitResponse) (spec.Exit, error) {
	if r.Code < 0 || r.Code > 255 || r.Signal < 0 || r.Signal > 64 || r.Signal != 0 && r.Code != 128+r.Signal {
		return spec.Exit{}, protocolError("exit code %d, signal %d", r.Code, r.Signal)
	}
	return spec.Exit{Code: int(r.Code), Signal: int(r.Signal), Time: clockTime(r.Time)}, nil
}

// pidOf checks a pid: 1 is the agent.
func pidOf(pid int32) (int, error) {
	if pid < 2 {
		return 0, protocolError("pid %d of a new process", pid)
	}
	return int(pid), nil
}
