package e2e

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestRunSpeaks(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		w.run(busybox, "echo", "hello  there").run().wantOut(t, "hello  there\n")
		r := w.run(busybox, "sh", "-c", "echo out; echo err >&2; exit 3").run()
		r.want(t, 3)
		if r.stdout != "out\n" || r.stderr != "err\n" {
			t.Errorf("stdout %q, stderr %q, want them apart", r.stdout, r.stderr)
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
			r := w.run(append([]string{busybox}, c.command...)...).run()
			if r.code != c.code {
				t.Errorf("%s: exit code %d, want %d; stderr: %s", c.what, r.code, c.code, r.stderr)
			}
			if c.code == 126 || c.code == 127 {
				r.wantError(t, c.code, c.command[0])
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
			r := w.run(append(c.flags, busybox, "sh", "-c", c.script)...).run()
			if r.code != 0 || r.stdout != c.want {
				t.Errorf("%s: exit code %d, wrote %q, want %q; stderr: %s", c.what, r.code, r.stdout, c.want, r.stderr)
			}
		}
		// Flags after the image are the command's.
		w.run("--entrypoint", "printf", busybox, "%s ", "--rm", "-v").run().wantOut(t, "--rm -v ")
		w.run("-u", "nobody-knows", busybox, "true").run().wantError(t, 125, "nobody-knows")
	})
}

func TestHostnameIsTheIDByDefault(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.start(t, busybox, "sleep", "600")
		w.exec(id, "hostname").run().wantOut(t, id[:12]+"\n")
	})
}

func TestRunInteractive(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		// cat ends because its input does: the end of ours must reach it.
		w.run("-i", busybox, "cat").withStdin(strings.NewReader("line one\nno newline")).run().wantOut(t, "line one\nno newline")
		// Half-close: wc answers only after its input has ended, on a connection that still carries its output.
		w.run("-i", busybox, "wc", "-c").withStdin(strings.NewReader(strings.Repeat("x", 1<<20))).run().wantOut(t, "1048576\n")
		// Without -i there is nothing to read, and no waiting for it.
		w.run(busybox, "cat").withStdin(strings.NewReader("unread")).run().wantOut(t, "")
	})
}

func TestRunKeepsOrRemoves(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		name := "kept-" + w.isolation
		w.command("run", "--isolation", w.isolation, "--name", name, busybox, "sh", "-c", "echo said; exit 4").run().want(t, 4)
		if got := w.inspect(t, name); got.Status.State != "WORKLOAD_STATE_EXITED" || got.Status.ExitCode == nil || *got.Status.ExitCode != 4 {
			t.Errorf("after run without --rm: %+v", got.Status)
		}
		w.call(t, "logs", name).wantOut(t, "said\n")
		w.call(t, "rm", name)
		w.command("inspect", name).run().wantError(t, 125, name)
		w.run("--name", name, busybox, "true").run().want(t, 0)
		w.command("inspect", name).run().wantError(t, 125, name)
	})
}

func TestCreateStartWait(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.create(t, busybox, "sh", "-c", "exit 5")
		if s := w.inspect(t, id).Status.State; s != "WORKLOAD_STATE_CREATED" {
			t.Errorf("state %s after create", s)
		}
		w.call(t, "start", id)
		w.call(t, "wait", id).wantOut(t, "5\n")
		// The prefix of an id is enough.
		w.call(t, "wait", id[:8]).wantOut(t, "5\n")
	})
}

func TestRestartKeepsWrittenFiles(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.start(t, busybox, "sh", "-c", `if [ -f /kept ]; then cat /kept; exit 5; fi; echo written before > /kept; exit 4`)
		w.call(t, "wait", id).wantOut(t, "4\n")
		w.call(t, "start", id)
		w.call(t, "wait", id).wantOut(t, "5\n")
		if out := w.call(t, "logs", id).stdout; !strings.HasSuffix(out, "written before\n") {
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
			id := w.start(t, append(c.create, busybox, "sh", "-c", c.script)...)
			w.waitForLog(t, id, "ready\n")
			began := time.Now()
			w.call(t, append(append([]string{"stop"}, c.stop...), id)...)
			// The default grace is 10 s: only who is deaf to the signal may need it all, and here nobody is.
			if took := time.Since(began); took > 9*time.Second {
				t.Errorf("%s: stop took %s", c.what, took)
			}
			w.call(t, "wait", id).wantOut(t, strconv.Itoa(c.code)+"\n")
		}
	})
}

func TestKill(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		// Start and end again and again: a workload may be started anew after each end.
		id := w.create(t, busybox, "sh", "-c", `trap "echo one; exit 7" USR1; echo ready; while :; do sleep 0.1; done`)
		for i, c := range []struct {
			flags []string
			code  int
		}{{nil, 137}, {[]string{"--signal", "TERM"}, 143}, {[]string{"--signal", "SIGUSR1"}, 7}, {[]string{"--signal", "10"}, 7}} {
			w.call(t, "start", id)
			eventually(t, logTimeout, "it is ready once more", func() (bool, string) {
				out := w.call(t, "logs", id).stdout
				return strings.Count(out, "ready\n") == i+1, out
			})
			w.call(t, append(append([]string{"kill"}, c.flags...), id)...)
			w.call(t, "wait", id).wantOut(t, strconv.Itoa(c.code)+"\n")
		}
	})
}

func TestRemoveRunning(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.start(t, busybox, "sleep", "600")
		w.command("rm", id).run().wantError(t, 125, "running")
		w.call(t, "rm", "-f", id)
		w.command("inspect", id).run().wantError(t, 125, "no workload")
	})
}

func TestZombiesAreReaped(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		// Twenty processes lose their parent and then end: only PID 1 can reap them.
		id := w.start(t, busybox, "sh", "-c", `for i in $(seq 20); do sh -c 'sleep 0.2 &'; done; echo ready; exec sleep 600`)
		w.waitForLog(t, id, "ready\n")
		eventually(t, 20*time.Second, "no zombie and no sleeper left", func() (bool, string) {
			r := w.exec(id, "sh", "-c", `grep -h -E '^(Name|State|PPid):' /proc/[0-9]*/status`).run()
			return r.code == 0 && !strings.Contains(r.stdout, "zombie") && strings.Count(r.stdout, "sleep\n") == 1, r.stdout
		})
	})
}

// The demo's image: a whole Debian.
func TestDebian(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		w.run(debian, "python3", "-c", "print(sum(range(10)))").run().wantOut(t, "45\n")
		w.run(debian, "sh", "-c", ". /etc/os-release; echo $ID $VERSION_ID").run().wantOut(t, "debian 12\n")
	})
}
