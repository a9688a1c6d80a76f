package crash

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/sys/unix"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

// stories are what a daemon is in the middle of when it dies. Together they come to every point; each point is tried in the
// story that comes there soonest.
var stories = []struct {
	name string
	// Behind which walls; neither has no workload.
	walls []string
	tell  func(s *scene) error
	// Whether a virtual machine's own points need it: the others are told behind a container alone, but for make crash.
	vm bool
}{
	{"a life", both, func(s *scene) error {
		return inOrder(
			func() error { return s.create(nil) }, s.start,
			func() error { _, err := s.exec("true"); return err },
			func() error { return s.copyIn("note", "a note\n") },
			func() error { return s.copyOut("/note") },
			s.pause, s.resume, s.update, s.release, s.wait,
			func() error { return s.delete(false) },
		)
	}, true},
	{"a second run, and an end by force", both, func(s *scene) error {
		return inOrder(
			func() error { return s.create(nil) }, s.start,
			func() error { return s.stop(0) },
			s.start,
			func() error { return s.delete(true) },
		)
	}, false},
	{"a sandbox that dies", both, func(s *scene) error {
		return inOrder(func() error { return s.create(nil) }, s.start, s.murder, s.wait, func() error { return s.delete(false) })
	}, false},
	{"much output", both, func(s *scene) error {
		return inOrder(
			func() error {
				return s.create(func(w *sandboxdv1.WorkloadSpec) {
					s.endsItself = true
					w.Process.Command[2] = "i=0; while [ $i -lt 4000 ]; do echo $i is a number, and this line is long; i=$((i+1)); done; exit 7"
					w.Resources.LogBytes = 64 << 10
				})
			},
			s.start, s.wait, func() error { return s.delete(false) },
		)
	}, false},
	{"a network", both, func(s *scene) error {
		return inOrder(
			func() error { return s.create(func(w *sandboxdv1.WorkloadSpec) { w.Network = "lan" }) },
			s.start, s.release, s.wait, func() error { return s.delete(false) },
		)
	}, true},
	{"a daemon that comes back", both, func(s *scene) error {
		return inOrder(func() error { return s.create(nil) }, s.start, s.restart, s.release, s.wait, func() error { return s.delete(false) })
	}, false},
	{"a daemon that comes back too late", both, func(s *scene) error {
		return inOrder(func() error { return s.create(nil) }, s.start,
			func() error {
				w, err := s.get()
				if err != nil {
					return err
				}
				if err := s.d.Kill(); err != nil {
					return err
				}
				s.asked[murder], s.told[murder] = true, true
				return killAndWait(int(w.GetStatus().GetHostPid()))
			},
			s.restart, func() error { return s.delete(false) })
	}, false},
	{"the first virtual machine", []string{"vm"}, func(s *scene) error {
		return inOrder(s.d.Kill,
			func() error { return os.RemoveAll(filepath.Join(s.d.StateDir, "microvm", "kernel")) },
			s.restart, func() error { return s.create(nil) }, s.start, func() error { return s.delete(true) })
	}, true},
	{"a snapshot, and what goes on from it", []string{"vm"}, (*scene).snapshots, true},
	{"an image", neither, func(s *scene) error {
		return inOrder(s.importImage, s.removeImage)
	}, false},
	{"many records", neither, func(s *scene) error {
		if err := s.create(nil); err != nil {
			return err
		}
		for range 400 {
			if err := s.update(); err != nil {
				return err
			}
		}
		return s.delete(false)
	}, false},
}

// lastLine is of the story with much output.
const lastLine = "3999 is a number, and this line is long\n"

var (
	both    = []string{"container", "vm"}
	neither = []string{"neither"}
)

func inOrder(steps ...func() error) error {
	for i, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("step %d: %w", i+1, err)
		}
	}
	return nil
}

// murder kills what the host has of a sandbox: the agent, or the virtual machine monitor.
func (s *scene) murder() error {
	w, err := s.get()
	if err != nil {
		return err
	}
	return s.do(murder, func() error { return syscall.Kill(int(w.GetStatus().GetHostPid()), syscall.SIGKILL) })
}

// killAndWait returns when the process can run no more: a daemon that comes back sooner may still find it.
func killAndWait(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // only waited upon
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		return err
	}
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(trapLimit.Milliseconds()))
	if err == nil && n == 0 {
		err = fmt.Errorf("process %d does not end", pid)
	}
	return err
}

// restart ends the daemon, if it runs, and starts it again.
func (s *scene) restart() error {
	if err := s.d.Kill(); err != nil {
		return err
	}
	if err := s.d.Start(); err != nil {
		return err
	}
	return s.dial()
}

// dial connects anew: a connection to a daemon that was away is tried again only after a while.
func (s *scene) dial() (err error) {
	if s.c != nil {
		_ = s.c.Close() // to a daemon that has gone
	}
	s.c, err = client.Dial(s.d.Address)
	return err
}

// importImage imports an image of two layers that nobody has had.
func (s *scene) importImage() error {
	img := empty.Image
	for i := range 2 {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		text := fmt.Sprintf("%s, layer %d, %s\n", s.name, i, time.Now())
		if err := w.WriteHeader(&tar.Header{Name: fmt.Sprint("file", i), Mode: 0o644, Size: int64(len(text)), Typeflag: tar.TypeReg}); err != nil {
			return err
		}
		if _, err := w.Write([]byte(text)); err != nil {
			return err
		}
		if err := w.Close(); err != nil {
			return err
		}
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
		if err != nil {
			return err
		}
		if img, err = mutate.AppendLayers(img, layer); err != nil {
			return err
		}
	}
	config, err := img.ConfigFile()
	if err != nil {
		return err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	if img, err = mutate.ConfigFile(img, config); err != nil {
		return err
	}
	tag, err := name.NewTag(s.imageName())
	if err != nil {
		return err
	}
	var archive bytes.Buffer
	if err := tarball.Write(tag, img, &archive); err != nil {
		return err
	}
	return s.do(importing, func() error {
		_, err := s.c.ImportImage(s.ctx, s.imageName(), &archive)
		return err
	})
}

const (
	importing = "import an image"
	removing  = "remove an image"
)

func (s *scene) imageName() string { return "crash/" + s.name + ":1" }

func (s *scene) removeImage() error {
	return s.do(removing, func() error {
		_, err := s.c.Images.RemoveImage(s.ctx, &sandboxdv1.RemoveImageRequest{Reference: s.imageName()})
		return err
	})
}
