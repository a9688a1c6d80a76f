package main

import (
	"context"
	"encoding/json"
	"runtime"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

func (a *app) versionCommand() *cobra.Command {
	var clientOnly bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Show the versions of sandboxctl and sandboxd, and what the daemon's host can do",
		Example: `  sandboxctl version
  sandboxctl version --client`,
		Args: noArgs,
		RunE: a.call(func(ctx context.Context, c *client.Client, _ []string) error {
			var info *sandboxdv1.InfoResponse
			var err error
			if !clientOnly {
				info, err = c.System.Info(ctx, &sandboxdv1.InfoRequest{})
			}
			// Its own version is shown even when no daemon answers.
			if printErr := a.printVersions(info); printErr != nil {
				return printErr
			}
			return err
		}),
	}
	cmd.Flags().BoolVar(&clientOnly, "client", false, "only that of sandboxctl")
	return cmd
}

func (a *app) printVersions(info *sandboxdv1.InfoResponse) error {
	if a.json() {
		return a.printVersionsJSON(info)
	}
	rows := [][]string{{"sandboxctl", spec.Version + " (commit " + short(spec.Commit) + ", " + runtime.Version() + ")"}}
	if info == nil {
		return table(a.stdout, nil, rows)
	}
	rows = append(rows,
		[]string{"sandboxd", info.GetVersion() + " (commit " + short(info.GetCommit()) + ", " + info.GetGoVersion() + ")"},
		[]string{"kernel", info.GetKernelRelease() + ", cgroup " + info.GetCgroupVersion()},
	)
	for _, i := range info.GetIsolations() {
		text := "no: "
		if i.GetAvailable() {
			text = "yes: "
		}
		text += i.GetReason()
		if i.GetAccelerator() != "" {
			text += " (" + i.GetAccelerator() + ", agent over " + i.GetAgentTransport() + ")"
		}
		rows = append(rows, []string{isolationText(i.GetIsolation()), text})
	}
	for _, row := range [][]string{{"qemu", info.GetQemuVersion()}, {"guest kernel", info.GetGuestKernel()}, {"policy", info.GetPolicyDigest()}} {
		if row[1] != "" {
			rows = append(rows, row)
		}
	}
	return table(a.stdout, nil, rows)
}

// printVersionsJSON: .client is this program, .server the daemon's InfoResponse.
func (a *app) printVersionsJSON(info *sandboxdv1.InfoResponse) error {
	out := map[string]any{"client": map[string]string{
		"version": spec.Version, "commit": spec.Commit, "goVersion": runtime.Version(),
	}}
	if info != nil {
		server, err := protojson.Marshal(info)
		if err != nil {
			return err
		}
		out["server"] = json.RawMessage(server)
	}
	b, err := json.Marshal(out)
	if err != nil {
		return err
	}
	return a.printRawJSON(b)
}
