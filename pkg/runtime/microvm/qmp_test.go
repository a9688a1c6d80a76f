package microvm

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// fakeQEMU answers the n-th line it gets with the n-th answer; the greeting comes unasked.
func fakeQEMU(t *testing.T, greeting string, answers ...string) net.Conn {
	t.Helper()
	ours, theirs := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer theirs.Close()
		if _, err := theirs.Write([]byte(greeting)); err != nil {
			return
		}
		lines := bufio.NewScanner(theirs)
		for _, a := range answers {
			if !lines.Scan() {
				return
			}
			if _, err := theirs.Write([]byte(a)); err != nil {
				return
			}
		}
		lines.Scan()
	}()
	t.Cleanup(func() {
		_ = ours.Close()
		<-done
	})
	return ours
}

const (
	qmpGreeting = `{"QMP":{"version":{"qemu":{"micro":22,"minor":2,"major":7}},"capabilities":["oob"]}}` + "\r\n"
	qmpEmpty    = `{"return":{}}` + "\r\n"
)

func TestQMP(t *testing.T) {
	q, err := newQMP(t.Context(), fakeQEMU(t, qmpGreeting, qmpEmpty,
		`{"event":"RESUME","timestamp":{"seconds":1,"microseconds":2}}`+"\n"+`{"return":{"status":"running","running":true}}`+"\n",
		`{"error":{"class":"GenericError","desc":"no power button"}}`+"\n",
		qmpEmpty))
	if err != nil {
		t.Fatal(err)
	}
	if s, err := q.status(t.Context()); err != nil || s != "running" {
		t.Errorf("status %q, %v", s, err)
	}
	var refused *qmpError
	if err := q.powerdown(t.Context()); !errors.As(err, &refused) || refused.Desc != "no power button" {
		t.Errorf("powerdown: %v", err)
	}
	if err := q.quit(t.Context()); err != nil {
		t.Errorf("quit: %v", err)
	}
}

func TestQMPRefuses(t *testing.T) {
	for name, c := range map[string]struct{ greeting, answer, want string }{
		"nothing":        {"", "", "closed"},
		"no greeting":    {qmpEmpty, qmpEmpty, "no greeting"},
		"not JSON":       {"hello\n", "", "not QMP"},
		"endless line":   {strings.Repeat("x", maxQMPLine+1), "", "too long"},
		"endless events": {qmpGreeting, strings.Repeat(`{"event":"X"}`+"\n", maxQMPEvents), "no answer"},
		"neither":        {qmpGreeting, "{}\n", "neither"},
		"refused":        {qmpGreeting, `{"error":{"class":"C","desc":"D"}}` + "\n", "D (C)"},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := net.Pipe()
			done := make(chan struct{})
			go func() {
				defer close(done)
				defer theirs.Close()
				_, _ = theirs.Write([]byte(c.greeting))
				if c.answer != "" {
					bufio.NewScanner(theirs).Scan()
					_, _ = theirs.Write([]byte(c.answer))
				}
			}()
			_, err := newQMP(t.Context(), ours)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
			<-done
		})
	}
}

func TestQMPWaitsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		ours, theirs := net.Pipe()
		defer theirs.Close()
		if _, err := newQMP(t.Context(), ours); err == nil || time.Since(began) != qmpTimeout {
			t.Errorf("a silent QEMU was waited for %v: %v", time.Since(began), err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer theirs.Close()
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		began := time.Now()
		if _, err := newQMP(ctx, ours); err == nil || time.Since(began) != time.Second {
			t.Errorf("a caller that gave up waited %v: %v", time.Since(began), err)
		}
	})
}

// bytesConn is a connection whose other side says b and then closes.
type bytesConn struct {
	net.Conn
	r *bytes.Reader
}

func (c bytesConn) Read(p []byte) (int, error) { return c.r.Read(p) }
func (bytesConn) Write(p []byte) (int, error)  { return len(p), nil }
func (bytesConn) Close() error                 { return nil }
func (bytesConn) SetDeadline(time.Time) error  { return nil }

func FuzzQMP(f *testing.F) {
	f.Add([]byte(qmpGreeting + qmpEmpty + `{"return":{"status":"running"}}` + "\n"))
	f.Add([]byte(qmpGreeting + qmpEmpty + `{"return":[1,{"status":{}}]}` + "\n"))
	f.Add([]byte(qmpGreeting + `{"error":null,"return":null,"event":7}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := newQMP(t.Context(), bytesConn{r: bytes.NewReader(b)})
		if err != nil {
			return
		}
		if s, err := q.status(t.Context()); err == nil && len(s) > maxQMPLine {
			t.Error("a status longer than a line")
		}
	})
}
