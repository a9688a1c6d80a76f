package osthread

import (
	"os"
	"strings"
	"testing"
)

func TestSetTimerSlack(t *testing.T) {
	const own = "/proc/self/timerslack_ns"
	was, err := os.ReadFile(own)
	if err != nil {
		t.Fatal(err)
	}
	defer os.WriteFile(own, was, 0) //nolint:errcheck // a test's
	if err := SetTimerSlack(123456); err != nil {
		t.Fatal(err)
	}
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, th := range threads {
		b, err := os.ReadFile("/proc/" + th.Name() + "/timerslack_ns")
		if err != nil {
			continue // it has ended
		}
		if got := strings.TrimSpace(string(b)); got != "123456" {
			t.Errorf("thread %s has a slack of %s ns", th.Name(), got)
		}
	}
	if err := Run(func() error { // a thread that did not exist
		b, err := os.ReadFile("/proc/thread-self/timerslack_ns")
		if err == nil && strings.TrimSpace(string(b)) != "123456" {
			t.Errorf("a new thread has a slack of %s", b)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}
