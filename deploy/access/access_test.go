// Package access holds an example; this test loads it.
package access

import (
	"os"
	"testing"

	"github.com/sandboxd/sandboxd/pkg/access"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

func TestExampleLoads(t *testing.T) {
	source, err := os.ReadFile("example.yaml")
	if err != nil {
		t.Fatal(err)
	}
	table, err := access.Load(source, "example.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if roles := table.RolesOf(spec.Caller{}); len(roles) != 1 || roles[0].Name != "operator" {
		t.Errorf("root has roles %v", roles)
	}
}
