package workload

import (
	"context"
	"fmt"

	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// TemplateSharing says whose VMs may be cloned from one template. Clones share memory until they write it, and how long a
// write takes tells whether it was shared.
type TemplateSharing struct {
	// Everybody's.
	All bool
	// Otherwise those of one caller whose workloads have the same value of this label, or all have none. Empty: one
	// caller's.
	Label string
}

// scope names those who share templates; empty for all.
func (s TemplateSharing) scope(caller spec.Caller, labels map[string]string) string {
	if s.All {
		return ""
	}
	scope := caller.Key()
	if value, ok := labels[s.Label]; ok && s.Label != "" {
		scope += fmt.Sprintf(" %s=%q", s.Label, value)
	}
	return scope
}

// TemplateOptions are the workloads that a template is for.
type TemplateOptions struct {
	Image     string
	Resources spec.Resources
	Labels    map[string]string
	Caller    spec.Caller
	// They are joined to a network.
	Network bool
}

func (m *Manager) templater() (runtime.Templater, error) {
	t, ok := m.cfg.Runtimes[spec.IsolationVM].(runtime.Templater)
	if !ok {
		return nil, spec.Errorf(spec.KindUnsupported, "this daemon's VMs have no templates")
	}
	return t, nil
}

// Templates lists every template.
func (m *Manager) Templates(ctx context.Context) ([]runtime.Template, error) {
	t, err := m.templater()
	if err != nil {
		return nil, err
	}
	return t.Templates(ctx)
}

// BuildTemplate makes the template from which VMs like those of o are cloned.
func (m *Manager) BuildTemplate(ctx context.Context, o TemplateOptions) (runtime.Template, error) {
	t, err := m.templater()
	if err != nil {
		return runtime.Template{}, err
	}
	img, err := m.cfg.Images.Get(o.Image)
	if err != nil {
		return runtime.Template{}, err
	}
	network := spec.NoNetwork
	if o.Network {
		network = "any"
	}
	return t.BuildTemplate(ctx, spec.Sandbox{
		Network:   network,
		ImagePath: img.Path, Resources: withDefaults(o.Resources, m.cfg.Defaults),
		TemplateScope: m.cfg.Templates.scope(o.Caller, o.Labels),
	})
}

// RemoveTemplate removes the template whose id begins with prefix.
func (m *Manager) RemoveTemplate(ctx context.Context, prefix string) error {
	t, err := m.templater()
	if err != nil {
		return err
	}
	return t.RemoveTemplate(ctx, prefix)
}

// startedHow is what the event of a start tells of how a VM came up.
func startedHow(s Status) map[string]string {
	how := map[string]string{}
	if s.StartedFrom != "" {
		how["started_from"] = s.StartedFrom
	}
	if s.StartNote != "" {
		how["start_note"] = s.StartNote
	}
	return how
}
