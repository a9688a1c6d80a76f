package container

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// agentBinary is the agent's program in a sealed memory file of mode 0111: executable, but readable by nobody. The kernel
// marks a process that runs a program it may not read as not dumpable, for good, and so closes /proc/1/fd, /proc/1/mem
// and the rest to root inside the sandbox. The seals keep anyone from changing it through /proc/1/exe.
type agentBinary struct {
	path string

	mu   sync.Mutex
	file *os.File
}

// open copies the program the first time. The file stays open for the daemon's life.
func (a *agentBinary) open() (*os.File, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.file != nil {
		return a.file, nil
	}
	src, err := os.Open(a.path)
	if err != nil {
		return nil, fmt.Errorf("cannot open the agent: %w", err)
	}
	defer src.Close() //nolint:errcheck // only read
	// Kernels before 6.3 know no MFD_EXEC, and make every memory file executable; later ones may be told not to.
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	seals := unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	fd, err := unix.MemfdCreate("sandbox-agent", flags|unix.MFD_EXEC)
	if err == nil {
		seals |= unix.F_SEAL_EXEC // its mode can change no more
	} else if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate("sandbox-agent", flags)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot make a memory file for the agent: %w", err)
	}
	f := os.NewFile(uintptr(fd), "memfd:sandbox-agent")
	if err := fill(f, src, seals); err != nil {
		_ = f.Close() // the first error counts
		return nil, fmt.Errorf("cannot copy the agent: %w", err)
	}
	a.file = f
	return f, nil
}

func fill(f, src *os.File, seals int) error {
	if _, err := io.Copy(f, src); err != nil {
		return err
	}
	if weaken.Without("seal the agent") {
		return f.Chmod(0o755)
	}
	if err := f.Chmod(0o111); err != nil {
		return err
	}
	_, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals)
	return err
}

func (a *agentBinary) close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.file == nil {
		return nil
	}
	err := a.file.Close()
	a.file = nil
	return err
}
