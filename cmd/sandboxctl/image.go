package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

func (a *app) imageCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Import, pull, list and remove images",
		Args:  cobra.ArbitraryArgs,
		RunE:  subcommands,
	}
	cmd.AddCommand(a.imageImportCommand(), a.imagePullCommand(), a.imageLsCommand(), a.imageInspectCommand(), a.imageRmCommand())
	return cmd
}

func (a *app) imageLsCommand() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use:   "ls",
		Short: "List images",
		Example: `  sandboxctl image ls
  sandboxctl image ls --format json | jq -r '.[].digest'`,
		Args: noArgs,
		RunE: a.call(func(ctx context.Context, c *client.Client, _ []string) error {
			images, err := c.ListImages(ctx)
			if err != nil {
				return err
			}
			return a.printImages(images, quiet)
		}),
	}
	boolFlag(cmd.Flags(), &quiet, "quiet", "q", "only digests")
	return cmd
}

func (a *app) printImages(images []*sandboxdv1.Image, quiet bool) error {
	if quiet {
		for _, i := range images {
			if _, err := fmt.Fprintln(a.stdout, i.GetDigest()); err != nil {
				return err
			}
		}
		return nil
	}
	if a.json() {
		return printJSONArray(a, images)
	}
	now := time.Now()
	var rows [][]string
	for _, i := range images {
		names := strings.Join(i.GetNames(), ", ")
		if names == "" {
			names = "-"
		}
		rows = append(rows, []string{names, short(i.GetDigest()), i.GetPlatform(), size(i.GetSizeBytes()), age(now.Sub(i.GetCreatedAt().AsTime())) + " ago"})
	}
	return table(a.stdout, []string{"NAME", "DIGEST", "PLATFORM", "SIZE", "CREATED"}, rows)
}

func (a *app) imageInspectCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "inspect IMAGE...",
		Short:   "Show everything about images, as JSON",
		Example: `  sandboxctl image inspect debian | jq .config`,
		Args:    minArgs(1, "IMAGE"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			for _, ref := range args {
				r, err := c.Images.GetImage(ctx, &sandboxdv1.GetImageRequest{Reference: ref})
				if err != nil {
					return err
				}
				if err := a.printJSON(r.GetImage()); err != nil {
					return err
				}
			}
			return nil
		}),
	}
}

func (a *app) imageRmCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rm IMAGE...",
		Short: "Remove names of images, and images without names",
		Example: `  sandboxctl image rm debian
  sandboxctl image rm $(sandboxctl image ls -q)`,
		Args: minArgs(1, "IMAGE"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			return a.each(ctx, args, func(ref string) (proto.Message, error) {
				_, err := c.Images.RemoveImage(ctx, &sandboxdv1.RemoveImageRequest{Reference: ref})
				return nil, err
			})
		}),
	}
}

// printImage tells which image came of an import or a pull.
func (a *app) printImage(i *sandboxdv1.Image) error {
	if a.json() {
		return a.printJSON(i)
	}
	_, err := fmt.Fprintln(a.stdout, i.GetDigest())
	return err
}
