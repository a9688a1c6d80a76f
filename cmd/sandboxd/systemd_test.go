package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
)

func TestWatchdogInterval(t *testing.T) {
	self := strconv.Itoa(os.Getpid())
	for _, c := range []struct {
		usec, pid string
		want      time.Duration
		bad       bool
	}{
		{"", "", 0, false}, {"30000000", self, 10 * time.Second, false}, {"30000000", "", 10 * time.Second, false},
		{"30000000", "1", 0, false}, {"soon", self, 0, true}, {"-1", self, 0, true}, {"0", self, 0, true}, {"99999999999999", self, 0, true},
	} {
		t.Setenv("WATCHDOG_USEC", c.usec)
		t.Setenv("WATCHDOG_PID", c.pid)
		got, err := watchdogInterval()
		if got != c.want || (err != nil) != c.bad {
			t.Errorf("%q for %q: %v, %v", c.usec, c.pid, got, err)
		}
		if _, still := os.LookupEnv("WATCHDOG_USEC"); still {
			t.Error("what the daemon starts would speak for it")
		}
	}
}

// A daemon that is alive says so again and again; one that hangs falls silent.
func TestWatchdogIsFedByALivingDaemonOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	asked, answer, ended := make(chan struct{}), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		notifier{address: path}.keepAlive(ctx, time.Millisecond, func() {
			asked <- struct{}{}
			<-answer
		}, zap.NewNop())
	}()
	buf := make([]byte, 100)
	for range 3 {
		<-asked
		answer <- struct{}{}
		if err := l.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		n, err := l.Read(buf)
		if err != nil || strings.TrimSpace(string(buf[:n])) != "WATCHDOG=1" {
			t.Fatalf("%q, %v", buf[:n], err)
		}
	}
	// It is asked, and does not answer: nothing has been sent.
	<-asked
	if err := l.SetReadDeadline(time.Now()); err != nil {
		t.Fatal(err)
	}
	if n, err := l.Read(buf); err == nil {
		t.Errorf("a daemon that hangs said %q", buf[:n])
	}
	cancel()
	answer <- struct{}{}
	for done := false; !done; {
		select {
		case <-asked: // the tick was there first
			answer <- struct{}{}
		case <-ended:
			done = true
		}
	}
}
