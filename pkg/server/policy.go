package server

import (
	"context"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

type policyService struct {
	sandboxdv1.UnsafePolicyServiceServer
	*Server
}

// Explain answers with the decision, a denial included. An error that comes with a decision says what the host cannot
// give; one without says that the request cannot be decided.
func (s *policyService) Explain(ctx context.Context, r *sandboxdv1.ExplainRequest) (*sandboxdv1.ExplainResponse, error) {
	o, err := createOptions(ctx, r.GetName(), r.GetLabels(), r.GetSpec())
	if err != nil {
		return nil, err
	}
	d, err := s.Workloads.Explain(ctx, o)
	answer := &sandboxdv1.ExplainResponse{
		Allowed: d.Allowed, Decision: decisionToAPI(d), Trace: traceToAPI(d.Trace),
	}
	switch {
	case err == nil:
	case spec.ReasonOf(err) == spec.ReasonUnsatisfiable:
		answer.Allowed = false
		answer.Unsatisfiable = err.Error()
	case spec.ReasonOf(err) == spec.ReasonPolicyDenied:
		answer.Allowed = false
		if answer.Decision.Reason == "" {
			answer.Decision.Reason = err.Error()
		}
	default:
		return nil, err
	}
	return answer, nil
}

func (s *policyService) GetPolicy(context.Context, *sandboxdv1.GetPolicyRequest) (*sandboxdv1.GetPolicyResponse, error) {
	answer := &sandboxdv1.GetPolicyResponse{
		Source:  string(s.Policy.Source()),
		Digest:  s.Policy.Digest(),
		Default: s.Policy.Default(),
	}
	for _, r := range s.Policy.Rules() {
		answer.Rules = append(answer.Rules, ruleToAPI(r))
	}
	return answer, nil
}
