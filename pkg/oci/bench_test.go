package oci

import (
	"testing"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Both are on the way of every start.
func BenchmarkConfig(b *testing.B) {
	for b.Loop() {
		if _, err := Config(testID, spec.Workload{Process: command("x")}, spec.ImageConfig{}, spec.IsolationContainer); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCompileSeccomp(b *testing.B) {
	profile := profileWith(b, nil, nil)
	for b.Loop() {
		if _, err := CompileSeccomp(profile); err != nil {
			b.Fatal(err)
		}
	}
}
