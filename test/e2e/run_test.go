package e2e

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

func TestRunSpeaks(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		w.Run(busybox, "echo", "hello  there").Run().WantOut(t, "hello  there\n")
		r := w.Run(busybox, "sh", "-c", "echo out; echo err >&2; exit 3").Run()
		r.Want(t, 3)
		if r.Stdout != "out\n" || r.Stderr != "err\n" {
			t.Errorf("stdout %q, stderr %q, want them apart", r.Stdout, r.Stderr)
		}
	})
}

func TestExitCodes(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		for _, c := range []struct {
			what    string
			command []string
			code    int
		}{
			{"success", []string{"true"}, 0},
			{"the process's own", []string{"sh", "-c", "exit 7"}, 7},
			{"the largest", []string{"sh", "-c", "exit 255"}, 255},
			{"killed by SIGKILL", []string{"sh", "-c", "kill -KILL $$"}, 137},
			{"killed by SIGTERM", []string{"sh", "-c", "kill -TERM $$"}, 143},
			{"found but not executable", []string{"/etc/not-executable"}, 126},
			{"a directory", []string{"/etc"}, 126},
			{"not found in PATH", []string{"no-such-program"}, 127},
			{"no such path", []string{"/no/such/program"}, 127},
		} {
			r := w.Run(append([]string{busybox}, c.command...)...).Run()
			if r.Code != c.code {
				t.Errorf("%s: exit code %d, want %d; stderr: %s", c.what, r.Code, c.code, r.Stderr)
			}
			if c.code == 126 || c.code == 127 {
				r.WantError(t, c.code, c.command[0])
			}
		}
	})
}

func TestProcessIsAsAsked(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		envFile := filepath.Join(t.TempDir(), "env")
		must(t, os.WriteFile(envFile, []byte("# comment\nFROM_FILE=yes\nBOTH=file\n"), 0o600))
		for _, c := range []struct {
			what  string
			flags []string
			// Its output must be want; the script says as much as it can, since every run in a VM boots one.
			script, want string
		}{
			{"as the image says", nil,
				`case $PATH in */bin*) echo path;; esac; id -u; pwd; echo "$HOME"`, "path\n0\n/\n/root\n"},
			{"environment, user by name with its groups, directory, host name",
				[]string{"-e", "SPACED=a b", "--env-file", envFile, "--env", "BOTH=flag", "-u", "app", "-w", "/var/tmp", "--hostname", "box.example"},
				`echo "$SPACED|$FROM_FILE|$BOTH"; id -u; id -g; echo $(id -G); echo $HOME; pwd; hostname`,
				"a b|yes|flag\n1000\n1000\n1000 29 50\n/home/app\n/var/tmp\nbox.example\n"},
			{"user and group by number, a directory that is missing", []string{"--user", "4711:815", "--workdir", "/made/for/it"},
				"id -u; id -g; pwd", "4711\n815\n/made/for/it\n"},
			{"user by name, group by name", []string{"--user", "app:staff"}, "echo $(id -u) $(id -g)", "1000 50\n"},
		} {
			r := w.Run(append(c.flags, busybox, "sh", "-c", c.script)...).Run()
			if r.Code != 0 || r.Stdout != c.want {
				t.Errorf("%s: exit code %d, wrote %q, want %q; stderr: %s", c.what, r.Code, r.Stdout, c.want, r.Stderr)
			}
		}
		// Flags after the image are the command's.
		w.Run("--entrypoint", "printf", busybox, "%s ", "--rm", "-v").Run().WantOut(t, "--rm -v ")
		w.Run("-u", "nobody-knows", busybox, "true").Run().WantError(t, 125, "nobody-knows")
	})
}

func TestHostnameIsTheIDByDefault(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sleep", "600")
		w.Exec(id, "hostname").Run().WantOut(t, id[:12]+"\n")
	})
}

func TestRunInteractive(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		// cat ends because its input does: the end of ours must reach it.
		w.Run("-i", busybox, "cat").WithStdin(strings.NewReader("line one\nno newline")).Run().WantOut(t, "line one\nno newline")
		// Half-close: wc answers only after its input has ended, on a connection that still carries its output.
		w.Run("-i", busybox, "wc", "-c").WithStdin(strings.NewReader(strings.Repeat("x", 1<<20))).Run().WantOut(t, "1048576\n")
		// Without -i there is nothing to read, and no waiting for it.
		w.Run(busybox, "cat").WithStdin(strings.NewReader("unread")).Run().WantOut(t, "")
	})
}

func TestRunKeepsOrRemoves(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		name := "kept-" + w.Isolation
		w.Command("run", "--isolation", w.Isolation, "--name", name, busybox, "sh", "-c", "echo said; exit 4").Run().Want(t, 4)
		if got := w.Inspect(t, name); got.Status.State != "WORKLOAD_STATE_EXITED" || got.Status.ExitCode == nil || *got.Status.ExitCode != 4 {
			t.Errorf("after run without --rm: %+v", got.Status)
		}
		w.Call(t, "logs", name).WantOut(t, "said\n")
		w.Call(t, "rm", name)
		w.Command("inspect", name).Run().WantError(t, 125, name)
		w.Run("--name", name, busybox, "true").Run().Want(t, 0)
		w.Command("inspect", name).Run().WantError(t, 125, name)
	})
}

func TestCreateStartWait(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Create(t, busybox, "sh", "-c", "exit 5")
		if s := w.Inspect(t, id).Status.State; s != "WORKLOAD_STATE_CREATED" {
			t.Errorf("state %s after create", s)
		}
		w.Call(t, "start", id)
		w.Call(t, "wait", id).WantOut(t, "5\n")
		// The prefix of an id is enough.
		w.Call(t, "wait", id[:8]).WantOut(t, "5\n")
	})
}

func TestRestartKeepsWrittenFiles(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sh", "-c", `if [ -f /kept ]; then cat /kept; exit 5; fi; echo written before > /kept; exit 4`)
		w.Call(t, "wait", id).WantOut(t, "4\n")
		w.Call(t, "start", id)
		w.Call(t, "wait", id).WantOut(t, "5\n")
		if out := w.Call(t, "logs", id).Stdout; !strings.HasSuffix(out, "written before\n") {
			t.Errorf("the second run wrote %q", out)
		}
	})
}

func TestStop(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		for _, c := range []struct {
			what, script string
			create, stop []string
			code         int
		}{
			{"default signal", `trap "exit 3" TERM; echo ready; while :; do sleep 0.1; done`, nil, nil, 3},
			{"its own signal", `trap "exit 42" USR1; echo ready; while :; do sleep 0.1; done`, []string{"--stop-signal", "USR1"}, nil, 42},
			{"deaf to it", `trap "" TERM; echo ready; while :; do sleep 0.1; done`, nil, []string{"--grace", "1s"}, 137},
			{"no grace", `trap "" TERM; echo ready; while :; do sleep 0.1; done`, nil, []string{"--grace", "0s"}, 137},
			{"not handled", `echo ready; exec sleep 600`, nil, nil, 143},
		} {
			id := w.Start(t, append(c.create, busybox, "sh", "-c", c.script)...)
			w.WaitForLog(t, id, "ready\n")
			began := time.Now()
			w.Call(t, append(append([]string{"stop"}, c.stop...), id)...)
			// The default grace is 10 s: only who is deaf to the signal may need it all, and here nobody is.
			if took := time.Since(began); took > 9*time.Second {
				t.Errorf("%s: stop took %s", c.what, took)
			}
			w.Call(t, "wait", id).WantOut(t, strconv.Itoa(c.code)+"\n")
		}
	})
}

func TestKill(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		// Start and end again and again: a workload may be started anew after each end.
		id := w.Create(t, busybox, "sh", "-c", `trap "echo one; exit 7" USR1; echo ready; while :; do sleep 0.1; done`)
		for i, c := range []struct {
			flags []string
			code  int
		}{{nil, 137}, {[]string{"--signal", "TERM"}, 143}, {[]string{"--signal", "SIGUSR1"}, 7}, {[]string{"--signal", "10"}, 7}} {
			w.Call(t, "start", id)
			eventually(t, harness.LogTimeout, "it is ready once more", func() (bool, string) {
				out := w.Call(t, "logs", id).Stdout
				return strings.Count(out, "ready\n") == i+1, out
			})
			w.Call(t, append(append([]string{"kill"}, c.flags...), id)...)
			w.Call(t, "wait", id).WantOut(t, strconv.Itoa(c.code)+"\n")
		}
	})
}

func TestRemoveRunning(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sleep", "600")
		w.Command("rm", id).Run().WantError(t, 125, "running")
		w.Call(t, "rm", "-f", id)
		w.Command("inspect", id).Run().WantError(t, 125, "no workload")
	})
}

func TestZombiesAreReaped(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		// Twenty processes lose their parent and then end: only PID 1 can reap them.
		id := w.Start(t, busybox, "sh", "-c", `for i in $(seq 20); do sh -c 'sleep 0.2 &'; done; echo ready; exec sleep 600`)
		w.WaitForLog(t, id, "ready\n")
		eventually(t, 20*time.Second, "no zombie and no sleeper left", func() (bool, string) {
			r := w.Exec(id, "sh", "-c", `grep -h -E '^(Name|State|PPid):' /proc/[0-9]*/status`).Run()
			return r.Code == 0 && !strings.Contains(r.Stdout, "zombie") && strings.Count(r.Stdout, "sleep\n") == 1, r.Stdout
		})
	})
}

// The demo's image: a whole Debian.
func TestDebian(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		w.Run(debian, "python3", "-c", "print(sum(range(10)))").Run().WantOut(t, "45\n")
		w.Run(debian, "sh", "-c", ". /etc/os-release; echo $ID $VERSION_ID").Run().WantOut(t, "debian 12\n")
	})
}
