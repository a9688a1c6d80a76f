package container

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/osthread"
)

// mounter is a thread of the daemon in a mount namespace of its own, where the layers of overlays are attached while
// overlays are made. Kernels before 6.15 take no layers that are attached nowhere, and the host's mount table is nobody's
// scratch pad.
//
// The namespace's root is an empty tmpfs: the thread keeps none of the host's mounts busy, and the paths of layers, which
// a sandbox reads in its /proc/mounts, tell nothing of the host. When the daemon dies the namespace goes, and with it
// every mount in it; overlays live on, since each holds clones of its layers.
type mounter struct {
	log *zap.Logger

	mu   sync.Mutex // one caller of do at a time, and guards what is below
	jobs chan func()
	done chan error // the thread's last word

	images map[imageKey]*image // mounted in the namespace; used on the thread only
	next   int                 // names them
}

// do runs fn on the thread, which is started the first time.
func (m *mounter) do(fn func() error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.jobs == nil {
		if err := m.startLocked(); err != nil {
			return err
		}
	}
	result := make(chan error, 1)
	m.jobs <- func() { result <- fn() }
	return <-result
}

// doIfRunning runs fn on the thread, if there is one.
func (m *mounter) doIfRunning(fn func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.jobs == nil {
		return
	}
	done := make(chan struct{})
	m.jobs <- func() { fn(); close(done) }
	<-done
}

func (m *mounter) startLocked() error {
	jobs, ready, done := make(chan func()), make(chan error, 1), make(chan error, 1)
	go func() {
		done <- osthread.Run(func() error {
			err := privateRoot()
			ready <- err
			if err != nil {
				return err
			}
			for job := range jobs {
				job()
			}
			return nil
		})
	}()
	if err := <-ready; err != nil {
		<-done
		return fmt.Errorf("cannot make a private mount namespace: %w", err)
	}
	m.jobs, m.done, m.images = jobs, done, map[imageKey]*image{}
	return nil
}

// onHost runs fn with the host's paths, for a job on the thread, where there are none.
func onHost(fn func() error) error {
	result := make(chan error, 1)
	go func() { result <- fn() }() // waited for below
	return <-result
}

// close ends the thread and with it everything it has mounted.
func (m *mounter) close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.jobs == nil {
		return nil
	}
	close(m.jobs)
	err := <-m.done
	m.jobs = nil
	return err
}

// privateRoot gives the calling thread a mount namespace whose root is an empty tmpfs with only /proc in it.
func privateRoot() error {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		return fmt.Errorf("cannot unshare: %w", err)
	}
	// Before anything is mounted here: nothing may reach the host's table.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("cannot make mounts private: %w", err)
	}
	// /proc/self/fd is how files of the host, open in the daemon, are named here.
	proc, err := unix.OpenTree(unix.AT_FDCWD, "/proc", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("cannot clone /proc: %w", err)
	}
	defer unix.Close(proc) //nolint:errcheck // a mount descriptor
	root, err := mountFS("tmpfs", unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC,
		option{"size", "1m"}, option{"mode", "0755"})
	if err != nil {
		return err
	}
	defer root.Close() //nolint:errcheck // a mount descriptor
	if err := unix.MoveMount(int(root.Fd()), "", unix.AT_FDCWD, "/proc", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("cannot attach the private root: %w", err)
	}
	if err := unix.Fchdir(int(root.Fd())); err != nil {
		return fmt.Errorf("cannot enter the private root: %w", err)
	}
	if err := os.Mkdir("proc", 0o755); err != nil {
		return err
	}
	if err := unix.MoveMount(proc, "", unix.AT_FDCWD, "proc", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("cannot attach proc: %w", err)
	}
	// The new root and the place of the old one may be the same directory: the old root then lies on top (pivot_root(2)).
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("cannot change the root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("cannot leave the host's mounts: %w", err)
	}
	return unix.Chdir("/")
}

// option is a file system's; without a value it is a flag.
type option struct{ key, value string }

// mountFS makes a file system and answers with a mount of it that is attached nowhere.
func mountFS(kind string, attrs int, options ...option) (*os.File, error) {
	fd, err := unix.Fsopen(kind, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot use file system %s: %w", kind, err)
	}
	defer unix.Close(fd) //nolint:errcheck // a configuration descriptor
	for _, o := range options {
		if o.value == "" {
			err = unix.FsconfigSetFlag(fd, o.key)
		} else {
			err = unix.FsconfigSetString(fd, o.key, o.value)
		}
		if err != nil {
			return nil, fmt.Errorf("cannot set %s=%s of %s: %w", o.key, o.value, kind, kernelSays(fd, err))
		}
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return nil, fmt.Errorf("cannot make %s: %w", kind, kernelSays(fd, err))
	}
	m, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return nil, fmt.Errorf("cannot mount %s: %w", kind, kernelSays(fd, err))
	}
	return os.NewFile(uintptr(m), kind), nil
}

// kernelSays adds the messages the kernel left on a configuration descriptor (fsopen(2)) to an error.
func kernelSays(fd int, err error) error {
	const maxMessages = 8
	buf := make([]byte, 1024)
	for range maxMessages {
		n, rerr := unix.Read(fd, buf)
		if rerr != nil || n <= 0 {
			break
		}
		err = fmt.Errorf("%w: %q", err, buf[:n])
	}
	return err
}

// setAttr changes a mount that is attached nowhere.
func setAttr(mount *os.File, attr unix.MountAttr) error {
	return unix.MountSetattr(int(mount.Fd()), "", unix.AT_EMPTY_PATH, &attr)
}

// attach puts a mount on a new directory of the calling thread's namespace; the result takes it away again.
func attach(mount *os.File, dir string) (detach func() error, err error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("cannot make a mount point: %w", err)
	}
	if err := unix.MoveMount(int(mount.Fd()), "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot attach a mount: %w", err), os.Remove(dir))
	}
	return func() error {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("cannot detach a mount: %w", err)
		}
		return os.Remove(dir)
	}, nil
}
