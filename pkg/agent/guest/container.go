package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// bootFD is the boot socket's descriptor: see spec.ContainerBoot.
	bootFD = 3
	// maxBootMessage bounds the boot message.
	maxBootMessage = 128 << 10
	// bootDescriptors is how many come with it: the root, the listener and, where processes are limited, the door to the workload's
	// control group.
	bootDescriptors = 3
)

// RunContainer is the agent's life as PID 1 of a container's namespaces. It returns nil when the daemon ended it.
func RunContainer() error {
	if err := checkPidOne(); err != nil {
		return err
	}
	unix.Umask(0) // modes are said in full
	warmUp()
	boot, root, listener, door, err := receiveBoot(bootFD)
	if err != nil {
		return errors.Join(err, answerBoot(bootFD, spec.BootResult{Error: err.Error()}))
	}
	notePhase("from the first instruction to the boot message", began)
	w := &containerWall{pidOne: newPidOne(), source: root}
	if door != nil {
		if w.children.within, err = newForker(door); err != nil {
			return errors.Join(err, answerBoot(bootFD, spec.BootResult{Error: err.Error()}))
		}
	}
	if len(boot.Prepare) > 0 {
		if boot, err = prepareFor(w, boot.Prepare); err != nil {
			return errors.Join(err, answerBoot(bootFD, spec.BootResult{Error: err.Error()}))
		}
	}
	return serveAsPidOne(newService(w), w.pidOne, listener, func(s *Service) error {
		if len(boot.Launch) == 0 {
			return answerBoot(bootFD, spec.BootResult{})
		}
		err := answerBoot(bootFD, spec.BootResult{Launched: s.launchAtBoot(boot.Launch)})
		if errors.Is(err, unix.EPIPE) {
			return nil // of a daemon that died meanwhile: its successor will ask
		}
		return err
	})
}

// prepareFor makes a root ahead of time, says so, and waits until it is somebody's: then it answers with what that one wants.
func prepareFor(w *containerWall, encoded []byte) (*spec.ContainerBoot, error) {
	config, err := decodeSpec(encoded)
	if err != nil {
		return nil, err
	}
	if err := w.prepare(config); err != nil {
		return nil, err
	}
	if err := tellBoot(bootFD, spec.BootResult{}); err != nil {
		return nil, err
	}
	message := make([]byte, maxBootMessage)
	n, _, _, _, err := unix.Recvmsg(bootFD, message, nil, unix.MSG_CMSG_CLOEXEC) // descriptors are dropped
	if err != nil {
		return nil, fmt.Errorf("cannot read the second boot message: %w", err)
	}
	return parseContainerBoot(message[:n])
}

// serveAsPidOne does what comes first, then serves and reaps until the daemon ends the sandbox.
func serveAsPidOne(s *Service, w pidOne, l net.Listener, first func(*Service) error) error {
	ctx, cancel := context.WithCancel(context.Background())
	reaped := make(chan struct{})
	go func() {
		defer close(reaped)
		w.run(ctx)
	}()
	err := first(s)
	if err == nil {
		err = s.Serve(ctx, l)
	}
	cancel()
	<-reaped
	return err
}

// receiveBoot reads the one message of the boot socket and the descriptors that come with it.
func receiveBoot(fd int) (boot *spec.ContainerBoot, root *os.File, l net.Listener, door *os.File, err error) {
	message := make([]byte, maxBootMessage)
	control := make([]byte, unix.CmsgSpace(bootDescriptors*4))
	n, controlLen, _, _, err := unix.Recvmsg(fd, message, control, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, nil, nil, nil, fmt.Errorf("cannot read the boot message: %w", err)
	}
	if boot, err = parseContainerBoot(message[:n]); err != nil {
		return nil, nil, nil, nil, err
	}
	fds, err := passedDescriptors(control[:controlLen])
	if err != nil {
		return nil, nil, nil, nil, err
	}
	if len(fds) < bootDescriptors-1 || len(fds) > bootDescriptors {
		return nil, nil, nil, nil, fmt.Errorf("cannot boot with %d descriptors, not %d or one less", len(fds), bootDescriptors)
	}
	if len(fds) == bootDescriptors {
		door = os.NewFile(uintptr(fds[2]), "door")
	}
	socket := os.NewFile(uintptr(fds[1]), "listener")
	defer socket.Close() // FileListener has its own
	l, err = net.FileListener(socket)
	if err != nil {
		return nil, nil, nil, nil, fmt.Errorf("cannot use the listening socket: %w", err)
	}
	if unixListener, ok := l.(*net.UnixListener); ok {
		unixListener.SetUnlinkOnClose(false) // its name is the runtime's, and not in this root
	}
	return boot, os.NewFile(uintptr(fds[0]), "/"), l, door, nil
}

func parseContainerBoot(message []byte) (*spec.ContainerBoot, error) {
	boot := &spec.ContainerBoot{}
	if err := json.Unmarshal(message, boot); err != nil {
		return nil, fmt.Errorf("cannot decode the boot message: %w", err)
	}
	tracing = boot.Trace
	if boot.Version != spec.ProtocolVersion {
		return nil, fmt.Errorf("cannot serve protocol version %d: this agent speaks %d", boot.Version, spec.ProtocolVersion)
	}
	return boot, nil
}

func passedDescriptors(control []byte) ([]int, error) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil, fmt.Errorf("cannot read passed descriptors: %w", err)
	}
	var fds []int
	for _, m := range messages {
		some, err := unix.ParseUnixRights(&m)
		if err != nil {
			return nil, fmt.Errorf("cannot read passed descriptors: %w", err)
		}
		fds = append(fds, some...)
	}
	return fds, nil
}

// answerBoot tells the runtime how the boot went and closes the socket.
func answerBoot(fd int, result spec.BootResult) error {
	return errors.Join(tellBoot(fd, result), unix.Close(fd))
}

func tellBoot(fd int, result spec.BootResult) error {
	b, err := json.Marshal(result)
	if err != nil {
		return err
	}
	if _, err := unix.Write(fd, b); err != nil {
		return fmt.Errorf("cannot answer the runtime: %w", err)
	}
	return nil
}

// containerWall is the agent's place in namespaces of the host's kernel.
type containerWall struct {
	pidOne
	// The root's mount, attached nowhere, until the container is entered.
	source *os.File
	// Nil without one.
	network *network
	// Nil but for a root that was made ahead of time.
	prepared *rootfs
}

// configure implements wall. Clock and entropy are the host's, and the host has set up the network.
func (w *containerWall) configure(hostname string, _ time.Time, _ []byte, n *network) error {
	w.network = n
	return setHostname(hostname)
}

func (*containerWall) ownClock() bool { return false }

// enter implements wall.
func (w *containerWall) enter(config *specs.Spec, filter []byte) (_ *root, err error) {
	var root *root
	if w.prepared != nil {
		w.prepared.network = w.network
		root, err = w.prepared.finish(config)
	} else {
		err = w.attach(config, func(fs *rootfs) (err error) {
			root, err = fs.run()
			return err
		})
	}
	if err != nil {
		return nil, err
	}
	if err := undumpable(); err != nil {
		return nil, err
	}
	end := phase("surrender capabilities")
	err = surrender(config, filters(filter))
	end()
	if err != nil {
		return nil, err
	}
	return root, filterSelf(filter)
}

// prepare does of enter what it can before the workload is known.
func (w *containerWall) prepare(config *specs.Spec) error {
	return w.attach(config, func(fs *rootfs) error {
		w.prepared = fs
		return fs.prepare()
	})
}

// attach puts the root over the old one and has it built.
func (w *containerWall) attach(config *specs.Spec, build func(*rootfs) error) error {
	if err := makePrivate(); err != nil {
		return err
	}
	oldDev, err := openDir("/dev")
	if err != nil {
		return err
	}
	defer oldDev.Close()
	// Over the old root, where nothing of this process's sees it but through the descriptor, so that no directory of the
	// host is needed as a mount point.
	top, err := openDir("/")
	if err != nil {
		return err
	}
	defer top.Close()
	if err := attach(w.source, top); err != nil {
		return err
	}
	defer phase("build the root")()
	return build(&rootfs{config: config, dir: w.source, oldDev: oldDev, network: w.network, enter: func(r *rootfs) error { return pivotInto(r.dir) }})
}

func openDir(name string) (*os.File, error) {
	fd, err := unix.Open(name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

func (*containerWall) sync() {}

func (*containerWall) oomKills(*os.File) (uint64, error) { return 0, nil }
