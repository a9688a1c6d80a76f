package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
	"github.com/sandboxd/sandboxd/pkg/policy"
)

// maxPolicyBytes bounds the file policy check reads: more is another file.
const maxPolicyBytes = 8 << 20

func (a *app) policyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "policy",
		Short: "Ask what the policy decides, and check policy files",
		Args:  cobra.ArbitraryArgs,
		RunE:  subcommands,
	}
	cmd.AddCommand(a.policyExplainCommand(), a.policyCheckCommand(), a.policyShowCommand())
	return cmd
}

func (a *app) policyExplainCommand() *cobra.Command {
	var flags createFlags
	cmd := &cobra.Command{
		Use:   "explain [create flags] IMAGE",
		Short: "Show what would be decided for a workload, and why",
		Long: `Explain takes the flags of create and shows the policy's decision without creating anything. A denial is an answer, too:
the exit code is then 0 as well.`,
		Example: `  sandboxctl policy explain -l origin=stranger debian
  sandboxctl policy explain --isolation container --cap-add NET_ADMIN debian`,
		Args: minArgs(1, "IMAGE"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			request, err := flags.request(args[0], args[1:])
			if err != nil {
				return err
			}
			answer, err := c.Policy.Explain(ctx, &sandboxdv1.ExplainRequest{
				Name: request.GetName(), Labels: request.GetLabels(), Spec: request.GetSpec(),
			})
			if err != nil {
				return err
			}
			if a.json() {
				return a.printJSON(answer)
			}
			return a.printExplanation(answer)
		}),
	}
	flags.register(cmd.Flags())
	cmd.Flags().SetInterspersed(false)
	return cmd
}

func (a *app) printExplanation(e *sandboxdv1.ExplainResponse) error {
	d := e.GetDecision()
	answer := "allowed"
	if !e.GetAllowed() {
		answer = "denied"
		if e.GetUnsatisfiable() != "" {
			answer = "allowed, but this host cannot give it"
		}
	}
	rows := [][]string{
		{"answer", answer},
		{"isolation", isolationText(d.GetIsolation()) + " at least"},
		{"granted", isolationText(d.GetGranted())},
		{"rule", d.GetRule()},
		{"reason", d.GetReason()},
	}
	if d.GetIsolation() == sandboxdv1.Isolation_ISOLATION_UNSPECIFIED {
		rows[1][1] = "none"
	}
	if e.GetUnsatisfiable() != "" {
		rows = append(rows, []string{"host", e.GetUnsatisfiable()})
	}
	if err := table(a.stdout, nil, rows); err != nil {
		return err
	}
	if len(e.GetTrace()) == 0 {
		return nil
	}
	rows = nil
	for _, t := range e.GetTrace() {
		matched := "no"
		if t.GetMatched() {
			matched = "yes"
		}
		rows = append(rows, []string{t.GetRule(), matched, strings.Join(strings.Fields(t.GetWhen()), " ")})
	}
	fmt.Fprintln(a.stdout)
	return table(a.stdout, []string{"RULE", "MATCHED", "WHEN"}, rows)
}

func (a *app) policyCheckCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "check FILE",
		Short:   "Check a policy file, without a daemon",
		Long:    `Check reads a policy file as sandboxd would and names each mistake with its place. The exit code is 1 if there are any.`,
		Example: `  sandboxctl policy check policy.yaml`,
		Args:    exactArgs(1, "FILE"),
		RunE:    func(_ *cobra.Command, args []string) error { return a.policyCheck(args[0]) },
	}
}

// policyCheck is the one thing sandboxctl does without the daemon: a file must be checked before a daemon is given it.
func (a *app) policyCheck(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("cannot read policy: %w", err)
	}
	if info.Size() > maxPolicyBytes {
		return fmt.Errorf("cannot read policy: %s is larger than %s", path, size(maxPolicyBytes))
	}
	source, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("cannot read policy: %w", err)
	}
	p, err := policy.Load(source, path)
	if err != nil {
		for line := range strings.Lines(err.Error()) {
			fmt.Fprintln(a.stderr, "sandboxctl: "+clean(strings.TrimRight(line, "\n")))
		}
		return exitStatus(exitNo)
	}
	answer := &sandboxdv1.GetPolicyResponse{Source: string(p.Source()), Digest: p.Digest(), Default: p.Default()}
	for _, r := range p.Rules() {
		answer.Rules = append(answer.Rules, &sandboxdv1.PolicyRule{Name: r.Name, When: r.When, Answer: r.Answer, Reason: r.Reason, Seccomp: r.Seccomp})
	}
	if a.json() {
		return a.printJSON(answer)
	}
	_, err = fmt.Fprintf(a.stdout, "%s is a policy: %s, otherwise %s (%s)\n", path, plural(len(answer.GetRules()), "rule"), answer.GetDefault(), answer.GetDigest())
	return err
}

func (a *app) policyShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "show",
		Short:   "Show the policy in force",
		Example: `  sandboxctl policy show > policy.yaml`,
		Args:    noArgs,
		RunE: a.call(func(ctx context.Context, c *client.Client, _ []string) error {
			p, err := c.Policy.GetPolicy(ctx, &sandboxdv1.GetPolicyRequest{})
			if err != nil {
				return err
			}
			if a.json() {
				return a.printJSON(p)
			}
			if p.GetSource() == "" {
				return errors.New("sandboxd has no policy: callers choose the isolation, and auto means vm: start it with --policy FILE to have one")
			}
			_, err = fmt.Fprint(a.stdout, p.GetSource())
			return err
		}),
	}
}
