package main

import (
	"bytes"
	"strings"
	"testing"
)

// Flags that would have no effect are refused; the environment may be about another address.
func TestTLSFlagsNeedTCP(t *testing.T) {
	t.Setenv("SANDBOXD_TLS_CA", "/nowhere/ca.pem")
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--tls-ca", "ca.pem", "ps"}, "cannot use --tls-ca with address"},
		{[]string{"--address", "unix:///nowhere/s", "ps", "--tls-server-name", "x"}, "cannot use --tls-server-name with address"},
		{[]string{"--address", "tcp://127.0.0.1:1", "--tls-cert", "c.pem", "--tls-key", "k.pem", "ps"}, "c.pem"},
		{[]string{"--address", "unix:///nowhere/s", "ps"}, "/nowhere/s"},
	} {
		var out, errs bytes.Buffer
		a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &errs}
		if code := a.main(c.args); code != 125 || !strings.Contains(errs.String(), c.want) {
			t.Errorf("%q: exit code %d, stderr %q, want %q", c.args, code, errs.String(), c.want)
		}
		if c.want == "/nowhere/s" && strings.Contains(errs.String(), "tls") {
			t.Errorf("%q: refused for the environment's sake: %q", c.args, errs.String())
		}
	}
}
