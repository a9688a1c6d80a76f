package main

import (
	"context"

	"github.com/spf13/cobra"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

func (a *app) execCommand() *cobra.Command {
	var interactive, tty bool
	var user, workdir string
	var env, envFiles []string
	cmd := &cobra.Command{
		Use:   "exec [flags] WORKLOAD COMMAND [ARG...]",
		Short: "Run a further command in a running workload; exit with its code",
		Long: `Exec runs a command beside the workload's own process, passes on signals, and exits with its code. When sandboxctl goes
away the command is ended.`,
		Example: `  sandboxctl exec web ps ax
  sandboxctl exec -it web sh
  sandboxctl exec -u nobody -w /tmp -e A=b web env
  tar c . | sandboxctl exec -i web tar x -C /srv`,
		Args: minArgs(2, "WORKLOAD or COMMAND"),
		RunE: func(cmd *cobra.Command, args []string) error {
			variables, err := environment(env, envFiles)
			if err != nil {
				return err
			}
			start := &sandboxdv1.ExecStart{
				Id: args[0], Command: args[1:], Env: variables, User: user, WorkingDir: workdir,
				Terminal: tty, Stdin: interactive,
			}
			if tty {
				start.TerminalSize = terminalOf(a.stdin).size()
			}
			c, err := a.dial()
			if err != nil {
				return err
			}
			defer c.Close()
			return a.exec(cmd.Context(), c, start)
		},
	}
	f := cmd.Flags()
	boolFlag(f, &interactive, "interactive", "i", "pass on standard input")
	boolFlag(f, &tty, "tty", "t", "give the command a terminal")
	f.StringVarP(&user, "user", "u", "", "NAME|UID[:GROUP|GID]; the workload's when left out")
	f.StringVarP(&workdir, "workdir", "w", "", "working directory; the workload's when left out")
	f.StringArrayVarP(&env, "env", "e", nil, "NAME=value, or NAME to take it from here; may be repeated")
	f.StringArrayVar(&envFiles, "env-file", nil, "file with such lines; may be repeated")
	f.SetInterspersed(false)
	return cmd
}

func (a *app) exec(ctx context.Context, c *client.Client, start *sandboxdv1.ExecStart) error {
	s := a.newSession(ctx, start.GetTerminal(), start.GetStdin(), func(ctx context.Context, p *client.Process, name string) error {
		return p.Signal(ctx, name)
	})
	defer s.close()
	p, err := c.Exec(s.ctx, start, a.stdio(start.GetStdin()))
	if err != nil {
		return orSignal(s.ctx, err)
	}
	defer p.Close()
	return a.follow(s, p)
}

// follow stands in for a process that runs, until it ends.
func (a *app) follow(s *session, p *client.Process) error {
	if err := s.start(p); err != nil {
		return err
	}
	exit, err := p.Wait()
	s.terminal.restore()
	if err != nil {
		return orSignal(s.ctx, err)
	}
	return processExit(exit.GetCode())
}
