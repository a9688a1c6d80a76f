package manpage

import (
	"errors"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

func TestTextIsShownAsItIs(t *testing.T) {
	f := pflag.NewFlagSet("x", pflag.ContinueOnError)
	f.StringP("tls-key", "k", "a\\b", "`FILE` of a key")
	f.Bool("secret", false, "not shown")
	if err := f.MarkHidden("secret"); err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	page := Page{Name: "x", Section: 1, Short: "Does \\things", Usage: []string{"x [flags]"}, Long: ".so /etc/shadow\n'quote", Example: ".x -f",
		Flags: []FlagGroup{{"options", f}, {"none", pflag.NewFlagSet("", pflag.ContinueOnError)}}}
	if err := page.Write(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"x \\- does \\ethings\n", "\n\\&.so /etc/shadow\n\\&'quote\n", "\n\\&.x \\-f\n",
		"\\fB\\-k\\fP, \\fB\\-\\-tls\\-key\\fP \\fIFILE\\fP\nFILE of a key (default a\\eb)\n",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("lacks %q:\n%s", want, b.String())
		}
	}
	for _, bad := range []string{"secret", "NONE", "\n.so"} {
		if strings.Contains(b.String(), bad) {
			t.Errorf("has %q:\n%s", bad, b.String())
		}
	}
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, errors.New("disk full") }

func TestWriteErrorsAreTold(t *testing.T) {
	if err := (Page{Name: "x"}).Write(full{}); err == nil || !strings.Contains(err.Error(), "disk full") {
		t.Errorf("%v", err)
	}
}
