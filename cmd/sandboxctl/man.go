package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sandboxd/sandboxd/pkg/manpage"
)

// manCommand writes the manual pages; the package's build calls it.
func (a *app) manCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "man DIRECTORY",
		Short:   "Write the manual pages of sandboxctl and its commands",
		Example: "  sandboxctl man /tmp/man1",
		Hidden:  true,
		Args:    exactArgs(1, "DIRECTORY"),
		RunE: func(cmd *cobra.Command, args []string) error {
			root := cmd.Root()
			root.InitDefaultHelpCmd()
			root.InitDefaultCompletionCmd()
			return writePages(root, args[0])
		},
	}
}

func writePages(cmd *cobra.Command, dir string) error {
	f, err := os.OpenFile(filepath.Join(dir, pageName(cmd)+".1"), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("cannot write manual page: %w", err)
	}
	if err := errors.Join(page(cmd).Write(f), f.Close()); err != nil {
		return err
	}
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			if err := writePages(c, dir); err != nil {
				return err
			}
		}
	}
	return nil
}

func pageName(cmd *cobra.Command) string { return strings.ReplaceAll(cmd.CommandPath(), " ", "-") }

func page(cmd *cobra.Command) manpage.Page {
	cmd.InitDefaultHelpFlag()
	p := manpage.Page{
		Name: pageName(cmd), Section: 1, Short: cmd.Short, Long: cmd.Long, Example: cmd.Example,
		Flags: []manpage.FlagGroup{{Heading: "options", Flags: cmd.NonInheritedFlags()}, {Heading: "options of every command", Flags: cmd.InheritedFlags()}},
	}
	if cmd.Runnable() {
		p.Usage = append(p.Usage, cmd.UseLine())
	}
	if cmd.HasParent() {
		p.SeeAlso = append(p.SeeAlso, pageName(cmd.Parent())+"(1)")
	}
	var commands []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			commands = append(commands, fmt.Sprintf("  %-12s %s", c.Name(), c.Short))
			p.SeeAlso = append(p.SeeAlso, pageName(c)+"(1)")
		}
	}
	if len(commands) > 0 {
		p.Usage = append(p.Usage, cmd.CommandPath()+" COMMAND …")
		p.More = append(p.More, manpage.Text{Heading: "commands", Body: strings.Join(commands, "\n")})
	}
	p.SeeAlso = append(p.SeeAlso, "sandboxd(8)")
	return p
}
