// Command sandboxctl is how people and scripts use sandboxd. It knows the API and its Go client; of the daemon's own
// packages only policy, to check a policy file where no daemon runs.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sandboxd/sandboxd/pkg/client"
)

func main() {
	// Writing to a reader that has gone is then an error like any other, and what must be cleaned up still is.
	signal.Ignore(syscall.SIGPIPE)
	a := &app{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr}
	os.Exit(a.main(os.Args[1:]))
}

// app is one invocation.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer

	address string
	tls     client.TLS
	format  string
}

// dial makes a client for the address of the flags.
func (a *app) dial() (*client.Client, error) {
	if strings.HasPrefix(a.address, "tcp://") {
		if a.tls.CA == "" || a.tls.Cert == "" || a.tls.Key == "" {
			return nil, fmt.Errorf("cannot use address %q: over TCP both sides show certificates: give --tls-ca, --tls-cert and --tls-key", a.address)
		}
		return client.DialTLS(a.address, a.tls)
	}
	return client.Dial(a.address)
}

// checkTLSFlags refuses flags that would have no effect, and whose user believes that certificates are checked. Environment
// variables are no such demand: they may be there for another address.
func (a *app) checkTLSFlags(cmd *cobra.Command) error {
	if strings.HasPrefix(a.address, "tcp://") {
		return nil
	}
	for _, name := range []string{"tls-ca", "tls-cert", "tls-key", "tls-server-name"} {
		if cmd.Flags().Changed(name) {
			return fmt.Errorf("cannot use --%s with address %q: a Unix socket has no certificates, the kernel says who calls; leave it out, or give --address tcp://HOST:PORT", name, a.address)
		}
	}
	return nil
}

// main runs the command line and returns the exit code. It prints errors; nothing else does.
func (a *app) main(args []string) int {
	root := a.rootCommand()
	root.SetArgs(args)
	err := root.ExecuteContext(context.Background())
	if message := errorText(err); message != "" {
		fmt.Fprintln(a.stderr, message)
	}
	return exitCode(err)
}

func (a *app) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "sandboxctl",
		Short: "Run workloads as containers or microVMs, as sandboxd's policy decides",
		Long: `sandboxctl talks to sandboxd, which runs workloads behind one of two walls: a container on the host's kernel, or a
microVM with a kernel of its own. The daemon's policy says which; the commands are the same.`,
		Example: `  sandboxctl image import --name debian debian.tar
  sandboxctl run --rm debian uname -r
  sandboxctl run --rm --isolation vm debian uname -r
  sandboxctl run -d --name web --memory 256m -l team=shop debian python3 -m http.server
  sandboxctl exec -it web sh
  sandboxctl logs -f web
  sandboxctl policy explain -l team=shop debian
  sandboxctl rm -f web

Exit codes: those of the process for run, exec and attach, 128+n after signal n; 125 when sandboxctl, sandboxd or the
request is at fault; 126 when the command cannot be executed; 127 when it is not in the image.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if a.format != formatTable && a.format != formatJSON {
				return fmt.Errorf("cannot use --format %q: it is table or json", a.format)
			}
			return a.checkTLSFlags(cmd)
		},
	}
	address := os.Getenv("SANDBOXD_ADDRESS")
	if address == "" {
		address = client.DefaultAddress
	}
	root.PersistentFlags().StringVar(&a.address, "address", address, "where sandboxd answers; SANDBOXD_ADDRESS sets it too")
	root.PersistentFlags().StringVar(&a.tls.CA, "tls-ca", os.Getenv("SANDBOXD_TLS_CA"), "over tcp://: authority of the daemon's certificate, PEM; SANDBOXD_TLS_CA sets it too")
	root.PersistentFlags().StringVar(&a.tls.Cert, "tls-cert", os.Getenv("SANDBOXD_TLS_CERT"), "over tcp://: certificate of the caller, PEM; SANDBOXD_TLS_CERT sets it too")
	root.PersistentFlags().StringVar(&a.tls.Key, "tls-key", os.Getenv("SANDBOXD_TLS_KEY"), "over tcp://: its key; SANDBOXD_TLS_KEY sets it too")
	root.PersistentFlags().StringVar(&a.tls.ServerName, "tls-server-name", "", "over tcp://: name in the daemon's certificate, if not the address's host")
	root.PersistentFlags().StringVar(&a.format, "format", formatTable, "table, or json: the protojson of the API's messages")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return usageError(cmd, err) })
	root.SetIn(a.stdin)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.AddGroup(
		&cobra.Group{ID: groupRun, Title: "Workloads:"},
		&cobra.Group{ID: groupLook, Title: "Looking at them:"},
		&cobra.Group{ID: groupRest, Title: "Images, policy, daemon:"},
	)
	add := func(group string, commands ...*cobra.Command) {
		for _, c := range commands {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add(groupRun, a.runCommand(), a.createCommand(), a.startCommand(), a.stopCommand(), a.killCommand(), a.waitCommand(),
		a.updateCommand(), a.pauseCommand(), a.resumeCommand(), a.snapshotCommand(), a.restoreCommand(), a.forkCommand(),
		a.rmCommand(), a.execCommand(), a.attachCommand(), a.cpCommand())
	add(groupLook, a.psCommand(), a.inspectCommand(), a.logsCommand(), a.eventsCommand(), a.statsCommand(), a.topCommand())
	add(groupRest, a.imageCommand(), a.templateCommand(), a.policyCommand(), a.doctorCommand(), a.versionCommand(), a.manCommand())
	root.SetHelpCommandGroupID(groupRest)
	root.SetCompletionCommandGroupID(groupRest)
	return root
}

const (
	groupRun  = "run"
	groupLook = "look"
	groupRest = "rest"
)

// call makes the body of a command that talks to the daemon and that a signal ends.
func (a *app) call(fn func(ctx context.Context, c *client.Client, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		c, err := a.dial()
		if err != nil {
			return err
		}
		defer c.Close()
		ctx, stop := interruptible(cmd.Context())
		defer stop()
		if err := fn(ctx, c, args); err != nil {
			return orSignal(ctx, err)
		}
		return nil
	}
}

// minArgs and exactArgs are cobra's, with an error that says what is missing.
func minArgs(n int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < n {
			return usageError(cmd, fmt.Errorf("%s is missing", what))
		}
		return nil
	}
}

func exactArgs(n int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < n {
			return usageError(cmd, fmt.Errorf("%s is missing", what))
		}
		if len(args) > n {
			return usageError(cmd, fmt.Errorf("argument %q is one too many", args[n]))
		}
		return nil
	}
}

func noArgs(cmd *cobra.Command, args []string) error { return exactArgs(0, "")(cmd, args) }

// usageError points to the help of the command that was called wrongly.
func usageError(cmd *cobra.Command, err error) error {
	return fmt.Errorf("%w: see %s --help", err, cmd.CommandPath())
}

// subcommands is the body of a command that only holds others.
func subcommands(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError(cmd, fmt.Errorf("unknown command %q", cmd.CommandPath()+" "+args[0]))
	}
	return cmd.Help()
}

// boolFlag defines a flag with a short name whose default is false.
func boolFlag(f *pflag.FlagSet, p *bool, name, short, usage string) {
	f.BoolVarP(p, name, short, false, usage)
}

// short is the part of an id that people see.
func short(id string) string {
	id = strings.TrimPrefix(id, "sha256:")
	return id[:min(len(id), 12)]
}
