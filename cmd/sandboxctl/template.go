package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

func (a *app) templateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "template",
		Short: "List, build and remove what VMs are cloned from",
		Long: `A template is a guest that was stopped when it had come up: VMs of the same image, processors and memory are cloned
from it instead of being booted. With sandboxd --vm-templates on, one is made after each first boot of its kind.`,
		Args: cobra.ArbitraryArgs,
		RunE: subcommands,
	}
	cmd.AddCommand(a.templateLsCommand(), a.templateBuildCommand(), a.templateRmCommand())
	return cmd
}

func (a *app) templateLsCommand() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use:     "ls",
		Short:   "List templates, the one used last first",
		Example: `  sandboxctl template ls`,
		Args:    noArgs,
		RunE: a.call(func(ctx context.Context, c *client.Client, _ []string) error {
			r, err := c.Templates.ListTemplates(ctx, &sandboxdv1.ListTemplatesRequest{})
			if err != nil {
				return err
			}
			return a.printTemplates(r.GetTemplates(), quiet)
		}),
	}
	boolFlag(cmd.Flags(), &quiet, "quiet", "q", "only ids")
	return cmd
}

func (a *app) printTemplates(templates []*sandboxdv1.Template, quiet bool) error {
	if quiet {
		for _, t := range templates {
			if _, err := fmt.Fprintln(a.stdout, t.GetId()); err != nil {
				return err
			}
		}
		return nil
	}
	if a.json() {
		return printJSONArray(a, templates)
	}
	now := time.Now()
	var rows [][]string
	for _, t := range templates {
		scope := t.GetScope()
		if scope == "" {
			scope = "everybody"
		}
		rows = append(rows, []string{
			short(t.GetId()), short(t.GetImage()), fmt.Sprint(t.GetCpus()), size(t.GetMemoryBytes()), scope, fmt.Sprint(t.GetClones()), fmt.Sprint(t.GetWaiting()),
			size(t.GetDiskBytes()), age(now.Sub(t.GetMadeAt().AsTime())) + " ago",
		})
	}
	return table(a.stdout, []string{"ID", "IMAGE", "CPUS", "MEMORY", "FOR", "CLONES", "WAITING", "ON DISK", "MADE"}, rows)
}

func (a *app) templateBuildCommand() *cobra.Command {
	var flags createFlags
	cmd := &cobra.Command{
		Use:   "build [create flags] IMAGE",
		Short: "Build the template for VMs like this",
		Long: `Build takes the flags of create and builds the template from which such a VM is cloned. Processors, memory, labels and
whether there is a network count, the rest does not matter.`,
		Example: `  sandboxctl template build --memory 256m debian`,
		Args:    exactArgs(1, "IMAGE"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			request, err := flags.request(args[0], nil)
			if err != nil {
				return err
			}
			r, err := c.Templates.BuildTemplate(ctx, &sandboxdv1.BuildTemplateRequest{
				Image: args[0], Resources: request.GetSpec().GetResources(), Labels: request.GetLabels(),
				Network: spec.Joins(request.GetSpec().GetNetwork()),
			})
			if err != nil {
				return err
			}
			if a.json() {
				return a.printJSON(r.GetTemplate())
			}
			_, err = fmt.Fprintln(a.stdout, r.GetTemplate().GetId())
			return err
		}),
	}
	flags.register(cmd.Flags())
	return cmd
}

func (a *app) templateRmCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "rm TEMPLATE...",
		Short:   "Remove templates; the VMs cloned from them run on",
		Example: `  sandboxctl template rm $(sandboxctl template ls -q)`,
		Args:    minArgs(1, "TEMPLATE"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			return a.each(ctx, args, func(ref string) (proto.Message, error) {
				_, err := c.Templates.RemoveTemplate(ctx, &sandboxdv1.RemoveTemplateRequest{Id: ref})
				return nil, err
			})
		}),
	}
}
