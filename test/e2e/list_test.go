package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

func TestListAndFilter(t *testing.T) {
	d := shared
	d.Watch(t)
	c, v := d.Wall("container"), d.Wall("vm")
	one := c.Create(t, "--name", "one", "-l", "team=red", busybox, "true")
	two := v.Create(t, "--name", "two", "--label", "team=blue", "-l", "size=large", busybox, "true")
	three := c.Start(t, "--name", "three", "-l", "team=red", busybox, "sleep", "600")
	for _, f := range []struct {
		args []string
		want []string
	}{
		{[]string{"-a"}, []string{one, two, three}},
		{nil, []string{three}},
		{[]string{"-a", "--filter", "label=team=red"}, []string{one, three}},
		{[]string{"-a", "--filter", "label=size"}, []string{two}},
		{[]string{"-a", "--filter", "label=team=red", "--filter", "label=size"}, nil},
		{[]string{"-a", "--filter", "state=created"}, []string{one, two}},
		{[]string{"-a", "--filter", "isolation=vm"}, []string{two}},
		{[]string{"-a", "--filter", "isolation=container", "--filter", "state=running"}, []string{three}},
	} {
		got := strings.Fields(d.Call(t, append([]string{"ps", "-q"}, f.args...)...).Stdout)
		for i, id := range got {
			for _, full := range []string{one, two, three} {
				if strings.HasPrefix(full, id) {
					got[i] = full
				}
			}
		}
		if !slices.Equal(got, f.want) {
			t.Errorf("ps -q %s: got %q, want %q", strings.Join(f.args, " "), got, f.want)
		}
	}
	table := d.Call(t, "ps", "-a").Stdout
	for _, word := range []string{"one", "two", "three", "container", "vm", "created", "up ", busybox} {
		if !strings.Contains(strings.ToLower(table), word) {
			t.Errorf("ps does not show %q:\n%s", word, table)
		}
	}
	if got := d.Inspect(t, "two"); got.Name != "two" || got.Labels["size"] != "large" || got.ID != two {
		t.Errorf("inspect: %+v", got)
	}
	d.Command("ps", "--filter", "colour=red").Run().WantError(t, 125, "colour")
}

func TestListIsPaged(t *testing.T) {
	d := shared
	d.Watch(t)
	var want, got []string
	for range 5 {
		want = append(want, d.Wall("container").Create(t, busybox, "true"))
	}
	for token, pages := "", 0; ; pages++ {
		r, err := d.Workloads().ListWorkloads(t.Context(), &sandboxdv1.ListWorkloadsRequest{PageSize: 2, PageToken: token})
		must(t, err)
		if len(r.Workloads) > 2 {
			t.Fatalf("a page of %d, asked for 2", len(r.Workloads))
		}
		for _, w := range r.Workloads {
			got = append(got, w.Id)
		}
		if token = r.NextPageToken; token == "" {
			break
		}
		if pages > 5 {
			t.Fatal("pages without end")
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q, oldest first", got, want)
	}
}

func TestEvents(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		name := "eventful-" + w.Isolation
		id := w.Create(t, "--name", name, busybox, "sh", "-c", "sleep 1; exit 3")
		w.Call(t, "start", id)
		// The past comes first, then what happens from here on.
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		stream, err := w.Workloads().WatchEvents(ctx, &sandboxdv1.WatchEventsRequest{Id: id, Since: timestamppb.New(time.Now().Add(-time.Hour))})
		must(t, err)
		w.Exec(id, "true").Run().Want(t, 0)
		w.Call(t, "wait", id)
		w.Call(t, "rm", id)
		var got []string
		for !slices.Contains(got, "TYPE_DELETED") {
			m, err := stream.Recv()
			if errors.Is(err, io.EOF) || err != nil {
				t.Fatalf("events end with %v after %q", err, got)
			}
			e := m.Event
			got = append(got, e.Type.String())
			if e.WorkloadId != id || e.WorkloadName != name {
				t.Errorf("event of another: %v", e)
			}
			if e.Type == sandboxdv1.Event_TYPE_EXITED && e.Attributes["exit_code"] != "3" {
				t.Errorf("event without its exit code: %v", e)
			}
			if e.Type == sandboxdv1.Event_TYPE_CREATED && e.Attributes["rule"] != "no-policy" {
				t.Errorf("event without the decision: %v", e)
			}
		}
		want := []string{"TYPE_CREATED", "TYPE_STARTING", "TYPE_STARTED", "TYPE_EXEC_STARTED", "TYPE_EXEC_EXITED", "TYPE_EXITED", "TYPE_DELETED"}
		got = slices.DeleteFunc(got, func(s string) bool { return s == "TYPE_STOPPING" })
		if !slices.Equal(got, want) {
			t.Errorf("got  %q\nwant %q", got, want)
		}
	})
}

func TestSmallCommands(t *testing.T) {
	d := shared
	d.Watch(t)
	if out := d.Call(t, "version").Stdout; strings.Count(out, "\n") < 1 {
		t.Errorf("version wrote %q", out)
	}
	doctor := d.Call(t, "doctor").Stdout
	for _, word := range []string{"cgroup", "container", "vm"} {
		if !strings.Contains(strings.ToLower(doctor), word) {
			t.Errorf("doctor does not speak of %s:\n%s", word, doctor)
		}
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if out := d.Call(t, "completion", shell).Stdout; !strings.Contains(out, "sandboxctl") {
			t.Errorf("completion %s wrote %q", shell, abridged(out))
		}
	}
	var list any
	if out := d.Call(t, "--format", "json", "ps", "-a").Stdout; json.Unmarshal([]byte(out), &list) != nil && out != "" {
		t.Errorf("ps --format json is no JSON: %q", out)
	}
	d.Command("no-such-command").Run().Want(t, 125)
	d.Command("run").Run().Want(t, 125)
	nobody := &daemon{Address: "unix:///run/no-such-daemon.sock"}
	nobody.Command("ps").Run().WantError(t, 125, "/run/no-such-daemon.sock")
}
