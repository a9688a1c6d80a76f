package workload

import (
	"context"
	"encoding/json"
	"fmt"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/pkg/oci"
)

// OCIConfig is the effective OCI runtime-spec config, as JSON: what the agent was given at the last start, or before the first
// what it would be given now.
func (m *Manager) OCIConfig(_ context.Context, ref string) ([]byte, error) {
	e, err := m.find(ref)
	if err != nil {
		return nil, err
	}
	config, err := m.effective(e)
	if err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("cannot encode the OCI config: %w", err)
	}
	return b, nil
}

// effective is OCIConfig, decoded. It is read back and not made again: a daemon of another version, or with other limits of its
// own, would make another one, and what is exec'd must be confined as what it is exec'd beside.
func (m *Manager) effective(e *entry) (*specs.Spec, error) {
	stored, err := m.store.config(e.id)
	if err != nil {
		return nil, err
	}
	if stored != nil {
		config := new(specs.Spec)
		if err := json.Unmarshal(stored, config); err != nil {
			return nil, fmt.Errorf("cannot read the configuration of workload %s: %w", e.id, err)
		}
		return config, nil
	}
	img, err := m.cfg.Images.Get(e.digest)
	if err != nil {
		return nil, err
	}
	rec, _, _ := e.peek()
	return oci.Config(e.id, rec.Spec, img.Config, rec.Status.Isolation)
}
