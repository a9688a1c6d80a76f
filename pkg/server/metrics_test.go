package server

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/sandboxd/sandboxd/pkg/metrics"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// A panic in whatever method, streams included, ends that call alone, is counted, and its stack is in the log.
func TestPanicsAreCounted(t *testing.T) {
	core, logs := observer.New(zap.ErrorLevel)
	m := metrics.New("", "", metrics.Sources{
		Workloads: func() map[metrics.Group]int { return nil }, Committed: func() (uint64, uint64) { return 0, 0 },
		IsolationOf: func(string) string { return "" },
	})
	// Without a store and workloads every method that comes that far panics.
	h := serve(t, Config{Log: zap.New(core), Metrics: m, Workloads: &fakeWorkloads{get: func(string) (workload.Workload, error) { return workload.Workload{}, nil }}})
	panics := 0
	eachMethod(t, func(full string, method protoreflect.MethodDescriptor) {
		if status.Code(invoke(t.Context(), h.conn, full, method, minimal(t, method.Input()))) == codes.Internal {
			panics++
		}
	})
	stacks := 0
	for _, e := range logs.FilterMessage("panic").All() {
		if stack, ok := e.ContextMap()["stack"].(string); ok && strings.Contains(stack, "goroutine") {
			stacks++
		}
	}
	counted := scraped(t, m, "sandboxd_panics_total")
	if panics < 15 || stacks != panics || counted != stacks {
		t.Errorf("%d calls ended by a panic, %d stacks logged, %d counted", panics, stacks, counted)
	}
}

func scraped(t *testing.T, m *metrics.Metrics, name string) (n int) {
	t.Helper()
	l, err := metrics.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- m.Serve(ctx, l) }()
	defer func() { cancel(); <-done }()
	c := http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
	}}}
	r, err := c.Get("http://x/metrics")
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r.Body)
	if err := errors.Join(err, r.Body.Close()); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, name+" "); ok {
			for _, d := range strings.TrimSpace(rest) {
				n = n*10 + int(d-'0')
			}
		}
	}
	return n
}
