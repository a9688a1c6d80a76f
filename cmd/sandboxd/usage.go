package main

import (
	"fmt"
	"io"

	"github.com/spf13/pflag"

	"github.com/sandboxd/sandboxd/pkg/manpage"
)

const (
	about = `sandboxd runs workloads as containers or microVMs, as its policy decides, and answers on a Unix socket and,
with certificates, over TCP.`
	examples = `  sandboxd --policy /etc/sandboxd/policy.yaml
  sandboxd --listen unix:///tmp/one/sandboxd.sock --state-dir /tmp/one/state --run-dir /tmp/one/run --vm-accel auto
  sandboxd --access /etc/sandboxd/access.yaml --listen unix:///run/sandboxd/sandboxd.sock,tcp://10.0.0.1:7443 \
    --tls-cert host.pem --tls-key host.key --tls-client-ca callers.pem
`
	signals = `SIGTERM and SIGINT end the daemon and leave the workloads alone; the next daemon finds them again. SIGHUP reads the
access file and the certificates again.`
	files = `  /etc/sandboxd/config.yaml    its keys are the names of the options above
  /var/lib/sandboxd            images, records, logs and writable layers
  /run/sandboxd                sockets, and what does not outlive a boot`
)

func usage(w io.Writer, flags *pflag.FlagSet) error {
	_, err := fmt.Fprintf(w, "%s\n\nUsage:\n  sandboxd [flags]\n\nExamples:\n%s\nFlags:\n%s", about, examples, flags.FlagUsagesWrapped(100))
	return err
}

// manual is sandboxd(8).
func manual(flags *pflag.FlagSet) manpage.Page {
	return manpage.Page{
		Name: "sandboxd", Section: 8, Short: "Runs workloads as containers or microVMs", Usage: []string{"sandboxd [flags]"},
		Long: about, Flags: []manpage.FlagGroup{{Heading: "options", Flags: flags}}, Example: examples,
		More:    []manpage.Text{{Heading: "signals", Body: signals}, {Heading: "files", Body: files}},
		SeeAlso: []string{"sandboxctl(1)"},
	}
}
