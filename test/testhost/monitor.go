package testhost

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// For one answer of QEMU's, which has nothing else to do.
const monitorPatience = 20 * time.Second

// How far apart two looks at a processor are: it has its turn meanwhile on a busy machine, too.
const betweenLooks = time.Second

// monitor is QEMU's own, spoken to in QMP (docs/interop/qmp-spec.txt of QEMU).
type monitor struct {
	conn *os.File
	enc  *json.Encoder
	dec  *json.Decoder
}

func newMonitor(conn *os.File) *monitor {
	return &monitor{conn: conn, enc: json.NewEncoder(conn), dec: json.NewDecoder(conn)}
}

// call has QEMU execute a command and answers with what it returns. The first must be qmp_capabilities.
func (m *monitor) call(command string, arguments map[string]any) (json.RawMessage, error) {
	if err := m.conn.SetDeadline(time.Now().Add(monitorPatience)); err != nil {
		return nil, err
	}
	request := struct {
		Execute   string         `json:"execute"`
		Arguments map[string]any `json:"arguments,omitempty"`
	}{command, arguments}
	if err := m.enc.Encode(request); err != nil {
		return nil, err
	}
	for {
		var r struct {
			Return json.RawMessage `json:"return"`
			Error  *struct {
				Desc string `json:"desc"`
			} `json:"error"`
		}
		if err := m.dec.Decode(&r); err != nil {
			return nil, fmt.Errorf("no answer to %s: %w", command, err)
		}
		if r.Error != nil {
			return nil, fmt.Errorf("%s: %s", command, r.Error.Desc)
		}
		if r.Return != nil { // neither the greeting nor an event
			return r.Return, nil
		}
	}
}

// state is what QEMU knows of the processors, each three times, so that one that stands can be told from one that runs.
func (m *monitor) state() string {
	var out strings.Builder
	for i, command := range []string{"info status", "info registers -a", "info registers -a", "info registers -a", "info pic"} {
		if i > 0 {
			time.Sleep(betweenLooks)
		}
		var said string
		b, err := m.call("human-monitor-command", map[string]any{"command-line": command})
		if err == nil {
			err = json.Unmarshal(b, &said)
		}
		if err != nil {
			return out.String() + "QEMU's monitor: " + err.Error()
		}
		for line := range strings.Lines(said) {
			// Neither segments nor the numbers of the floating point unit.
			if !strings.HasPrefix(line, "FPR") && !strings.HasPrefix(line, "XMM") && !strings.HasPrefix(line, "YMM") && len(line) > 1 {
				out.WriteString(line)
			}
		}
		fmt.Fprintf(&out, "(%s, at %s)\n\n", command, time.Now().Format(time.StampMilli))
	}
	return out.String()
}

// socketPair is a connection's two ends, the second for QEMU.
func socketPair(t testing.TB) (ours, theirs *os.File) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	// So that it has deadlines.
	if err := unix.SetNonblock(pair[0], true); err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
}
