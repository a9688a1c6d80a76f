package policy

import "github.com/sandboxd/sandboxd/pkg/spec"

// Input is everything a decision may depend on. Decide reads nothing else.
type Input struct {
	Request Request
	Image   Image
	Caller  spec.Caller
	Host    Host
}

// Request is the workload as asked for, after validation.
type Request struct {
	// The reference as asked.
	Image    string
	Labels   map[string]string
	Workload spec.Workload
	Name     string
}

// Image is the image the reference means.
type Image struct {
	Digest string
	Names  []string
	Config spec.ImageConfig
}

// Host is what this host can give.
type Host struct {
	Hostname           string
	ContainerAvailable bool
	ContainerReason    string
	VMAvailable        bool
	VMReason           string
	// "kvm" or "tcg"
	VMAccelerator string
}

// Decision is what the policy answered. It is stored with the workload.
type Decision struct {
	// Whether the request is granted.
	Allowed bool `json:"allowed"`
	// The weakest isolation allowed; empty when the policy denies.
	Isolation spec.Isolation `json:"isolation,omitempty"`
	// What the workload gets; empty unless Allowed.
	Granted spec.Isolation `json:"granted,omitempty"`
	// The rule that matched; "default" or "no-policy" when none did.
	Rule string `json:"rule"`
	// One sentence: the rule's reason, or why the request is refused.
	Reason string `json:"reason"`
	// One sentence, when the policy would allow the request and this host cannot give what was decided.
	Unsatisfiable string `json:"unsatisfiable,omitempty"`
	// sha256 of the policy file, empty without one.
	PolicyDigest string `json:"policyDigest,omitempty"`
	// Each rule up to the one that matched, in order.
	Trace []Trace `json:"-"`
}

// Trace is one rule looked at.
type Trace struct {
	Rule    string
	When    string
	Matched bool
}
