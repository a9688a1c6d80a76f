package oci

import (
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Real-time signals as the C library counts them: the kernel's first two are its own.
const (
	sigRTMin = 34
	sigRTMax = 64
)

// ParseSignal understands SIGTERM, TERM, 15, SIGRTMIN+3 and RTMAX-1, in any case.
func ParseSignal(name string) (syscall.Signal, error) {
	bad := func() (syscall.Signal, error) {
		return 0, spec.Errorf(spec.KindInvalid, "signal %q is unknown; use a name such as SIGTERM or a number from 1 to %d", name, sigRTMax)
	}
	if n, err := strconv.ParseUint(name, 10, 8); err == nil {
		if n < 1 || n > sigRTMax {
			return bad()
		}
		return syscall.Signal(n), nil
	}
	upper := strings.ToUpper(name)
	if !strings.HasPrefix(upper, "SIG") {
		upper = "SIG" + upper
	}
	if n := unix.SignalNum(upper); n != 0 {
		return n, nil
	}
	for prefix, base := range map[string]int{"SIGRTMIN": sigRTMin, "SIGRTMAX": sigRTMax} {
		rest, found := strings.CutPrefix(upper, prefix)
		if !found {
			continue
		}
		offset := 0
		if rest != "" {
			var err error
			// Atoi takes a sign, which must be there: RTMIN3 is nothing.
			if offset, err = strconv.Atoi(rest); err != nil || rest[0] != '+' && rest[0] != '-' {
				return bad()
			}
		}
		if offset < sigRTMin-sigRTMax || offset > sigRTMax-sigRTMin {
			return bad()
		}
		if n := base + offset; n >= sigRTMin && n <= sigRTMax {
			return syscall.Signal(n), nil
		}
	}
	return bad()
}

// StopSignal is what asks the workload w, made from an image that says img, to end: what w names, else what the image
// names, else SIGTERM. A workload that Config accepts has one.
func StopSignal(w spec.Workload, img spec.ImageConfig) (syscall.Signal, error) {
	name := first(w.StopSignal, img.StopSignal)
	if name == "" {
		return syscall.SIGTERM, nil
	}
	sig, err := ParseSignal(name)
	switch {
	case err == nil:
		return sig, nil
	case w.StopSignal == "":
		return 0, spec.Invalidf("spec.stop_signal", "cannot use the image's stop signal, so give one: %w", err)
	}
	return 0, spec.Invalidf("spec.stop_signal", "%w", err)
}
