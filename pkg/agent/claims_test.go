package agent

import (
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
)

func FuzzText(f *testing.F) {
	for _, s := range []string{"", "plain", "\x1b]0;title\a", "a\nb\x00c", "\xff\xfe", "Grüße", strings.Repeat("ü", 200), "\u202egnp.exe"} {
		f.Add(s, 100)
	}
	f.Fuzz(func(t *testing.T, s string, limit int) {
		limit = max(0, limit%4096)
		got := text(s, limit)
		if len(got) > limit || !utf8.ValidString(got) {
			t.Errorf("%q of at most %d bytes from %q", got, limit, s)
		}
		for _, r := range got {
			if !unicode.IsPrint(r) {
				t.Errorf("%U in %q", r, got)
			}
		}
	})
}

func FuzzReadOutput(f *testing.F) {
	add := func(r *agentv1.ReadOutputResponse) {
		b, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, 100)
	}
	add(&agentv1.ReadOutputResponse{Eof: true})
	add(&agentv1.ReadOutputResponse{Chunks: []*agentv1.Chunk{{Stream: 1, Data: []byte("x"), Time: timestamppb.Now()}}})
	add(&agentv1.ReadOutputResponse{Chunks: []*agentv1.Chunk{{Stream: 3, Data: []byte("x")}, {}, {Stream: 2, Data: make([]byte, 200)}}})
	add(&agentv1.ReadOutputResponse{Chunks: []*agentv1.Chunk{{Stream: 2, Data: []byte("x"), Time: &timestamppb.Timestamp{Seconds: 1 << 62, Nanos: -5}}}})
	f.Fuzz(func(t *testing.T, b []byte, limit int) {
		limit = max(1, limit%maxCallBytes)
		r := &agentv1.ReadOutputResponse{}
		if proto.Unmarshal(b, r) != nil {
			return
		}
		chunks, _, err := chunksOf(r, limit)
		total := 0
		for _, c := range chunks {
			total += len(c.Data)
			if c.Stream != 1 && c.Stream != 2 || len(c.Data) == 0 {
				t.Errorf("chunk %+v", c)
			}
			checkTime(t, c.Time)
		}
		if total > limit || err != nil && len(chunks) > 0 {
			t.Errorf("%d bytes of %d, %v", total, limit, err)
		}
	})
}

func FuzzWait(f *testing.F) {
	for _, r := range []*agentv1.WaitResponse{
		{Exited: true, Code: 7}, {Exited: true, Code: 137, Signal: 9}, {Exited: true, Code: 1, Signal: 9}, {Exited: true, Code: -1},
		{Exited: true, Code: 256}, {Exited: true, Code: 128 + 65, Signal: 65}, {Time: &timestamppb.Timestamp{Seconds: -1 << 60}},
	} {
		b, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := &agentv1.WaitResponse{}
		if proto.Unmarshal(b, r) != nil {
			return
		}
		exit, err := exitOf(r)
		if err != nil {
			return
		}
		if exit.Code < 0 || exit.Code > 255 || exit.Signal < 0 || exit.Signal > 64 || exit.Signal != 0 && exit.Code != 128+exit.Signal {
			t.Errorf("%+v", exit)
		}
		checkTime(t, exit.Time)
	})
}

func checkTime(t *testing.T, at time.Time) {
	t.Helper()
	if at.Before(earliest) || at.After(time.Now().Add(maxClockLead+time.Minute)) {
		t.Errorf("time %v", at)
	}
}

func TestPid(t *testing.T) {
	for _, pid := range []int32{-5, 0, 1} {
		if _, err := pidOf(pid); err == nil {
			t.Errorf("pid %d is accepted", pid)
		}
	}
}
