package policy

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Policy is what Load read, or None. The zero value refuses everything. It may be used by several goroutines at once.
type Policy struct {
	// Whether it is Load's or None's.
	loaded bool
	none   bool
	// The answer when no rule matches.
	fallback string
	rules    []rule
	source   []byte
	digest   string
}

// Rule is one rule as it was written.
type Rule struct {
	Name string
	When string
	// "container", "vm" or "deny".
	Answer string
	// Empty when the file gives none.
	Reason string
	// "any" when the rule grants the system call filter that a request brings, or none; empty for the default filter.
	Seccomp string
}

type rule struct {
	Rule
	condition *condition
}

// None is the policy of a daemon that was given none: an explicit isolation is honoured, and auto means vm.
func None() *Policy { return &Policy{none: true} }

// Source is the file as it was loaded, empty without one.
func (p *Policy) Source() []byte { return bytes.Clone(p.source) }

// Digest is "sha256:…" of Source, empty without a file.
func (p *Policy) Digest() string { return p.digest }

// Rules are in the order they are tried.
func (p *Policy) Rules() []Rule {
	out := make([]Rule, len(p.rules))
	for i, r := range p.rules {
		out[i] = r.Rule
	}
	return out
}

// Default is the answer when no rule matches: "vm", "container" or "deny"; without a file it is that of auto, "vm".
func (p *Policy) Default() string {
	switch {
	case p.none:
		return answerVM
	case p.loaded:
		return p.fallback
	default:
		return answerDeny
	}
}

// Decide answers how strong the wall must be, and whether the request gets one. It reads in and nothing else, and gives
// the same answer to the same question.
//
// A refusal is both a Decision with Allowed false and a spec.Error: of KindDenied, reason POLICY_DENIED, naming the rule;
// or of KindWrongState, reason UNSATISFIABLE, when the host cannot give what was decided. It is never answered with less.
// Any other error is a fault of the request or of the caller, and comes with a Decision that allows nothing.
func (p *Policy) Decide(in Input) (Decision, error) {
	asked := in.Request.Workload.Isolation
	if asked != spec.IsolationAuto && asked != spec.IsolationContainer && asked != spec.IsolationVM {
		return Decision{}, spec.Invalidf("spec.isolation", "isolation %q is unknown; use auto, container or vm", asked)
	}
	d, err := p.answer(in, asked)
	if err != nil {
		return d, err
	}
	if kind, _ := seccompFacts(in.Request.Workload.Seccomp); kind != seccompDefault && !p.grantsAnySeccomp(d.Rule) {
		return refuse(d, fmt.Sprintf("%s grants the default seccomp profile only, and %s was asked for; leave it out, or have the rule say \"seccomp: any\"",
			p.answerer(d.Rule), kind))
	}
	granted := asked
	if asked == spec.IsolationAuto {
		granted = d.Isolation
	}
	if granted.Weaker(d.Isolation) {
		return refuse(d, fmt.Sprintf("the policy's %s demands %s isolation, and %s was asked for%s; ask for %s or auto",
			called(d.Rule), d.Isolation, asked, because(d.Reason), d.Isolation))
	}
	if sentence := in.Host.cannot(granted, d.Isolation); sentence != "" {
		d.Unsatisfiable = sentence
		return d, spec.Errorf(spec.KindWrongState, "%s", sentence).WithReason(spec.ReasonUnsatisfiable)
	}
	d.Allowed, d.Granted = true, granted
	return d, nil
}

// answer is the weakest isolation allowed, whatever was asked for and whatever the host has. On success Isolation is set,
// and Allowed is not.
func (p *Policy) answer(in Input, asked spec.Isolation) (Decision, error) {
	d := Decision{PolicyDigest: p.digest}
	if p.none {
		d.Rule = RuleNoPolicy
		if asked == spec.IsolationAuto {
			d.Isolation, d.Reason = spec.IsolationVM, "no policy is loaded, and auto then means vm"
		} else {
			d.Isolation, d.Reason = asked, "no policy is loaded, and the request asks for "+string(asked)
		}
		return d, nil
	}
	facts, err := factsOf(in)
	if err != nil {
		return d, err
	}
	for _, r := range p.rules {
		matched, err := r.condition.matches(facts)
		if err != nil {
			d.Rule = r.Name
			d.Trace = append(d.Trace, Trace{Rule: r.Name, When: r.When})
			return refuse(d, fmt.Sprintf("the policy's %s cannot be evaluated for this request: %s; its condition must hold or not hold for every request, so guard it, for example with has()",
				called(r.Name), firstLine(err.Error())))
		}
		d.Trace = append(d.Trace, Trace{Rule: r.Name, When: r.When, Matched: matched})
		if matched {
			return conclude(d, r.Rule)
		}
	}
	fallback := Rule{Name: RuleDefault, Answer: p.Default(), Reason: "no rule matches"}
	if fallback.Answer != answerDeny {
		fallback.Reason += ", and the policy's default is " + fallback.Answer
	}
	return conclude(d, fallback)
}

// conclude turns what a rule answers into a decision.
func conclude(d Decision, r Rule) (Decision, error) {
	d.Rule, d.Reason = r.Name, r.Reason
	switch r.Answer {
	case answerContainer, answerVM:
		d.Isolation = spec.Isolation(r.Answer)
		if d.Reason == "" {
			d.Reason = fmt.Sprintf("the policy's %s demands at least %s isolation", called(r.Name), r.Answer)
		}
		return d, nil
	default:
		return refuse(d, fmt.Sprintf("the policy's %s refuses this workload%s", called(r.Name), because(d.Reason)))
	}
}

// refuse says in one sentence why not, in the decision and in the error.
func refuse(d Decision, sentence string) (Decision, error) {
	d.Allowed, d.Granted, d.Reason = false, "", sentence
	return d, &spec.Error{Kind: spec.KindDenied, Reason: spec.ReasonPolicyDenied, Rule: d.Rule,
		Err: fmt.Errorf("%s", sentence)}
}

// cannot says why the host cannot give an isolation, and what to do; empty when it can.
func (h Host) cannot(granted, weakest spec.Isolation) string {
	available, why := h.ContainerAvailable, h.ContainerReason
	if granted == spec.IsolationVM {
		available, why = h.VMAvailable, h.VMReason
	}
	if available {
		return ""
	}
	sentence := fmt.Sprintf("this host cannot run a workload with %s isolation", granted)
	if why = strings.TrimRight(strings.TrimSpace(why), "."); why != "" {
		sentence += ": " + why
	}
	advice := "; see `sandboxctl doctor`"
	switch {
	case granted == spec.IsolationContainer && h.VMAvailable:
		advice = "; ask for vm, which the policy allows too"
	case granted == spec.IsolationVM && weakest == spec.IsolationContainer && h.ContainerAvailable:
		advice = "; the policy would allow container"
	}
	return sentence + advice
}

// grantsAnySeccomp reports whether the rule of that name grants another system call filter than the default one. What answers
// when no rule matches never does.
func (p *Policy) grantsAnySeccomp(name string) bool {
	return slices.ContainsFunc(p.rules, func(r rule) bool { return r.Name == name && r.Seccomp == seccompAny })
}

// answerer is who gave an answer, at the beginning of a sentence.
func (p *Policy) answerer(rule string) string {
	if p.none {
		return "a daemon without a policy"
	}
	return "the policy's " + called(rule)
}

// called is how a sentence names a rule.
func called(name string) string {
	if name == RuleDefault {
		return "default"
	}
	return fmt.Sprintf("rule %q", name)
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return ": " + strings.TrimRight(reason, ".")
}
