package microvm

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// QMP is how QEMU is asked things: a JSON object a line. QEMU handles the guest's every byte, so what it says is bounded
// and believed only for messages to people. Format: docs/interop/qmp-spec.rst of QEMU.

const (
	// maxQMPLine bounds a message from QEMU. The greeting has about 400 bytes.
	maxQMPLine = 256 << 10
	// maxQMPEvents bounds the events read while waiting for one answer.
	maxQMPEvents = 1000
	// qmpTimeout bounds one exchange: QEMU answers within milliseconds unless it is stuck.
	qmpTimeout = 5 * time.Second
)

// qmp is a connection to a QEMU. One command at a time.
type qmp struct {
	conn  net.Conn
	lines *bufio.Scanner
	// Bounds an exchange; 0 for qmpTimeout.
	limit time.Duration
}

// qmpError is what QEMU answers to a command that failed.
type qmpError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *qmpError) Error() string { return fmt.Sprintf("%s (%s)", e.Desc, e.Class) }

// qmpMessage is any message of QEMU: greeting, answer or event.
type qmpMessage struct {
	Greeting json.RawMessage `json:"QMP"`
	Return   json.RawMessage `json:"return"`
	Error    *qmpError       `json:"error"`
	Event    string          `json:"event"`
}

// newQMP takes the greeting and leaves negotiation mode. It owns conn, also when it fails.
func newQMP(ctx context.Context, conn net.Conn) (*qmp, error) {
	q := &qmp{conn: conn, lines: bufio.NewScanner(conn)}
	q.lines.Buffer(nil, maxQMPLine)
	if err := q.handshake(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot talk QMP: %w", err), conn.Close())
	}
	return q, nil
}

func (q *qmp) handshake(ctx context.Context) error {
	stop := q.bound(ctx)
	defer stop()
	m, err := q.read()
	if err != nil {
		return err
	}
	if m.Greeting == nil {
		return errors.New("no greeting")
	}
	return q.execute(ctx, "qmp_capabilities", nil)
}

// execute runs a command without arguments and decodes what it returns into result, unless that is nil.
func (q *qmp) execute(ctx context.Context, name string, result any) error {
	return q.executeWith(ctx, name, nil, nil, result)
}

// executeWith is execute with arguments, unless they are nil, and a file that goes with the command, unless that is.
func (q *qmp) executeWith(ctx context.Context, name string, arguments map[string]any, file *os.File, result any) error {
	stop := q.bound(ctx)
	defer stop()
	message := map[string]any{"execute": name}
	if arguments != nil {
		message["arguments"] = arguments
	}
	command, err := json.Marshal(message)
	if err != nil {
		return err
	}
	if err := q.send(append(command, '\n'), file); err != nil {
		return fmt.Errorf("cannot send %s: %w", name, err)
	}
	for range maxQMPEvents {
		m, err := q.read()
		switch {
		case err != nil:
			return fmt.Errorf("cannot read the answer to %s: %w", name, err)
		case m.Event != "":
			continue
		case m.Error != nil:
			return fmt.Errorf("QEMU refuses %s: %w", name, m.Error)
		case m.Return == nil:
			return fmt.Errorf("%s: neither an answer nor an error", name)
		case result == nil:
			return nil
		}
		if err := json.Unmarshal(m.Return, result); err != nil {
			return fmt.Errorf("cannot decode the answer to %s: %w", name, err)
		}
		return nil
	}
	return fmt.Errorf("%s: %d events and no answer", name, maxQMPEvents)
}

// status is QEMU's run state: "running", "shutdown", "internal-error" and so on.
func (q *qmp) status(ctx context.Context) (string, error) {
	var s struct {
		Status string `json:"status"`
	}
	err := q.execute(ctx, "query-status", &s)
	return s.Status, err
}

// powerdown presses the guest's power button.
func (q *qmp) powerdown(ctx context.Context) error { return q.execute(ctx, "system_powerdown", nil) }

// quit ends QEMU.
func (q *qmp) quit(ctx context.Context) error { return q.execute(ctx, "quit", nil) }

func (q *qmp) Close() error { return q.conn.Close() }

func (q *qmp) send(b []byte, file *os.File) error {
	if file == nil {
		_, err := q.conn.Write(b)
		return err
	}
	unixConn, ok := q.conn.(*net.UnixConn)
	if !ok {
		return errors.New("a file can only be sent over a Unix socket")
	}
	_, _, err := unixConn.WriteMsgUnix(b, unix.UnixRights(int(file.Fd())), nil)
	return err
}

func (q *qmp) read() (qmpMessage, error) {
	if !q.lines.Scan() {
		if err := q.lines.Err(); err != nil {
			return qmpMessage{}, err
		}
		return qmpMessage{}, errors.New("QEMU closed the connection")
	}
	var m qmpMessage
	if err := json.Unmarshal(q.lines.Bytes(), &m); err != nil {
		return qmpMessage{}, fmt.Errorf("not QMP: %w", err)
	}
	return m, nil
}

// bound limits an exchange to ctx and to q.limit.
func (q *qmp) bound(ctx context.Context) (stop func() bool) {
	deadline := time.Now().Add(cmp.Or(q.limit, qmpTimeout))
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	_ = q.conn.SetDeadline(deadline) // a closed connection fails at its next use
	return context.AfterFunc(ctx, func() { _ = q.conn.SetDeadline(time.Unix(1, 0)) })
}
