package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

// quiet is an app whose output a test reads.
func quiet(format string) (a *app, stdout, stderr *bytes.Buffer) {
	stdout, stderr = new(bytes.Buffer), new(bytes.Buffer)
	return &app{stdin: strings.NewReader(""), stdout: stdout, stderr: stderr, format: format}, stdout, stderr
}

func TestExitCodes(t *testing.T) {
	for _, c := range []struct {
		err  error
		code int
		text string
	}{
		{nil, 0, ""},
		{processExit(0), 0, ""},
		{processExit(42), 42, ""},
		{processExit(137), 137, ""},
		{errors.New("cannot x"), 125, "sandboxctl: cannot x"},
		{&client.Error{Reason: client.ReasonProcessNotFound, Message: "no such command"}, 127, "sandboxctl: no such command"},
		{fmt.Errorf("run: %w", &client.Error{Reason: client.ReasonProcessNotExecutable, Message: "no"}), 126, "sandboxctl: run: no"},
		{&client.Error{Reason: client.ReasonPolicyDenied, Message: "denied"}, 125, "sandboxctl: denied"},
		{&client.Error{Reason: client.ReasonUnreachable, Message: "nobody"}, 125, "sandboxctl: nobody"},
		{errors.Join(errors.New("one"), nil, errors.New("two")), 125, "sandboxctl: one\nsandboxctl: two"},
		{errors.Join(nil, exitStatus(7)), 7, ""},
		{context.Canceled, 125, "sandboxctl: context canceled"},
		// What a sandbox says stays on its line and does not move the cursor.
		{errors.New("a\nb\x1b[2Jc"), 125, "sandboxctl: a b\uFFFD[2Jc"},
	} {
		if code, text := exitCode(c.err), errorText(c.err); code != c.code || text != c.text {
			t.Errorf("%v: code %d, text %q; want %d, %q", c.err, code, text, c.code, c.text)
		}
	}
}

func TestWrongCommandLines(t *testing.T) {
	for _, args := range [][]string{
		{"run"}, {"create"}, {"exec", "x"}, {"nosuch"}, {"image", "nosuch"}, {"ps", "extra"}, {"ps", "--nosuch"}, {"cp", "a"},
		{"--format", "xml", "ps"}, {"--address", "tcp://x", "ps"}, {"cp", "a", "b"}, {"cp", "w:/a", "v:/b"},
		{"logs", "--tail", "few", "x"}, {"logs", "--since", "yesterday", "x"},
	} {
		a, stdout, stderr := quiet(formatTable)
		if code := a.main(args); code != exitError {
			t.Errorf("%v: exit code %d, want %d", args, code, exitError)
		}
		if text := stderr.String(); !strings.HasPrefix(text, "sandboxctl: ") || strings.Count(text, "\n") != 1 || stdout.Len() > 0 {
			t.Errorf("%v: want one sentence on stderr and nothing else, got %q and %q", args, text, stdout)
		}
	}
}

func TestNobodyThere(t *testing.T) {
	for _, args := range [][]string{{"ps"}, {"run", "x"}, {"doctor"}, {"version"}, {"stop", "a"}, {"image", "ls"}} {
		a, _, stderr := quiet(formatTable)
		if code := a.main(append([]string{"--address", "unix:///nonexistent/sandboxd.sock"}, args...)); code != exitError {
			t.Errorf("%v: exit code %d, want %d", args, code, exitError)
		}
		if !strings.Contains(stderr.String(), "/nonexistent/sandboxd.sock") || !strings.Contains(stderr.String(), "start sandboxd") {
			t.Errorf("%v: %q does not say what to do", args, stderr)
		}
	}
}

func TestEveryCommandHasAnExample(t *testing.T) {
	a, _, _ := quiet(formatTable)
	var names []string
	for _, c := range a.rootCommand().Commands() {
		names = append(names, c.Name())
		for _, sub := range append(c.Commands(), c) {
			if sub.Example == "" && !sub.HasSubCommands() || sub.Short == "" {
				t.Errorf("%s has no example or no description", sub.CommandPath())
			}
		}
	}
	for _, want := range strings.Fields("create run start stop kill wait rm exec attach logs ps inspect events stats cp image policy doctor version") {
		if !strings.Contains(" "+strings.Join(names, " ")+" ", " "+want+" ") {
			t.Errorf("there is no command %s", want)
		}
	}
	if code := a.main([]string{"completion", "bash"}); code != 0 {
		t.Errorf("completion bash: exit code %d", code)
	}
}

func aWorkload(state sandboxdv1.WorkloadState, code int32) *sandboxdv1.Workload {
	w := &sandboxdv1.Workload{
		Id: strings.Repeat("0123456789abcdef", 2), Name: "web", CreatedAt: timestamppb.New(time.Now().Add(-time.Hour - time.Second)),
		Spec: &sandboxdv1.WorkloadSpec{Image: "debian"},
		Status: &sandboxdv1.WorkloadStatus{
			State: state, Isolation: sandboxdv1.Isolation_ISOLATION_VM, Accelerator: "kvm",
			Decision: &sandboxdv1.Decision{Rule: "strangers"}, StartedAt: timestamppb.New(time.Now().Add(-3*time.Minute - time.Second)),
		},
	}
	if state == sandboxdv1.WorkloadState_WORKLOAD_STATE_EXITED {
		w.Status.ExitCode = &code
		w.Status.ExitedAt = timestamppb.New(time.Now().Add(-10*time.Second - 500*time.Millisecond))
	}
	return w
}

func TestPsTable(t *testing.T) {
	a, stdout, _ := quiet(formatTable)
	hostile := aWorkload(sandboxdv1.WorkloadState_WORKLOAD_STATE_CREATED, 0)
	hostile.Spec.Image = "x\x1b]0;title\x07\ty"
	if err := a.printWorkloads([]*sandboxdv1.Workload{
		aWorkload(sandboxdv1.WorkloadState_WORKLOAD_STATE_RUNNING, 0), aWorkload(sandboxdv1.WorkloadState_WORKLOAD_STATE_EXITED, 3), hostile,
	}, false); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(stdout.String()), "\n")
	if len(lines) != 4 {
		t.Fatalf("%d lines:\n%s", len(lines), stdout)
	}
	for i, want := range []string{
		"ID             NAME   IMAGE",
		"0123456789ab   web    debian",
		"Exited (3) 10 seconds ago   1 hour ago   strangers",
		"Created",
	} {
		if !strings.Contains(lines[i], want) {
			t.Errorf("line %d lacks %q:\n%s", i, want, lines[i])
		}
	}
	if !strings.Contains(lines[1], "vm (kvm)") || !strings.Contains(lines[1], "Up 3 minutes") || strings.ContainsAny(stdout.String(), "\x1b\x07") {
		t.Errorf("table:\n%s", stdout)
	}
}

func TestPsQuietAndJSON(t *testing.T) {
	list := []*sandboxdv1.Workload{aWorkload(sandboxdv1.WorkloadState_WORKLOAD_STATE_EXITED, 0)}
	a, stdout, _ := quiet(formatTable)
	if err := a.printWorkloads(list, true); err != nil || stdout.String() != list[0].GetId()+"\n" {
		t.Errorf("-q: %q %v", stdout, err)
	}
	for _, l := range [][]*sandboxdv1.Workload{list, nil} {
		a, stdout, _ = quiet(formatJSON)
		if err := a.printWorkloads(l, false); err != nil {
			t.Fatal(err)
		}
		var got []struct {
			ID     string
			Status struct {
				State    string
				ExitCode *int
			}
		}
		if err := json.Unmarshal(stdout.Bytes(), &got); err != nil || len(got) != len(l) {
			t.Fatalf("%v: %s", err, stdout)
		}
		// Exit code 0 is a value, not an absence.
		if len(l) > 0 && (got[0].ID != l[0].GetId() || got[0].Status.State != "WORKLOAD_STATE_EXITED" || got[0].Status.ExitCode == nil) {
			t.Errorf("json: %s", stdout)
		}
	}
}

func TestCPUShare(t *testing.T) {
	at := func(seconds, cpu float64) *sandboxdv1.Usage {
		return &sandboxdv1.Usage{
			Time:    timestamppb.New(time.Unix(0, int64(seconds*1e9))),
			CpuTime: durationpb.New(time.Duration(cpu * 1e9)),
		}
	}
	for _, c := range []struct {
		before, now *sandboxdv1.Usage
		want        string
	}{
		{at(10, 1), at(12, 2), "50.0%"},
		{at(10, 1), at(11, 3.5), "250.0%"},
		{nil, at(11, 3.5), "-"},
		{at(10, 1), at(10, 1), "-"},
		// It was started again meanwhile: its count began anew.
		{at(10, 5), at(11, 1), "0.0%"},
	} {
		if got := cpuShare(c.before, c.now); got != c.want {
			t.Errorf("cpuShare(%v, %v) = %s, want %s", c.before, c.now, got, c.want)
		}
	}
}

func TestTimestamps(t *testing.T) {
	var out bytes.Buffer
	w := &stampedWriter{w: &out, fresh: true}
	at := time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC)
	// Pieces are cut anywhere: a line gets the time of the piece it began in, once.
	for i, piece := range []string{"one\ntw", "o\n", "three", "\n\nfour"} {
		if err := w.write(at.Add(time.Duration(i)*time.Second), []byte(piece)); err != nil {
			t.Fatal(err)
		}
	}
	want := "2026-01-02T03:04:05.000006000Z one\n2026-01-02T03:04:05.000006000Z two\n" +
		"2026-01-02T03:04:07.000006000Z three\n2026-01-02T03:04:08.000006000Z \n2026-01-02T03:04:08.000006000Z four"
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
}

func TestParseTime(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for s, want := range map[string]time.Time{
		"10m": now.Add(-10 * time.Minute), "2026-01-01T00:00:00Z": time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
		"2026-01-01T02:00:00.5+02:00": time.Date(2026, 1, 1, 0, 0, 0, 5e8, time.UTC), "1700000000": time.Unix(1700000000, 0),
		"2026-01-01": time.Date(2026, 1, 1, 0, 0, 0, 0, time.Local),
	} {
		if got, err := parseTime("since", s, now); err != nil || !got.AsTime().Equal(want) {
			t.Errorf("parseTime(%q) = %v, %v; want %v", s, got.AsTime(), err, want)
		}
	}
}

func TestPullLines(t *testing.T) {
	var out bytes.Buffer
	now := time.Unix(0, 0)
	l := &lines{w: &out, last: make(map[string]time.Time), now: func() time.Time { return now }}
	report := func(done uint64) {
		l.report(&sandboxdv1.PullProgress{Phase: "fetch", Layer: "sha256:0123456789abcdef", DoneBytes: done, TotalBytes: 1 << 20})
	}
	report(0)
	report(1 << 10) // too soon
	now = now.Add(lineEvery)
	report(1 << 19)
	report(1 << 20) // the end, however soon
	want := "fetch 0123456789ab: 0B of 1.0MiB\nfetch 0123456789ab: 512.0KiB of 1.0MiB\nfetch 0123456789ab: 1.0MiB of 1.0MiB\n"
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
}

// Whatever was reported last, the bars let go of the terminal: a pull that failed leaves steps unfinished.
func TestPullBarsEnd(t *testing.T) {
	var out bytes.Buffer
	b := newBars(&out)
	for _, p := range []*sandboxdv1.PullProgress{
		{Phase: "resolve"}, {Phase: "fetch", Layer: "sha256:a", DoneBytes: 5, TotalBytes: 10}, {Phase: "fetch", Layer: "sha256:b", DoneBytes: 10, TotalBytes: 10},
		{Phase: "build", DoneBytes: 7}, {Phase: "build", DoneBytes: 7, TotalBytes: 7}, {Phase: "build", DoneBytes: 7, TotalBytes: 7},
	} {
		b.report(p)
	}
	ended := make(chan struct{})
	go func() {
		b.end()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(30 * time.Second):
		t.Fatal("the bars wait for steps that will not end")
	}
	if len(b.bars) != 3 {
		t.Errorf("%d bars, want one for each layer and one for the build", len(b.bars))
	}
}

func TestPolicyCheck(t *testing.T) {
	dir := t.TempDir()
	good, bad := dir+"/good.yaml", dir+"/bad.yaml"
	writeFile(t, good, "version: 1\ndefault: deny\n")
	writeFile(t, bad, "version: 1\nrules:\n  - name: x\n    when: 'request.nosuch'\n    isolation: vm\n")
	a, stdout, _ := quiet(formatTable)
	if code := a.main([]string{"policy", "check", good}); code != 0 || !strings.Contains(stdout.String(), "otherwise deny") {
		t.Errorf("a good policy: exit code %d, %q", code, stdout)
	}
	a, stdout, stderr := quiet(formatTable)
	if code := a.main([]string{"policy", "check", bad}); code != exitNo || !strings.Contains(stderr.String(), "bad.yaml:4") || stdout.Len() > 0 {
		t.Errorf("a bad policy: exit code %d, %q", code, stderr)
	}
	a, _, _ = quiet(formatTable)
	if code := a.main([]string{"policy", "check", dir + "/none"}); code != exitError {
		t.Errorf("no policy: exit code %d", code)
	}
}
