package metrics

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const (
	// scrapeTimeout bounds what one who looks may take.
	scrapeTimeout = 20 * time.Second
	// maxScrapes at once.
	maxScrapes = 4
	maxHeader  = 16 << 10
)

// CheckAddress refuses an address that others than this host can reach: metrics tell of every tenant, and nobody is asked who he is.
func CheckAddress(address string) error {
	if path, ok := strings.CutPrefix(address, "unix://"); ok {
		if !filepath.IsAbs(path) {
			return fmt.Errorf("%q is no absolute path", path)
		}
		return nil
	}
	addr, err := netip.ParseAddrPort(address)
	if err != nil || !addr.Addr().IsLoopback() {
		return fmt.Errorf("%q is no address of this host alone: give one such as 127.0.0.1:9464 or unix:///run/sandboxd/metrics.sock", address)
	}
	return nil
}

// Listen opens the address that CheckAddress accepts. Only root may open the Unix socket.
func Listen(address string) (net.Listener, error) {
	if err := CheckAddress(address); err != nil {
		return nil, fmt.Errorf("cannot show metrics: %w", err)
	}
	path, ok := strings.CutPrefix(address, "unix://")
	if !ok {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return nil, fmt.Errorf("cannot show metrics: %w", err)
		}
		return l, nil
	}
	// Of a daemon that died. What is no socket stays, and the listening fails.
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() == os.ModeSocket {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("cannot show metrics: %w", err)
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("cannot show metrics: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot show metrics: %w", err), l.Close())
	}
	return l, nil
}

// Serve shows the metrics at /metrics until ctx is done.
func (m *Metrics) Serve(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		Registry: m.registry, MaxRequestsInFlight: maxScrapes, Timeout: scrapeTimeout, ErrorHandling: promhttp.HTTPErrorOnError,
	}))
	s := &http.Server{Handler: mux, ReadTimeout: scrapeTimeout, WriteTimeout: 2 * scrapeTimeout, IdleTimeout: time.Minute, MaxHeaderBytes: maxHeader}
	defer context.AfterFunc(ctx, func() { _ = s.Close() })()
	if err := s.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("cannot show metrics: %w", err)
	}
	return nil
}
