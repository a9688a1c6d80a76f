// Command vsockguest is the init of the guests that transport tests boot: it dials as an agent does, and serves on each
// connection the one command that comes on it.
//
//	echo        send back what comes, until the host's half-close
//	source N    send N bytes, whose sum the test knows
//	sink        read until the host's half-close, answer with the sum
//	hold        read nothing, stay open
//	hangup      close with what the host sent unread
//	reset       reset the machine
package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// redial is an agent's: a connection lost is dialled again.
const redial = 10 * time.Millisecond

func main() {
	err := run()
	fmt.Println("vsockguest:", err)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

func run() error {
	b, err := os.ReadFile("/boot.json")
	if err != nil {
		return err
	}
	var boot spec.VMBoot
	if err := json.Unmarshal(b, &boot); err != nil {
		return err
	}
	for _, path := range boot.Modules {
		if err := load(path); err != nil {
			return fmt.Errorf("cannot load %s: %w", path, err)
		}
	}
	token, err := hex.DecodeString(boot.Token)
	if err != nil {
		return err
	}
	for {
		conn, err := vsock.Dial(vsock.Host, boot.VsockPort, nil)
		if err == nil {
			_, err = conn.Write(spec.Preface([spec.TokenLen]byte(token)))
		}
		if err != nil {
			time.Sleep(redial)
			continue
		}
		r := bufio.NewReader(conn)
		if _, err := r.Peek(1); err != nil {
			_ = conn.Close()
			continue
		}
		go serve(conn, r)
	}
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
		return err
	}
	return nil
}

func serve(conn *vsock.Conn, r *bufio.Reader) {
	defer conn.Close()
	line, err := r.ReadString('\n')
	if err != nil {
		return
	}
	switch command, arg, _ := strings.Cut(strings.TrimSpace(line), " "); command {
	case "echo":
		_, _ = io.Copy(conn, r)
	case "source":
		n, _ := strconv.ParseInt(arg, 10, 64)
		_, _ = io.CopyN(conn, rand.NewChaCha8([32]byte{}), n)
		_ = conn.CloseWrite()
		_, _ = io.Copy(io.Discard, r)
	case "sink":
		h := sha256.New()
		_, _ = io.Copy(h, r)
		fmt.Fprintf(conn, "%x\n", h.Sum(nil))
	case "hold":
		select {}
	case "hangup":
	case "reset":
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	}
}
