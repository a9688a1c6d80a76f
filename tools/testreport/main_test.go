package main

import (
	"strings"
	"testing"
)

const (
	pass = `{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"chatter\n"}
{"Action":"pass","Package":"p","Test":"TestA","Elapsed":2.5}
{"Action":"output","Package":"p","Output":"ok  \tp\t2.600s\n"}
{"Action":"pass","Package":"p","Elapsed":2.6}
`
	skip = `{"Action":"output","Package":"p","Test":"TestB","Output":"    b_test.go:1: install qemu to run this\n"}
{"Action":"skip","Package":"p","Test":"TestB"}
`
	fail = `{"Action":"output","Package":"p","Test":"TestC","Output":"    c_test.go:1: got 1, want 2\n"}
{"Action":"fail","Package":"p","Test":"TestC"}
{"Action":"output","Package":"p","Output":"FAIL\tp\t0.1s\n"}
{"Action":"fail","Package":"p"}
`
	brokenBuild = `{"ImportPath":"q","Action":"build-output","Output":"q.go:1: undefined: x\n"}
{"ImportPath":"q","Action":"build-fail"}
`
)

func TestReport(t *testing.T) {
	for _, c := range []struct {
		name, input string
		allowed     map[string]string
		wantOut     []string
		notOut      string
		wantErr     string
	}{
		{"passing", pass, nil, []string{"ok  \tp\t2.600s", "1 passed, 0 failed, 0 skipped", "slow:   2.5 s p TestA"}, "chatter", ""},
		{"nothing ran", "", nil, nil, "", "no test ran"},
		{"only package without tests", `{"Action":"skip","Package":"p"}`, nil, nil, "", "no test ran"},
		{"skip without leave", pass + skip, nil, []string{"install qemu", "skipped: p TestB (NOT ALLOWED)"}, "", "p TestB"},
		{"allowed skip", pass + skip, map[string]string{"p TestB": "needs qemu"}, []string{"skipped: p TestB (needs qemu)", "1 skipped"}, "", ""},
		{"failing", pass + fail, nil, []string{"got 1, want 2", "FAIL\tp\t0.1s"}, "chatter", "p TestC"},
		{"not compiling", pass + brokenBuild, nil, []string{"undefined: x"}, "", "q"},
		{"no json", "panic: oh\n", nil, nil, "", "cannot read"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out strings.Builder
			r := newReport(&out)
			err := r.read(strings.NewReader(c.input))
			if err == nil {
				err = r.finish(c.allowed)
			}
			if (err != nil) != (c.wantErr != "") || err != nil && !strings.Contains(err.Error(), c.wantErr) {
				t.Errorf("error %v, want one with %q", err, c.wantErr)
			}
			for _, want := range c.wantOut {
				if !strings.Contains(out.String(), want) {
					t.Errorf("output lacks %q:\n%s", want, out.String())
				}
			}
			if c.notOut != "" && strings.Contains(out.String(), c.notOut) {
				t.Errorf("output has %q:\n%s", c.notOut, out.String())
			}
		})
	}
}

func TestReadAllowed(t *testing.T) {
	got, err := readAllowed(strings.NewReader("# comment\n\np TestB because of this\n"))
	if err != nil || got["p TestB"] != "because of this" || len(got) != 1 {
		t.Errorf("got %v, %v", got, err)
	}
	if _, err := readAllowed(strings.NewReader("p TestB\n")); err == nil {
		t.Error("a row without a reason was accepted")
	}
}
