// Command rogue stands in for sandbox-agent as PID 1 of a guest, in tests: a guest that was taken over. It dials in as an
// agent does, and then does what the line it reads tells it, answering with a line.
package main

import (
	"bufio"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

func main() {
	err := run()
	if err == nil {
		err = errors.New("the daemon hung up")
	}
	fmt.Println("rogue:", err)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() error {
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			return err
		}
	}
	b, err := os.ReadFile("/boot.json")
	if err != nil {
		return err
	}
	var boot spec.VMBoot
	if err := json.Unmarshal(b, &boot); err != nil {
		return err
	}
	for _, path := range boot.Modules {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	conn, err := dial(boot)
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(conn)
	for lines.Scan() {
		answer, err := obey(lines.Text())
		if err != nil {
			answer = "error: " + strings.ReplaceAll(err.Error(), "\n", "; ")
		}
		if _, err := fmt.Fprintln(conn, answer); err != nil {
			return err
		}
	}
	return lines.Err()
}

func dial(boot spec.VMBoot) (*os.File, error) {
	token, err := hex.DecodeString(boot.Token)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: boot.VsockPort}); err != nil {
		return nil, err
	}
	conn := os.NewFile(uintptr(fd), "vsock")
	_, err = conn.Write(spec.Preface([spec.TokenLen]byte(token)))
	return conn, err
}

func obey(command string) (string, error) {
	switch command {
	case "write image":
		return writeImage()
	case "touch memory":
		return touchMemory()
	case "panic":
		return "", os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	case "triple fault":
		// The kernel's own way to reset at once, which reboot=t makes a triple fault.
		return "", os.WriteFile("/proc/sysrq-trigger", []byte("b"), 0)
	case "restart":
		return "", unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	case "shout":
		return "", shout()
	case "cmdline":
		b, err := os.ReadFile("/proc/cmdline")
		return strings.TrimSpace(string(b)), err
	default:
		return "", errors.New("unknown command")
	}
}

// shout floods the console, pretends a panic in words for a terminal, and goes.
func shout() error {
	c, err := os.OpenFile("/dev/console", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	for range 1000 {
		if _, err := fmt.Fprintln(c, strings.Repeat("\x1b]0;owned\a", 5)); err != nil {
			return err
		}
	}
	time.Sleep(3 * time.Second) // by then it is heard
	if _, err := fmt.Fprintf(c, "\nKernel panic - not syncing: \x1b[2J%s\n", strings.Repeat("x", 10000)); err != nil {
		return err
	}
	return unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

// writeImage tries every way to change the image's drive, and answers with those that worked.
func writeImage() (string, error) {
	node, err := imageNode()
	if err != nil {
		return "", err
	}
	f, err := os.OpenFile(node, os.O_RDWR, 0)
	if err != nil {
		// The kernel refuses because the drive says it is read-only: tell it otherwise first.
		if f, err = os.Open(node); err != nil {
			return "", err
		}
	}
	var done []string
	try := func(name string, err error) {
		if err == nil {
			done = append(done, name)
		}
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.BLKROSET, 0); err != nil {
		return "", fmt.Errorf("cannot make the block device writable: %w", err)
	}
	w, err := os.OpenFile(node, os.O_RDWR|unix.O_SYNC, 0)
	if err != nil {
		return "", fmt.Errorf("cannot open the block device for writing: %w", err)
	}
	_, err = w.WriteAt(make([]byte, 8192), 0)
	if err == nil {
		err = w.Sync()
	}
	try("write", err)
	span := [2]uint64{0, 1 << 20}
	for name, request := range map[string]uintptr{"discard": unix.BLKDISCARD, "zero": unix.BLKZEROOUT, "secure discard": unix.BLKSECDISCARD} {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, w.Fd(), request, uintptr(unsafe.Pointer(&span)))
		if errno == 0 {
			errno = 0
			done = append(done, name)
		}
	}
	return "worked: " + strings.Join(done, ","), nil
}

func imageNode() (string, error) {
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		files, err := filepath.Glob("/sys/block/*/serial")
		if err != nil {
			return "", err
		}
		for _, file := range files {
			if b, err := os.ReadFile(file); err == nil && strings.HasPrefix(string(b), "sandbox-image") {
				return "/dev/" + filepath.Base(filepath.Dir(file)), nil
			}
		}
	}
	return "", errors.New("no image drive")
}

// touchMemory writes to nearly every page the guest has and answers with how much that was.
func touchMemory() (string, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return "", err
	}
	const spare = 8 << 20
	size := int(info.Freeram) - spare
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return "", err
	}
	for i := 0; i < size; i += 4096 {
		b[i] = 1
	}
	return fmt.Sprintf("touched %d", size), unix.Munmap(b)
}
