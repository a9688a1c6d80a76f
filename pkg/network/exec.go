package network

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// maxAnswer bounds what a plugin may say on its standard output; a result with a hundred routes has 10 KB.
	maxAnswer = 1 << 20
	// maxComplaint bounds what is kept of its standard error, and shown of what went wrong.
	maxComplaint = 2048
	// pipeDelay is how long a plugin's own children may keep its output open after its end.
	pipeDelay = 2 * time.Second
	// pluginPath is where plugins find programs: iptables, nft, sysctl.
	pluginPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

// pluginExec runs plugins for libcni: bounded, with an environment of their own, and marked by an open lock (lock.go).
type pluginExec struct {
	version.PluginDecoder
	lock *os.File
}

var _ invoke.Exec = (*pluginExec)(nil)

// ExecPlugin implements invoke.Exec. ctx bounds the plugin and, since they are in its process group, the plugins it runs.
func (e *pluginExec) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	name := filepath.Base(path)
	answer, complaint := &bounded{limit: maxAnswer, strict: true}, &bounded{limit: maxComplaint}
	cmd := exec.CommandContext(ctx, path)
	cmd.Dir = "/"
	cmd.Env = pluginEnv(environ)
	cmd.Stdin = bytes.NewReader(stdin)
	cmd.Stdout, cmd.Stderr = answer, complaint
	cmd.ExtraFiles = []*os.File{e.lock}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) } // not reaped yet: the number is its own
	cmd.WaitDelay = pipeDelay
	err := cmd.Run()
	switch {
	case err == nil:
		return answer.kept.Bytes(), nil
	case ctx.Err() != nil:
		return nil, spec.Errorf(spec.KindUnavailable, "plugin %s did not end in time and was killed: %w%s", name, context.Cause(ctx), said(complaint.kept.Bytes()))
	case answer.over:
		return nil, fmt.Errorf("plugin %s answered with more than %d bytes", name, maxAnswer)
	}
	return nil, pluginError(name, err, answer.kept.Bytes(), complaint.kept.Bytes())
}

// pluginError is what a plugin that failed says in the form that CNI defines, or whatever it says.
func pluginError(name string, err error, answer, complaint []byte) error {
	var why types.Error
	if json.Unmarshal(answer, &why) == nil && why.Msg != "" {
		text := why.Msg
		if why.Details != "" {
			text += ": " + why.Details
		}
		return fmt.Errorf("plugin %s failed: %s (code %d)", name, clip(text), why.Code)
	}
	if len(complaint) == 0 {
		complaint = answer
	}
	return fmt.Errorf("plugin %s failed: %w%s", name, err, said(complaint))
}

func said(b []byte) string {
	if len(bytes.TrimSpace(b)) == 0 {
		return ""
	}
	return fmt.Sprintf("; it said %q", clip(string(bytes.TrimSpace(b))))
}

// clip keeps a message readable, and sendable.
func clip(s string) string {
	if len(s) > maxComplaint {
		s = s[:maxComplaint] + "…"
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// pluginEnv leaves of the daemon's environment, which libcni would pass on, nothing.
func pluginEnv(environ []string) []string {
	env := []string{pluginPath, "LC_ALL=C.UTF-8"}
	for _, v := range environ {
		if strings.HasPrefix(v, "CNI_") {
			env = append(env, v)
		}
	}
	return env
}

// FindInPath implements invoke.Exec. A plugin that others than root could replace is none.
func (e *pluginExec) FindInPath(plugin string, dirs []string) (string, error) {
	return findPlugin(plugin, dirs)
}

func findPlugin(plugin string, dirs []string) (string, error) {
	path, err := invoke.FindInPath(plugin, dirs)
	if err != nil {
		return "", spec.Errorf(spec.KindWrongState, "plugin %q is not in %s: install it (Debian: containernetworking-plugins) or name its directory with --cni-plugin-dir",
			clip(plugin), strings.Join(dirs, ", "))
	}
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if err := rootsOwn(path, info); err != nil {
		return "", fmt.Errorf("cannot use plugin %s: %w", plugin, err)
	}
	dir, err := os.Stat(filepath.Dir(path))
	if err != nil {
		return "", err
	}
	if dir.Mode().Perm()&0o022 != 0 && dir.Mode()&os.ModeSticky == 0 {
		return "", fmt.Errorf("cannot use plugin %s: others than root can write to %s", plugin, filepath.Dir(path))
	}
	return path, nil
}

// bounded keeps the first limit bytes; a strict one refuses more, which ends the writer's pipe. The buffer is not embedded: its
// ReadFrom would take everything.
type bounded struct {
	kept   bytes.Buffer
	limit  int
	strict bool
	over   bool
}

var errTooMuch = errors.New("more than is taken")

func (b *bounded) Write(p []byte) (int, error) {
	room := b.limit - b.kept.Len()
	if len(p) <= room {
		return b.kept.Write(p)
	}
	b.over = true
	_, _ = b.kept.Write(p[:max(room, 0)]) // never fails
	if b.strict {
		return 0, errTooMuch
	}
	return len(p), nil
}
