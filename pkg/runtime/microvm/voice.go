package microvm

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/console"
)

const (
	// voiceBuffer is how much is read of a voice at once, and voicePause how long one that had more to say must wait: 80 KiB
	// a second. What its pipe then doesn't hold is lost, and nobody waits: both ends are non-blocking.
	voiceBuffer = 4 << 10
	voicePause  = 50 * time.Millisecond
	// voiceDrain bounds the reading of last words, once the speaker is dead.
	voiceDrain = time.Second
)

// voice is what a process of a VM says on one of its outputs: a pipe, and who reads it into the console's log. The process
// has the pipe open for reading too, so that what it says while no daemon runs is there for the next one: as much as a
// pipe holds.
type voice struct {
	source *console.Source
	// The process's end, to be closed once it runs; nil when it was found running.
	child *os.File

	ours  *os.File
	heard sync.WaitGroup
}

// newVoice makes the pipe and begins to read it.
func newVoice(source *console.Source, logger *zap.Logger) (*voice, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, fmt.Errorf("cannot make a pipe: %w", err)
	}
	// Linux lets a pipe be opened for both by the path of either descriptor.
	both, err := unix.Open(fdPath(fds[1]), unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	_ = unix.Close(fds[1])
	if err != nil {
		_ = unix.Close(fds[0])
		return nil, fmt.Errorf("cannot open a pipe: %w", err)
	}
	v := &voice{source: source, child: os.NewFile(uintptr(both), "voice"), ours: os.NewFile(uintptr(fds[0]), "voice")}
	v.listen(logger)
	return v, nil
}

// findVoice finds the pipe that is descriptor fd of a process, nil if that is no pipe, or if the process is ending and has
// closed it: what it said is lost then, and that it has ended is seen elsewhere.
func findVoice(pid, fd int, source *console.Source, logger *zap.Logger) (*voice, error) {
	path := fmt.Sprintf("/proc/%d/fd/%d", pid, fd)
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	if hasClosed(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot find what process %d says: %w", pid, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return nil, nil
	}
	ours, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if hasClosed(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot hear what process %d says: %w", pid, err)
	}
	v := &voice{source: source, ours: os.NewFile(uintptr(ours), "voice")}
	v.listen(logger)
	return v, nil
}

func hasClosed(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) }

func (v *voice) listen(logger *zap.Logger) {
	v.heard.Go(func() {
		buf := make([]byte, voiceBuffer)
		for warned := false; ; {
			n, err := v.ours.Read(buf)
			if _, werr := v.source.Write(buf[:n]); werr != nil && !warned {
				warned = true
				logger.Warn("a console's log is incomplete", zap.Error(werr))
			}
			if err != nil {
				_ = v.source.Flush() // at worst the end of a line is missing
				return
			}
			if n == len(buf) {
				time.Sleep(voicePause)
			}
		}
	})
}

// end returns when everything was read that the process, which has ended, had said. Idempotent.
func (v *voice) end() {
	v.started()
	_ = v.ours.SetReadDeadline(time.Now().Add(voiceDrain))
	v.heard.Wait()
	_ = v.ours.Close()
}

// leave stops listening. The process goes on.
func (v *voice) leave() {
	v.started()
	_ = v.ours.Close()
	v.heard.Wait()
}

// started is called when the process has its end.
func (v *voice) started() {
	if v.child != nil {
		_ = v.child.Close()
		v.child = nil
	}
}

// voices are all of a VM's.
type voices struct {
	log *console.Log
	// What the guest's kernel says on its console, and what QEMU and the helper complain about. qemu and guest are nil
	// where they could not be found again, helper also where there is none.
	guest, qemu, helper *voice
	kernel              kernelSaid
}

func (v *voices) all(do func(*voice)) {
	for _, one := range []*voice{v.guest, v.qemu, v.helper} {
		if one != nil {
			do(one)
		}
	}
}

// end reads the last words of a VM whose processes have ended.
func (v *voices) end() error {
	v.all((*voice).end)
	return v.log.Close()
}

// leave lets go of a VM that runs on.
func (v *voices) leave() error {
	v.all((*voice).leave)
	return v.log.Close()
}

// quote is what a voice said last.
func quote(v *voice) string {
	if v == nil {
		return ""
	}
	return v.source.Quote()
}

// findVoices finds those of a VM that an earlier daemon started.
func findVoices(rec record, logger *zap.Logger) (_ *voices, err error) {
	v := &voices{}
	if v.log, err = console.Open(rec.ConsolePath); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.leave())
		}
	}()
	if v.guest, err = findVoice(rec.QEMU.PID, 1, v.log.Source("", v.kernel.note), logger); err != nil {
		return nil, err
	}
	if v.qemu, err = findVoice(rec.QEMU.PID, 2, v.log.Source(qemuPrefix, nil), logger); err != nil {
		return nil, err
	}
	if rec.Helper.PID != 0 {
		v.helper, err = findVoice(rec.Helper.PID, 2, v.log.Source(helperPrefix, nil), logger)
	}
	return v, err
}

// waitingForMonitor is in what a QEMU says that is shown its descriptors, every time.
const waitingForMonitor = "info: QEMU waiting for connection on: "

// Who speaks, in the console's log; the guest's kernel has no prefix.
const (
	qemuPrefix   = "qemu: "
	helperPrefix = "vsock helper: "
)
