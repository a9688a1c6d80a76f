package guest

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// maxResolveTries bounds how often a path is resolved again because of renames going on. A workload can rename all the time.
const maxResolveTries = 1000

// openIn opens path with root as "/": symbolic links and .. are followed inside it and nowhere else. Links of /proc that
// jump (magic links) are refused. how may add to the resolution: RESOLVE_NO_SYMLINKS for what must be where it says.
func openIn(root *os.File, path string, flags int, how uint64) (*os.File, error) {
	resolve := unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | how
	if weaken.Without("resolve inside the root") {
		resolve = 0
	}
	for try := 1; ; try++ {
		fd, err := unix.Openat2(int(root.Fd()), path, &unix.OpenHow{
			Flags: uint64(flags | unix.O_CLOEXEC), Resolve: resolve,
		})
		// The kernel gives up with EAGAIN when something was renamed meanwhile and it can't tell whether .. stayed inside.
		if (errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR)) && try < maxResolveTries {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		return os.NewFile(uintptr(fd), path), nil
	}
}

// errDotDot: nothing is made along a path that goes up.
var errDotDot = errors.New("it has .. in it")

// makeDirIn opens the directory path in root, making what is missing of it with root as owner.
func makeDirIn(root *os.File, path string, perm uint32, how uint64) (*os.File, error) {
	const dirFlags = unix.O_PATH | unix.O_DIRECTORY
	if dir, err := openIn(root, path, dirFlags, how); err == nil || !errors.Is(err, unix.ENOENT) {
		return dir, err
	}
	at := "/"
	for part := range strings.SplitSeq(path, "/") {
		if part == "" || part == "." {
			continue
		}
		if part == ".." {
			return nil, fmt.Errorf("cannot make %s: %w", path, errDotDot)
		}
		parent, err := openIn(root, at, dirFlags, how)
		if err != nil {
			return nil, err
		}
		err = unix.Mkdirat(int(parent.Fd()), part, perm)
		parent.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, fmt.Errorf("cannot make %s: %w", path, err)
		}
		at += part + "/"
	}
	return openIn(root, path, dirFlags, how)
}

// isMissing reports whether err says that there is nothing by that name.
func isMissing(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) }
