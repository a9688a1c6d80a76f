package server

import (
	"testing"

	"google.golang.org/protobuf/types/known/fieldmaskpb"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

func TestResourceChange(t *testing.T) {
	before := spec.Resources{CPUMillis: 1000, MemoryBytes: 1 << 30, CPUSet: "0", IOReadBPS: 1 << 20}
	tests := map[string]struct {
		resources *sandboxdv1.Resources
		mask      []string
		want      spec.Resources
	}{
		"without a mask what is set": {
			&sandboxdv1.Resources{CpuMillis: 500}, nil,
			spec.Resources{CPUMillis: 500, MemoryBytes: 1 << 30, CPUSet: "0", IOReadBPS: 1 << 20},
		},
		"with one what it names, zero too": {
			&sandboxdv1.Resources{CpuMillis: 500, Pids: 9}, []string{"pids", "cpuset_cpus", "io_read_bps"},
			spec.Resources{CPUMillis: 1000, MemoryBytes: 1 << 30, Pids: 9},
		},
	}
	for name, tt := range tests {
		r := &sandboxdv1.UpdateWorkloadRequest{Id: "x", Resources: tt.resources}
		if tt.mask != nil {
			r.UpdateMask = &fieldmaskpb.FieldMask{Paths: tt.mask}
		}
		change, err := resourceChange(r)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got := before
		if change(&got); got != tt.want {
			t.Errorf("%s: %+v, want %+v", name, got, tt.want)
		}
	}
	for name, r := range map[string]*sandboxdv1.UpdateWorkloadRequest{
		"nothing":          {Resources: &sandboxdv1.Resources{}},
		"an unknown field": {Resources: &sandboxdv1.Resources{}, UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"gpus"}}},
	} {
		if _, err := resourceChange(r); spec.KindOf(err) != spec.KindInvalid {
			t.Errorf("%s: %v", name, err)
		}
	}
}
